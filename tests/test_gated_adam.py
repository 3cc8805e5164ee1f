"The paths of a step: each the same numbers as the reference, each with live knobs, each leaving everything untouched when it must."
import copy
import io

import pytest
import torch
from torch import nn

from adaptive_lab import gated_lists
from adaptive_lab.gated_adam import GatedAdam, fresh, path_of
from adaptive_lab.gated_kernel import kernel
from adaptive_lab.gates import eligibility, marks
from adaptive_lab.gated_lists import Item, Rule, item, list_step, update, update_compiled, update_fused, update_list

inf = float("inf")
HERE = [p for p in ("native", "fused", "foreach", "single") if p != "native" or kernel()[0]]
FAST = [p for p in HERE if p != "single"] + ["compile"]
SHAPES = [(1,), (5,), (40,), (33, 7), (1023,), (64, 100), (250_000,)]


@pytest.fixture(autouse=True)
def compile_without_a_compiler(monkeypatch):
    "torch.compile's own steps, but without the C++ that takes half a minute."
    monkeypatch.setattr(gated_lists, "runners", lambda run=[torch.compile(list_step, dynamic=False, fullgraph=True, backend="eager")]: run)
    torch._dynamo.reset()


def gradient(shape, seed, dtype=torch.float32):
    "Gradients of very different sizes, a third of them zero."
    draw = torch.Generator().manual_seed(seed)
    size = torch.randn(shape, generator=torch.Generator().manual_seed(7)).mul(2).exp()
    return (torch.randn(shape, generator=draw) * size * (torch.rand(shape, generator=draw) < 0.7)).to(dtype)


def params(shapes, dtype=torch.float32, seed=0):
    draw = torch.Generator().manual_seed(seed)
    return [nn.Parameter(torch.randn(s, generator=draw).to(dtype)) for s in shapes]


def walk_on(ps, opt, steps, start=0):
    for i in range(start, start + steps):
        for j, p in enumerate(ps):
            p.grad = gradient(p.shape, 1000 * i + j, p.dtype)
        opt.step()


def tensors(opt):
    return [s[n].clone() for s in opt.state.values() for n in ("exp_avg", "exp_avg_sq", "step")]


def in_ulps(a, b, size):
    "The largest difference, in units of the last place of numbers of that size."
    last = torch.finfo(a.dtype).eps * 2.0 ** size.abs().clamp(min=torch.finfo(a.dtype).tiny).log2().floor()
    return ((a - b).abs() / last).max().item()


# the same numbers


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("k", [0, 2.0, 20.0])
def test_one_step_on_any_path_is_the_reference_to_the_last_place(path, dtype, k):
    for seed in range(3):
        ps = params(SHAPES, dtype, seed)
        opt = GatedAdam(ps, lr=0.01, plasticity_k=k, warmup_steps=3, path="single", threshold_percentile=30 + 20 * seed, floor=0.1 * seed)
        walk_on(ps, opt, 6, start=100 * seed)
        before = [p.detach().clone() for p in ps]
        twins, twin = copy.deepcopy((ps, opt))
        twin.param_groups[0]["path"] = path
        walk_on(ps, opt, 1, start=900 + seed), walk_on(twins, twin, 1, start=900 + seed)
        full = GatedAdam(copy.deepcopy([nn.Parameter(b) for b in before])).param_groups[0]["params"]
        for p, q, b, mine, theirs in zip(ps, twins, before, opt.state.values(), twin.state.values()):
            step = 0.01 * mine["exp_avg"].abs() / (mine["exp_avg_sq"] / (1 - 0.99**7)).sqrt().clamp(min=1e-30) / (1 - 0.9**7)
            g, p, q, step = p.grad, p.detach(), q.detach(), max(k, 1) * step  # a gate multiplies what rounding there is by k
            assert in_ulps(p, q, torch.stack([b.abs(), p.abs(), step]).amax(0)) <= 4
            large = b.abs() > 4 * step
            assert not large.any() or in_ulps(p[large], q[large], torch.maximum(b.abs(), p.abs())[large]) <= 1
            assert in_ulps(mine["exp_avg"], theirs["exp_avg"], torch.maximum(mine["exp_avg"].abs(), g.abs())) <= 1
            assert in_ulps(mine["exp_avg_sq"], theirs["exp_avg_sq"], mine["exp_avg_sq"]) <= 1
            assert mine["step"] == theirs["step"] == 7
            assert mine.get("calibration", 0) == pytest.approx(theirs.get("calibration", 0), abs=1e-6)
        assert len(full) == len(ps)


@pytest.mark.parametrize("path, foreach", [("single", False), ("foreach", True)])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_k_0_is_adam_bit_for_bit_over_1000_steps(path, foreach, dtype):
    shapes = [(1,), (40,), (33, 7), (2000,)]
    a, b = params(shapes, dtype), params(shapes, dtype)
    mine, theirs = GatedAdam(a, plasticity_k=0, warmup_steps=10, path=path), torch.optim.Adam(b, betas=(0.9, 0.99), foreach=foreach)
    for i in range(0, 1000, 250):
        walk_on(a, mine, 250, i), walk_on(b, theirs, 250, i)
        assert all(torch.equal(p, q) for p, q in zip(a, b)), f"differ after {i + 250} steps"


@pytest.mark.parametrize("path", [p for p in FAST if p != "foreach"])
def test_k_0_on_the_fast_paths_is_adam_within_two_places_at_each_of_1000_steps(path):
    shapes = [(40,), (33, 7), (2000,)]
    a, b = params(shapes), params(shapes)
    mine, theirs = GatedAdam(a, plasticity_k=0, warmup_steps=10, path=path), torch.optim.Adam(b, betas=(0.9, 0.99), foreach=False)
    for i in range(1000):
        before = [q.detach().clone() for q in b]
        walk_on(a, mine, 1, i), walk_on(b, theirs, 1, i)
        with torch.no_grad():
            for p, q, old in zip(a, b, before):
                assert in_ulps(p, q, torch.stack([old.abs(), q.abs(), (q - old).abs()]).amax(0)) <= 2, i  # two where a processor divides vectors otherwise
                p.copy_(q)
                for n in ("exp_avg", "exp_avg_sq"):
                    assert in_ulps(mine.state[p][n], theirs.state[q][n], torch.maximum(theirs.state[q][n].abs(), q.grad.abs())) <= 1
                    mine.state[p][n].copy_(theirs.state[q][n])


@pytest.mark.parametrize("path", FAST)
def test_what_other_rules_bring_in_counts_on_every_path(path):
    for shape in [(40,), (64, 100)]:
        walks = []
        for way in (path, "single"):
            (p,) = ps = params([shape])
            opt = GatedAdam(ps, lr=0.01, plasticity_k=2.0, warmup_steps=0, path=way)
            walk_on(ps, opt, 1)
            kept = torch.rand(shape, generator=torch.Generator().manual_seed(3)) * (torch.arange(p.numel()).view(shape) % 2)
            opt.state[p].update(kept=kept)
            walk_on(ps, opt, 5, start=1)
            walks.append(p.detach())
        assert torch.allclose(*walks, atol=1e-6)


def test_kept_weights_stand_still():
    p, g = torch.zeros(40), torch.ones(40)
    state = fresh(p) | dict(kept=torch.cat([torch.ones(10), torch.zeros(30)]))
    update(item(p, g, state), Rule(0.1, 0.9, 0.99, 1e-8, 20.0))
    assert (p[:10] == 0).all() and torch.allclose(p[10:], torch.tensor(-0.1))


@pytest.mark.skipif(not kernel()[0], reason="no C kernel")
def test_the_number_of_threads_changes_nothing():
    ends, threads = [], torch.get_num_threads()
    try:
        for n in (1, 2, 3):
            torch.set_num_threads(n)
            ps = params([(250_000,), (5,), (70_000,)])
            opt = GatedAdam(ps, warmup_steps=0, path="native")
            walk_on(ps, opt, 4)
            ends.append(torch.cat([p.detach().flatten() for p in ps] + [s.flatten() for s in tensors(opt)]))
    finally:
        torch.set_num_threads(threads)
    assert torch.equal(ends[0], ends[1]) and torch.equal(ends[0], ends[2])


# thresholds


@pytest.mark.parametrize("path", HERE)
def test_the_threshold_is_calibrated_to_half_a_percentile(path):
    rows = torch.randn(400, 1, generator=torch.Generator().manual_seed(1)).mul(2).exp()  # rows of very different sizes: a hard case for a sample
    alone, calibrated = [], []
    for percentile in (50, 75, 90):
        (p,) = ps = params([(400, 500)])
        opt = GatedAdam(ps, warmup_steps=0, threshold_percentile=percentile, path=path)
        for i in range(20):
            p.grad = rows * torch.randn(400, 500, generator=torch.Generator().manual_seed(i))
            opt.step()
            e = eligibility(opt.state[p]["exp_avg_sq"], i + 1.0, 0.99)
            for missed, correction in ((alone, 0.0), (calibrated, opt.state[p]["calibration"])):
                landed = (e <= marks(e, p.grad, percentile, calibration=correction).top).double().mean().item()
                missed += [abs(100 * landed - percentile)] * (i >= 10)
    assert sum(c > 0.5 for c in calibrated) <= 0.05 * len(calibrated) and max(calibrated) < 0.7 < max(alone), (max(calibrated), max(alone))


# live, safe, and of all kinds


@pytest.mark.parametrize("path", FAST)
@pytest.mark.parametrize("name, value", dict(lr=0.05, trace_decay=0.5, plasticity_k=0.0, threshold_percentile=20, warmup_steps=99, eps=0.1, floor=0.5).items())
def test_a_live_change_acts_at_the_next_step_on_every_path(path, name, value):
    ps = params([(40,), (1500,)])
    opt = GatedAdam(ps, plasticity_k=3.0, warmup_steps=0, path=path)
    walk_on(ps, opt, 5)
    twins, twin = copy.deepcopy((ps, opt))
    ref, reference = copy.deepcopy((ps, opt))
    reference.param_groups[0].update({"path": "single", name: value})
    twin.param_groups[0][name] = value
    for these, o in ((ps, opt), (twins, twin), (ref, reference)):
        walk_on(these, o, 1, start=5)
    assert all(not torch.equal(p, q) and torch.allclose(q, r, atol=1e-6) for p, q, r in zip(ps, twins, ref))


@pytest.mark.parametrize("bad", [inf, -inf, float("nan")])
@pytest.mark.parametrize("path", FAST + ["single"])
def test_one_bad_number_in_the_last_tensor_leaves_every_bit(path, bad):
    ps = params([(250_000,), (7,)])
    opt = GatedAdam(ps, warmup_steps=0, path=path)
    for first in (True, False):
        before, states = [p.detach().clone() for p in ps], tensors(opt)
        for p in ps:
            p.grad = torch.ones_like(p)
        ps[1].grad[3] = bad
        opt.step()
        assert all(torch.equal(p, b) for p, b in zip(ps, before)) and all(map(torch.equal, tensors(opt), states)) and bool(opt.state) != first
        walk_on(ps, opt, 1)
    assert opt.param_groups[0]["skipped_steps"] == 2


def test_tensors_of_every_kind_in_one_group():
    draw = torch.Generator().manual_seed(0)
    make = lambda dtype, *shape: nn.Parameter(torch.randn(*shape, generator=draw, dtype=dtype))
    ps = [make(torch.float32, 30), make(torch.float64, 30), make(torch.complex64, 30), nn.Parameter(torch.randn(6, 5, generator=draw).T), nn.Parameter(torch.ones(30, dtype=torch.bfloat16)), nn.Parameter(torch.tensor(2.0))]
    twins = copy.deepcopy(ps)
    auto, single = GatedAdam(ps, warmup_steps=0, plasticity_k=1), GatedAdam(twins, warmup_steps=0, plasticity_k=1, path="single")
    assert not ps[3].is_contiguous()
    for i in range(4):
        for p, q in zip(ps, twins):
            p.grad = q.grad = torch.ones_like(p) * (i + 1)
        auto.step(), single.step()
    assert all(torch.allclose(p, q, atol=1e-6) for p, q in zip(ps, twins))
    paths = [path_of(item(p, p.grad, auto.state[p]), "auto") for p in ps]
    assert paths[3:5] == ["single", "single"] and (not kernel()[0] or paths[:3] == ["native"] * 3)


@pytest.mark.parametrize("path", HERE)
def test_memory_is_adams_to_the_byte(path):
    ps, qs = params([(3000,), (10,)]), params([(3000,), (10,)])
    mine, adam = GatedAdam(ps, warmup_steps=0, path=path), torch.optim.Adam(qs)
    walk_on(ps, mine, 3), walk_on(qs, adam, 3)
    held = lambda opt: [(n, v.dtype, v.nbytes) for s in opt.state.values() for n, v in s.items() if isinstance(v, torch.Tensor)]
    assert held(mine) == held(adam) and all(isinstance(v, float) for s in mine.state.values() for n, v in s.items() if n == "calibration")


@pytest.mark.parametrize("adaptive", [True, False])
@pytest.mark.parametrize("path", HERE)
def test_a_run_that_was_saved_goes_on_bit_for_bit(path, adaptive):
    ps = params([(3000,), (10,)])
    opt = GatedAdam(ps, warmup_steps=2, path=path, adaptive_threshold=adaptive)
    walk_on(ps, opt, 7)
    file = io.BytesIO()
    torch.save((ps, opt.state_dict()), file)
    walk_on(ps, opt, 7, start=7)
    file.seek(0)
    again, state = torch.load(file, weights_only=True)
    other = GatedAdam(again, path=path)
    other.load_state_dict(state)
    walk_on(again, other, 7, start=7)
    assert all(torch.equal(p, q) for p, q in zip(ps, again)) and other.param_groups[0]["path"] == path


def test_a_path_that_does_not_exist_is_refused():
    with pytest.raises(ValueError, match="path='quick' is not allowed: path must be one of 'auto', 'native'"):
        GatedAdam(params([(3,)]), path="quick")


# torch.compile


def test_schedules_and_sliders_compile_nothing_anew(monkeypatch):
    from torch._dynamo.testing import CompileCounter

    counter = CompileCounter()
    run = [torch.compile(list_step, dynamic=False, fullgraph=True, backend=counter)]
    monkeypatch.setattr(gated_lists, "runners", lambda: run)
    ps = params([(40,), (33, 7)])
    opt = GatedAdam(ps, warmup_steps=3, path="compile")
    schedule = torch.optim.lr_scheduler.CyclicLR(opt, 1e-4, 1e-2)
    for i in range(12):
        walk_on(ps, opt, 1, start=i)
        schedule.step()
        opt.param_groups[0].update(plasticity_k=float(i), trace_decay=0.9 + 0.005 * i, threshold_percentile=5 * i)
    assert counter.frame_count == 2  # during warm-up, and after it


def test_a_compiler_that_fails_is_left_alone(monkeypatch):
    def broken(*_):
        raise RuntimeError("no C++ here")

    run = [broken]
    monkeypatch.setattr(gated_lists, "runners", lambda: run)
    ends = []
    for path in ("compile", "single"):
        ps = params([(40,)])
        walk_on(ps, GatedAdam(ps, warmup_steps=0, path=path), 3)
        ends.append(ps[0].detach())
    assert torch.allclose(*ends, atol=1e-6) and run == [list_step]


@pytest.mark.parametrize("step", [update, lambda x, r: update_list([x], r), lambda x, r: update_fused([x], r), lambda x, r: update_compiled([x], r)], ids=["single", "foreach", "fused", "compile"])
def test_an_overflow_of_the_trace_moves_nothing(step):
    p, g = torch.ones(8), torch.tensor([1.0, 2, 3, 4, 5, 6, 7, 1e30])
    step(item(p, g, fresh(p)), Rule(0.1, 0.9, 0.99, 1e-8, 20.0))
    assert p.isfinite().all() and p[7] == 1 and isinstance(item(p, g, fresh(p)), Item)
