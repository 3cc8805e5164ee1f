"Selective plasticity wherever torch.optim.Adam goes: in several processes, under Accelerate, with every scheduler, number format and path."
import copy
import json

import pytest
import ranks
import torch
from torch import nn
from torch.optim import lr_scheduler, swa_utils

from adaptive_lab.gated_kernel import kernel
from adaptive_lab.plasticity import SelectivePlasticityOptimizer

PATHS = [p for p in ("native", "fused", "foreach", "single") if p != "native" or kernel()[0]]


def net(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 16), nn.Tanh(), nn.Linear(16, 4)).to(dtype)


def batch(i, dtype=torch.float32):
    draw = torch.Generator().manual_seed(i)
    return torch.randn(8, 6, generator=draw).to(dtype) * (torch.arange(6) < 3 + 3 * (i >= 20)), torch.randn(8, 4, generator=draw).to(dtype)


def loss_of(model, i, dtype=torch.float32):
    x, y = batch(i, dtype)
    return (model(x) - y).square().mean()


def ours(model, **knobs):
    opt = SelectivePlasticityOptimizer(model.parameters(), **{"lr": 0.01, "warmup_steps": 5, "plasticity_k": 2.0, **knobs})
    opt.attach(model, every=2)
    return opt


def feed(model, opt, steps, start=0, dtype=torch.float32, after=lambda loss: None):
    for i in range(start, start + steps):
        opt.zero_grad()
        loss = loss_of(model, i, dtype)
        loss.backward()
        opt.step()
        after(loss.item())


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


ALL = dict(coincidence=100.0, both=False, slow=0.1, anchor=0.01, keep=True)


# several processes

MANY = """
import json, sys
from datetime import timedelta
import torch
import torch.distributed as dist
from torch.nn.parallel import DistributedDataParallel
from adaptive_lab.plasticity import SelectivePlasticityOptimizer

torch.set_num_threads(1)
dist.init_process_group("gloo", timeout=timedelta(seconds=40))
rank, out = dist.get_rank(), {}

def batch(i, rank):
    draw = torch.Generator().manual_seed(1000 * rank + i)
    new = i >= 80 and rank == 1  # the other process alone would not see that the task has changed
    x = torch.randn(8, 6, generator=draw) * torch.tensor([1.0, 1, 1, 0, 0, 0]).roll(3 * new) + 2 * new
    return x * (1 + rank), torch.randn(8, 4, generator=draw)  # the processes see very different inputs

KNOBS = dict(gates=dict(), slow=dict(slow=0.1, anchor=0.05), keep=dict(keep=True), both=dict(coincidence=100.0),
             inputs=dict(coincidence=100.0, both=False), detect=dict(coincidence=100.0, both=False, detect=True, keep=True))
for name, knobs in KNOBS.items():
    torch.manual_seed(5)
    model = torch.nn.Sequential(torch.nn.Linear(6, 16), torch.nn.Tanh(), torch.nn.Linear(16, 4))
    wrapped = DistributedDataParallel(model)
    opt = SelectivePlasticityOptimizer(model.parameters(), lr=0.01, warmup_steps=5, plasticity_k=2.0, **knobs)
    opt.attach(wrapped if name == "inputs" else model, every=5)
    for i in range(130):
        opt.zero_grad()
        if i % 3 == 0:  # two passes a step, the first not shared out
            with wrapped.no_sync():
                x, y = batch(i, rank)
                (wrapped(x) - y).square().mean().backward()
        x, y = batch(i, rank)
        (wrapped(x) - y).square().mean().backward()
        opt.step()
        if i == 79 and name != "detect":
            opt.consolidate()
    mine = torch.cat([p.detach().flatten() for p in model.parameters()])
    all_of_them = [torch.zeros_like(mine) for _ in range(dist.get_world_size())]
    dist.all_gather(all_of_them, mine)
    tasks = opt.watched.tasks if opt.watched else 0
    found = dict(equal=all(torch.equal(a, mine) for a in all_of_them), sum=mine.double().sum().item(), tasks=tasks)
    if tasks:
        kept = opt.watched.layers[0].a.kept
        found.update(names=[x.name for x in opt.watched.layers], kept=kept.diagonal().tolist(), held=opt.get_diagnostics()["share_held"][opt.watched.layers[0].name])
    out[name] = found
json.dump(out, open(sys.argv[1] + str(rank), "w"))
dist.destroy_process_group()
"""


def test_two_processes_keep_the_same_weights(tmp_path):
    script = tmp_path / "many.py"
    script.write_text(MANY)
    for p in ranks.begin(script, tmp_path / "out"):
        _, complaints = p.communicate(timeout=240)
        assert p.returncode == 0, complaints[-3000:]
    one, two = (json.loads((tmp_path / f"out{rank}").read_text()) for rank in (0, 1))
    assert one == two and all(found["equal"] for found in one.values()), (one, two)
    assert len({found["sum"] for found in one.values()}) == len(one)  # each way was another
    assert [one[n]["tasks"] for n in ("gates", "both", "inputs", "detect")] == [0, 1, 1, 1] and one["inputs"]["names"] == ["0", "2"]
    assert all(found["held"] > 0.1 for found in one.values() if found["tasks"])
    kept = torch.tensor(one["inputs"]["kept"])  # inputs of size 1 in one process and of size 2 in the other: mean square (1 + 4) / 2
    assert ((kept[:3] - 2.5).abs() < 0.7).all() and (kept[3:6] == 0).all() and abs(kept[6] - 1) < 1e-5


# Accelerate


@pytest.fixture
def accelerator():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    for state in (AcceleratorState._reset_state, GradientState._reset_state):
        state()
    yield lambda **more: Accelerator(cpu=True, **more)
    AcceleratorState._reset_state(reset_partial_state=True), GradientState._reset_state()


def test_accelerate_prepares_accumulates_clips_and_schedules(accelerator):
    acc = accelerator(gradient_accumulation_steps=2)
    a, b = net(), net()
    mine, plain = ours(a, **ALL), ours(b, **ALL)
    rates = [lr_scheduler.OneCycleLR(o, 0.02, total_steps=40) for o in (mine, plain)]
    wrapped, stepper, rate = acc.prepare(a, mine, rates[0])
    for i in range(60):
        with acc.accumulate(wrapped):
            acc.backward(loss_of(wrapped, i))
            if acc.sync_gradients:
                acc.clip_grad_norm_(wrapped.parameters(), 0.05)
            stepper.step(), rate.step(), stepper.zero_grad()
        (loss_of(b, i) / 2).backward()
        if i % 2:
            nn.utils.clip_grad_norm_(b.parameters(), 0.05)
            plain.step(), rates[1].step(), plain.zero_grad()
        if i == 29:
            mine.consolidate(), plain.consolidate()
        assert torch.equal(flat(a), flat(b)), i
    assert mine.watched.tasks == 1 and mine.get_diagnostics()["share_held"]["0"] > 0
    assert mine.param_groups[0]["lr"] == plain.param_groups[0]["lr"] != 0.01
    saved = copy.deepcopy(stepper.state_dict())
    stepper.load_state_dict(saved)
    assert str(stepper.state_dict()) == str(saved)


def test_accelerate_in_bf16(accelerator):
    acc = accelerator(mixed_precision="bf16")
    model = net()
    opt = ours(model, **ALL)
    wrapped, stepper = acc.prepare(model, opt)
    before = flat(model)
    for i in range(30):
        acc.backward(loss_of(wrapped, i))
        stepper.step(), stepper.zero_grad()
        opt.consolidate() if i == 19 else None
    assert opt.watched.tasks == 1 and flat(model).isfinite().all() and (flat(model) - before).norm() > 0.1
    assert all(p.dtype == torch.float32 for p in model.parameters()) and opt.watched.layers[0].a.kept.dtype == torch.float32


# schedulers

SCHEDULES = dict(
    LambdaLR=lambda o: lr_scheduler.LambdaLR(o, lambda i: 0.95**i),
    MultiplicativeLR=lambda o: lr_scheduler.MultiplicativeLR(o, lambda i: 0.9),
    StepLR=lambda o: lr_scheduler.StepLR(o, 3),
    MultiStepLR=lambda o: lr_scheduler.MultiStepLR(o, [2, 7]),
    ConstantLR=lambda o: lr_scheduler.ConstantLR(o, 0.3, 6),
    LinearLR=lambda o: lr_scheduler.LinearLR(o, 0.1, 1.0, 8),
    ExponentialLR=lambda o: lr_scheduler.ExponentialLR(o, 0.9),
    PolynomialLR=lambda o: lr_scheduler.PolynomialLR(o, 15, 2.0),
    CosineAnnealingLR=lambda o: lr_scheduler.CosineAnnealingLR(o, 10),
    CosineAnnealingWarmRestarts=lambda o: lr_scheduler.CosineAnnealingWarmRestarts(o, 4, 2),
    CyclicLR=lambda o: lr_scheduler.CyclicLR(o, 1e-4, 1e-2, 5, cycle_momentum=True),
    OneCycleLR=lambda o: lr_scheduler.OneCycleLR(o, 0.02, total_steps=20, cycle_momentum=True),
    ReduceLROnPlateau=lambda o: lr_scheduler.ReduceLROnPlateau(o, patience=1),
    SequentialLR=lambda o: lr_scheduler.SequentialLR(o, [lr_scheduler.LinearLR(o), lr_scheduler.CosineAnnealingLR(o, 9)], [6]),
    ChainedScheduler=lambda o: lr_scheduler.ChainedScheduler([lr_scheduler.ConstantLR(o, 0.5, 4), lr_scheduler.ExponentialLR(o, 0.9)]),
    SWALR=lambda o: swa_utils.SWALR(o, 0.05, 5),
)


def test_no_scheduler_is_left_out():
    torchs = [c for c in lr_scheduler.LRScheduler.__subclasses__() if c.__module__.startswith("torch.")]
    assert {c.__name__ for c in torchs if c.__name__[0] != "_"} <= set(SCHEDULES)


def driven(opt, model, schedule, steps=16, start=0):
    seen = []

    def after(loss):
        schedule.step(loss) if isinstance(schedule, lr_scheduler.ReduceLROnPlateau) else schedule.step()
        seen.append((float(opt.param_groups[0]["lr"]), opt.param_groups[0]["betas"]))

    feed(model, opt, steps, start, after=after)
    return seen


@pytest.mark.parametrize("name", SCHEDULES)
def test_every_scheduler_drives_the_native_path_as_it_drives_adam(name):
    a, b, c = net(), net(), net()
    mine, gated = ours(a, path="native", plasticity_k=0), ours(c, path="native")
    theirs = torch.optim.Adam(b.parameters(), lr=0.01, betas=(0.9, 0.99))
    seen = driven(mine, a, SCHEDULES[name](mine))
    assert seen == driven(theirs, b, SCHEDULES[name](theirs)) and len(set(seen)) > 1
    assert torch.allclose(flat(a), flat(b), atol=1e-5)
    first = driven(gated, c, SCHEDULES[name](gated))
    assert [lr for lr, _ in first] == [lr for lr, _ in seen] or name == "ReduceLROnPlateau"
    assert not torch.allclose(flat(a), flat(c), atol=1e-4) and gated.param_groups[0]["trace_decay"] == 0.99


@pytest.mark.parametrize("name", ["OneCycleLR", "CyclicLR"])
@pytest.mark.parametrize("path", PATHS)
def test_cycled_momentum_acts_and_is_resumed(name, path):
    a, b = net(), net()
    opt = ours(a, path=path)
    schedule = SCHEDULES[name](opt)
    betas = {beta for _, beta in driven(opt, a, schedule, 7)}
    assert len({m for m, _ in betas}) > 3 and {v for _, v in betas} == {0.99}
    twin = copy.deepcopy(a)
    other = ours(twin, path=path)
    again = SCHEDULES[name](other)
    other.load_state_dict(opt.state_dict()), again.load_state_dict(schedule.state_dict())
    assert driven(opt, a, schedule, 8, start=7) == driven(other, twin, again, 8, start=7)
    assert torch.equal(flat(a), flat(twin))
    still = ours(b, path=path)
    alone = lr_scheduler.OneCycleLR(still, 0.02, total_steps=20, cycle_momentum=False) if name == "OneCycleLR" else \
        lr_scheduler.CyclicLR(still, 1e-4, 1e-2, 5, cycle_momentum=False)
    driven(still, b, alone, 15)
    assert still.param_groups[0]["lr"] == opt.param_groups[0]["lr"] and not torch.allclose(flat(a), flat(b), atol=1e-4)


# number formats and paths


@pytest.mark.parametrize("path", PATHS[1:] + ["auto"])
def test_every_path_remembers_the_same(path):
    ends = []
    for way in (PATHS[0], path):
        model = net()
        opt = ours(model, path=way, **ALL)
        feed(model, opt, 20), opt.consolidate(), feed(model, opt, 20, start=20)
        ends.append((flat(model), torch.cat([s["average"].flatten() for s in opt.state.values()])))
        assert opt.get_diagnostics()["share_held"]["0"] > 0 and all("kept" in s for s in opt.state.values())
    assert all(torch.allclose(a, b, atol=1e-5) for a, b in zip(*ends)) and not torch.equal(*ends[0])


@pytest.mark.parametrize("path", PATHS + ["auto"])
def test_bf16_parameters_on_every_path(path):
    step = []
    for k in (20.0, 0.0):
        p = nn.Parameter(torch.zeros(40, dtype=torch.bfloat16))
        opt = SelectivePlasticityOptimizer([p], warmup_steps=20, plasticity_k=k, path=path)
        for _ in range(20):
            p.grad = torch.where(torch.arange(40) < 30, 1.0, 4.0).bfloat16()
            opt.step()
        before, p.grad = p.detach().clone(), torch.ones_like(p)
        opt.step()
        step.append((p.detach() - before).abs())
    assert (step[0][30:] <= 0.1 * step[1][30:].min()).all() and torch.equal(step[0][:30], step[1][:30]) and (step[1] > 0).all()
    assert all(s[n].dtype == torch.bfloat16 for s in opt.state.values() for n in ("exp_avg", "exp_avg_sq"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_all_memories_in_another_number_format(dtype):
    model, reference = net(dtype=dtype), net()
    opts = [ours(m, **ALL) for m in (model, reference)]
    for m, o, kind in ((model, opts[0], dtype), (reference, opts[1], torch.float32)):
        feed(m, o, 20, dtype=kind), o.consolidate(), feed(m, o, 20, start=20, dtype=kind)
    assert (flat(model).float() - flat(reference)).norm() < (0.1 if dtype is torch.bfloat16 else 1e-3) * flat(reference).norm()
    assert opts[0].watched.tasks == 1 and all(s[n].dtype == dtype for s in opts[0].state.values() for n in ("average", "kept", "exp_avg"))
    twin = net(seed=1, dtype=dtype)
    other = ours(twin)
    twin.load_state_dict(model.state_dict()), other.load_state_dict(opts[0].state_dict())
    feed(model, opts[0], 5, 40, dtype), feed(twin, other, 5, 40, dtype)
    assert torch.equal(flat(model), flat(twin))


@pytest.mark.parametrize("path", PATHS)
def test_closures_on_every_path(path):
    a, b = net(), net()
    mine, plain = ours(a, path=path, **ALL), ours(b, path=path, **ALL)
    for i in range(30):
        def closure():
            mine.zero_grad()
            loss = loss_of(a, i)
            loss.backward()
            return loss

        found = mine.step(closure)
        assert found == loss_of(b, i).detach()
        feed(b, plain, 1, i)
        if i == 19:
            mine.consolidate(), plain.consolidate()
    assert torch.equal(flat(a), flat(b)) and mine.watched.tasks == 1


# Adam's state

KEYS = [dict(fused=True), dict(foreach=True), dict(capturable=True), dict(fused=None, foreach=None, capturable=False, differentiable=False)]


@pytest.mark.parametrize("keys", KEYS, ids=str)
@pytest.mark.parametrize("path", ["auto", "native"])
def test_adams_state_with_its_own_keys_goes_in_and_comes_out(keys, path):
    a, b = net(), net()
    made = {} if keys.get("capturable") else keys  # on a processor Adam refuses to step with it, but its state may come from elsewhere
    adam = torch.optim.Adam(a.parameters(), lr=0.003, betas=(0.9, 0.95), **made)
    feed(a, adam, 10)
    state = copy.deepcopy(adam.state_dict())
    state["param_groups"][0].update(keys)
    b.load_state_dict(a.state_dict())
    mine = ours(b, plasticity_k=0, path=path)
    mine.load_state_dict(state)
    assert (mine.param_groups[0]["trace_decay"], mine.param_groups[0]["lr"]) == (0.95, 0.003)
    feed(a, adam, 10, 10), feed(b, mine, 10, 10)
    assert torch.allclose(flat(a), flat(b), atol=1e-6) and mine.get_diagnostics()["step_count"] == 20
    out = copy.deepcopy(mine.state_dict())
    assert {k: out["param_groups"][0][k] for k in keys} == keys
    out["param_groups"][0].update(capturable=False)
    back = torch.optim.Adam((c := net()).parameters())
    back.load_state_dict(out)
    c.load_state_dict(b.state_dict())
    feed(a, adam, 5, 20), feed(c, back, 5, 20)
    assert torch.allclose(flat(a), flat(c), atol=1e-6)


def test_a_rate_that_is_a_tensor_and_decoupled_decay():
    state = torch.optim.Adam(net().parameters(), lr=torch.tensor(0.003), foreach=False).state_dict()
    a, b = net(), net()
    mine, plain = ours(a), ours(b, lr=0.003, trace_decay=0.999)
    mine.load_state_dict(state)
    feed(a, mine, 8), feed(b, plain, 8)
    assert torch.allclose(flat(a), flat(b), atol=1e-6)
    with pytest.raises(ValueError, match="weight_decay=0.01 is not supported"):
        mine.load_state_dict(torch.optim.AdamW(net().parameters()).state_dict())


# arrays of another size


@pytest.mark.parametrize("path", ["auto", "fused", "foreach", "single"])
@pytest.mark.parametrize("size", [3, 5000])
def test_a_parameter_that_was_resized_is_refused_before_anything_moves(path, size):
    first, grown = nn.Parameter(torch.zeros(7)), nn.Parameter(torch.zeros(50))
    opt = SelectivePlasticityOptimizer([first, grown], warmup_steps=0, path=path)
    for p in (first, grown):
        p.grad = torch.ones_like(p)
    opt.step()
    before = first.detach().clone()
    grown.grad = None
    grown.data = torch.zeros(size)
    grown.grad = torch.ones(size)
    with pytest.raises(ValueError, match=rf"exp_avg has shape \(50,\) where the parameter has shape \({size},\)"):
        opt.step()
    assert torch.equal(first, before) and opt.state[first]["step"] == 1


@pytest.mark.parametrize(
    "name, value",
    [("kept", torch.zeros(3)), ("kept", torch.tensor(0.5)), ("average", torch.zeros(3)), ("exp_avg", None), ("step", float("nan")), ("step", -5), ("threshold", "x"), ("calibration", float("nan"))],
)
def test_a_state_with_a_wrong_value_is_refused_and_changes_nothing(name, value):
    p = nn.Parameter(torch.zeros(5))
    opt = SelectivePlasticityOptimizer([p], warmup_steps=0)
    p.grad = torch.ones(5)
    opt.step()
    saved = copy.deepcopy(opt.state_dict())
    saved["state"][0][name] = value
    opt.step()
    with pytest.raises(ValueError, match=name):
        opt.load_state_dict(saved)
    assert opt.state[p]["step"] == 2
