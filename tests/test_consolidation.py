"What outlives a task: slow weights, kept eligibility, held directions; and that a model which is watched is otherwise left alone."
import copy
import io
import pickle

import pytest
import torch
from torch import nn

from adaptive_lab import coincidence
from adaptive_lab.coincidence import Coincidence, Layer, rows_of
from adaptive_lab.consolidation import ConsolidatingAdam
from adaptive_lab.gated_adam import GatedAdam
from adaptive_lab.gates import eligibility, hill, strided, typical
from adaptive_lab.plasticity import SelectivePlasticityOptimizer
from adaptive_lab.run import Run
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe

inf, nan = float("inf"), float("nan")
pytestmark = pytest.mark.filterwarnings("ignore:Complex modules")
STRONG = dict(coincidence=1e5, both=False)


def linear(bias=True, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(8, 12, bias), nn.Tanh(), nn.Linear(12, 4, bias)).to(dtype)


def conv(bias=True, seed=0):
    torch.manual_seed(seed)
    last = nn.Conv2d(6, 4, 3, stride=2, padding=(1, 2), dilation=(1, 2), bias=bias)
    return nn.Sequential(nn.Conv2d(2, 6, 3, padding=1, bias=bias), nn.Tanh(), last, nn.Flatten())


def inputs(model, task, n=256, seed=0):
    "Task 0 uses some of the inputs, task 1 all of them; a thousandth of noise."
    shape = (n, 2, 7, 7) if isinstance(model[0], nn.Conv2d) else (n, 8)
    draw = torch.Generator().manual_seed(100 * task + seed)
    x, free = torch.randn(shape, generator=draw), torch.arange(shape[1]) < shape[1] / 2
    return x * (free | bool(task)).view(-1, *[1] * (len(shape) - 2)) + (task and 0.3)


def ours(model, attach=True, every=1, **knobs):
    opt = SelectivePlasticityOptimizer(model.parameters(), **{"lr": 0.01, "warmup_steps": 0, "plasticity_k": 1.0, **knobs})
    if attach:
        opt.attach(model, every)
    return opt


def backward(model, task, i, dtype=None):
    x = inputs(model, task, 8, 1 + i).to(next(model.parameters()).dtype)
    out = model(x)
    target = torch.randn(out.shape[1], generator=torch.Generator().manual_seed(7 + task)).to(out.dtype)
    (out - target * x.flatten(1).mean(1, keepdim=True)).abs().square().mean().backward()


def feed(model, opt, task=0, steps=20, start=0):
    for i in range(start, start + steps):
        opt.zero_grad()
        backward(model, task, i)
        opt.step()


def flat(model):
    return torch.cat([p.detach().flatten() for p in model.parameters()])


def bits(tensors):
    return [t.detach().clone().view(torch.uint8) for t in tensors]


def same_bits(a, b):
    return all(map(torch.equal, a, b))


# slow weights


@pytest.mark.parametrize("share", [0.05, 1.0])
def test_slow_weights_are_the_formula(share):
    a, b = linear(dtype=torch.float64), linear(dtype=torch.float64)
    slow, plain = ours(a, slow=share), ours(b)
    for t in range(1, 41):
        feed(a, slow, start=t, steps=1), feed(b, plain, start=t, steps=1)
        average = flat(b) if t == 1 else average + (flat(b) - average) / (1 + share * t)
        assert torch.equal(flat(a), flat(b))  # an average alone moves nothing
    assert torch.allclose(torch.cat([s["average"].flatten() for s in slow.state.values()]), average, rtol=0, atol=1e-14)
    assert slow.extra_bytes() == dict(slow=8 * len(average), keep=0, coincidence=0)
    slow.param_groups[0]["slow"] = 0.0
    feed(a, slow, start=41, steps=1)
    assert not any(slow.extra_bytes().values())


def test_the_anchor_draws_each_step_back():
    model = linear(dtype=torch.float64)
    opt = ours(model, slow=0.2, anchor=0.3)
    feed(model, opt, steps=5)
    for t in range(6, 12):
        twin, free = copy.deepcopy((model, opt))
        free.param_groups[0]["slow"] = 0.0
        feed(twin, free, start=t, steps=1)
        due = {n: (a := s["average"]) + (q.detach() - a) / (1 + 0.2 * t) for (n, q), s in zip(twin.named_parameters(), opt.state.values())}
        feed(model, opt, start=t, steps=1)
        for (n, p), q in zip(model.named_parameters(), twin.parameters()):
            assert torch.allclose(opt.state[p]["average"], due[n], rtol=0, atol=1e-14)
            assert torch.allclose(p, q + 0.3 * (due[n] - q), rtol=0, atol=1e-14) and not torch.allclose(p, q, atol=1e-6)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.complex64])
def test_slow_weights_come_and_go(dtype):
    model = linear(dtype=dtype)
    opt = ours(model, slow=0.5, anchor=0.01)
    feed(model, opt, steps=8)
    own, slow = bits(model.parameters()), bits(s["average"] for s in opt.state.values())
    assert not same_bits(own, slow)
    with pytest.raises(ZeroDivisionError):
        with opt.slow_weights():
            assert same_bits(bits(model.parameters()), slow)
            with opt.slow_weights():
                assert same_bits(bits(model.parameters()), slow)
            assert same_bits(bits(model.parameters()), slow)
            1 / 0
    assert same_bits(bits(model.parameters()), own) and same_bits(bits(s["average"] for s in opt.state.values()), slow)
    with ours(linear()).slow_weights():
        pass  # there are none


@pytest.mark.parametrize("bad", [nan, inf])
def test_a_skipped_step_moves_nothing_that_is_remembered(bad):
    model = linear()
    opt = ours(model, slow=0.1, anchor=0.1, keep=True, detect=True, **STRONG)
    feed(model, opt)
    opt.consolidate()
    feed(model, opt, 1, 3)
    with torch.no_grad():
        model[0].weight[0] = -0.0
    before, watched = copy.deepcopy(opt.state_dict()), copy.deepcopy(opt.watched.state_dict())
    weights, steps = bits(model.parameters()), opt.novelty.steps
    opt.zero_grad()
    (1e4 * model(inputs(model, 1)).square().sum()).backward()  # the hooks see it
    model[2].bias.grad[1] = bad
    opt.step()
    after, still = opt.state_dict(), opt.watched.state_dict()
    assert same_bits(bits(model.parameters()), weights) and opt.param_groups[0]["skipped_steps"] == 1 and opt.novelty.steps == steps
    for i, state in before["state"].items():
        assert set(state) >= {"average", "kept"}
        assert all(torch.equal(torch.as_tensor(v), torch.as_tensor(after["state"][i][n])) for n, v in state.items())
    for name, layer in watched["layers"].items():
        assert all(torch.equal(layer[s][n], still["layers"][name][s][n]) for s in "ag" for n in ("now", "kept"))
        assert all(layer[s]["seen"] == still["layers"][name][s]["seen"] > 0 for s in "ag")
    assert watched["steps"] == still["steps"]
    seen = opt.watched.layers[0].a.seen
    feed(model, opt, 1, 1)
    assert opt.watched.layers[0].a.seen == seen + 1  # the skipped batch is not among what is summed up later


def test_the_share_held_is_told_at_any_time():
    model = linear()
    opt = ours(model, **STRONG)
    share = lambda: opt.get_diagnostics()["share_held"]["0"]
    feed(model, opt)
    assert share() == 0
    opt.consolidate()
    held = share()
    assert held > 0.1
    feed(model, opt, 1)
    assert abs(share() - held) < 1e-5
    opt.param_groups[0]["coincidence"] = 0.0
    assert share() == 0


# kept eligibility


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.complex64])
def test_keep_is_the_maximum_over_tasks(dtype):
    model = linear(dtype=dtype)
    opt, most = ours(model, attach=False, keep=True), None
    for task in range(3):
        feed(model, opt, task % 2, steps=10, start=10 * task)
        opt.consolidate()
        now = []
        for s in opt.state.values():
            e = eligibility(torch.view_as_real(s["exp_avg_sq"]) if dtype.is_complex else s["exp_avg_sq"], float(s["step"]), 0.99)
            now.append(hill(e, typical(strided(e))).flatten())
        now = torch.cat(now)
        most = now if most is None else torch.maximum(most, now)
        kept = [torch.view_as_real(s["kept"]) if dtype.is_complex else s["kept"] for s in opt.state.values()]
        assert torch.equal(torch.cat([k.flatten() for k in kept]), most) and 0 < most.max() <= 1
    assert not torch.equal(most, now)  # an earlier task had more somewhere
    assert opt.extra_bytes()["keep"] == sum(p.nbytes for p in model.parameters())


def test_what_was_kept_protects_when_the_trace_has_faded():
    ends = {}
    for keep in (False, True):
        p = nn.Parameter(torch.zeros(40))
        opt = ConsolidatingAdam([p], warmup_steps=0, plasticity_k=20, keep=keep, trace_decay=0.9)
        for i in range(150):
            if i == 50:
                opt.consolidate()
                start = p.detach().clone()
            p.grad = torch.where(torch.arange(40) < 10, 1.0, 0.01) if i < 50 else torch.where(torch.arange(40) >= 30, 1.0, 0.01)
            opt.step()
        ends[keep] = (p.detach() - start).abs()[:10].mean().item()
    assert ends[True] < 0.1 * ends[False]


def test_consolidate_does_nothing_that_was_not_asked_for():
    model = linear()
    opt = ours(model)
    feed(model, opt)
    before, weights = copy.deepcopy(opt.state_dict()), flat(model)
    opt.consolidate()
    after = opt.state_dict()
    assert str(after) == str(before) and torch.equal(flat(model), weights) and set(after) == {"state", "param_groups"}
    assert opt.extra_bytes() == dict(slow=0, keep=0, coincidence=0) and opt.watched is None
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


# held directions


def moved(make, **knobs):
    "How far the answers to the first task's inputs move in the second, layer by layer, each on the inputs it had."
    model = make()
    opt = ours(model, **knobs)
    feed(model, opt, 0, 30)
    opt.consolidate()
    x, before = inputs(model, 0), []
    with torch.no_grad():
        for layer in model:
            before.append((x, x := layer(x)))
        with torch.enable_grad():
            feed(model, opt, 1, 30)
        return torch.stack([(layer(a) - b).norm() for layer, (a, b) in zip(model, before) if hasattr(layer, "weight")]), flat(model)


@pytest.mark.parametrize("make", [linear, conv])
@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize("both", [True, False])
def test_answers_to_old_inputs_stay_within_a_tenth(make, bias, both):
    free, held = (moved(lambda: make(bias), coincidence=c, both=both) for c in (0.0, 1e5))
    assert (held[0] <= 0.1 * free[0]).all() and (free[0] > 0.5).all()


def test_two_tasks_are_held_and_not_the_first_alone():
    change = []
    for ends in (1, 2):
        model = linear()
        opt = ours(model, **STRONG)
        feed(model, opt, 0), opt.consolidate(), feed(model, opt, 1)
        opt.consolidate() if ends == 2 else None
        x = inputs(model, 1)
        old = model(x).detach()
        feed(model, opt, 1, start=100)
        change.append((model(x) - old).norm())
    assert opt.watched.tasks == 2 and change[1] <= 0.1 * change[0]


def test_each_group_has_its_own_strength():
    def run(first, second, loose=None):
        model = linear()
        groups = [dict(params=list(model[0].parameters()), coincidence=first), dict(params=list(model[2].parameters()), coincidence=second)]
        if loose is not None:
            groups = [dict(params=[model[0].weight], coincidence=first), dict(params=[model[0].bias], coincidence=loose), groups[1]]
        opt = SelectivePlasticityOptimizer(groups, lr=0.01, warmup_steps=0, both=False)
        opt.attach(model, every=1)
        feed(model, opt, 0, 30)
        opt.consolidate()
        x, bias = inputs(model, 0), model[0].bias.detach().clone()
        hidden = model[:2](x).detach()
        old = [model[0](x).detach(), model[2](hidden).detach()]
        feed(model, opt, 1, 30)
        with torch.no_grad():
            answers, turn = model[0](x) - old[0], model[0].bias - bias
            return answers.norm(), (model[2](hidden) - old[1]).norm(), (answers - turn).norm(), turn.norm()

    free, first, second, loose = run(0.0, 0.0), run(1e5, 0.0), run(0.0, 1e5), run(1e5, 0.0, 0.0)
    assert first[0] <= 0.1 * free[0] and first[1] > 0.5 * free[1]
    assert second[1] <= 0.1 * free[1] and second[0] > 0.5 * free[0]
    assert loose[2] <= 0.1 * free[2] and loose[3] > 0.5 * free[3]  # a bias that is not held moves, and the weight beside it is


def test_without_strength_it_is_as_if_unattached():
    a, b = linear(), linear()
    held, free = ours(a, **STRONG), ours(b, attach=False, **STRONG)
    feed(a, held), feed(b, free)
    assert torch.equal(flat(a), flat(b))  # nothing is held before the first task has ended
    held.consolidate(), free.consolidate()
    held.param_groups[0]["coincidence"] = 0.0
    feed(a, held, 1), feed(b, free, 1)
    assert same_bits(bits(a.parameters()), bits(b.parameters()))
    held.param_groups[0]["coincidence"] = 1e5
    feed(a, held, 1, start=20), feed(b, free, 1, start=20)
    assert not torch.equal(flat(a), flat(b))


def test_threshold_activations_and_gradients_each_change_the_result(monkeypatch):
    "The ablation: what is left out of the mechanism, and how far the old answers then move."
    make, knobs = linear, dict(coincidence=100.0, both=True)
    whole = moved(make, **knobs)
    others = dict(threshold=moved(make, threshold_percentile=25, **knobs), gradients=moved(make, coincidence=100.0, both=False))
    monkeypatch.setattr(coincidence, "rows_of", lambda layer, a, d: (rows_of(layer, a, d)[0].roll(4, 1), rows_of(layer, a, d)[1]))
    others["activations"] = moved(make, **knobs)
    monkeypatch.undo()
    others["gates and all"] = moved(make, plasticity_k=0.0)
    ends = [whole[1], *(weights for _, weights in others.values())]
    assert all((p - q).norm() > 1e-3 for i, p in enumerate(ends) for q in ends[:i])
    assert (others["activations"][0][0] > 5 * whole[0][0]) and others["gates and all"][0].min() > 5 * whole[0].max()


def test_an_active_input_is_held_and_more_firmly_where_errors_were():
    "Two inputs, two outputs: input 0 was active, output 0 had errors, so the scaled eigenvalues of its side are 2 and 0."
    for both, gates in ((True, [[1 / 3, 1], [1 / 2, 1]]), (False, [[1 / 2, 1], [1 / 2, 1]])):
        layer = nn.Linear(2, 2, bias=False)
        watched = Layer("one", layer)
        watched.saw(torch.tensor([[1.0, 0.0]]), torch.tensor([[1.0, 0.0]]))
        watched.fold()
        before = layer.weight.detach().clone()
        with torch.no_grad():
            layer.weight.add_(1)
        watched.hold([layer.weight], [before], 1.0, both)
        assert torch.allclose(layer.weight - before, torch.tensor(gates), atol=1e-5)
        assert abs((1 - watched.gates().mean().item()) - (1 - torch.tensor(gates).mean().item())) < 1e-5


def test_input_and_output_of_any_rank():
    for make, shape in ((nn.Linear, (3,)), (nn.Linear, (4, 5, 3)), (nn.Conv2d, (3, 5, 5)), (nn.Conv2d, (4, 3, 5, 5))):
        layer = make(3, 2) if make is nn.Linear else make(3, 2, 2)
        opt = ConsolidatingAdam(layer.parameters(), **STRONG)
        opt.attach(layer, every=1)
        x = torch.randn(shape, generator=torch.Generator().manual_seed(0))
        for call in (lambda: layer(x), lambda: layer(input=x)):
            call().square().sum().backward()
            opt.step()
        opt.consolidate()
        assert opt.watched.tasks == 1 and opt.watched.layers[0].a.kept.isfinite().all()


# what leaves a mark


def test_only_a_pass_that_is_trained_on_leaves_a_mark():
    model = linear()
    opt = ours(model, **STRONG)
    x = inputs(model, 0)
    model.eval()
    model(x).sum().backward()
    model.train()
    model(x)  # nothing comes back
    with torch.no_grad():
        model(x)
    with torch.inference_mode():
        model(x)
    assert opt.watched.nbytes() == 0 and all(side.seen == 0 for layer in opt.watched.layers for side in (layer.a, layer.g))
    model(x).sum().backward()
    assert all(side.new_seen == 1 for layer in opt.watched.layers for side in (layer.a, layer.g))


def test_one_step_in_ten_is_looked_at_and_all_its_passes():
    model = linear()
    opt = ours(model, every=10, **STRONG)
    for i in range(25):
        for _ in range(3):
            model(inputs(model, 0)).sum().backward()
        opt.step()
    assert [layer.a.seen for layer in opt.watched.layers] == [6, 6]


def test_accumulated_gradients_count_like_one_batch():
    kept = []
    for parts in (1, 4):
        model = linear()
        opt = ours(model, **STRONG)
        for x in inputs(model, 0).split(256 // parts):
            (model(x).square().mean() / parts).backward()
        opt.step()
        opt.consolidate()
        kept.append([side.kept for layer in opt.watched.layers for side in (layer.a, layer.g)])
    assert all(torch.allclose(a, b, rtol=1e-3, atol=1e-4) for a, b in zip(*kept))


def test_a_gradient_that_is_differentiated_again_is_not_kept_as_a_graph():
    model = linear()
    opt = ours(model, **STRONG)
    x = inputs(model, 0).requires_grad_()
    (grad,) = torch.autograd.grad(model(x).sum(), x, create_graph=True)
    (model(x).sum() + grad.square().sum()).backward()
    opt.step()
    assert not any(side.now.requires_grad for layer in opt.watched.layers for side in (layer.a, layer.g))


@pytest.mark.parametrize("scale", [2.0**90, 2.0**127])
def test_an_overflow_of_a_grad_scaler_leaves_nothing_infinite(scale):
    "At 2**90 the gradients are finite and their squares are not; at 2**127 neither is."
    model, scaler = linear(), torch.amp.GradScaler("cpu", init_scale=scale)
    opt = ours(model, **STRONG)
    for i in range(4):
        opt.zero_grad()
        scaler.scale((10 * model(inputs(model, 0, seed=i))).square().mean()).backward()
        scaler.step(opt)
        scaler.update()
    assert all(side.now is None or side.now.isfinite().all() for layer in opt.watched.layers for side in (layer.a, layer.g))
    feed(model, opt)
    opt.consolidate()
    feed(model, opt, 1)
    assert flat(model).isfinite().all() and opt.watched.tasks == 1


def test_a_layer_used_twice_is_seen_twice_and_held():
    class Twice(nn.Module):
        def __init__(self):
            super().__init__()
            torch.manual_seed(0)
            self.one, self.last = nn.Linear(8, 8), nn.Linear(8, 4)

        def forward(self, x):
            return self.last(torch.tanh(self.one(torch.tanh(self.one(x)))))

        def __getitem__(self, i):
            return self.one

    change = {}
    for strength in (0.0, 1e5):
        model = Twice()
        opt = ours(model, coincidence=strength, both=False, detect=True)
        feed(model, opt, 0, 40)
        assert not strength or opt.watched.layers[0].a.seen == 80 and opt.watched.layers[1].a.seen == 40
        assert (opt.novelty.mean[4:] == 0).all() and (opt.novelty.mean[:4] != 0).all()  # of the inputs, not of what the layer made of them
        opt.consolidate()
        x = inputs(model, 0)
        old = model(x).detach()
        feed(model, opt, 1, 15)
        change[strength] = (model(x) - old).norm()
    assert change[1e5] <= 0.1 * change[0.0]


def test_layers_that_share_a_weight_are_held():
    model = nn.Sequential(nn.Linear(8, 8), nn.Tanh(), nn.Linear(8, 8))
    model[2].weight = model[0].weight
    opt = ours(model, **STRONG)
    feed(model, opt)
    opt.consolidate()
    x = inputs(model, 0)
    old = model(x).detach()
    feed(model, opt, 1)
    assert (model(x) - old).norm() < 0.1 * old.norm() and len(opt.watched.layers) == 2


def test_what_is_frozen_or_in_no_group_stands_still():
    model = nn.Sequential(nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 8), nn.Linear(8, 4))
    model[0].bias.requires_grad_(False)
    model[1].requires_grad_(False)
    ps = [model[0].weight, model[2].weight, *model[3].parameters()]  # neither the bias of 2
    opt = SelectivePlasticityOptimizer([*ps, model[0].bias], warmup_steps=0, **STRONG)
    opt.attach(model, every=1)
    still = [model[0].bias, *model[1].parameters(), model[2].bias]
    before, weights = bits(still), bits(ps)
    for task in range(2):
        feed(model, opt, task)
        opt.consolidate()
    feed(model, opt, 1)
    assert same_bits(bits(still), before) and not any(map(torch.equal, bits(ps), weights))
    assert [layer.name for layer in opt.watched.layers] == ["0", "2", "3"]


def test_a_layer_that_joins_later_is_held():
    change = {}
    for strength in (0.0, 1e5):
        model = linear()
        opt = SelectivePlasticityOptimizer(model[0].parameters(), lr=0.01, warmup_steps=0, coincidence=1e5, both=False)
        opt.attach(model, every=1)
        feed(model, opt)
        opt.add_param_group(dict(params=list(model[2].parameters()), coincidence=strength))
        feed(model, opt, start=20)
        opt.consolidate()
        hidden = model[:2](inputs(model, 0)).detach()
        old = model[2](hidden).detach()
        feed(model, opt, 1)
        change[strength] = (model[2](hidden) - old).norm()
    assert change[1e5] <= 0.1 * change[0.0]


# detection


def stream(model, opt, steps, shift, start=0):
    "Steps at which a task was found to have ended."
    found = []
    for i in range(start, start + steps):
        x = torch.randn(10, 8, generator=torch.Generator().manual_seed(i)) + shift
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
        found += [i] * (opt.watched.tasks > len(found) + stream.before)
    stream.before += len(found)
    return found


@pytest.mark.parametrize("group", [0, 1])
def test_a_new_task_is_detected_and_nothing_else(group):
    model, stream.before = linear(), 0
    groups = [dict(params=list(m.parameters()), detect=i == group) for i, m in enumerate((model[0], model[2]))]
    opt = SelectivePlasticityOptimizer(groups, warmup_steps=0, **STRONG)
    opt.attach(model, every=5)
    shift = torch.tensor([2.0, -2.0] * 4)
    assert stream(model, opt, 300, 0 * shift) == []
    with torch.no_grad():
        model(50 + shift.expand(10, 8))
    model.eval()
    model(50 + shift.expand(10, 8)).sum().backward()  # evaluation is not training
    model.train()
    (hit,) = stream(model, opt, 300, shift, 300)
    assert 300 <= hit < 315
    assert len(stream(model, opt, 100, -shift, 600)) == 1
    for g in opt.param_groups:
        g["detect"] = False
    assert stream(model, opt, 60, 3 * shift, 700) == []


def test_a_task_that_was_told_is_not_detected_again():
    model, stream.before = linear(), 1
    opt = ours(model, detect=True, every=1, **STRONG)
    stream.before = 0
    assert stream(model, opt, 200, 0.0) == []
    opt.consolidate()
    stream.before = 1
    assert opt.watched.tasks == 1 and stream(model, opt, 200, 3.0, 200) == []
    opt.consolidate(), opt.consolidate()  # of the second nothing was seen
    assert opt.watched.tasks == 2


def test_inputs_that_are_not_finite_or_of_another_size_do_not_end_it():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(1, 2, 3), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    opt = ours(model, detect=True, **STRONG)
    for i, size in enumerate([6] * 30 + [9] * 30 + [6] * 70):
        x = torch.randn(10, 1, size, size, generator=torch.Generator().manual_seed(i))
        if i == 70:
            opt.novelty.saw(torch.full((36,), nan))
        opt.zero_grad()
        model(x).square().mean().backward()
        opt.step()
    assert opt.watched.tasks == 0 and opt.novelty.mean.isfinite().all() and opt.novelty.steps == 70
    assert opt.novelty.nbytes() == 2 * 4 * 36


def test_detection_alone_remembers_no_directions():
    model, stream.before = linear(), 0
    opt = ours(model, detect=True, keep=True)
    stream(model, opt, 100, 0.0), stream(model, opt, 20, 3.0, 100)
    assert opt.extra_bytes()["coincidence"] == opt.novelty.nbytes() == 2 * 4 * 8
    assert opt.watched.nbytes() == opt.watched.tasks == 0 and opt.extra_bytes()["keep"] > 0


RUN = {"run.steps": 330, "run.eval_every": 100, "run.threads": 1, "data.steps_per_task": 150, "model.hidden": 32}
OURS = {"optimizer.coincidence": 10.0, "optimizer.slow": 0.2, "optimizer.keep": True, "optimizer.anchor": 0.01}


@pytest.mark.parametrize("detect", [False, True])
def test_in_a_run_each_task_is_folded_once_and_a_saved_run_goes_on(tmp_path, detect):
    recipe = Recipe("split_digits", "mlp", "plasticity", RUN | OURS | {"optimizer.detect": detect})
    run, store = Run(recipe).advance(215), Store(tmp_path)
    run.save(store, "it")
    assert run.optimizer.watched.tasks == 1
    again = Run.resume(store, "it")
    state, other = run.optimizer.state_dict(), again.optimizer.state_dict()
    assert str(state["novelty"]) == str(other["novelty"]) and (state["novelty"]["steps"] > 0) == detect
    run.advance(), again.advance()
    assert run.optimizer.watched.tasks == again.optimizer.watched.tasks == 2
    assert same_bits(bits(run.model.parameters()), bits(again.model.parameters()))


# to save it


def state_of(opt):
    file = io.BytesIO()
    torch.save(opt.state_dict(), file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_a_state_saved_amid_a_task_goes_on_bit_for_bit():
    knobs = dict(slow=0.1, anchor=0.01, keep=True, detect=True, adaptive_threshold=False, **STRONG)
    a = linear()
    opt = ours(a, every=3, **knobs)
    feed(a, opt, 0, 25)
    opt.consolidate()
    feed(a, opt, 1, 34)
    weights, state = copy.deepcopy(a.state_dict()), state_of(opt)
    assert state["novelty"]["recent"] and state["watched"]["layers"]["0"]["a"]["now"] is not None
    b = linear(seed=5)
    b.load_state_dict(weights)
    other = ours(b, every=3)
    feed(b, other, 0, 2)  # it has seen something itself
    b.load_state_dict(weights)
    other.load_state_dict(state)
    for model, o in ((a, opt), (b, other)):
        feed(model, o, 1, 20, start=34)
        o.consolidate()
        feed(model, o, 0, 20, start=60)
    assert same_bits(bits(a.parameters()), bits(b.parameters()))
    assert str(opt.state_dict()) == str(other.state_dict()) and other.extra_bytes() == opt.extra_bytes()


def test_turning_a_knob_after_loading_still_acts():
    model = linear()
    opt = ours(model, **STRONG)
    feed(model, opt)
    opt.consolidate()
    opt.load_state_dict(state_of(opt))
    twin, free = copy.deepcopy((model, opt))
    opt.param_groups[0]["coincidence"] = 0.0
    feed(model, opt, 1), feed(twin, free, 1)
    assert torch.equal(flat(model), flat(twin))


def test_an_earlier_state_forgets_what_was_held_since():
    for tasks in (0, 1):
        a, b = linear(), linear()
        opt, straight = ours(a, **STRONG), ours(b, **STRONG)
        for model, o in ((a, opt), (b, straight)):
            feed(model, o, 0, 5)
            o.consolidate() if tasks else None
            feed(model, o, 1, 5, start=5)
        weights, state = copy.deepcopy(a.state_dict()), state_of(opt)
        feed(a, opt, 1, 20), opt.consolidate(), feed(a, opt, 0, 2)
        a.load_state_dict(weights)
        opt.load_state_dict(state)
        feed(a, opt, 1, 10, start=10), feed(b, straight, 1, 10, start=10)
        assert torch.equal(flat(a), flat(b)) and opt.watched.tasks == tasks
    opt.consolidate()
    plain = torch.optim.Adam(linear().parameters()).state_dict()
    opt.load_state_dict(plain)  # knows of no directions
    assert opt.watched.tasks == 0 and opt.watched.nbytes() == 0 and opt.model is a


@pytest.mark.parametrize("watching", [True, False])
def test_a_state_of_other_layers_is_refused_and_changes_nothing(watching):
    big = nn.Sequential(nn.Linear(8, 13), nn.Tanh(), nn.Linear(13, 4))
    theirs = ours(big, **STRONG)
    feed(big, theirs), theirs.consolidate()
    model = linear()
    opt = ours(model, **(STRONG if watching else {}))
    feed(model, opt)
    opt.consolidate()
    broken = ours(named := linear(), **STRONG)
    feed(named, broken)
    broken = broken.state_dict()
    broken["state"][0]["exp_avg"] = torch.zeros(3)  # right layers, wrong moments
    other = state_of(theirs)
    other["state"] = {}
    before, weights = str(opt.state_dict()), flat(model)
    for state, word in ((state_of(theirs), "other|watches layers|shape"), (other, "watches layers"), (broken, "exp_avg has shape")):
        with pytest.raises(ValueError, match=word):
            opt.load_state_dict(state)
        assert str(opt.state_dict()) == before and torch.equal(flat(model), weights) and (opt.watched is not None) == watching
        assert {len(m._forward_hooks) for m in (model[0], model[2])} == {int(watching)}


def test_a_state_with_directions_needs_a_model():
    model = linear()
    opt = ours(model, **STRONG)
    feed(model, opt), opt.consolidate()
    lone = ours(linear(), attach=False)
    with pytest.raises(ValueError, match=r"attach\(model\)"):
        lone.load_state_dict(opt.state_dict())
    assert not lone.state and lone.param_groups[0]["coincidence"] == 0
    adam = torch.optim.Adam(linear().parameters())
    adam.load_state_dict(opt.state_dict())
    assert adam.state_dict()["state"][0]["step"] == 20


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["deepcopy", "pickle"])
def test_a_copy_goes_on_without_the_model_and_feeds_nobody(copied):
    model, lonely = linear(), linear()
    opt, unread = (ours(m, slow=0.1, detect=True, **STRONG) for m in (model, lonely))
    for m, o in ((model, opt), (lonely, unread)):
        feed(m, o), o.consolidate(), feed(m, o, 1, 5)
    twin, other = copied((model, opt))
    seen = [(x.a.seen, x.a.now.clone()) for x in opt.watched.layers]
    feed(twin, other, 1, 10, start=5)
    assert other.model is other.watched is None and other.get_diagnostics()["step_count"] == 35
    assert all(x.a.seen == n and torch.equal(x.a.now, now) for x, (n, now) in zip(opt.watched.layers, seen)) and opt.watched.inputs is None
    feed(model, opt, 1, 10, start=5), feed(lonely, unread, 1, 10, start=5)
    assert torch.equal(flat(model), flat(lonely)) and not torch.equal(flat(model), flat(twin))
    twin.load_state_dict(model.state_dict())
    other.attach(twin, every=1)
    other.load_state_dict(opt.state_dict())
    feed(model, opt, 1, 5, start=15), feed(twin, other, 1, 5, start=15)
    assert torch.equal(flat(model), flat(twin)) and other.watched.layers[0].layer is twin[0]


# attach and detach


def hooks(model):
    return [len(m._forward_hooks) + len(m._forward_pre_hooks) + len(m._forward_hooks_with_kwargs) for m in model.modules()]


def test_attach_and_detach_leave_no_hooks():
    model = linear()
    opt = ours(model, detect=True, **STRONG)
    once = hooks(model)
    assert sum(once) > 0
    opt.attach(model)
    assert hooks(model) == once
    other = linear()
    with pytest.raises(ValueError, match="no layer whose weight is in this optimizer"):
        opt.attach(other)
    assert sum(hooks(other)) == 0 and hooks(model) == once and opt.model is model
    opt.detach(), opt.detach()
    assert sum(hooks(model)) == 0 and opt.watched is opt.model is None
    feed(model, opt), opt.consolidate()  # goes on


def test_it_begins_to_watch_when_the_knob_is_turned():
    model = linear()
    opt = ours(model)
    feed(model, opt, steps=3)
    assert sum(hooks(model)) == 0
    opt.param_groups[0]["coincidence"] = 10.0
    feed(model, opt, steps=3), opt.consolidate()
    assert opt.watched.tasks == 1 and opt.get_diagnostics()["tasks"] == 1


@pytest.mark.parametrize("make", [
    lambda: nn.Sequential(nn.Embedding(8, 4), nn.LayerNorm(4)),
    lambda: nn.Conv2d(2, 2, 3, padding=1, padding_mode="reflect"),
    lambda: nn.Sequential(nn.Conv2d(2, 2, 3, groups=2), nn.Conv2d(2, 2, 3, padding="same")),
    lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)),
    lambda: nn.Linear(3, 3, dtype=torch.complex64),
])
def test_a_model_without_layers_is_refused(make):
    model = make()
    opt = ours(model)  # nothing is asked for yet
    with pytest.raises(ValueError, match="nothing can be attached"):
        ours(model, **STRONG)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    before = flat(model)
    opt.param_groups[0]["coincidence"] = 1.0
    with pytest.raises(ValueError, match="nothing can be attached"):
        opt.step()
    assert torch.equal(flat(model), before) and sum(hooks(model)) == 0


def test_bad_arguments_of_attach():
    for every in (0, -1, 2.5):
        with pytest.raises(ValueError, match=f"every={every}"):
            ours(linear(), every=every, **STRONG)
    with pytest.raises(ValueError, match="every=0"):
        Coincidence(linear(), 0)


def test_hooks_of_a_step_are_called_once():
    GatedAdam(linear().parameters())
    ConsolidatingAdam(linear().parameters())
    model, calls = linear(), []
    opt = ours(model, **STRONG)
    opt.register_step_post_hook(lambda *_: calls.append(1))
    feed(model, opt, steps=3)
    assert len(calls) == 3
