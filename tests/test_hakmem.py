"The optimizer that finds its rate: its cycle against a naive twin, reproducible and resumed to the bit, bad input, and a monitor that sees what is planted."
import copy
import math

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_lab.hakmem.controller as controller
import adaptive_lab.hakmem.optimizer as optimizer
from adaptive_lab.evaluator import evaluator_of
from adaptive_lab.hakmem import GradientMonitor, HAKMEMEnhancedSGD
from adaptive_lab.hakmem.tables import alignment_bin, chance, progress, reward, trend_bin
from adaptive_lab.knobs import KnobError
from adaptive_lab.models import perceptron
from adaptive_lab.run import Run, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe
from adaptive_lab.training import Training, train

RATES = (1e-4, 1e-2, 1.0)


# --- a regression whose gradient can be written down: rows x, targets t, weights W (3, 4) and b (3,) ---


def batch(seed, i):
    r = np.random.default_rng([seed, i])
    x = r.normal(size=(6, 4)) * [0.1, 0.5, 1.0, 3.0]
    return x, x @ np.array([[1.0, -2.0, 0.5], [0.3, 1.0, 2.0], [-1.0, 0.2, 0.4], [0.5, 0.5, -0.5]]) + r.normal(size=(6, 3)) + 0.7


def loss_and_gradient(W, b, seed, i):
    x, t = batch(seed, i)
    e = x @ W.T + b - t
    return (e * e).mean(), [2 * e.T @ x / e.size, 2 * e.sum(0) / e.size]


def begin(seed):
    r = np.random.default_rng([seed, 99])
    return [r.normal(size=(3, 4)) * 0.4, r.normal(size=3) * 0.1]


def ours(rate, seed, steps, **knobs):
    "The optimizer on that regression: itself and its parameters."
    params = [nn.Parameter(torch.tensor(w)) for w in begin(seed)]
    opt = HAKMEMEnhancedSGD(params, lr=rate, seed=seed, **knobs)
    return go_on(opt, params, seed, range(steps))


def go_on(opt, params, seed, steps):
    for i in steps:
        value, grads = loss_and_gradient(*(p.detach().numpy() for p in params), seed, i)
        for p, g in zip(params, grads):
            p.grad = torch.tensor(g)
        opt.set_current_loss(float(value))
        opt.step()
    return opt, params


# --- the naive twin, from the equations alone: the average is stored, the tables are dictionaries, a loop over tensors ---


class Twin:
    def __init__(self, weights, rate, seed, momentum=0.9, decay=0.01, alpha=0.1, gamma=0.9):
        self.x, self.z = [w.copy() for w in weights], [w.copy() for w in weights]
        self.y, self.v = [w.copy() for w in weights], [np.zeros_like(w) for w in weights]
        self.size = math.sqrt(min((weights[0] ** 2).sum(), 3) / 12)  # of the one matrix, rows of 4: at most 1/√4 each
        self.rate, self.base, self.decay, self.seed, self.alpha, self.gamma = min(rate, 0.02 * self.size), momentum, decay, seed, alpha, gamma
        self.push, self.t, self.age, self.decisions, self.due = 1.0, 0, 0.0, 0, 8
        self.Q, self.taken, self.usual, self.before, self.seen, self.losses, self.lines = [{}, {}], None, 0.0, None, [], [], []

    def q(self, which, state):
        "A row of a table; before anything was learnt, what is called for is best and each step away from it a fifth worse."
        if state not in self.Q[which]:
            i, *rest = state
            if which == 0:  # 2 leaves the rate alone, 4 doubles it; a rising loss, or a rate that is large already, lets it be less
                called, n = max(0, i - 1) if rest[0] == 2 else i, 5
                called = min(called, 2) if rest[1] == 2 else called
            else:
                called, n = min(2, 3 - rest[0]) if i == 0 else 2 - rest[0], 3
            self.Q[which][state] = [-0.2 * abs(a - called) for a in range(n)]
        return self.Q[which][state]

    def step(self, value, grads):
        norm = math.sqrt(sum((g * g).sum() for g in grads))
        grads = [g * min(1.0, 1 / norm) for g in grads]
        self.t, self.age = self.t + 1, self.age + 1
        c, beta, along, steep, far = min(1.0, 2 / (min(self.age, self.t) + 1)), 1 - (1 - self.base) * self.push, 0.0, 0.0, 0.0
        for k, g in enumerate(grads):
            self.v[k] = 0.99 * self.v[k] + 0.01 * g * g
            e, d = np.sqrt(self.v[k] / (1 - 0.99**self.t)) + 1e-8, self.z[k] - self.x[k]
            along, steep, far = along + (g * d).sum(), steep + (g * g / e).sum(), far + (d * d * e).sum()
            self.z[k] = self.z[k] - self.rate * g / e - self.decay * self.rate / self.size * self.y[k]
            self.x[k] = (1 - c) * self.x[k] + c * self.z[k]
            self.y[k] = beta * self.x[k] + (1 - beta) * self.z[k]
        self.losses.append(value)  # 1: monitor
        self.seen += [along / math.sqrt(steep * far)] if steep * far > 1e-300 else []
        if self.t >= self.due:
            self.decide()

    def decide(self):
        m, n = (np.mean(self.seen) if self.seen else None), max(1, len(self.seen))
        now, falls = (np.mean(self.losses), np.std(self.losses) / math.sqrt(len(self.losses))), 0.0
        if self.before:
            falls = math.tanh((self.before[0] - now[0]) / (2 * math.hypot(self.before[1], now[1])))
        width = max(0.05, 0.15 * math.sqrt(8 / n))
        near = 2 if m is None else 2 + max(-2, min(2, round(2 * (0.045 - m) / width)))  # 2: state
        trend, large = (0 if falls > 0.5 else 2 if falls < -0.9 else 1), (0 if self.rate < 0.01 * self.size else 2 if self.rate >= 0.5 * self.size else 1)
        states = (near, trend, large), (near, 0 if self.push > 1.1 else 2 if self.push < 0.9 else 1)
        gain = 0.5 * falls - (0 if m is None else min(1.0, abs(0.045 - m) / 0.3))  # 6: reward, of the last action
        if self.taken:
            self.usual += (gain - self.usual) / min(self.decisions, 20)
            for which, (s, a) in enumerate(self.taken):  # 7: Bellman
                row = self.q(which, s)
                row[a] += self.alpha * (gain - self.usual + self.gamma * max(self.q(which, states[which])) - row[a])
        epsilon, actions = max(0.05, 0.2 * 0.995**self.decisions), []
        for which, s in enumerate(states):  # 3: an action, ε-greedily
            row = self.q(which, s)
            a = row.index(max(row))
            if chance(2 * self.seed + which, 2 * self.decisions) < epsilon:
                a = max(0, min(len(row) - 1, a + (1 if chance(2 * self.seed + which, 2 * self.decisions + 1) < 0.5 else -1)))
            actions.append(a)
        self.taken = list(zip(states, actions))
        factor = (0.5, 2**-0.5, 1, 2**0.5, 2)[actions[0]]  # 4: apply
        self.rate = min(4.0, max(1e-8, self.rate / self.size * factor)) * self.size
        self.age /= 4 if factor == 2 else 1
        self.push = min(1.4, max(0.7, self.push * (2**0.25, 1, 2**-0.25)[actions[1]]))
        self.lines.append((self.t, states[0], *actions, self.rate))
        self.before, self.seen, self.losses = now, [], []
        self.decisions, self.due = self.decisions + 1, self.t + min(200, max(8, self.t // 16))


def twin(rate, seed, steps):
    made = Twin(begin(seed), rate, seed)
    for i in range(steps):
        made.step(*loss_and_gradient(*made.y, seed, i))  # 5: update
    return made


def agree(rate, seed, steps):
    "Assert that the optimizer is its twin: every weight, every average, every decision, every table."
    naive, (opt, params) = twin(rate, seed, steps), ours(rate, seed, steps)
    lines = [(h["step"], tuple(h["state"]), h["action"], h["push"]) for h in opt.history]
    assert lines == [line[:4] for line in naive.lines]
    np.testing.assert_allclose([h["rate"] for h in opt.history[1:]], [line[4] for line in naive.lines[:-1]], rtol=1e-9)
    for p, y in zip(params, naive.y):
        np.testing.assert_allclose(p.detach().numpy(), y, rtol=1e-7, atol=1e-10)
    with opt.slow_weights():
        for p, x in zip(params, naive.x):
            np.testing.assert_allclose(p.detach().numpy(), x, rtol=1e-7, atol=1e-10)
    for table, learnt in zip((opt.controller.rates, opt.controller.momenta), naive.Q):
        for state, row in learnt.items():
            np.testing.assert_allclose(table.values[state], row, rtol=1e-7, atol=1e-9)
    return naive


@pytest.fixture(params=["kernel", "lists"])
def path(request, monkeypatch):
    "Both ways of making a step."
    if request.param == "lists":
        monkeypatch.setattr(optimizer, "kernel", lambda: (None, "not asked for"))
    return request.param


@pytest.mark.parametrize("rate", RATES)
@pytest.mark.parametrize("seed", range(3))
def test_the_cycle_is_that_of_the_naive_twin(path, rate, seed):
    naive = agree(rate, seed, 260)
    assert naive.decisions > 20 and len({line[2] for line in naive.lines}) > 1 and len({line[3] for line in naive.lines}) > 1


def changed(monkeypatch, what):
    "Break one part of the mechanism."
    c, Table = controller.Controller, controller.QTable
    if what == "monitor":
        monkeypatch.setattr(c, "take", lambda self, m, losses: (self.alignments.extend(-a for a in m), self.losses.extend(losses)))
    elif what == "state":
        monkeypatch.setattr(controller, "trend_bin", lambda falls: 1)
    elif what == "action":
        monkeypatch.setattr(Table, "choose", lambda self, s, *_: int(self.values[s].argmax()))
    elif what == "apply":
        monkeypatch.setattr(controller, "RATE_ACTIONS", (-1.0, -0.5, 0.0, 0.5, 0.9))
    elif what == "update":
        monkeypatch.setattr(controller, "START", 0.03)
    elif what == "reward":
        monkeypatch.setattr(controller, "reward", lambda falls, m: -reward(falls, m))
    elif what == "Bellman":
        learn = Table.learn
        monkeypatch.setattr(Table, "learn", lambda self, s, a, gain, after, rate, discount: learn(self, s, a, gain, after, rate, 0.0))
    elif what == "window":
        monkeypatch.setattr(controller, "window", lambda steps: 8)


@pytest.mark.parametrize("what", ["monitor", "state", "action", "apply", "update", "reward", "Bellman", "window"])
def test_a_broken_part_of_the_cycle_is_seen(monkeypatch, what):
    changed(monkeypatch, what)
    with pytest.raises(AssertionError):
        agree(1.0, 1, 260)


def test_the_same_seed_gives_the_same_bits_and_another_other_actions(path):
    once, again = (ours(1e-2, 4, 200) for _ in range(2))
    assert all(torch.equal(p, q) for p, q in zip(once[1], again[1])) and once[0].history == again[0].history
    params = [nn.Parameter(torch.tensor(w)) for w in begin(4)]
    other, _ = go_on(HAKMEMEnhancedSGD(params, lr=1e-2, seed=5), params, 4, range(200))
    assert [h["action"] for h in other.history] != [h["action"] for h in once[0].history]


def test_it_leaves_the_global_generators_alone():
    before = torch.get_rng_state(), np.random.get_state()[1].copy()
    ours(1e-2, 0, 40)
    assert torch.equal(torch.get_rng_state(), before[0]) and (np.random.get_state()[1] == before[1]).all()


def test_chance_is_uniform_and_depends_on_seed_and_count():
    drawn = np.array([[chance(s, n) for n in range(500)] for s in range(20)])
    assert abs(drawn.mean() - 0.5) < 0.01 and abs(drawn.std() - 12**-0.5) < 0.005 and len(np.unique(drawn)) == drawn.size
    assert abs(np.corrcoef(drawn[:, :-1].ravel(), drawn[:, 1:].ravel())[0, 1]) < 0.03


@pytest.mark.parametrize("at", [1, 8, 13, 64, 150])
def test_a_state_saved_at_any_step_goes_on_with_the_same_bits(path, at):
    whole, params = ours(1.0, 2, 180)
    opt, early = ours(1.0, 2, at)
    state = copy.deepcopy(opt.state_dict())
    later = [nn.Parameter(p.detach().clone()) for p in early]
    resumed = HAKMEMEnhancedSGD(later, lr=0.5, seed=77)  # whose settings and seed are those of the state, then
    resumed.load_state_dict(state)
    go_on(resumed, later, 2, range(at, 180))
    go_on(opt, early, 2, range(at, 180))  # saving has changed nothing
    for found in (later, early):
        assert all(torch.equal(p, q) for p, q in zip(found, params))
    assert resumed.history == whole.history and resumed.diagnostics() == whole.diagnostics() == opt.diagnostics()


def test_a_run_that_was_killed_ends_in_the_same_bits_and_keeps_what_was_measured(tmp_path):
    recipe = Recipe("digits", "mlp", "hakmem", {"run.steps": 60, "run.eval_every": 15, "model.hidden": 16, "training.accumulate": 2, "optimizer.learning_rate": 1.0})
    whole, store = Run(recipe).advance(), Store(tmp_path)
    first = Run(recipe).advance(37)
    first.save(store, "r")
    assert weights_digest(Run.resume(store, "r").model) == weights_digest(first.model)
    again = Run.resume(store, "r").advance()
    assert weights_digest(again.model) == weights_digest(whole.model) and (again.losses, again.evaluations) == (whole.losses, whole.evaluations)
    again.save(store, "r")
    kept, judge = store.load("r"), evaluator_of(recipe.to_dict())
    assert judge.metrics(kept["model"])["accuracy"] == pytest.approx(whole.evaluations[-1]["accuracy"], abs=1e-7)
    own = {name: kept["moving"].get(name, t) for name, t in kept["model"].items()}
    assert judge.metrics(own)["loss"] != judge.metrics(kept["model"])["loss"] and kept["moving"]


def test_training_tells_the_mean_of_all_batches_once_a_step(monkeypatch):
    torch.manual_seed(0)
    model, told = nn.Linear(3, 2), []
    opt = HAKMEMEnhancedSGD(model.parameters())
    monkeypatch.setattr(opt, "set_current_loss", told.append)
    data = [(torch.randn(5, 3), torch.randint(2, (5,))) for _ in range(4)]
    losses = [step.loss for step in train(model, opt, data, 3, settings=Training(accumulate=2))]
    assert told == losses and len(told) == 3


def test_it_anneals_where_noise_rules_and_needs_no_horizon():
    long, _ = ours(1.0, 3, 1500, weight_decay=0.0)
    short, _ = ours(1.0, 3, 300, weight_decay=0.0)
    assert long.history[: len(short.history)] == short.history  # nothing it did depends on the end
    rates = [h["rate"] for h in long.history]
    assert rates[-1] < 0.5 * max(rates)
    early, late = (np.mean([loss_and_gradient(*weights, 50, i)[0] for i in range(400)]) for weights in map(average, (60, 1500)))
    assert late < 1.05 < early  # the noise of the targets is 1


def average(steps):
    opt, params = ours(1.0, 3, steps, weight_decay=0.0)
    with opt.slow_weights():
        return [p.detach().numpy().copy() for p in params]


def test_without_controller_the_rate_stays():
    opt, _ = ours(3e-3, 0, 60, disable_q_controller=True)
    assert not opt.history and opt.diagnostics()["rate"] == 3e-3


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.complex64])
def test_other_types_learn_and_their_averages_come_and_go(dtype):
    torch.manual_seed(0)
    p, goal = nn.Parameter(torch.randn(5, 4).to(dtype)), torch.randn(5, 4).to(dtype)
    opt = HAKMEMEnhancedSGD([p], lr=1e-2, weight_decay=0.0)
    far = lambda: (p.detach() - goal).abs().float().square().mean().item()
    first = far()
    for _ in range(150):
        p.grad = (p.detach() - goal) * 0.1
        opt.step()
    own = p.detach().clone()
    with opt.slow_weights():
        assert far() < 0.1 * first
    assert torch.equal(p, own)


@pytest.mark.parametrize("knobs, said", [
    (dict(lr=-1.0), "learning_rate"), (dict(lr=math.nan), "learning_rate"), (dict(momentum=1.0), "momentum"), (dict(weight_decay=-0.1), "weight_decay"),
    (dict(max_grad_norm=-1.0), "max_grad_norm"), (dict(q_discount=1.0), "q_discount"), (dict(q_epsilon=1.5), "q_epsilon"), (dict(q_learning_rate="fast"), "q_learning_rate"),
    (dict(q_epsilon_decay=0.0), "q_epsilon_decay"), (dict(beta2=1.0), "beta2"),
])
def test_a_knob_that_cannot_be_is_refused_by_name(knobs, said):
    with pytest.raises(KnobError, match=said):
        HAKMEMEnhancedSGD([nn.Parameter(torch.ones(2))], **knobs)


def test_bad_input_changes_nothing():
    opt, params = ours(1e-2, 0, 20)
    before = [p.detach().clone() for p in params], copy.deepcopy(opt.state_dict())

    def refused(error, said, act):
        with pytest.raises(error, match=said):
            act()
        assert all(torch.equal(p, q) for p, q in zip(params, before[0]))
        assert str(opt.state_dict()) == str(before[1])

    for wrong in ("2", None, torch.ones(2)):
        refused(TypeError, "loss", lambda: opt.set_current_loss(wrong))
    opt.eval()
    for act, said in ((opt.step, "next step"), (lambda: opt.load_state_dict(before[1]), "loading")):
        with pytest.raises(RuntimeError, match=said):
            act()
    opt.train()
    lacking = {k: v for k, v in before[1].items() if k != "controller"}
    misfit = dict(before[1], held=[torch.ones(2) for _ in params])
    refused(ValueError, "held has shape", lambda: opt.load_state_dict(misfit))
    refused(ValueError, "controller", lambda: opt.load_state_dict(lacking))
    other = HAKMEMEnhancedSGD([nn.Parameter(torch.ones(3, 5, dtype=torch.float64)), nn.Parameter(torch.ones(3, dtype=torch.float64))])
    with pytest.raises(ValueError, match="shape"):
        other.load_state_dict(before[1])
    assert not other.state and not other.history
    broken = copy.deepcopy(before[1])
    broken["param_groups"][0]["q_discount"] = 2.0
    refused(KnobError, "q_discount", lambda: opt.load_state_dict(broken))
    params[0].grad = torch.ones(3, 4, dtype=torch.float64).to_sparse()
    refused(ValueError, "sparse", opt.step)


def test_a_gradient_that_is_not_finite_makes_no_step_and_is_counted(path):
    opt, params = ours(1e-2, 0, 20)
    before = [p.detach().clone() for p in params]
    for wrong in (math.nan, math.inf):
        params[0].grad[0, 0] = wrong
        opt.step()
    assert all(torch.equal(p, q) for p, q in zip(params, before)) and opt.diagnostics()["skipped_steps"] == 2
    go_on(opt, params, 0, range(20, 30))
    assert all(p.isfinite().all() for p in params) and not torch.equal(params[0], before[0])


def test_bins_are_ordered():
    assert [alignment_bin(m, 8) for m in (0.9, 0.12, 0.045, -0.03, -0.9)] == [0, 1, 2, 3, 4]
    assert alignment_bin(0.08, 8) == 2 and alignment_bin(0.08, 200) == 1  # the more steps, the finer
    assert [trend_bin(progress((2.0, 0.1), (x, 0.1))) for x in (1.0, 2.0, 3.0)] == [0, 1, 2]
    assert progress(None, (1.0, 0.1)) == 0 and progress((1.0, 0.1), (math.inf, 0.1)) == -1
    assert reward(1.0, 0.045) > reward(0.0, 0.045) > reward(0.0, 0.3) and reward(0.0, 9.0) == -1


# --- the monitor ---


def readings(plant, steps=60):
    "A monitor on a network of three layers whose gradients are noise of size 1, but for what `plant(step, gradients)` does to them."
    torch.manual_seed(0)
    model = perceptron([4, 8, 8, 2])
    monitor, names = GradientMonitor(model), None
    for t in range(steps):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        names = list(monitor.layers)
        plant(t, {name: layer for name, layer in monitor.layers.items()}, names)
        monitor.observe()
    return monitor, names


def scaled(layer, by):
    for p in layer:
        p.grad.mul_(by)


def test_the_monitor_is_quiet_when_nothing_is_wrong():
    monitor, names = readings(lambda t, layers, n: None)
    assert len(names) == 3 and all(r.ok for r in monitor.history)
    last = monitor.history[-1]
    assert last.total == pytest.approx(math.hypot(*last.norms.values()))


def test_the_monitor_sees_spikes_dead_and_exploding_layers_and_what_is_not_finite():
    def plant(t, layers, n):
        if t == 30:
            scaled(layers[n[0]], 20)
        if t >= 20:
            scaled(layers[n[1]], 0)
        if t >= 50:
            scaled(layers[n[2]], 30 * 3 ** (t - 50))
        if t == 40:
            layers[n[0]][0].grad[0, 0] = math.nan

    monitor, n = readings(plant)
    seen = {kind: [r.step for r in monitor.history if name in getattr(r, kind)] for kind, name in (("spikes", n[0]), ("dead", n[1]), ("exploding", n[2]), ("nonfinite", n[0]))}
    assert seen["spikes"] == [30] and seen["nonfinite"] == [40] and set(range(52, 60)) <= set(seen["exploding"]) and min(seen["exploding"]) >= 50
    assert 39 <= min(seen["dead"]) <= 41 and set(range(41, 60)) - {40} <= set(seen["dead"])
    assert not any(n[0] in r.dead or n[0] in r.exploding or n[2] in r.dead for r in monitor.history)


def test_the_monitor_watches_an_optimizer_and_lets_go():
    model, told = nn.Linear(3, 2), []
    monitor, opt = GradientMonitor(model), torch.optim.SGD(model.parameters(), 0.0)
    handle = monitor.watch(opt, every=2, tell=told.append)
    for t in range(10):
        for p in model.parameters():
            p.grad = torch.full_like(p, math.inf if t == 6 else 1.0)
        opt.step()
    assert len(monitor.history) == 5 and [r.step for r in told] == [3] and told[0].nonfinite == ("model",)
    handle.remove()
    opt.step()
    assert len(monitor.history) == 5


@pytest.mark.parametrize("given, said", [(dict(window=2), "window"), (dict(spike=0.5), "spike"), (dict(patience=True), "patience"), (dict(lines="many"), "lines")])
def test_a_monitor_that_cannot_be_is_refused_by_name(given, said):
    with pytest.raises(ValueError, match=said):
        GradientMonitor(nn.Linear(2, 2), **given)
    with pytest.raises(ValueError, match="requires_grad"):
        GradientMonitor(nn.Linear(2, 2).requires_grad_(False))
