"VWPR with every kind of model and optimizer, its mathematics against a computation by hand, and what it refuses."
import copy
import io
import math
import pickle
import textwrap

import pytest
import torch
import torch.nn.functional as F
import warm_python
from torch import nn

from adaptive_lab.knobs import KnobError
from adaptive_lab.value_weights import START, bounded, raw_gradient, raw_of, value_of
from adaptive_lab.vwpr import EnhancedVWPRWrapper

X, Y = torch.randn(64, 6, generator=torch.Generator().manual_seed(1)), torch.arange(64) % 3
GRANULARITIES = ("tensor", "unit", "element")


def net(dtype=torch.float32, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3)).to(dtype)


def made(model=None, rate=0.1, phi=torch.optim.SGD, theta=torch.optim.Adam, lr=1e-3, **how):
    m = EnhancedVWPRWrapper(model or net(), **how)
    return m, theta(m.base_model.parameters(), lr=lr), phi(m.phi_params(), lr=rate)


def raw(m):
    "The raw values of the first kind."
    return next(m.phi_params())


def loss_of(m, x=X, **how):
    return F.cross_entropy(m(x), Y, **how)


def snapshot(m, *optimizers):
    return copy.deepcopy((m.state_dict(), [o.state_dict() for o in optimizers]))


def equal(a, b):
    if torch.is_tensor(a):
        return torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[k], b[k]) for k in a)
    return len(a) == len(b) and all(map(equal, a, b)) if isinstance(a, (list, tuple)) else a == b


# The mathematics, by hand


@pytest.mark.parametrize("how", [dict(), dict(l1_lambda=0.5), dict(normalize_phi=True), dict(phi_clip_value=1.05), dict(normalize_phi=True, phi_clip_value=1.02), dict(relative=True)])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_a_step_by_hand(granularity, how):
    "Signal, values, penalty, normalisation, clip, and the step of SGD, in float64, over three steps."
    m, theta, phi = made(net(torch.float64), rate=0.3, theta=torch.optim.SGD, lr=0.1, granularity=granularity, **how)
    twin, x = net(torch.float64), X.double()
    raw = {n: torch.full_like(v, START) for n, v in m.phi_values().items()}
    for _ in range(3):
        l_map, phi_vals = m.apply_vwpr_step(loss_of(m, x), theta, phi)
        names, grads = zip(*((n, torch.autograd.grad(F.cross_entropy(twin(x), Y), p)[0]) for n, p in twin.named_parameters()))
        for n, g, p in zip(names, grads, twin.parameters()):
            p.data -= 0.1 * torch.log(1 + torch.exp(raw[n])) * g
        size = {"tensor": lambda g: g.abs().mean().reshape((1,) * g.ndim), "unit": lambda g: g.reshape(len(g), -1).pow(2).sum(1).sqrt().reshape(-1, *[1] * (g.ndim - 1)), "element": torch.abs}[granularity]
        l = {n: size(g) for n, g in zip(names, grads)}
        every = torch.cat([v.flatten() for v in l.values()])
        for n in names:
            assert torch.allclose(l_map[n], l[n], atol=1e-12)
            told = l[n] / every.mean() - 1 if how.get("relative") else l[n]
            raw[n] += 0.3 * (told - m.knobs.l1_lambda / (1 + torch.exp(-raw[n])))
        value = {n: torch.log(1 + torch.exp(r)) for n, r in raw.items()}
        if how.get("normalize_phi"):
            mean = torch.cat([v.flatten() for v in value.values()]).mean()
            value = {n: v / mean for n, v in value.items()}
        largest = how.get("phi_clip_value") or math.inf
        if how.get("normalize_phi") and largest < math.inf:  # what the clip takes is shared out
            low, high = 0.0, 100.0
            for _ in range(200):
                t = (low + high) / 2
                low, high = (t, high) if torch.cat([v.flatten() for v in value.values()]).mul(t).clamp(max=largest).mean() < 1 else (low, t)
            value = {n: v * t for n, v in value.items()}
        value = {n: v.clamp(max=largest) for n, v in value.items()}
        raw = {n: torch.log(torch.exp(v) - 1) for n, v in value.items()}
        for n, p in twin.named_parameters():
            assert torch.allclose(phi_vals[n], value[n], atol=1e-10)
            assert torch.allclose(m.base_model.get_parameter(n), p, atol=1e-12)


def test_the_model_descends():
    for granularity in GRANULARITIES:
        m, theta, phi = made(granularity=granularity, lr=1e-2)
        first = loss_of(m).item()
        for _ in range(60):
            m.apply_vwpr_step(loss_of(m), theta, phi)
        assert loss_of(m).item() < 0.9 * first


def test_no_drift_without_a_signal():
    "A million steps at l = 0 leave every bit, normalised or not. (The loop is that of Values.learn with SGD.)"
    for normalize, largest in ((False, 5.0), (True, math.inf), (True, 5.0), (True, 1.5), (True, 1.01)):
        start = bounded(raw_of(torch.tensor([0.2, 0.9, 1.0, 6.0])), normalize, largest)
        raw, zero = start.clone(), torch.zeros(4)
        for _ in range(100):
            raw = bounded(raw - 0.1 * raw_gradient(raw, zero, 0.0), normalize, largest)
        once = bounded(raw - 0.1 * raw_gradient(raw, zero, 0.0), normalize, largest)
        assert torch.equal(once, raw) and torch.equal(raw, start)  # a fixed point stays one for any number of steps


def test_the_penalty_alone_lowers_values():
    m, theta, phi = made(l1_lambda=0.5, rate=1.0)
    for p in m.base_model.parameters():
        p.grad = torch.zeros_like(p)
    m.step(theta, phi)
    assert torch.allclose(value_of(raw(m)), value_of(torch.tensor(START - 0.5 * (1 - 1 / math.e))))


OPTIMIZERS = [
    (torch.optim.SGD, dict(lr=0.1)), (torch.optim.SGD, dict(lr=0.1, momentum=0.9, nesterov=True, weight_decay=0.01)), (torch.optim.Adam, dict()), (torch.optim.Adam, dict(foreach=True)),
    (torch.optim.Adam, dict(fused=True)), (torch.optim.AdamW, dict(weight_decay=0.1)), (torch.optim.RMSprop, dict(lr=1e-3)), (torch.optim.Adagrad, dict()), (torch.optim.NAdam, dict()),
    (torch.optim.RAdam, dict()), (torch.optim.Adamax, dict()), (torch.optim.Adadelta, dict()), (torch.optim.ASGD, dict()), (torch.optim.Rprop, dict()), (torch.optim.Adafactor, dict()),
]


@pytest.mark.parametrize("granularity", GRANULARITIES)
@pytest.mark.parametrize("kind, how", OPTIMIZERS, ids=lambda x: getattr(x, "__name__", ""))
def test_values_of_one_are_the_plain_optimizer(kind, how, granularity):
    m = EnhancedVWPRWrapper(net(), granularity=granularity)
    theta, phi, twin = kind(m.base_model.parameters(), **how), torch.optim.SGD(m.phi_params(), lr=0.0), net()
    plain = kind(twin.parameters(), **how)
    for _ in range(20):
        m.apply_vwpr_step(loss_of(m), theta, phi)
        plain.zero_grad()
        loss_of(twin).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(m.base_model.parameters(), twin.parameters()))


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_number_formats(dtype):
    m, theta, phi = made(net(dtype), rate=0.0, granularity="unit")
    twin = net(dtype)
    plain = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for _ in range(10):
        m.apply_vwpr_step(loss_of(m, X.to(dtype)), theta, phi)
        plain.zero_grad()
        loss_of(twin, X.to(dtype)).backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(m.base_model.parameters(), twin.parameters()))
    assert raw(m).dtype == (torch.float64 if dtype == torch.float64 else torch.float32)


def test_complex_weights():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(3, 2, dtype=torch.complex64))

        def forward(self, x):
            return (x.to(torch.complex64) @ self.w.T).abs()

    m, theta, phi = made(Model(), granularity="unit", theta=torch.optim.SGD, lr=0.1)
    with torch.no_grad():
        raw(m).copy_(raw_of(torch.tensor([1.0, 2.0, 3.0])))
    m.apply_vwpr_step(m(torch.ones(4, 2)).sum(), theta, phi)
    moved = (m.base_model.w.detach() - 1).abs()[:, 0]
    assert torch.allclose(moved / moved[0], torch.tensor([1.0, 2.0, 3.0]), atol=1e-5)


# Values act under Adam


def test_twice_the_value_is_twice_the_step_of_adam():
    moved = []
    for phi_value in (1.0, 2.0):
        m, theta, phi = made(rate=0.0, lr=1e-2)
        with torch.no_grad():
            raw(m)[0] = raw_of(torch.tensor(phi_value))
        before = copy.deepcopy(m.base_model)
        m.apply_vwpr_step(loss_of(m), theta, phi)
        moved.append([a.detach() - b.detach() for a, b in zip(m.base_model.parameters(), before.parameters())])
    assert (moved[1][0] - 2 * moved[0][0]).abs().max() < 1e-6 and moved[0][0].abs().max() > 5e-3
    assert all(torch.equal(a, b) for a, b in zip(moved[0][1:], moved[1][1:]))


def test_values_change_the_path_under_adam():
    "200 steps with values from .1 to 10: the weights end elsewhere by more than half of the way they went."
    ends = []
    for act in (False, True):
        m, theta, phi = made(rate=0.0, granularity="unit")
        if act:
            with torch.no_grad():
                raw(m).copy_(raw_of(torch.logspace(-1, 1, len(raw(m)))))
        start = nn.utils.parameters_to_vector(m.base_model.parameters()).detach().clone()
        for _ in range(200):
            m.apply_vwpr_step(loss_of(m), theta, phi)
        ends.append(nn.utils.parameters_to_vector(m.base_model.parameters()).detach() - start)
    assert (ends[1] - ends[0]).norm() > 0.5 * ends[0].norm()


# Models


class Odd(nn.Module):
    "Dotted names, a shared weight, a frozen tensor, a scalar, a buffer, a batch norm, a convolution, an embedding, a branch not always taken."

    def __init__(self):
        super().__init__()
        self.block = nn.ModuleDict({"inner": nn.Sequential(nn.Conv1d(1, 4, 3, padding=1), nn.BatchNorm1d(4))})
        self.table, self.out = nn.Embedding(3, 6), nn.Linear(6, 3, bias=False)
        self.out.weight = self.table.weight
        self.scale, self.unused = nn.Parameter(torch.tensor(1.0)), nn.Linear(2, 2)
        self.fixed = nn.Parameter(torch.ones(6), requires_grad=False)
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        self.calls += 1
        return self.out(self.block["inner"](x[:, None]).mean(1) * self.scale * self.fixed)


@pytest.mark.parametrize("signal", ["gradient", "persistence", "rarity"])
@pytest.mark.parametrize("granularity", GRANULARITIES)
def test_any_module(granularity, signal):
    torch.manual_seed(0)
    m, theta, phi = made(Odd(), granularity=granularity, signal=signal, normalize_phi=True, phi_clip_value=3.0)
    fixed = m.base_model.fixed.clone()
    for _ in range(5):
        l_map, phi_vals = m.apply_vwpr_step(loss_of(m), theta, phi)
    assert set(l_map) == set(phi_vals) == {n for n, _ in m.base_model.named_parameters()} and "block.inner.0.weight" in l_map
    assert all((l_map[n] * p).shape == p.shape for n, p in m.base_model.named_parameters())
    assert not l_map["unused.weight"].any() and torch.equal(m.base_model.fixed, fixed) and m.base_model.calls == 5
    assert all(v.isfinite().all() and (v > 0).all() and (v <= 3.0001).all() for v in phi_vals.values())
    assert any(l.any() for l in l_map.values())


def test_frozen_later_and_thawed_later():
    m, theta, phi = made(granularity="unit")
    first = m.base_model[0].weight
    first.requires_grad_(False)
    before = first.clone()
    m.apply_vwpr_step(loss_of(m), theta, phi)
    assert torch.equal(first, before)
    first.requires_grad_(True)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    assert not torch.equal(first, before)


def test_forward_is_the_models_own():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.ones(1))

        def forward(self, a, *, b):
            return {"sum": self.w * a + b}

    assert EnhancedVWPRWrapper(Two())(torch.tensor(1.0), b=2.0)["sum"].item() == 3.0


def test_state_dict_carries_phi_and_resumes_bit_for_bit():
    def go(m, theta, phi, steps):
        for _ in range(steps):
            m.apply_vwpr_step(loss_of(m), theta, phi)

    whole = made(phi=torch.optim.Adam, granularity="unit", relative=True, normalize_phi=True)
    go(*whole, 6)
    half = made(phi=torch.optim.Adam, granularity="unit", relative=True, normalize_phi=True)
    go(*half, 3)
    file = io.BytesIO()
    torch.save([o.state_dict() for o in half], file)
    file.seek(0)
    rest = made(net(seed=5), phi=torch.optim.Adam, granularity="unit", relative=True, normalize_phi=True)
    for o, state in zip(rest, torch.load(file, weights_only=True)):
        o.load_state_dict(state)
    go(*rest, 3)
    assert equal(whole[0].state_dict(), rest[0].state_dict()) and any("raw.0.weight" in k for k in whole[0].state_dict())


@pytest.mark.parametrize("spoil, word", [
    (lambda s: s.pop("values.tensor.raw.0.bias"), "Missing key"), (lambda s: s.update({"values.tensor.raw.5.bias": torch.ones(1)}), "Unexpected key"),
    (lambda s: s.update({"values.tensor.raw.0.bias": torch.ones(3)}), "another granularity"),
])
def test_a_state_dict_of_another_wrapper_is_refused(spoil, word):
    m, *_ = made(granularity="tensor")
    before, state = raw(m).clone(), m.state_dict()
    state["values.tensor.raw.0.weight"] = state["values.tensor.raw.0.weight"] + 1
    spoil(state)
    with pytest.raises(RuntimeError, match=word):
        m.load_state_dict(state)
    assert word != "another granularity" or torch.equal(raw(m), before)


@pytest.mark.parametrize("how", [dict(granularity="unit"), dict(granularity="unit", signal="rarity"), dict(granularity="element", signal="persistence")])
def test_copies_are_independent_and_equal(how):
    m, theta, phi = made(track_history=True, theta=torch.optim.SGD, **how)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    for copied in (copy.deepcopy(m), pickle.loads(pickle.dumps(m))):
        theirs = torch.optim.SGD(copied.base_model.parameters(), lr=1e-3), torch.optim.SGD(copied.phi_params(), lr=0.1)
        twin = copy.deepcopy(copied)
        mine = torch.optim.SGD(twin.base_model.parameters(), lr=1e-3), torch.optim.SGD(twin.phi_params(), lr=0.1)
        before = raw(m).clone()
        copied.apply_vwpr_step(loss_of(copied), *theirs)
        twin.apply_vwpr_step(loss_of(twin), *mine)
        assert torch.equal(raw(copied), raw(twin)) and torch.equal(raw(m), before)


# Tools around it


def test_gradients_of_several_batches():
    m, theta, phi = made(theta=torch.optim.SGD, lr=0.1)
    twin, twin_theta, twin_phi = made(theta=torch.optim.SGD, lr=0.1)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    twin_theta.zero_grad()
    (F.cross_entropy(twin(X[:32]), Y[:32]) / 2).backward()
    twin.apply_vwpr_step(F.cross_entropy(twin(X[32:]), Y[32:]) / 2, twin_theta, twin_phi, zero_grad=False)
    assert all(torch.allclose(a, b, atol=1e-6) for a, b in zip(m.parameters(), twin.parameters()))


def test_grad_scaler():
    m, theta, phi = made(granularity="unit")
    twin, *opts = made(granularity="unit")
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    for _ in range(3):
        m.apply_vwpr_step(loss_of(m), theta, phi, scaler=scaler)
        twin.apply_vwpr_step(loss_of(twin), *opts)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(m.parameters(), twin.parameters()))
    before = snapshot(m, theta, phi)
    huge = torch.amp.GradScaler("cpu", init_scale=2.0**100)
    l_map, _ = m.apply_vwpr_step(1e20 * loss_of(m), theta, phi, scaler=huge)
    assert l_map == {} and equal(before, snapshot(m, theta, phi)) and huge.get_scale() < 2.0**100


def test_schedulers_and_groups():
    m = EnhancedVWPRWrapper(net(), granularity="unit")
    theta = torch.optim.AdamW([dict(params=m.base_model[0].parameters(), lr=1e-2), dict(params=m.base_model[2].parameters())], lr=1e-3)
    phi = torch.optim.SGD(m.phi_params(), lr=0.1)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(theta, 10)
    for _ in range(10):
        m.apply_vwpr_step(loss_of(m), theta, phi)
        schedule.step()
    before = snapshot(m.base_model)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    assert theta.param_groups[0]["lr"] < 1e-8 and all(torch.allclose(a, b, atol=1e-6) for a, b in zip(before[0].values(), m.base_model.state_dict().values()))


def test_compiled_and_data_parallel_models_are_modules():
    m, theta, phi = made(nn.DataParallel(net()), granularity="unit")
    l_map, _ = m.apply_vwpr_step(loss_of(m), theta, phi)
    assert "module.0.weight" in l_map


def test_two_processes_keep_equal_values(tmp_path):
    "DDP inside the wrapper and around it; gradient, rarity and samples: both ranks end with the same weights and values."
    script = tmp_path / "ranks.py"
    script.write_text(textwrap.dedent("""
        import os, sys, torch, torch.distributed as dist, torch.nn.functional as F
        from torch import nn
        from torch.nn.parallel import DistributedDataParallel as DDP
        from adaptive_lab.vwpr import EnhancedVWPRWrapper
        rank = int(sys.argv[1])
        dist.init_process_group("gloo", init_method="file://" + sys.argv[2], rank=rank, world_size=2)
        torch.manual_seed(rank)
        X, y = torch.randn(8, 6), torch.arange(8) % 3
        for how in (dict(granularity="unit"), dict(granularity="unit", signal="rarity"), dict(granularity="sample", samples=16, normalize_phi=True),
                    dict(granularity="feature+output", features=6, outputs=3)):
            for outside in (False, True):
                torch.manual_seed(0)
                net = nn.Sequential(nn.Linear(6, 8), nn.ReLU(), nn.Linear(8, 3))
                m = EnhancedVWPRWrapper(net if outside else DDP(net), **how)
                called = DDP(m) if outside else m
                theta, phi = torch.optim.Adam(m.base_model.parameters()), torch.optim.Adam(m.phi_params(), 0.1)
                own = how["granularity"] == "sample"
                for _ in range(4):
                    loss = F.cross_entropy(called(X), y, reduction="none" if own else "mean")
                    m.apply_vwpr_step(loss, theta, phi, index=torch.arange(8) + 8 * rank if own else None)
                mine = torch.cat([p.detach().flatten() for p in m.parameters()])
                both = [torch.empty_like(mine) for _ in range(2)]
                dist.all_gather(both, mine)
                assert torch.equal(*both), (how, outside)
                raw = next(m.phi_params())
                assert (raw - raw[0]).abs().max() > 1e-5
        print("equal", flush=True)
        dist.barrier()
        os._exit(0)  # gloo's threads sometimes outlive a destroyed group
    """))
    ranks = [warm_python.Started([script, r, tmp_path / "meet"]) for r in range(2)]
    said = [r.communicate(timeout=120) for r in ranks]
    assert all(out == "equal\n" for out, _ in said), said


# Samples


def test_values_of_samples_by_hand():
    m, theta, phi = made(net(torch.float64), granularity="sample", samples=100, rate=0.5, l1_lambda=0.1, theta=torch.optim.SGD, lr=0.1, normalize_phi=True)
    rows, twin, x = torch.arange(64) + 20, net(torch.float64), X.double()
    with torch.no_grad():
        raw(m).copy_(torch.linspace(-1, 1, 100))
    value = torch.log1p(torch.exp(torch.linspace(-1, 1, 100, dtype=torch.float64)))
    l = F.cross_entropy(twin(x), Y, reduction="none")
    (l * value[rows]).sum().div(value[rows].sum()).backward()
    l_map, phi_vals = m.apply_vwpr_step(F.cross_entropy(m(x), Y, reduction="none"), theta, phi, index=rows)
    assert all(torch.allclose(a, b - 0.1 * b.grad, atol=1e-12) for a, b in zip(m.base_model.parameters(), twin.parameters()))
    wanted = torch.linspace(-1, 1, 100, dtype=torch.float64)
    wanted[rows] += 0.5 * (l.detach() - 0.1 * torch.sigmoid(wanted[rows]))
    assert torch.allclose(raw(m), wanted, atol=1e-6) and torch.equal(phi_vals["samples"], value_of(raw(m))[rows]) and torch.allclose(l_map["samples"], l)


def test_one_loss_a_sample_is_averaged_where_tensors_have_values():
    m, *opts = made(granularity="unit")
    twin, *theirs = made(granularity="unit")
    m.apply_vwpr_step(loss_of(m), *opts)
    twin.apply_vwpr_step(loss_of(twin, reduction="none"), *theirs)
    assert all(torch.allclose(a, b, atol=1e-7) for a, b in zip(m.parameters(), twin.parameters()))


# Features and outputs

FORWARD = dict(granularity="feature+output+sample", features=6, outputs=3, samples=64)


def test_values_of_features_by_hand():
    m, theta, phi = made(net(torch.float64), granularity="feature", features=6, rate=0.2, theta=torch.optim.SGD, lr=0.1, l1_lambda=0.3, memory=0.5)
    twin, x, r, mean, size = net(torch.float64), X.double(), torch.full((6,), START, dtype=torch.float64), 0, 0
    for t in range(1, 4):
        value = torch.log1p(torch.exp(r)).requires_grad_()
        F.cross_entropy(twin(x * value), Y).backward()
        u = -(value * value.grad).detach()
        mean, size = 0.5 * mean + 0.5 * u, size + u.abs().mean()
        l_map, phi_vals = m.apply_vwpr_step(loss_of(m, x), theta, phi)
        assert torch.allclose(l_map["features"], mean / (size / t), atol=1e-12)
        r = r + 0.2 * (mean / (size / t) - 0.3 * torch.sigmoid(r))
        assert torch.allclose(phi_vals["features"], torch.log1p(torch.exp(r)), atol=1e-10)
        for p in twin.parameters():
            p.data -= 0.1 * p.grad
            p.grad = None
        assert all(torch.allclose(a, b, atol=1e-12) for a, b in zip(m.base_model.parameters(), twin.parameters()))
    m.eval()
    assert torch.allclose(m(x), twin(x * phi_vals["features"]), atol=1e-12)


def test_outputs_find_how_often_they_are_asked_for():
    "From the error alone: the share of each class, whatever the network says; and the margin is there in training only."
    m, theta, phi = made(granularity="output", outputs=3, rate=1.0, l1_lambda=0.0, memory=0.99, margin=2.0)
    rare = torch.tensor([0] * 40 + [1] * 20 + [2] * 4)
    for _ in range(60):
        l_map, phi_vals = m.apply_vwpr_step(F.cross_entropy(m(X), rare), theta, phi)
    wanted = 1 / (3 * (torch.bincount(rare) / 64 * 60 + 1 / 3) / 61)  # the start counts as one batch
    assert torch.allclose(phi_vals["outputs"], wanted, rtol=0.02)
    in_training = m(X)
    m.eval()
    assert torch.allclose(in_training, m(X) - 2 * phi_vals["outputs"].log(), atol=1e-6) and torch.equal(m(X), m.base_model(X))


def test_forward_values_of_one_are_the_plain_training():
    m, theta, phi = made(rate=0.0, **FORWARD)
    twin = net()
    plain = torch.optim.Adam(twin.parameters(), lr=1e-3)
    for _ in range(10):
        m.apply_vwpr_step(loss_of(m, reduction="none"), theta, phi, index=torch.arange(64))
        plain.zero_grad()
        loss_of(twin, reduction="none").mean().backward()
        plain.step()
    assert all(torch.equal(a, b) for a, b in zip(m.base_model.parameters(), twin.parameters()))


def test_forward_values_resume_bit_for_bit():
    def go(m, theta, phi, steps):
        for i in range(steps):
            m.apply_vwpr_step(loss_of(m, reduction="none"), theta, phi, index=torch.arange(64))

    whole, half = made(normalize_phi=True, **FORWARD), made(normalize_phi=True, **FORWARD)
    go(*whole, 6), go(*half, 3)
    rest = made(net(seed=5), normalize_phi=True, **FORWARD)
    for o, state in zip(rest, copy.deepcopy([o.state_dict() for o in half])):
        o.load_state_dict(state)
    go(*rest, 3)
    assert equal(whole[0].state_dict(), rest[0].state_dict()) and whole[0].steps == rest[0].steps == 6
    assert (whole[0].phi_values()["features"] != 1).all() and (whole[0].phi_values()["outputs"] != 1).all()


@pytest.mark.parametrize("how", [dict(granularity="element", signal="persistence"), dict(granularity="unit", signal="rarity")])
def test_running_means_resume_bit_for_bit(how):
    whole, half = made(theta=torch.optim.SGD, **how), made(theta=torch.optim.SGD, **how)
    for trained, steps in ((whole, 6), (half, 3)):
        for _ in range(steps):
            trained[0].apply_vwpr_step(loss_of(trained[0]), *trained[1:])
    rest = made(net(seed=5), theta=torch.optim.SGD, **how)
    for o, state in zip(rest, copy.deepcopy([o.state_dict() for o in half])):
        o.load_state_dict(state)
    for _ in range(3):
        rest[0].apply_vwpr_step(loss_of(rest[0]), *rest[1:])
    assert equal(whole[0].state_dict(), rest[0].state_dict())


def test_features_and_outputs_must_fit():
    m, *_ = made(granularity="feature", features=5)
    with pytest.raises(ValueError, match="values for 5 features: give features=6"):
        m(X)
    m, *_ = made(granularity="output", outputs=4)
    with pytest.raises(ValueError, match="values for 4 outputs: it must be logits"):
        m(X)
    with pytest.raises(ValueError, match="features=0"):
        made(granularity="feature")
    pictures = EnhancedVWPRWrapper(nn.Sequential(nn.Flatten(), nn.Linear(12, 2)), granularity="feature", features=12)
    assert pictures(torch.ones(5, 3, 2, 2)).shape == (5, 2)


# History and pictures


def test_history_is_bounded_and_a_table(tmp_path):
    m, theta, phi = made(granularity="unit", track_history=True, history_limit=10)
    for _ in range(100):
        m.apply_vwpr_step(loss_of(m), theta, phi)
    history = m.get_phi_history()
    assert 5 <= len(history) <= 10
    table = history.to_dataframe()
    assert table.index.name == "step" and table.index[-1] > 80 and "0.weight/mean" in table and len(table) == len(history)
    assert (table["0.weight/min"] <= table["0.weight/mean"]).all() and (table["0.weight/mean"] <= table["0.weight/max"]).all()
    fig = m.visualize_phi_distribution(3, save=tmp_path / "phi.png")
    assert type(fig).__mro__[1].__name__ == "Figure" and "epoch 3" in fig.get_suptitle() and (tmp_path / "phi.png").stat().st_size > 1000


# What is refused


def refused(error, words, m, theta, phi, loss, **how):
    before = snapshot(m, theta, phi)
    with pytest.raises(error, match=words):
        m.apply_vwpr_step(loss, theta, phi, **how)
    assert equal(before, snapshot(m, theta, phi))


def test_refusals():
    m, theta, phi = made(phi=torch.optim.Adam)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    refused(ValueError, "base_loss has no graph", m, theta, phi, loss_of(m).detach())
    refused(ArithmeticError, "base_loss is nan", m, theta, phi, loss_of(m) * math.nan)
    refused(ArithmeticError, "base_loss is inf", m, theta, phi, loss_of(m) * math.inf)
    refused(ValueError, r"base_loss is \(2, 3\)", m, theta, phi, torch.zeros(2, 3, requires_grad=True))
    refused(ValueError, "base_loss is float", m, theta, phi, 1.0)
    refused(ValueError, "swapped", m, phi, theta, loss_of(m))
    other = torch.optim.Adam(net().parameters())
    refused(ValueError, "optimizer_theta holds none", m, other, phi, loss_of(m))
    refused(ValueError, "optimizer_phi does not hold", m, theta, other, loss_of(m))
    refused(ValueError, "optimizer_theta holds the values", m, torch.optim.SGD(m.parameters(), lr=0.1), phi, loss_of(m))
    refused(ValueError, "granularity=.sample", m, theta, phi, loss_of(m, reduction="none"), index=torch.arange(64))
    stranger = net()
    refused(ValueError, "does not come from this model", *made(), loss_of(stranger))


def test_a_gradient_that_is_not_finite_changes_nothing():
    for signal in ("gradient", "persistence", "rarity"):
        m, theta, phi = made(signal=signal, phi=torch.optim.Adam, granularity="unit")
        m.apply_vwpr_step(loss_of(m), theta, phi)
        x = m.base_model[0].weight.sum()
        refused(ArithmeticError, "gradient is not finite", m, theta, phi, loss_of(m) + 0 * torch.sqrt(x - x.detach()))


@pytest.mark.parametrize("index, words", [(None, "index=None"), (torch.arange(3), "index="), (torch.arange(64) * 1.0, "float32"), (torch.arange(64) + 10, "0 to 63"), (torch.arange(64) - 1, "0 to 63")])
def test_samples_must_be_numbered(index, words):
    m, theta, phi = made(granularity="sample", samples=64)
    refused(ValueError, words, m, theta, phi, loss_of(m, reduction="none"), index=index)
    refused(ValueError, "one loss a sample", m, theta, phi, loss_of(m), index=torch.arange(64))
    refused(ValueError, "signal", m, theta, phi, loss_of(m, reduction="none"), index=torch.arange(64), signal=torch.zeros(3))


@pytest.mark.parametrize("how, error, words", [
    (dict(l1_lambda=-1.0), KnobError, "l1_lambda"), (dict(granularity="layer"), KnobError, "granularity"), (dict(phi_clip_value=0), ValueError, "phi_clip_value=0"),
    (dict(phi_clip_value=math.nan), ValueError, "phi_clip_value"), (dict(signal="loss"), KnobError, "signal='loss'"), (dict(granularity="sample"), ValueError, "samples=0"),
    (dict(samples=5), ValueError, "samples=5"), (dict(granularity="sample", samples=5, signal="rarity"), ValueError, "signal='rarity'"), (dict(track_history=True, history_limit=1), ValueError, "limit=1"),
    (dict(memory=1.0), KnobError, "memory"),
])
def test_bad_settings(how, error, words):
    with pytest.raises(error, match=words):
        EnhancedVWPRWrapper(net(), **how)


def test_nothing_to_train():
    for model, words in ((nn.ReLU(), "has no parameters"), (net().requires_grad_(False), "has only frozen")):
        with pytest.raises(ValueError, match=f"base_model {words}"):
            EnhancedVWPRWrapper(model)
    with pytest.raises(TypeError, match="base_model is a list"):
        EnhancedVWPRWrapper([])
    with pytest.raises(ValueError, match="track_history=True"):
        made()[0].get_phi_history()


# What a stranger found


@pytest.mark.parametrize("how", [dict(granularity="output", outputs=3), dict(granularity="feature", features=6)])
@pytest.mark.parametrize("scaled", [False, True])
def test_a_refused_step_leaves_nothing_behind(how, scaled):
    m, theta, phi = made(**how)
    twin, *theirs = made(**how)
    scaler = torch.amp.GradScaler("cpu") if scaled else None
    z = m(X)
    bad = F.cross_entropy(z, Y) + 0 * torch.sqrt(z.sum() * 0)
    if scaled:
        assert m.apply_vwpr_step(bad, theta, phi, scaler=scaler)[0] == {}
    else:
        with pytest.raises(ArithmeticError):
            m.apply_vwpr_step(bad, theta, phi)
    m.apply_vwpr_step(loss_of(m), theta, phi)
    twin.apply_vwpr_step(loss_of(twin), *theirs)
    assert equal(m.values.state_dict(), twin.values.state_dict())


def test_a_look_at_the_gradient_is_no_step():
    m, theta, phi = made(granularity="output", outputs=3)
    twin, *theirs = made(granularity="output", outputs=3)
    z = m(X)
    torch.autograd.grad(F.cross_entropy(z, Y) * 1000, list(m.base_model.parameters()), retain_graph=True)
    m.apply_vwpr_step(F.cross_entropy(z, Y), theta, phi)
    twin.apply_vwpr_step(loss_of(twin), *theirs)
    assert equal(m.values.state_dict(), twin.values.state_dict())


def test_a_scaler_that_is_switched_off():
    m, theta, phi = made(granularity="unit")
    off = torch.amp.GradScaler("cpu", enabled=False)
    x = m.base_model[0].weight.sum()
    refused(ArithmeticError, "gradient is not finite", m, theta, phi, loss_of(m) + 0 * torch.sqrt(x - x.detach()), scaler=off)
    m.apply_vwpr_step(loss_of(m), theta, phi, scaler=off)
    assert m.steps == 1


def test_clipping_with_a_scaler():
    m, theta, phi = made(granularity="output", outputs=3)
    twin, *theirs = made(granularity="output", outputs=3)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)
    scaler.scale(loss_of(m)).backward()
    scaler.unscale_(theta)
    nn.utils.clip_grad_norm_(m.base_model.parameters(), 1e3)
    m.step(theta, phi, scaler=scaler)
    twin.apply_vwpr_step(loss_of(twin), *theirs)
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(m.parameters(), twin.parameters()))


def test_gradients_of_several_batches_with_samples():
    m, theta, phi = made(granularity="sample", samples=64, normalize_phi=True)
    rows, found = torch.arange(64), []
    for part in rows.split(32):
        losses = F.cross_entropy(m(X[part]), Y[part], reduction="none")
        (m.weigh(losses, part) / 2).backward()
        found.append(losses.detach())
    m.step(theta, phi, samples=(torch.cat(found), rows))
    assert (m.phi_values()["samples"] != 1).all()
    for bad in (None, (rows, found[0]), (torch.cat(found), rows + 1), (torch.cat(found) * math.nan, rows), torch.cat(found)):
        before = snapshot(m, theta, phi)
        F.cross_entropy(m(X), Y).backward()
        with pytest.raises(ValueError):
            m.step(theta, phi, samples=bad)
        assert equal(before, snapshot(m, theta, phi))


def test_parameters_that_changed_after_wrapping_are_named():
    m, theta, phi = made(granularity="unit")
    m.apply_vwpr_step(loss_of(m), theta, phi)
    m.base_model[2] = nn.Linear(8, 3)
    new = torch.optim.Adam(m.base_model.parameters())
    with pytest.raises(ValueError, match="2 parameters that base_model got after"):
        m.apply_vwpr_step(loss_of(m), new, phi)
    m, theta, phi = made(granularity="unit")
    m.load_state_dict(copy.deepcopy(m.state_dict()), assign=True)
    with pytest.raises(ValueError, match="was replaced"):
        m.apply_vwpr_step(loss_of(m), theta, phi)
    m, _, phi = made(granularity="unit")
    m.base_model.append(nn.Linear(3, 3))
    with pytest.raises(ValueError, match="2 parameters that base_model got after"):
        m.apply_vwpr_step(loss_of(m), torch.optim.Adam(m.base_model.parameters()), phi)


def test_optimizers_of_another_copy_are_refused():
    m, theta, phi = made(granularity="unit")
    m.apply_vwpr_step(loss_of(m), theta, phi)
    copied = copy.deepcopy(m)
    with pytest.raises(ValueError, match="optimizer_theta holds none"):
        copied.apply_vwpr_step(loss_of(copied), theta, phi)


def test_tensors_of_which_nothing_is_heard_keep_their_values():
    "Frozen, unused, or left to another optimizer: no part in means, no gradient that adds up, no value that moves."
    for how in (dict(relative=True, normalize_phi=True, phi_clip_value=5.0), dict(l1_lambda=0.5)):
        m = EnhancedVWPRWrapper(Odd(), granularity="unit", **how)
        m.base_model.scale.requires_grad_(False)
        theta = torch.optim.Adam([p for n, p in m.base_model.named_parameters() if not n.startswith("table")], lr=1e-3)
        phi = torch.optim.SGD(m.phi_params(), lr=0.5)
        for _ in range(10):
            m.apply_vwpr_step(loss_of(m), theta, phi)
        values = m.phi_values()
        assert all((values[n] == 1).all() for n in ("scale", "fixed", "unused.weight", "table.weight"))
        added_up = m.base_model.table.weight.grad.norm()
        m.base_model.zero_grad()
        loss_of(m).backward()
        assert added_up < 2 * m.base_model.table.weight.grad.norm()
        assert (values["block.inner.0.weight"] != 1).all()


def test_persistence_reads_each_groups_betas():
    m = EnhancedVWPRWrapper(net(), granularity="tensor", signal="persistence")
    theta = torch.optim.Adam([dict(params=m.base_model[0].parameters()), dict(params=m.base_model[2].parameters(), betas=(0.5, 0.9))], lr=1e-9)
    phi = torch.optim.SGD(m.phi_params(), lr=0.0)
    for _ in range(3):
        l_map, _ = m.apply_vwpr_step(loss_of(m), theta, phi)
    assert abs(l_map["0.weight"].item() - 1) < 1e-3 and abs(l_map["2.weight"].item() - 1) < 1e-3  # the same gradient three times


def test_values_of_samples_cost_what_the_batch_costs():
    "With plain gradient descent or SparseAdam only the values of the batch are touched."
    for phi in (torch.optim.SGD, torch.optim.SparseAdam):
        m = EnhancedVWPRWrapper(net(), granularity="sample", samples=1000, phi_clip_value=2.0, l1_lambda=0.0)
        theta, phi = torch.optim.Adam(m.base_model.parameters()), phi(list(m.phi_params()), lr=0.1)
        for _ in range(3):
            m.apply_vwpr_step(loss_of(m, reduction="none"), theta, phi, index=torch.arange(64) + 100)
        changed = (m.phi_values()["samples"] != 1).nonzero().flatten()
        assert changed.tolist() == list(range(100, 164)) and m.phi_values()["samples"].max() <= 2.0001
    m, theta, phi = made(granularity="unit", phi=lambda p, lr: torch.optim.SparseAdam(list(p), lr))
    refused(ValueError, "SparseAdam", m, theta, phi, loss_of(m))


def test_values_stay_wide_and_go_where_the_model_goes():
    m, *_ = made(granularity="unit")
    assert raw(m.half()).dtype == torch.float32 and raw(m.double()).dtype == torch.float64


def test_what_cannot_be_multiplied_or_heard_is_named():
    words = EnhancedVWPRWrapper(nn.Sequential(nn.Embedding(10, 4), nn.Flatten(), nn.Linear(20, 3)), granularity="feature", features=5)
    with pytest.raises(ValueError, match="the input is torch.int64"):
        words(torch.zeros(2, 5, dtype=torch.long))
    m, theta, phi = made(granularity="output", outputs=3)
    refused(ValueError, "outputs have values, and the wrapper was not called in training mode", m, theta, phi, F.cross_entropy(m.base_model(X), Y))

    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = net()

        def forward(self, x=None):
            return {"logits": self.body(x)}

    assert EnhancedVWPRWrapper(Two())(x=X)["logits"].shape == (64, 3)
    with pytest.raises(ValueError, match="the model's output is dict"):
        EnhancedVWPRWrapper(Two(), granularity="output", outputs=3)(X)
    with pytest.raises(ValueError, match="without a positional argument"):
        EnhancedVWPRWrapper(Two(), granularity="feature", features=6)(x=X)


def test_padding_asks_for_nothing():
    m, theta, phi = made(granularity="output", outputs=3, memory=0.0, l1_lambda=0.0, rate=1.0)
    y = torch.where(torch.arange(64) < 32, Y, -100)
    for _ in range(40):
        m.apply_vwpr_step(F.cross_entropy(m(X), y), theta, phi)
    assert torch.allclose(m.values["output"].asked, torch.bincount(Y[:32]) / 32, atol=0.03)


def test_sparse_gradients():
    m = EnhancedVWPRWrapper(nn.Sequential(nn.Embedding(10, 4, sparse=True), nn.Flatten(), nn.Linear(20, 3)), granularity="unit")
    theta, phi = torch.optim.SGD(m.base_model.parameters(), lr=0.1), torch.optim.SGD(m.phi_params(), lr=0.1)
    l_map, _ = m.apply_vwpr_step(F.cross_entropy(m(torch.randint(0, 5, (8, 5))), torch.zeros(8, dtype=torch.long)), theta, phi)
    assert l_map["0.weight"][:5].all() and not l_map["0.weight"][5:].any()


def test_optimizers_must_be_optimizers():
    m, theta, phi = made()
    for wrong in (None, m.phi_params(), torch.optim.LBFGS(m.phi_params())):
        refused_types = pytest.raises(ValueError, match="optimizer_phi is a")
        with refused_types:
            m.apply_vwpr_step(loss_of(m), theta, wrong)
