"Embeddings of a hierarchy: any closure, same bits, both paths, clear errors."
import numpy as np
import pytest
import torch

from adaptive_lab.data.files import Closure, read_closure
from adaptive_lab.wubu.embedding import Annealing, embed
from adaptive_lab.wubu.hierarchy import Hierarchy, generations
from adaptive_lab.wubu.layouts import balls, caps, fan
from adaptive_lab.wubu.tree_kernel import Places, tree_kernel

SHORT = Annealing(steps=60, rounds=0, batch=64)


def closure_of(parents):
    "From lists of parents, each before its children."
    above = []
    for ps in parents:
        above.append(set(ps).union(*(above[p] for p in ps)))
    return Closure.of([(f"n{v}", f"n{a}") for v, up in enumerate(above) for a in sorted(up)])


def drawn(n, seed, two=0.0, roots=1):
    "A random recursive graph: each node has one parent among those before, or two."
    r = np.random.default_rng(seed)
    return closure_of([[] if v < roots else sorted({int(r.integers(v)) for _ in range(1 + (r.random() < two))}) for v in range(n)])


HIERARCHIES = {
    "tree": drawn(150, 0),
    "graph": drawn(150, 1, 0.3),
    "forest": drawn(150, 2, roots=20),
    "chain": closure_of([[]] + [[v] for v in range(40)]),
    "star": closure_of([[]] + [[0]] * 100),
    "ties": Closure.of([(v, a) for v in "xyz" for a in "abc"] + [(v, "r") for v in "xyzabc"]),
    "alone": Closure.of([("a", "a")]),
    "strangers": Closure.of([("a", "a"), ("b", "b"), ("d", "c")]),
}


@pytest.fixture(autouse=True)
def two_threads():
    before = torch.get_num_threads()
    yield
    torch.set_num_threads(before)


@pytest.mark.parametrize("name", HIERARCHIES)
@pytest.mark.parametrize("dim, geometry", [(2, "hyperbolic"), (5, "hyperbolic"), (3, "euclidean")])
def test_any_hierarchy_is_embedded(name, dim, geometry):
    c = HIERARCHIES[name]
    e = embed(c, dim, geometry=geometry, knobs=SHORT)
    assert e.tangent.shape == (len(c.nodes), dim) and e.tangent.isfinite().all() and e.points.isfinite().all()
    ranks = e.rank()
    if name == "alone":
        assert np.isnan(ranks.mean_rank) and e.nearest("a", 3) == []
    else:
        assert ranks.mean_rank >= 1 and 0 < ranks.map <= 1
    if geometry == "hyperbolic":
        assert (e.points.norm(dim=-1) < 1).all()


@pytest.mark.parametrize("name", HIERARCHIES)
def test_parents_come_first_and_are_ancestors(name):
    h = Hierarchy(HIERARCHIES[name])
    assert sorted(h.order) == list(range(h.n)) and (h.parent < np.arange(h.n)).all()
    for v in range(h.n):
        up = h.above[h.start[v] : h.start[v + 1]]
        assert h.parent[v] in up if len(up) else h.parent[v] == -1
    assert sorted(np.concatenate(generations(h))) == list(range(h.n))


@pytest.mark.parametrize("seed", range(3))
@pytest.mark.parametrize("layout", [fan, lambda h, r: caps(h, 3, r), lambda h, r: caps(h, 16, r), lambda h, r: balls(h, 4, r)])
def test_layouts_are_places(layout, seed):
    for c in HIERARCHIES.values():
        made = layout(Hierarchy(c), np.random.default_rng(seed))
        assert np.isfinite(made.ways).all() and (made.radii >= 0).all() and (made.reach > 0).all()
        again = layout(Hierarchy(c), np.random.default_rng(seed))
        assert np.array_equal(made.ways, again.ways)


def test_the_same_bits_with_any_number_of_threads():
    made = []
    for n in (1, 2, 1):
        torch.set_num_threads(n)
        made.append(embed(HIERARCHIES["graph"], 4, seed=3, knobs=SHORT))
    assert torch.equal(made[0].tangent, made[1].tangent) and torch.equal(made[0].tangent, made[2].tangent)
    assert made[0].rank() == made[1].rank()
    assert not torch.equal(made[0].tangent, embed(HIERARCHIES["graph"], 4, seed=4, knobs=SHORT).tangent)


def placed(c, dim, seed, flat, native, scale=25.0):
    h, r = Hierarchy(c), np.random.default_rng(seed)
    z = r.normal(size=(h.n, dim))
    return Places(h, z if flat else z / np.linalg.norm(z, axis=1, keepdims=True), r.uniform(0.01, scale, h.n), np.ones(h.n), flat, native)


def alike(a, b):
    "The same ranks, but for neighbours that float32 and float64 order differently."
    (ra, pa), (rb, pb) = a.ranks(), b.ranks()
    return (ra - rb).abs().max() <= 2 and (ra != rb).double().mean() < 0.05 and (pa - pb).abs().mean() < 1e-3


@pytest.mark.skipif(tree_kernel(3, False) is None, reason="no C compiler")
@pytest.mark.parametrize("dim, flat", [(2, False), (3, False), (16, False), (3, True)])
@pytest.mark.parametrize("scale", [1.0, 28.0])
@pytest.mark.parametrize("heat, cut", [(1.0, 50.0), (0.3, 2.0), (0.05, 5.0)])
def test_kernel_and_tensors_agree(dim, flat, scale, heat, cut):
    for name in ("graph", "forest", "ties", "chain"):
        a, b = (placed(HIERARCHIES[name], dim, 0, flat, native, scale) for native in (True, False))
        batch = torch.as_tensor(a.h.sources)
        la, lb = (x.gradient(batch, heat, cut) for x in (a, b))
        ga, gb = a.g.sum(0), b.g.sum(0)
        assert la == pytest.approx(lb, rel=1e-4, abs=1e-3)
        assert (ga - gb).norm() <= 2e-3 * gb.norm() + 1e-5
        assert alike(a, b)


@pytest.mark.skipif(tree_kernel(3, False) is None, reason="no C compiler")
def test_bounds_leave_nobody_out():
    "Far nodes are passed over by sixteens; ranks and gradient are those of all nodes."
    c = drawn(900, 5, 0.1)
    h = Hierarchy(c)
    made = caps(h, 4, np.random.default_rng(0))
    a, b = (Places(h, made.ways, made.radii, made.reach, False, native) for native in (True, False))
    batch = torch.as_tensor(h.sources[::9].copy())
    la, lb = (x.gradient(batch, 0.2, 5.0) for x in (a, b))
    assert la == pytest.approx(lb, rel=1e-4) and (a.g.sum(0) - b.g.sum(0)).norm() < 1e-3 * b.g.sum(0).norm()
    assert alike(a, b)


@pytest.mark.skipif(tree_kernel(3, False) is None, reason="no C compiler")
@pytest.mark.parametrize("flat", [False, True])
def test_steps_agree(flat):
    a, b = (placed(HIERARCHIES["graph"], 3, 0, flat, native) for native in (True, False))
    g = torch.Generator().manual_seed(0)
    for _ in range(10):
        a.g[:, :, : a.n] = torch.randn(*a.g.shape[:2], a.n, generator=g)
        b.g.copy_(a.g)
        for p in (a, b):
            p.step(0.05, 7)
    assert torch.allclose(a.ways, b.ways, atol=1e-5) and (flat or torch.allclose(a.R, b.R, atol=1e-4)) and not a.g.any()
    assert flat or torch.allclose(a.ways.norm(dim=1), torch.ones(a.n))


def test_without_a_compiler(monkeypatch):
    monkeypatch.setattr("adaptive_lab.wubu.tree_kernel.tree_kernel", lambda dim, flat: None)
    e = embed(HIERARCHIES["tree"], 3, knobs=Annealing(steps=60, rounds=0))
    assert e.rank().mean_rank < 1.5 and e.rank().map > 0.9


def test_gradient_is_that_of_the_loss():
    "Central differences of the kernel's own loss, along a random direction of the radii."
    p = placed(HIERARCHIES["tree"], 3, 1, False, True, 4.0)
    batch = torch.as_tensor(p.h.sources)
    p.gradient(batch, 1.0, 100.0)
    g, way, R = p.g.sum(0)[p.dim, : p.n].clone(), torch.randn(p.n, generator=torch.Generator().manual_seed(0)), p.R.clone()
    losses = []
    for sign in (1, -1):
        p.R[: p.n] = R[: p.n] + sign * 1e-2 * way
        losses.append(p.gradient(batch, 1.0, 100.0))
    assert (losses[0] - losses[1]) / 2e-2 == pytest.approx((g @ way).item(), rel=1e-2)


def test_curvature_only_rescales():
    e, tight = (embed(HIERARCHIES["tree"], 3, c=c, knobs=SHORT) for c in (1.0, 0.01))
    assert torch.allclose(tight.tangent, e.tangent * 10, rtol=1e-6) and tight.rank() == e.rank()
    assert tight.distance("n0", "n9") == pytest.approx(10 * e.distance("n0", "n9"), rel=1e-4)


def test_seconds_are_a_cap(monkeypatch):
    clock = iter(np.arange(0, 1e6, 0.5))
    monkeypatch.setattr("adaptive_lab.wubu.embedding.time.process_time", lambda: float(next(clock)))
    steps = []
    monkeypatch.setattr(Places, "step", lambda self, rate, many, real=Places.step: (steps.append(rate), real(self, rate, many)))
    embed(HIERARCHIES["tree"], 3, core_seconds=10)
    assert len(steps) == 19 and steps[-1] < 0.2 * max(steps)


def test_a_table_in_a_file(tmp_path):
    path = tmp_path / "t.tsv"
    path.write_text("cat\tmammal\ncat\tanimal\nmammal\tanimal\ndog\tmammal\ndog\tanimal\nfish\tanimal\n")
    e = embed(read_closure(path), 2)
    assert e.rank() == (1, 1) and {n for n, _ in e.nearest("cat", 2)} <= {"mammal", "animal", "dog"}


@pytest.mark.parametrize(
    "given, word",
    [
        (dict(closure=[("a", "b")]), "closure must be a Closure"),
        (dict(closure=Closure.of([("a", "b"), ("b", "a")])), "circles"),
        (dict(closure=Closure.of([("a", "b"), ("b", "c")])), "all its ancestors"),
        (dict(closure=Closure(np.array([[0, 7]]), ["a", "b"])), "closure.pairs"),
        (dict(dim=1), "dim must be"),
        (dict(dim=17), "dim must be"),
        (dict(dim=2.5), "dim must be"),
        (dict(c=0), "c must be"),
        (dict(c=-1.0), "c must be"),
        (dict(c=float("nan")), "c must be"),
        (dict(c=2.0, geometry="euclidean"), "c must be 1"),
        (dict(seed=-1), "seed must be"),
        (dict(core_seconds=0), "core_seconds must be"),
        (dict(geometry="flat"), "geometry must be"),
    ],
)
def test_bad_input(given, word):
    with pytest.raises(ValueError, match=word):
        embed(**{"closure": HIERARCHIES["tree"], **given})


def test_an_unknown_name():
    e = embed(HIERARCHIES["ties"], 2, knobs=SHORT)
    with pytest.raises(ValueError, match="no node is named 'q'"):
        e.distance("x", "q")
