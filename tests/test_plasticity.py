"Selective plasticity as a drop-in for Adam: identity, gating, state, live knobs, bad input."
import copy
import io
import pickle

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn
from torch.optim import lr_scheduler

from adaptive_lab.gates import SAMPLE, gate, marks, percentile, strided, tensor_gates
from adaptive_lab.knobs import KnobError, walk
from adaptive_lab.models import MLP, mlp
from adaptive_lab.parts import find_part
from adaptive_lab.plasticity import Plasticity, SelectivePlasticityOptimizer, gates_from_sample

inf, nan = float("inf"), float("nan")


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.ReLU(), nn.Linear(16, 4)).to(dtype)


def ours(model, **knobs):
    return SelectivePlasticityOptimizer(model.parameters(), **{"warmup_steps": 0, **knobs})


def feed(model, opt, steps, seed=0, start=0):
    "Steps with the gradients of a small regression; the batches depend on seed and step alone."
    dtype = next(model.parameters()).dtype
    for i in range(start, start + steps):
        draw = torch.Generator().manual_seed(1000 * seed + i)
        x, y = torch.randn(8, 6, generator=draw).to(dtype), torch.randn(8, 4, generator=draw).to(dtype)
        opt.zero_grad()
        (model(x) - y).square().mean().backward()
        opt.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def moved(history, now, **knobs):
    "How far weights that start at 0 go in one step, after gradients that only fill the trace."
    p = nn.Parameter(torch.zeros(len(history)))
    opt = SelectivePlasticityOptimizer([p], warmup_steps=20, **knobs)
    for _ in range(20):
        p.grad = torch.tensor(history)
        opt.step()
    before, p.grad = p.detach().clone(), torch.tensor(now)
    opt.step()
    return (p.detach() - before).abs()


# identity with Adam


# In bfloat16 torch's own foreach Adam rounds otherwise than its single-tensor Adam.
@pytest.mark.parametrize("dtype, foreach", [(torch.float32, False), (torch.float32, True), (torch.float64, False), (torch.bfloat16, False)])
def test_k_0_is_adam_bit_for_bit(dtype, foreach):
    a, b = net(dtype=dtype), net(dtype=dtype)
    mine, theirs = ours(a, plasticity_k=0), torch.optim.Adam(b.parameters(), betas=(0.9, 0.99), foreach=foreach)
    for start in range(0, 1000, 100):
        feed(a, mine, 100, start=start)
        feed(b, theirs, 100, start=start)
        assert torch.equal(flat(a), flat(b)), f"differ after {start + 100} steps"


def test_warmup_is_adam_and_the_next_step_is_not():
    a, b = net(), net()
    mine, theirs = ours(a, warmup_steps=30, path="single"), torch.optim.Adam(b.parameters(), betas=(0.9, 0.99))
    feed(a, mine, 30), feed(b, theirs, 30)
    assert torch.equal(flat(a), flat(b))
    feed(a, mine, 1, start=30), feed(b, theirs, 1, start=30)
    assert not torch.equal(flat(a), flat(b))


def test_complex_weights_with_k_0_are_adams():
    walks = []
    makers = (lambda p: SelectivePlasticityOptimizer(p, plasticity_k=0, warmup_steps=0), lambda p: torch.optim.Adam(p, betas=(0.9, 0.99)))
    for make in makers:
        p = nn.Parameter(torch.tensor([1 + 2j, -1j, 3]))
        opt = make([p])
        for i in range(20):
            p.grad = torch.tensor([1j * i, 2.0 - i, 1])
            opt.step()
        walks.append(p.detach())
    assert torch.equal(*walks)
    opt = SelectivePlasticityOptimizer([p], warmup_steps=0)
    opt.step()
    assert opt.get_param_eligibility(p).shape == p.shape and opt.get_param_eligibility(p).is_complex()


def test_memory_is_exactly_adams():
    a, b = net(), net()
    mine, theirs = ours(a), torch.optim.Adam(b.parameters())
    feed(a, mine, 2), feed(b, theirs, 2)
    tensors = lambda opt: {(i, name): (v.dtype, v.nbytes) for i, s in enumerate(opt.state.values()) for name, v in s.items()}
    assert tensors(mine) == tensors(theirs)


# gates are used

BUSY = [1.0 + 0.01 * i for i in range(40)]  # all nearly alike, the last ten the busiest quarter


def test_protected_weights_move_at_most_a_tenth_as_far():
    step = moved(BUSY, [1.0] * 40, plasticity_k=20)
    assert (step[30:] <= 0.1 * step[:30].min()).all() and step[:30].min() > 5e-4


def test_a_strong_present_gradient_opens_the_gate():
    now = [1.0] * 39 + [1000.0]
    assert moved(BUSY, [1.0] * 40, plasticity_k=20)[39] == 0
    assert moved(BUSY, now, plasticity_k=20)[39] > 0.9 * moved(BUSY, now, plasticity_k=0)[39] > 0


@pytest.mark.parametrize("percentile_, still", [(0, 40), (50, 20), (75, 10), (90, 4), (100, 0)])
def test_the_threshold_decides_who_is_protected(percentile_, still):
    step = moved(BUSY, [1.0] * 40, plasticity_k=20, threshold_percentile=percentile_)
    assert abs((step == 0).sum().item() - still) <= 1


def test_floor_keeps_a_share_of_the_step():
    ratio = moved(BUSY, [1.0] * 40, plasticity_k=20, floor=0.25) / moved(BUSY, [1.0] * 40, plasticity_k=0)
    assert torch.allclose(ratio[30:], torch.tensor(0.25), rtol=1e-3) and torch.allclose(ratio[:30], torch.ones(30), rtol=1e-3)


@settings(max_examples=60, deadline=None)
@given(st.integers(0, 10**6), st.floats(0, 20), st.floats(0, 1), st.floats(0, 1))
def test_gates_stay_between_floor_and_1_and_fall_with_k(seed, k, threshold, floor):
    e, g = torch.rand(2, 50, generator=torch.Generator().manual_seed(seed))
    above = (e > threshold).float()
    gates = gate(e, g, k, above, floor)
    assert (gates >= min(floor, 1)).all() and (gates <= 1).all() and (gates[e <= threshold] == 1).all()
    assert (gate(e, g, k + 1, above, floor) <= gates).all()


@pytest.mark.parametrize("seed", range(3))
def test_gates_do_not_depend_on_the_scale_of_a_tensor(seed):
    e, g = torch.rand(2, 300, generator=torch.Generator().manual_seed(seed)) + 0.01
    plain, scaled = (tensor_gates(s * e, s * g, marks(s * e, s * g, 75), 5.0) for s in (1, 1024.0))
    assert torch.equal(plain, scaled)


def test_one_outlier_changes_nobody_elses_gate_much():
    e, g = torch.rand(2, 1001, generator=torch.Generator().manual_seed(0)) + 0.1
    spiked = e.clone()
    spiked[e.argmax()] = 1e6
    change = tensor_gates(e, g, marks(e, g, 75), 1.0) - tensor_gates(spiked, g, marks(spiked, g, 75), 1.0)
    change[e.argmax()] = 0
    assert change.abs().max() < 1e-6


@pytest.mark.parametrize("shape", [(5000,), (64, 256), (256, 256), (300, 64), (33, 7, 3, 3), (17_000_000,)])
def test_a_sample_spreads_over_all_columns_and_hits_the_percentile(shape):
    x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
    sample = strided(x)
    assert SAMPLE / 3 < len(sample) < 2 * SAMPLE
    if len(shape) > 1 and shape[-1] <= 256:
        columns = strided(torch.arange(shape[-1]).expand(shape))
        assert len(columns.unique()) == shape[-1]
    assert abs((x < percentile(sample, 75)).double().mean().item() - 0.75) < 0.025


def test_overflowed_second_moment_does_not_poison_weights():
    p = nn.Parameter(torch.ones(4))
    opt = SelectivePlasticityOptimizer([p], warmup_steps=0, plasticity_k=20)
    p.grad = torch.tensor([1.0, 2, 3, 1e30])  # its square is infinite in float32
    opt.step()
    assert p.isfinite().all()


# knobs


@pytest.mark.parametrize("k", walk(Plasticity), ids=lambda k: k.name)
def test_a_knob_outside_its_range_is_refused_everywhere(k):
    bad = "perhaps" if k.type in (bool, str) else (k.high if k.high_open else k.high + 1) if k.high is not None else k.low - 1
    p = nn.Parameter(torch.ones(3))
    p.grad = torch.ones(3)
    with pytest.raises(KnobError, match=k.name):
        SelectivePlasticityOptimizer([p], **{k.name: bad})
    with pytest.raises(KnobError, match=k.name):
        SelectivePlasticityOptimizer([dict(params=[p], **{k.name: bad})])
    opt = SelectivePlasticityOptimizer([p])
    opt.param_groups[0][k.name] = bad
    with pytest.raises(KnobError, match=k.name):
        opt.step()
    assert torch.equal(p, torch.ones(3)) and not opt.state


def test_names_and_defaults_are_as_documented():
    due = dict(lr=0.001, trace_decay=0.99, plasticity_k=5.0, threshold_percentile=75, warmup_steps=1000, adaptive_threshold=True, eps=1e-8)
    group = SelectivePlasticityOptimizer([nn.Parameter(torch.ones(1))]).param_groups[0]
    assert [k.name for k in walk(Plasticity)][:7] == list(due) and {n: group[n] for n in due} == due
    assert all(k.live == (k.name != "path") for k in walk(Plasticity))


def test_unknown_names_and_empty_lists_are_refused():
    p = nn.Parameter(torch.ones(1))
    with pytest.raises(KnobError, match="plasticity"):
        SelectivePlasticityOptimizer([p], plasticity=1)
    with pytest.raises(KnobError, match="plasticity"):
        SelectivePlasticityOptimizer([p]).add_param_group(dict(params=[nn.Parameter(torch.ones(1))], plasticity=1))
    with pytest.raises(ValueError, match="empty"):
        SelectivePlasticityOptimizer([])


@pytest.mark.parametrize("name, value", [("weight_decay", 0.1), ("amsgrad", True), ("maximize", True)])
def test_what_adam_can_and_this_cannot_is_refused(name, value):
    with pytest.raises(ValueError, match=name):
        SelectivePlasticityOptimizer([dict(params=[nn.Parameter(torch.ones(1))], **{name: value})]).step()
    saved = torch.optim.Adam(net().parameters(), **{name: value}).state_dict()
    with pytest.raises(ValueError, match=name):
        ours(net()).load_state_dict(saved)


CHANGES = dict(lr=0.01, trace_decay=0.5, plasticity_k=0.0, threshold_percentile=20, warmup_steps=99, eps=0.1, floor=0.5)


@pytest.mark.parametrize("name", CHANGES)
def test_a_live_change_takes_effect_at_the_next_step(name):
    walks = []
    for change in (False, True):
        model = net()
        opt = ours(model)
        feed(model, opt, 20)
        before = flat(model)
        if change:
            opt.param_groups[0][name] = CHANGES[name]
        assert torch.equal(flat(model), before)
        feed(model, opt, 1, start=20)
        walks.append(flat(model))
    assert not torch.equal(*walks)


def test_trace_decay_rules_over_betas_and_momentum_is_the_first_beta():
    model = net()
    opt = ours(model)
    opt.param_groups[0].update(trace_decay=0.5, betas=(0.7, 0.999))
    feed(model, opt, 1)
    assert opt.param_groups[0]["betas"] == (0.7, 0.5)
    other = torch.optim.Adam((b := net()).parameters(), betas=(0.7, 0.5))
    feed(b, other, 1)
    assert torch.equal(next(iter(opt.state.values()))["exp_avg_sq"], next(iter(other.state.values()))["exp_avg_sq"])


def test_a_threshold_that_is_not_adaptive_stays_and_follows_its_percentile():
    model = net()
    opt = ours(model, adaptive_threshold=False, warmup_steps=10)
    kept = lambda: [s["threshold"] for s in opt.state.values()]
    feed(model, opt, 11)
    first = kept()
    feed(model, opt, 20, start=11)
    assert kept() == first
    opt.param_groups[0]["threshold_percentile"] = 30
    feed(model, opt, 1, start=31)
    assert all(a != b for a, b in zip(kept(), first))
    opt.param_groups[0]["adaptive_threshold"] = True
    feed(model, opt, 1, start=32)
    assert not any("threshold" in s for s in opt.state.values())


# bad gradients


@pytest.mark.parametrize("bad", [nan, inf, -inf])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_a_step_with_a_gradient_that_is_not_finite_changes_nothing(bad, dtype):
    a, b = nn.Parameter(torch.ones(3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))
    opt = SelectivePlasticityOptimizer([dict(params=[a]), dict(params=[b], lr=0.1)], warmup_steps=0)
    a.grad, b.grad = torch.ones_like(a), torch.ones_like(b)
    opt.step()
    before = copy.deepcopy(opt.state_dict()["state"])
    weights = a.detach().clone(), b.detach().clone()
    b.grad[1] = bad
    opt.step()
    after = opt.state_dict()["state"]
    assert torch.equal(a, weights[0]) and torch.equal(b, weights[1])
    assert all(torch.equal(before[i][n], after[i][n]) for i in before for n in before[i])
    found, sample = opt.get_diagnostics(), opt.sample_gates()
    assert (found["step_count"], found["skipped_steps"]) == (1, 1)
    assert sample["g_hat"].isnan().tolist() == [False] * 3 + [True] * 2  # of b, whose gradient is not known


def test_large_but_finite_gradients_are_not_skipped():
    p = nn.Parameter(torch.ones(4, dtype=torch.float16))
    opt = SelectivePlasticityOptimizer([p])
    p.grad = torch.full_like(p, 60000.0)  # their sum is infinite in float16
    opt.step()
    assert opt.get_diagnostics()["skipped_steps"] == 0 and opt.get_diagnostics()["step_count"] == 1


def test_sparse_gradients_are_refused_before_anything_moves():
    dense, table = nn.Linear(2, 2), nn.Embedding(4, 2, sparse=True)
    opt = SelectivePlasticityOptimizer([*dense.parameters(), *table.parameters()])
    (dense(torch.ones(1, 2)) + table(torch.tensor([1]))).sum().backward()
    before = dense.weight.detach().clone()
    with pytest.raises(ValueError, match="sparse=False"):
        opt.step()
    assert torch.equal(dense.weight, before) and not opt.state


def test_parameters_without_gradient_scalars_and_empty_ones_are_fine():
    params = [nn.Parameter(torch.ones(s)) for s in ((), (1,), (0,), (3, 2))]
    opt = SelectivePlasticityOptimizer(params, warmup_steps=0)
    assert opt.get_diagnostics()["step_count"] == 0 and len(opt.sample_gates()["e_hat"]) == 0
    opt.step()
    for p in params[:3]:
        p.grad = torch.ones_like(p)
    opt.step()
    assert params[0] < 1 and params[1] < 1 and torch.equal(params[3], torch.ones(3, 2))
    assert opt.get_param_eligibility(params[3]) is None


# state


@pytest.mark.parametrize("knobs", [{}, dict(adaptive_threshold=False), dict(warmup_steps=20)])
def test_a_resumed_run_is_bit_exact(knobs):
    a = net()
    opt = ours(a, **knobs)
    feed(a, opt, 15)
    file = io.BytesIO()
    torch.save((a.state_dict(), opt.state_dict()), file)
    feed(a, opt, 15, start=15)
    b = net(9)
    again = ours(b)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    b.load_state_dict(weights), again.load_state_dict(state)
    feed(b, again, 15, start=15)
    assert torch.equal(flat(a), flat(b)) and again.param_groups[0]["warmup_steps"] == knobs.get("warmup_steps", 0)


def test_two_optimizers_never_share_a_state():
    a, b = net(), net()
    opt, other = ours(a), ours(b)
    feed(a, opt, 3)
    other.load_state_dict(opt.state_dict())
    feed(b, other, 1, start=3)
    assert opt.get_diagnostics()["step_count"] == 3 and other.get_diagnostics()["step_count"] == 4


def test_adams_state_goes_in_and_ours_comes_out():
    a, b = net(), net()
    adam = torch.optim.Adam(a.parameters(), lr=0.003, betas=(0.8, 0.95))
    feed(a, adam, 10)
    b.load_state_dict(a.state_dict())
    mine = ours(b, plasticity_k=0)
    mine.load_state_dict(adam.state_dict())
    assert (mine.param_groups[0]["lr"], mine.param_groups[0]["trace_decay"]) == (0.003, 0.95)
    feed(a, adam, 10, start=10), feed(b, mine, 10, start=10)
    assert torch.equal(flat(a), flat(b))
    back = torch.optim.Adam((c := net()).parameters())
    c.load_state_dict(b.state_dict())
    back.load_state_dict(copy.deepcopy(mine.state_dict()))
    feed(b, mine, 10, start=20), feed(c, back, 10, start=20)
    assert torch.equal(flat(b), flat(c))


def test_a_state_that_does_not_fit_is_refused_whole():
    opt = ours(model := net())
    feed(model, opt, 2)
    before = copy.deepcopy(opt.state_dict())
    wide = nn.Sequential(nn.Linear(6, 17), nn.ReLU(), nn.Linear(17, 4))
    feed(wide, wide_opt := ours(wide), 1)
    feed(other := net(), sgd := torch.optim.SGD(other.parameters(), 0.1, momentum=0.9), 1)
    fewer = SelectivePlasticityOptimizer([nn.Parameter(torch.ones(2))]).state_dict()
    beyond = copy.deepcopy(before)
    beyond["param_groups"][0]["plasticity_k"] = 99
    cases = [(wide_opt.state_dict(), "shape"), (sgd.state_dict(), "exp_avg|step"), (fewer, "parameters"), (beyond, "plasticity_k")]
    for state, word in cases:
        with pytest.raises(ValueError, match=word):
            opt.load_state_dict(state)
        now = opt.state_dict()
        assert now["param_groups"] == before["param_groups"]
        assert all(torch.equal(now["state"][i][n], before["state"][i][n]) for i in now["state"] for n in now["state"][i])


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_the_same_way(copied):
    model = net()
    opt = ours(model, adaptive_threshold=False)
    feed(model, opt, 5)
    twin, twin_opt = copied((model, opt))
    feed(model, opt, 5, start=5), feed(twin, twin_opt, 5, start=5)
    assert torch.equal(flat(model), flat(twin))


def test_parameters_added_later_have_knobs_and_a_warmup_of_their_own():
    old, new = nn.Parameter(torch.zeros(40)), nn.Parameter(torch.zeros(40))
    opt = SelectivePlasticityOptimizer([old], warmup_steps=5, plasticity_k=20)
    for _ in range(5):
        old.grad = torch.tensor(BUSY)
        opt.step()
    opt.add_param_group(dict(params=[new], lr=0.1))
    new.grad, old.grad = torch.tensor(BUSY), torch.ones(40)
    opt.step()
    assert torch.allclose(new, torch.tensor(-0.1)) and opt.param_groups[1]["plasticity_k"] == 20
    assert opt.sample_gates()["warmup_left"] == [0, 4]


def test_reset_starts_over_as_a_new_adam():
    model = net()
    opt = ours(model, plasticity_k=3.0)
    feed(model, opt, 10)
    twin = copy.deepcopy(model)
    opt.reset_eligibility()
    assert opt.get_param_eligibility(model[0].weight) is None and opt.get_diagnostics()["step_count"] == 0
    feed(model, opt, 5, start=10), feed(twin, ours(twin, plasticity_k=3.0), 5, start=10)
    assert torch.equal(flat(model), flat(twin))


# company


def test_closures_are_called_with_gradients_on():
    p = nn.Parameter(torch.ones(2))
    opt = SelectivePlasticityOptimizer([p], lr=0.1)

    def closure():
        opt.zero_grad()
        loss = p.square().sum()
        loss.backward()
        return loss

    assert opt.step(closure) == 2 and torch.allclose(p, torch.tensor(0.9))


SCHEDULES = dict(
    step=lambda o: lr_scheduler.StepLR(o, 2),
    cosine=lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    one_cycle=lambda o: lr_scheduler.OneCycleLR(o, 0.01, total_steps=12),
    cyclic=lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, cycle_momentum=True),
    restarts=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 3),
    chained=lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.ExponentialLR(o, 0.9)], [3]),
)


@pytest.mark.parametrize("name", SCHEDULES)
def test_schedulers_drive_it_as_they_drive_adam(name):
    a, b = net(), net()
    mine, theirs = ours(a, plasticity_k=0), torch.optim.Adam(b.parameters(), betas=(0.9, 0.99))
    for model, opt in ((a, mine), (b, theirs)):
        schedule = SCHEDULES[name](opt)
        for i in range(10):
            feed(model, opt, 1, start=i)
            schedule.step()
    assert torch.equal(flat(a), flat(b))


def test_a_grad_scaler_drives_it():
    model, scaler = net(), torch.amp.GradScaler("cpu", init_scale=4.0)
    opt = ours(model)
    before = flat(model)
    scaler.scale(model(torch.ones(2, 6)).square().mean()).backward()
    scaler.step(opt)
    scaler.update()
    assert not torch.equal(flat(model), before)
    before = flat(model)
    scaler.scale(model(torch.full((2, 6), inf)).square().mean()).backward()
    scaler.step(opt)
    scaler.update()
    assert torch.equal(flat(model), before)


# looking inside


def test_diagnostics_and_sample_agree_with_the_step():
    model = net()
    opt = ours(model, plasticity_k=2.0)
    feed(model, opt, 30)
    before, step = flat(model), copy.deepcopy(opt)
    found, sample = opt.get_diagnostics(), opt.sample_gates(10**6)
    gates = gates_from_sample(sample, 2.0)
    assert len(gates) == len(before) and abs(gates.mean() - found["gate_mean"]) < 1e-6
    assert abs((gates < 1).mean() - found["share_protected"]) < 1e-6 and abs(np.quantile(gates, 0.05, method="hazen") - found["gate_percentiles"][5]) < 1e-6
    assert set(found["threshold"]) == set(sample["names"]) and sample["layer"].max() == 3
    again = gates_from_sample(sample, 2.0, 75)
    assert np.array_equal(gates, again)
    assert len(gates_from_sample(sample, 2.0, layer=1)) == 16
    assert torch.equal(flat(model), before)
    assert all(torch.equal(a["exp_avg_sq"], b["exp_avg_sq"]) for a, b in zip(opt.state.values(), step.state.values()))


def test_the_sampled_gates_are_those_of_the_step():
    p = nn.Parameter(torch.zeros(40))
    opt = SelectivePlasticityOptimizer([p], warmup_steps=20, plasticity_k=1.0)
    plain = nn.Parameter(torch.zeros(40))
    adam = torch.optim.Adam([plain], betas=(0.9, 0.99))
    for g in [torch.tensor(BUSY)] * 20 + [torch.linspace(0, 1, 40)]:
        before = p.detach().clone()
        p.grad, plain.grad = g.clone(), g.clone()
        opt.step(), adam.step()
    ratio = (p.detach() - before) / (plain.detach() - before)
    assert np.allclose(gates_from_sample(opt.sample_gates(), 1.0), ratio, atol=1e-3) and ratio.min() < 0.8


def test_gates_without_a_gradient_are_unknown_not_wrong():
    model = net()
    opt = ours(model)
    feed(model, opt, 3)
    opt.zero_grad()
    found, sample = opt.get_diagnostics(), opt.sample_gates()
    assert np.isnan(found["gate_mean"]) and found["eligibility_mean"] > 0 and found["step_count"] == 3
    assert sample["g_hat"].isnan().all() and sample["e_hat"].isfinite().all() and len(gates_from_sample(sample, 5)) == 0


def test_the_part_builds_it_with_names():
    data = type("Data", (), dict(inputs=(6,), classes=4))
    opt = find_part("optimizer", "plasticity")({"plasticity_k": 2}, mlp(MLP(hidden=8), data, 0))
    assert isinstance(opt, SelectivePlasticityOptimizer) and opt.param_groups[0]["plasticity_k"] == 2
    assert opt.param_groups[0]["param_names"][0] == "1.weight"
