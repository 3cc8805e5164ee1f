"The continual-learning protocol: equal streams, settings, metrics, optimizers that take part, recipes, and that it repeats bit for bit."
from contextlib import contextmanager

import numpy as np
import pytest
import torch
from torch import nn

import adaptive_lab.parts
import adaptive_lab.peers.continual  # noqa: F401 (registers learners)
import adaptive_lab.peers.regularizers  # noqa: F401
import adaptive_lab.peers.projections  # noqa: F401
from adaptive_lab.continual import Learner, Plain, Protocol, course, measure, prepared, read_recipe, run, steps_of, tiny_is_zero, train, transfer
from adaptive_lab.evidence import compare
from adaptive_lab.knobs import KnobError, Knobs, knob
from adaptive_lab.network import Network, flatten, softmax_gradient
from adaptive_lab.parts import part, parts
from adaptive_lab.replay import POLICIES, ReplayBuffer

LEARNERS = sorted(parts("learner"))
REPLAY = ["agem", "der", "derpp", "er", "er_ace"]
SHORT = {"steps_per_task": 20, "hidden": 20}


@pytest.fixture
def own_parts(monkeypatch):
    "Parts registered in a test are gone after it."
    monkeypatch.setattr(adaptive_lab.parts, "_parts", dict(adaptive_lab.parts._parts))


def test_the_methods_asked_for_are_there():
    assert set(LEARNERS) >= {"finetune", "joint", "ewc", "online_ewc", "si", "mas", "lwf", "owm", "gpm", *REPLAY}


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("setting", ["class-incremental", "task-incremental", "domain-incremental"])
def test_every_method_in_every_setting_repeats_bit_for_bit(method, setting):
    recipe = {"method": method, "setting": setting, "lr": 0.02, **SHORT}
    one, two, other = run(recipe, 3), run(recipe, 3), run(recipe, 4)
    assert torch.equal(one.learner.net.w, two.learner.net.w) and not torch.equal(one.learner.net.w, other.learner.net.w)
    assert np.array_equal(one.R, two.R) and one.steps == 100 and one.R.shape == (6, 5) and one.learner.net.w.isfinite().all()
    assert (one.masked >= one.R).all() and (setting == "class-incremental" or np.array_equal(one.R, one.masked))


@pytest.mark.parametrize("scenario", ["permuted", "rotated"])
@pytest.mark.parametrize("method", ["ewc", "lwf", "derpp"])
def test_other_scenarios(scenario, method):
    for setting, outputs in (("domain-incremental", 10), ("class-incremental", 30), ("task-incremental", 30)):
        out = run({"method": method, "scenario": scenario, "tasks": 3, "setting": setting, **SHORT}, 0)
        assert out.learner.course.classes == outputs and out.R.shape == (4, 3)


def planned(method, seed=1, **more):
    "A learner with its plan, 75 steps."
    return prepared({"method": method, **SHORT, "steps_per_task": 15, **more}, seed)[1]


def seen_by(method, monkeypatch, **more):
    "The batches that a learner was given in a run, replayed samples included."
    seen, kind = [], type(planned(method))
    step = kind.step

    def spy(self, x, y, i):
        seen.append((x.clone(), y.clone()))
        step(self, x, y, i)

    with monkeypatch.context() as m:
        m.setattr(kind, "step", spy)
        learner = run({"method": method, **SHORT, "steps_per_task": 15, **more}, 1).learner
    return seen, learner


@pytest.mark.parametrize("method", ["finetune", "joint", "si", "er", "derpp"])
def test_a_run_gives_each_step_what_is_planned(method, monkeypatch):
    seen, learner = seen_by(method, monkeypatch)
    assert len(seen) == len(learner.rows) == 75
    for (x, y), rows in zip(seen, learner.rows):
        assert torch.equal(x, learner.course.X[rows]) and torch.equal(y, learner.course.y[rows])


def test_all_methods_see_the_same_new_samples():
    first = planned("finetune").rows
    for method in set(LEARNERS) - {"joint"}:
        rows = planned(method).rows
        assert len(rows) == 75 and all(torch.equal(a, b[:10]) for a, b in zip(first, rows))


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("method", REPLAY)
@pytest.mark.parametrize("more", [{}, {"buffer": 7, "minibatch": 12}, {"batch": 3, "minibatch": 8}, {"steps_per_task": 80, "buffer": 50}])
def test_the_plan_replays_what_a_buffer_would(method, policy, more):
    learner = planned(method, policy=policy, **{"buffer": 30, **more})
    buffer, new = ReplayBuffer(learner.knobs.buffer, 1, policy), learner.batch
    for i, rows in enumerate(learner.rows):
        drawn = [buffer.sample(learner.knobs.minibatch) for _ in range(learner.draws)] if len(buffer) else []
        assert rows[new:].tolist() == sum((d[2].tolist() for d in drawn), [])
        assert learner.again[i].tolist() == sum((d[3].tolist() for d in drawn), [])
        numbers = torch.arange(i * new, (i + 1) * new)
        buffer.add(learner.course.X[rows[:new]], learner.course.y[rows[:new]], row=rows[:new], number=numbers)
    assert len(buffer) == learner.knobs.buffer


def test_the_first_step_replays_nothing_and_the_next_what_there_is():
    learner = planned("derpp", buffer=1000, minibatch=25)
    assert [len(rows) for rows in learner.rows[:5]] == [10, 30, 50, 60, 60]
    assert sorted(learner.again[1].tolist()) == sorted(2 * list(range(10)))


@pytest.mark.parametrize("method", ["der", "derpp"])
def test_stored_logits_are_those_of_the_time_when_the_sample_was_new(method, monkeypatch):
    "Also when it is shown again in a later pass."
    learner, said = planned(method, steps_per_task=40, batch=50, buffer=500, lr=0.05), []
    forward = Network.forward
    monkeypatch.setattr(Network, "forward", lambda self, x: said.append(forward(self, x)) or said[-1])
    train(learner, range(45))
    assert len(learner.course.tasks[0].y) < 40 * 50
    for i, z in enumerate(said):
        assert torch.equal(learner.logits[50 * i : 50 * i + 50], z[:50])
    assert learner.logits[45 * 50 :].eq(0).all() and learner.again[44].max() < 44 * 50


def test_joint_takes_as_many_steps_and_has_accuracy_only():
    out = run({"method": "joint", **SHORT}, 0)
    assert out.steps == 100 and out.learner.joint
    assert set(measure({"method": "joint", **SHORT}, 0)) == {"accuracy", "masked_accuracy"}
    assert set(measure({"method": "joint", "setting": "domain-incremental", **SHORT}, 0)) == {"accuracy"}


def test_joint_learns_all_tasks_from_the_start():
    out = run({"method": "joint", "epochs": 3}, 0)
    assert out.R[1].min() > 30 and out.R[-1].min() > 80


def test_a_told_task_trains_its_own_outputs_only():
    _, learner = prepared({"setting": "task-incremental", **SHORT}, 0)
    task = learner.course.tasks[2]
    learner.gradient(task.X[:10], task.y[:10], 40)
    bias = learner.net.grad[-10:]
    assert bias[[4, 5]].abs().min() > 0 and bias[[0, 1, 2, 3, 6, 7, 8, 9]].eq(0).all()


def test_tasks_of_unequal_size():
    made = course(Protocol(classes_per_task=4), 0)
    assert made.outputs == [range(0, 4), range(4, 8), range(8, 10)] and made.classes == 10
    assert run({"classes_per_task": 4, **SHORT}, 0).R.shape == (4, 3)
    assert run({"classes_per_task": 4, "setting": "domain-incremental", **SHORT}, 0).learner.course.classes == 4


def test_steps():
    made, n = course(Protocol(), 0), [len(t.y) for t in course(Protocol(), 0).tasks]
    assert steps_of(Protocol(), made.tasks) == [k // 10 for k in n]
    assert steps_of(Protocol(epochs=2.5), made.tasks) == [int(2.5 * k) // 10 for k in n]
    assert steps_of(Protocol(steps_per_task=7), made.tasks) == [7] * 5
    assert steps_of(Protocol(batch=4000), made.tasks) == [1] * 5
    assert run({"batch": 1000, "hidden": 5}, 0).steps == 5


def test_metrics_by_hand():
    R = [[10, 20, 30], [80, 25, 30], [60, 90, 40], [50, 95, 70]]
    found = transfer(R)
    assert found["accuracy"] == pytest.approx((50 + 95 + 70) / 3)
    assert found["forgetting"] == pytest.approx((30 - 5) / 2)  # 80 - 50, and 90 - 95
    assert found["backward_transfer"] == pytest.approx((-30 + 5) / 2)
    assert found["forward_transfer"] == pytest.approx((5 + 10) / 2)  # 25 - 20, and 40 - 30
    assert transfer([[10], [90]]) == {"accuracy": 90}


def test_forgetting_counts_from_the_best_and_transfer_from_the_first():
    found = transfer([[90, 0, 0], [50, 0, 0], [80, 90, 0], [70, 60, 90]])
    assert found["forgetting"] == pytest.approx((10 + 30) / 2)  # from 80, which is not the first; the untrained 90 does not count
    assert found["backward_transfer"] == pytest.approx((20 - 30) / 2)


class Spy(torch.optim.SGD):
    "Gradient descent that counts what the protocol asks of it."

    def __init__(self, model, lr):
        super().__init__(model.parameters(), lr)
        self.model, self.ends, self.inside, self.seen = model, 0, 0, 0
        model[1].register_forward_hook(self.look)

    def look(self, layer, given, out):
        self.seen += 1

    def consolidate(self):
        self.ends += 1

    @contextmanager
    def slow_weights(self):
        self.inside += 1
        yield


class SpyKnobs(Knobs):
    lr: float = knob(0.1, "learning rate", ge=0)


def test_an_optimizer_takes_part(own_parts):
    part("optimizer", "spy", SpyKnobs)(lambda knobs, model: Spy(model, knobs.lr))
    spied, plain = (run({"optimizer": o, "lr": 0.1, "method": "er", **SHORT}, 0) for o in ("spy", "sgd"))
    optimizer = spied.learner.optimizer
    assert (optimizer.ends, optimizer.inside) == (5, 5) and optimizer.seen == 100 + 6
    assert torch.allclose(spied.learner.net.w, plain.learner.net.w, atol=1e-4)  # hooked layers are run by torch: the same numbers
    untold = run({"optimizer": "spy", "boundaries": False, **SHORT}, 0).learner.optimizer
    assert untold.ends == 0 and untold.inside == 5
    with pytest.raises(ValueError, match="slow weights of its own"):
        run({"optimizer": "spy", "average": 0.9, **SHORT}, 0)


def test_the_test_sees_the_slow_weights_and_the_training_does_not(own_parts):
    class Zero(torch.optim.SGD):
        @contextmanager
        def slow_weights(self):
            params = [p for g in self.param_groups for p in g["params"]]
            own = [p.detach().clone() for p in params]
            [p.data.zero_() for p in params]
            yield
            [p.data.copy_(o) for p, o in zip(params, own)]

    part("optimizer", "zero", SpyKnobs)(lambda knobs, model: Zero(model.parameters(), knobs.lr))
    zero, plain = run({"optimizer": "zero", **SHORT}, 0), run({"lr": 0.1, **SHORT}, 0)
    assert np.array_equal(zero.R[0], plain.R[0]) and (zero.R[1:, 1:] == 0).all() and (plain.R[-1, -1] > 0)
    assert torch.allclose(zero.learner.net.w, plain.learner.net.w, atol=1e-6)


def test_an_optimizer_that_replaces_storage_is_found(own_parts):
    class Replacing(torch.optim.SGD):
        def step(self):
            for p in self.param_groups[0]["params"]:
                p.data = p.data - 0.1 * p.grad

    part("optimizer", "replacing", SpyKnobs)(lambda knobs, model: Replacing(model.parameters(), knobs.lr))
    with pytest.raises(RuntimeError, match="in place"):
        run({"optimizer": "replacing", **SHORT}, 0)


@pytest.mark.parametrize("optimizer", ["adam", "plasticity"])
def test_the_other_optimizers_run(optimizer):
    assert run({"optimizer": optimizer, "method": "er", **SHORT}, 0).R.max() > 50


def test_adam_on_one_vector_is_adam():
    one = run({"optimizer": "adam", **SHORT}, 0).learner.net
    _, learner = prepared({"optimizer": "adam", **SHORT}, 0)
    learner.optimizer = torch.optim.Adam(learner.net.model.parameters())
    train(learner, range(100))
    assert torch.allclose(one.w, learner.net.w, atol=1e-5)


def test_the_average_is_tested_and_not_trained():
    plain, averaged = run(SHORT, 0), run({"average": 0.99, **SHORT}, 0)
    assert torch.equal(plain.learner.net.w, averaged.learner.net.w)
    assert np.array_equal(plain.R[0], averaged.R[0]) and not np.array_equal(plain.R[1:], averaged.R[1:])


@pytest.mark.parametrize("method", ["ewc", "online_ewc", "si", "mas", "lwf", "owm", "gpm"])
def test_a_method_that_needs_boundaries_refuses_to_go_without(method):
    with pytest.raises(ValueError, match="told when a task ends"):
        run({"method": method, "boundaries": False, **SHORT}, 0)


def test_replay_needs_no_boundaries():
    told, untold = (run({"method": "derpp", "boundaries": b, **SHORT}, 0).R for b in (True, False))
    assert np.array_equal(told, untold)


@pytest.mark.parametrize(
    "recipe, word",
    [
        ({"bufer": 200}, "unknown knob 'bufer'"),
        ({"buffer": 200}, "unknown knob 'buffer'"),  # fine-tuning has none
        ({"method": "er", "alpha": 1}, "unknown knob 'alpha'"),
        ({"method": "er", "buffer": 0}, "buffer=0 is not allowed"),
        ({"method": "derpp", "beta": -1}, "beta=-1 is not allowed"),
        ({"setting": "class"}, "class-incremental"),
        ({"batch": 0}, "batch=0"),
        ({"lr": float("nan")}, "lr=nan"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipe, word):
    with pytest.raises(KnobError, match=word):
        measure(recipe, 0)


def test_an_unknown_method_is_refused_with_what_there_is():
    with pytest.raises(LookupError, match="Did you mean 'derpp'"):
        measure({"method": "derp"}, 0)


@pytest.mark.parametrize("method", LEARNERS)
@pytest.mark.parametrize("optimizer", ["sgd", "adam", "plasticity"])
def test_no_name_is_declared_twice(method, optimizer):
    knobs, _, _ = read_recipe({"method": method, "optimizer": optimizer})
    assert knobs.method == method


def test_a_name_declared_twice_is_refused(own_parts):
    class Double(Knobs):
        lr: float = knob(0.1, "a rate of its own")

    part("learner", "double", Double)(Learner)
    with pytest.raises(KnobError, match="'lr' is declared twice"):
        read_recipe({"method": "double"})


def test_measure_takes_part_in_a_comparison():
    arms = {"plain": {"lr": 0.1, **SHORT}, "averaged": {"lr": 0.1, "average": 0.9, **SHORT}}
    found = compare(arms, range(2), "adaptive_lab.continual:measure", cache=False, jobs=1, higher_is_better={"accuracy": True})
    assert set(found.metrics) == {"accuracy", "forgetting", "backward_transfer", "forward_transfer", "masked_accuracy"}
    assert not any(c.error for c in found.cells)
    assert found.values("plain", "accuracy")[1] == measure(arms["plain"], 1)["accuracy"]


def test_a_run_that_diverges_counts_as_guessing():
    found = measure({"method": "ewc", "lam": 1e6, "lr": 1, **SHORT}, 0)
    assert all(np.isfinite(v) for v in found.values()) and found["accuracy"] < 25


def test_threads_are_given_back():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        measure(SHORT, 0)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)


@pytest.mark.parametrize("before", [False, True])
def test_tiny_numbers_are_as_before_after_a_run(before):
    tiny = torch.tensor(1e-30)
    torch.set_flush_denormal(before)
    try:
        with pytest.raises(KeyError), tiny_is_zero():
            assert tiny * 1e-10 == 0
            raise KeyError
        run({"optimizer": "adam", **SHORT}, 0)
        assert bool(tiny * 1e-10 == 0) == before
    finally:
        torch.set_flush_denormal(False)


def test_adam_leaves_no_tiny_numbers():
    "Pixels that are black in all pictures of a task would leave them, and they are slow."
    learner = run({"optimizer": "adam", "steps_per_task": 1500, "classes_per_task": 5, "hidden": 5}, 0).learner
    for average in learner.optimizer.state[learner.net.weights].values():
        assert not ((average != 0) & (average.abs() < torch.finfo(torch.float32).tiny / 10)).any()


@pytest.mark.parametrize("more", [{"momentum": 0.9}, {"weight_decay": 0.1}])
def test_descent_is_torchs_and_only_without_momentum(more):
    plain, other = (prepared({**SHORT, **m}, 0)[1] for m in ({}, more))
    assert isinstance(other.optimizer, torch.optim.SGD) and not isinstance(plain.optimizer, torch.optim.SGD)
    by_torch = prepared(SHORT, 0)[1]
    by_torch.optimizer = torch.optim.SGD(by_torch.net.model.parameters(), lr=0.1)
    for learner in (plain, other, by_torch):
        train(learner, range(100))
    assert torch.allclose(plain.net.w, by_torch.net.w, atol=1e-5) and not torch.allclose(plain.net.w, other.net.w, atol=1e-2)


def test_global_generators_are_left_alone():
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    measure({"method": "derpp", **SHORT}, 0)
    assert torch.equal(before, torch.random.get_rng_state())


def test_a_model_of_another_kind_is_run_by_torch():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 6), nn.Tanh(), nn.Linear(6, 3))
    net = Network(model)
    x, y = torch.randn(5, 4), torch.tensor([0, 1, 2, 0, 1])
    for _ in range(2):  # the second backward does not add to the first
        net.backward(softmax_gradient(net.forward(x), y))
    expected = torch.autograd.grad(nn.functional.cross_entropy(model(x), y), list(model.parameters()))
    assert net.layers is None and torch.allclose(net.grad, torch.cat([g.flatten() for g in expected]), atol=1e-6)
    with pytest.raises(ValueError, match="plain perceptron"):
        net.power_sum(torch.zeros(5, 3), 2)


def test_the_vector_is_the_model():
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 1))
    weights = flatten(model)
    weights.data.fill_(3)
    assert all(p.eq(3).all() for p in model.parameters()) and weights.grad.eq(0).all()


def test_ewc_holds_what_the_first_task_used():
    "The stiffer a weight, the less it moves in the second task."
    recipe = {"method": "ewc", "scenario": "permuted", "setting": "domain-incremental", "tasks": 2, "hidden": 30, "lr": 0.05}
    _, learner = prepared({**recipe, "lam": 20.0, "steps_per_task": 140}, 0)
    first = learner.course.tasks[0]
    train(learner, range(140))
    learner.end_task(0, first)
    anchor, stiff = learner.net.w.clone(), learner.stiffness > learner.stiffness.quantile(0.9)
    train(learner, range(140, 280))
    moved = (learner.net.w - anchor).abs()
    free = Learner(Plain(), learner.net, learner.optimizer, learner.course, 0)
    free.rows = learner.rows
    learner.net.w.copy_(anchor)
    train(free, range(140, 280))
    moved_free = (learner.net.w - anchor).abs()
    assert moved[stiff].mean() < 0.6 * moved_free[stiff].mean()
