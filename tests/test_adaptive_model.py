"The adaptive transformer under random changes: what is removed and regrown keeps its bits, the optimizer follows, and nothing else moves."
import copy
import io
import random

import pytest
import torch
from torch.nn import functional as F

from adaptive_lab.controller.model import AdaptiveTransformer, Gates
from adaptive_lab.training import train

L, H, DIM, HIDDEN = 2, 3, 12, 20
PARTS = [(i, p) for i in range(L) for p in (*range(H), "ffn")]
X = torch.randint(256, (3, 9), generator=torch.Generator().manual_seed(1))
BATCH = (X[:, :-1], X[:, 1:])


def model(seed=0):
    torch.manual_seed(seed)
    return AdaptiveTransformer(L, H, DIM, context=8, hidden=HIDDEN)


def rows(m, layer, part):
    "The weights of a part, wherever they are; None for those that nobody has."
    if not m.is_present(layer, part):
        return m.removed.get((layer, part))
    return {name: p.parameter.data.narrow(p.axis, p.rows.start, len(p.rows)).clone() for name, p in m._places(layer, part).items()}


def record(m):
    "All that a change may touch, by part."
    there = {where: m.is_present(*where) for where in PARTS}
    return dict(
        gates=[g.clone() for g in m.gates], there=there, known={w: r for w in PARTS if (r := rows(m, *w)) is not None},
        rest={n: p.data.clone() for n, p in m.named_parameters() if not n.startswith("blocks") or "norm" in n},
    )


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


def masked(m, whole):
    "A model with nothing removed, the weights of which are those of m or, for what m has not, those of `whole`; with m's gates."
    out = copy.deepcopy(whole)
    for where in PARTS:
        if m.is_present(*where):
            for name, p in out._places(*where).items():
                p.parameter.data.narrow(p.axis, p.rows.start, len(p.rows)).copy_(rows(m, *where)[name])
    for own, theirs in zip(out.gates, m.gates):
        own.copy_(theirs)
    return out


def change(m, rng):
    "One random change; True when something changed that undo takes back."
    layer, part = rng.choice([*PARTS, *((i, "layer") for i in range(L))])
    kind = rng.choice(("gate", "gate", "gate", "prune", "regrow", "regrow", "fresh"))
    if kind == "prune":
        return bool(m.prune())
    if kind == "gate":
        value = rng.choice((0, 0, 0.5, 1)) if m.is_present(layer, part) else 0
        m.set_gate(layer, part, value)
    elif not (lost := m.missing(layer, part)) or kind == "regrow" and any((layer, p) not in m.removed for p in lost):
        with pytest.raises(ValueError):
            m.regrow(layer, part)
        return False
    else:
        m.regrow(layer, part, fresh=kind == "fresh", seed=rng.randrange(100))
    return True


@pytest.mark.parametrize("seed", range(20))
def test_a_random_walk_is_undone_bit_for_bit(seed):
    m, rng = model(seed), random.Random(seed)
    before = []
    for _ in range(40):
        if rng.random() < 0.25 and before:
            assert m.undo() and equal(record(m), before.pop())
        else:
            now = record(m)
            if change(m, rng):
                before.append(now)
            else:
                assert equal(record(m), now)
    while before:
        assert m.undo() and equal(record(m), before.pop())
    assert m.undo() == "" and equal(record(m), record(model(seed)))


@pytest.mark.parametrize("fresh", [False, True])
def test_the_regrowth_of_a_whole_layer_is_undone(fresh):
    m = model()
    for part in (0, 1, 2, "ffn"):
        m.set_gate(1, part, 0)
    m.set_gate(1, "layer", 0.5), m.prune()
    before = record(m)
    m.regrow(1, "layer", fresh=fresh)
    assert m.gate_layers[1] == 0 and m.undo() == "regrow" and equal(record(m), before) and m.gate_layers[1] == 0.5


@pytest.mark.parametrize("seed", range(12))
def test_a_random_walk_computes_what_masks_compute(seed):
    m, rng, whole = model(seed), random.Random(100 + seed), model(seed)
    for _ in range(25):
        closed = m(X[:, :8])
        if m.prune():
            assert (m(X[:, :8]) - closed).abs().max() < 1e-5
        change(m, rng)
        assert (m(X[:, :8]) - masked(m, whole)(X[:, :8])).abs().max() < 1e-5
        kept = sum(p.numel() for p in m.parameters())
        heads, ffn = int(m.present_heads.sum()), int(m.present_ffn.sum())
        assert kept == heads * 4 * (DIM // H) * DIM + ffn * 2 * DIM * HIDDEN + (512 + 8) * DIM + DIM * (2 * L + 1)


@pytest.mark.parametrize("seed", range(6))
def test_the_state_of_any_pruning_comes_back(seed):
    m, rng = model(seed), random.Random(200 + seed)
    for _ in range(15):
        change(m, rng)
    file = io.BytesIO()
    torch.save(m.state_dict(), file)
    file.seek(0)
    again = AdaptiveTransformer.from_state(torch.load(file, weights_only=True))
    assert equal(record(again), record(m)) and torch.equal(again(X[:, :8]), m(X[:, :8])) and again.undo() == ""
    other = model(seed + 50)
    other.restructure(m.state_dict())
    assert equal(record(other), record(m))
    for where in PARTS:  # and what was removed is still known
        if m.missing(*where) and where in m.removed:
            m.regrow(*where), again.regrow(*where)
    assert equal(record(again), record(m))


@pytest.mark.parametrize("dtype", [torch.float64, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("first", [True, False])
def test_a_state_comes_back_in_its_dtypes(dtype, first):
    m = model()
    m = m.to(dtype) if first else m
    m.set_gate(0, 1, 0), m.set_gate(1, 0, 0.3), m.prune()
    m = m.to(dtype)
    m.norm.float()  # one that differs
    state = m.state_dict()
    assert state["removed.0.1.out"].dtype == (dtype if first else torch.float32)
    again = AdaptiveTransformer.from_state(state).state_dict()
    assert again.keys() == state.keys() and all(t.dtype == state[k].dtype and torch.equal(t, state[k]) for k, t in again.items())
    back = AdaptiveTransformer.from_state(state)
    m.regrow(0, 1), back.regrow(0, 1)
    assert torch.equal(back.blocks[0].attention.qkv, m.blocks[0].attention.qkv)


def test_a_model_without_numbers_takes_a_whole_state_and_nothing_else():
    whole, m = model().state_dict(), model().to("meta")
    for act in (lambda: m.set_gate(0, 0, 0), m.prune, lambda: m.is_present(0, 0), lambda: m.parts(0)):
        with pytest.raises(ValueError, match="meta device"):
            act()
    with pytest.raises(ValueError, match="assign=True"):
        m.load_state_dict(whole)
    with pytest.raises(ValueError, match="meta device"):
        model().load_state_dict(m.state_dict())
    assert m.sizes.is_meta
    m.load_state_dict(whole, assign=True)
    assert torch.equal(m(X[:, :8]), model()(X[:, :8])) and m.is_present(0, 0)


@pytest.mark.parametrize("key", ["gate_heads", "present_ffn", "sizes", "places.weight", "removed.0.0.out", 7])
@pytest.mark.parametrize("value", [3, "a", None, [1.0]])
def test_a_state_is_tensors(key, value):
    m = model()
    m.set_gate(0, 0, 0), m.prune()
    before = record(m)
    for read in (m.load_state_dict, m.restructure, AdaptiveTransformer.from_state):
        with pytest.raises(ValueError, match=f"{key} of the state is a {type(value).__name__}"):
            read(m.state_dict() | {key: value})
        with pytest.raises(ValueError, match=f"state is a {type(value).__name__}"):
            read(value)
        with pytest.raises(ValueError, match="present_heads of the state is of torch.float32"):
            read(m.state_dict() | dict(present_heads=torch.ones(L, H)))
    assert equal(record(m), before)


WRONG = [
    lambda g: g._replace(heads=torch.ones(L, H + 1)), lambda g: g._replace(heads=torch.ones(H)), lambda g: g._replace(ffn=torch.ones(L + 1)), lambda g: g._replace(layers=torch.ones(L - 1)),
    lambda g: g._replace(heads=torch.ones(2, L, H)), lambda g: g._replace(ffn=torch.ones(1, 3, L)), lambda g: g._replace(heads=[[1.0] * H] * L), lambda g: (1, 2), lambda g: 3,
]


@pytest.mark.parametrize("wrong", WRONG)
def test_gates_of_another_shape_are_named(wrong):
    m = model()
    with pytest.raises(ValueError, match=r"gates\.(heads|ffn|layers) .* is needed, or"):
        m(X[:, :8], wrong(m.gates))


def test_gates_may_be_anything_of_the_right_shape_and_be_mapped_and_differentiated():
    m, x = model(), X[:, :8]
    g = [torch.stack([t, t * 7, t * -0.5]) for t in m.gates]
    rows = m(x, Gates(*g))
    assert torch.allclose(rows[1], m(x[1:2], Gates(*(t[1] for t in g)))[0], atol=1e-4)
    mapped = torch.func.vmap(lambda *t: m(x[:1], Gates(*t))[0])(*g)
    assert torch.allclose(mapped, m(x[:1].expand(3, -1), Gates(*g)), atol=1e-4) and torch.allclose(mapped, m(x[:1], Gates(*g)), atol=1e-4)
    with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):  # the fused kernels of the CPU have no forward derivative
        _, tangent = torch.func.jvp(lambda h: m(x, m.gates._replace(heads=h)).sum(), (m.gate_heads,), (torch.ones(L, H),))
    slope = torch.func.grad(lambda h: m(x, m.gates._replace(heads=h)).sum())(m.gate_heads)
    assert torch.allclose(tangent, slope.sum(), rtol=1e-3)
    assert m(x, m.gates._replace(heads=m.gate_heads * float("nan"))).isnan().all()


@pytest.mark.parametrize("change", [lambda m: (m.set_gate(1, 2, 0), m.prune()), lambda m: (m.set_gate(1, "layer", 0), m.prune()), lambda m: m.regrow(0, 0)])
def test_a_cache_that_other_heads_filled_is_refused_and_stays(change):
    m, x = model().eval(), X[:, :8]
    m.set_gate(0, 0, 0), m.prune()
    cache = m.new_cache()
    m(x[:, :4], cache=cache)
    with pytest.raises(ValueError, match="cache holds 3 rows × 2 heads, and 2 × 2"):
        m(x[:2, 4:5], cache=cache)
    change(m)
    with pytest.raises(ValueError, match="cache holds .* begin a new one"):
        m(x[:, 4:5], cache=cache)
    assert cache.length == 4 and all(c.length == 4 for c in cache)
    m.undo()
    assert m(x[:, 4:], cache=cache).shape == (3, 4, 256)


def test_a_layer_that_had_no_heads_cannot_go_on_from_its_cache():
    m, x = model().eval(), X[:, :8]
    for head in range(H):
        m.set_gate(1, head, 0)
    m.prune()
    cache = m.new_cache()
    pieces = torch.cat([m(part, cache=cache) for part in x.split([4, 2, 2], 1)[:2]], 1)
    assert torch.allclose(pieces, m(x[:, :6]), atol=1e-5)
    m.regrow(1, 0)
    with pytest.raises(ValueError, match="holds 3 rows × 0 heads, and 3 × 1"):
        m(x[:, 6:], cache=cache)


def loss_of(m):
    return F.cross_entropy(m(BATCH[0]).flatten(0, 1), BATCH[1].flatten())


OPTIMIZERS = {
    "adam": lambda p: torch.optim.Adam(p, 0.01),
    "amsgrad": lambda p: torch.optim.Adam(p, 0.01, amsgrad=True),
    "adamw, foreach": lambda p: torch.optim.AdamW(p, 0.01, weight_decay=0.0, foreach=True),
    "adam, fused": lambda p: torch.optim.Adam(p, 0.01, fused=True),
    "momentum": lambda p: torch.optim.SGD(p, 0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, 0.001, momentum=0.9),
    "adagrad": lambda p: torch.optim.Adagrad(p, 0.01),
}


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_training_on_after_pruning_is_training_with_the_mask(name):
    "The parts that stay learn as if the closed ones were masked: their averages were not mixed up."
    cut_, kept = model(), model()
    a, b = (OPTIMIZERS[name](m.parameters()) for m in (cut_, kept))
    for i in range(12):
        for m, o in ((cut_, a), (kept, b)):
            if i == 4:
                for where in ((0, 0), (1, 1), (1, "ffn")):
                    m.set_gate(*where, 0)
                if m is cut_:
                    assert m.prune(o) == [(0, 0), (1, 1), (1, "ffn")]
            if i == 8:
                m.set_gate(0, 2, 0)
                if m is cut_:
                    m.prune(o)
            o.zero_grad()
            loss_of(m).backward()
            o.step()
    for where in PARTS:
        if cut_.is_present(*where):
            for mine, other in zip(rows(cut_, *where).values(), rows(kept, *where).values()):
                assert torch.allclose(mine, other, atol=1e-5)
    assert torch.allclose(loss_of(cut_), loss_of(kept), atol=1e-5)


def test_regrown_rows_step_as_adam_steps_what_it_has_not_met():
    m = model()
    adam = torch.optim.Adam(m.parameters(), 0.01)
    for step in train(m, adam, [BATCH], steps=5):
        if step.index == 2:
            m.set_gate(0, 1, 0), m.prune(adam)
    m.regrow(0, 1, optimizer=adam), m.set_gate(0, 1, 1)
    before = rows(m, 0, 1)
    adam.zero_grad()
    loss_of(m).backward()
    grads = {n: p.parameter.grad.narrow(p.axis, p.rows.start, len(p.rows)).clone() for n, p in m._places(0, 1).items()}
    adam.step()
    for name, g in grads.items():
        first, second = 0.1 * g / (1 - 0.9**6), 0.001 * g**2 / (1 - 0.999**6)
        assert torch.allclose(rows(m, 0, 1)[name], before[name] - 0.01 * first / (second.sqrt() + 1e-8), atol=1e-6)
    assert all(p.grad is None or p.grad.shape == p.shape for p in m.parameters())


@pytest.mark.parametrize("seed", range(5))
def test_a_training_survives_any_walk(seed):
    "Prune, regrow and undo between steps: finite losses, and the shapes of the averages are those of the parameters."
    m, rng = model(seed), random.Random(300 + seed)
    adam = torch.optim.Adam(m.parameters(), 0.01)
    for step in train(m, adam, [BATCH], steps=30):
        for _ in range(2):
            layer, part = rng.choice(PARTS)
            what = rng.choice(("close", "regrow", "undo", "open"))
            if what == "close":
                m.set_gate(layer, part, 0), m.prune(adam)
            elif what == "undo":
                m.undo(adam)
            elif what == "regrow" and m.missing(layer, part):
                m.regrow(layer, part, optimizer=adam)
            elif m.is_present(layer, part):
                m.set_gate(layer, part, 1)
        for p in m.parameters():
            assert all(t.shape == p.shape for n, t in adam.state[p].items() if n != "step")
    assert step.loss < 5.6


def test_an_optimizer_whose_averages_are_rows_and_columns_is_cut_too():
    m = model()
    o = torch.optim.Adafactor(m.parameters(), 0.01)
    for step in train(m, o, [BATCH], steps=8):
        if step.index == 3:
            m.set_gate(0, 1, 0), m.set_gate(1, "ffn", 0), m.prune(o)
        if step.index == 5:
            m.regrow(0, 1, optimizer=o), m.regrow(1, "ffn", optimizer=o), m.set_gate(0, 1, 1), m.set_gate(1, "ffn", 1)
            seen = {n: t.clone() for n, t in o.state[m.blocks[0].attention.qkv].items()}
    assert seen["row_var"].shape == (3, H, DIM // H, 1) and (seen["row_var"][:, 1] == 0).all() and (seen["row_var"][:, ::2] > 0).all()


@pytest.mark.parametrize("whole", [False, True])
def test_a_regrown_part_changes_no_loss_until_its_gate_opens(whole):
    m = model()
    m.set_gate(1, "layer", 0), m.prune()
    before = m(X[:, :8])
    m.regrow(1, "layer" if whole else 2, fresh=True, seed=3)
    assert torch.equal(m(X[:, :8]), before) and m.is_present(1, 2)


FAULTS = [
    (lambda m, s: m.set_gate(0, 1, -0.1), "value=-0.1"),
    (lambda m, s: m.set_gate(0, 1, float("inf")), "value=inf"),
    (lambda m, s: m.set_gate(0, 1, None), "value=None"),
    (lambda m, s: m.set_gate(2, 1, 1), "layer=2"),
    (lambda m, s: m.set_gate(-1, 1, 1), "layer=-1"),
    (lambda m, s: m.set_gate(0, True, 1), "head=True"),
    (lambda m, s: m.set_gate(0, "head", 1), "head='head'"),
    (lambda m, s: m.set_gate(0, 0, 1), "was removed"),
    (lambda m, s: m.regrow(0, 1), "there already"),
    (lambda m, s: m.load_state_dict(s), "another pruning"),
    (lambda m, s: m.restructure(AdaptiveTransformer(L, H, 24, context=8, hidden=HIDDEN).state_dict()), "dim"),
    (lambda m, s: m.restructure(AdaptiveTransformer(L + 1, H, DIM, context=8, hidden=HIDDEN).state_dict()), "layers"),
    (lambda m, s: m.restructure({k: v for k, v in s.items() if "ffn" not in k}), "no state"),
    (lambda m, s: m.restructure({**s, "blocks.1.attention.out": torch.zeros(2, 4, DIM)}), "blocks.1.attention.out"),
    (lambda m, s: AdaptiveTransformer.from_state({k: v for k, v in s.items() if "present" not in k}), "no state"),
    (lambda m, s: AdaptiveTransformer.from_state({k: v for k, v in s.items() if "logits" not in k}), "no state"),
]


@pytest.mark.parametrize("fault, words", FAULTS)
def test_bad_input_is_named_and_changes_nothing(fault, words):
    m, whole = model(), model().state_dict()
    m.set_gate(0, 0, 0), m.prune()
    before = record(m)
    with pytest.raises(ValueError) as e:
        fault(m, whole)
    assert words in str(e.value) and equal(record(m), before) and m.undo() == "prune"


def test_numbers_of_numpy_and_torch_name_a_part():
    import numpy as np

    m = model()
    m.set_gate(np.int64(1), np.int32(2), np.float32(0.5))
    assert m.gate_heads[1, 2] == 0.5 and not m.set_gate(np.int64(1), np.int64(0), 0) and m.prune() == [(1, 0)]
    m.regrow(np.int64(1), np.int64(0))
    assert m.is_present(1, 0)
