"VWPR on a running training: every kind of value through a recipe, live knobs, resume and replay to the bit, copies that are independent."
import copy
from typing import get_args

import pytest
import torch

from adaptive_lab.error_signals import Watch
from adaptive_lab.knobs import KnobError, walk
from adaptive_lab.live import Live
from adaptive_lab.models import perceptron
from adaptive_lab.run import Run, replay, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe, RecipeError, Tape, load_session, save_session
from adaptive_lab.training import NonFiniteLoss, train
from adaptive_lab.value_kinds import WEIGHTS, Kinds
from adaptive_lab.valued_adam import LINES, OnInput, OnOutput, ValuedAdam, VWPRAdam, phi_at, sample_phi

SHORT = {"run.steps": 30, "run.eval_every": 10, "run.threads": 1, "model.hidden": 16, "data.batch_size": 96, "optimizer.alpha": 0.05, "optimizer.lr": 0.01}
FORMS = [(kinds, signal) for kinds in get_args(Kinds) for signal in (("gradient", "persistence", "rarity") if set(kinds.split("+")) & set(WEIGHTS) else ("gradient",))]


def recipe(granularity="sample", data="noisy_digits", **more):
    return Recipe(data, "mlp", "vwpr", {**SHORT, "optimizer.granularity": granularity, **more})


def phi(run):
    return torch.cat([v.phi for v in run.optimizer.wrapper.values.values()])


def hooks(model):
    return [h for m in model.modules() for found in (m._forward_pre_hooks, m._forward_hooks) for h in found.values() if isinstance(h, (OnInput, OnOutput, Watch))]


@pytest.mark.parametrize("granularity, signal", FORMS)
def test_every_kind_learns_and_resumes_to_the_bit(tmp_path, granularity, signal):
    tape = Tape([(5, "optimizer.alpha", 0.1), (12, "optimizer.phi_clip_value", 2.0), (17, "optimizer.memory", 0.8)])
    made = recipe(granularity, **{"optimizer.signal": signal})
    straight = replay(made, tape)
    plain = Run(recipe(granularity, **{"optimizer.signal": signal, "optimizer.alpha": 0.0})).advance()
    assert weights_digest(straight.model) != weights_digest(plain.model) and (phi(plain) == 1).all() and not (phi(straight) == 1).any()
    store = Store(tmp_path)
    replay(made, tape, 14).save(store, "r")
    resumed = Run.resume(store, "r").advance()
    assert weights_digest(resumed.model) == weights_digest(straight.model)
    assert (resumed.losses, resumed.evaluations) == (straight.losses, straight.evaluations)
    assert torch.equal(phi(resumed), phi(straight)) and resumed.optimizer.history == straight.optimizer.history


def test_values_that_stand_still_are_plain_adam():
    adam = Run(Recipe("noisy_digits", "mlp", "adam", {k: v for k, v in SHORT.items() if "alpha" not in k})).advance()
    for granularity in ("unit", "output", "feature"):
        run = Run(recipe(granularity, **{"optimizer.alpha": 0.0})).advance()
        assert weights_digest(run.model) == weights_digest(adam.model) and run.losses == adam.losses, granularity


def test_a_session_replays_from_its_file(tmp_path):
    run = Run(recipe(**{"training.accumulate": 2})).advance(10)
    run.change({"optimizer.sample_signal": "loss", "optimizer.relative": True, "optimizer.l1_lambda": 0.3})
    run.advance(20)
    save_session(tmp_path / "s.json", run.session())
    session = load_session(tmp_path / "s.json")
    again = replay(session.recipe, session.tape, session.until)
    assert again.session().weights == session.weights and torch.equal(phi(again), phi(run))
    assert weights_digest(replay(session.recipe, None, 20).model) != session.weights


@pytest.mark.parametrize("granularity, knob, value", [
    ("sample", "alpha", 1.0), ("sample", "l1_lambda", 5.0), ("sample", "phi_clip_value", 0.5), ("sample", "normalize_phi", False), ("sample", "sample_signal", "loss"),
    ("unit", "relative", True), ("unit", "normalize_phi", False), ("unit", "lr", 0.1), ("output", "margin", 5.0), ("output", "memory", 0.5), ("feature", "memory", 0.1),
])
def test_a_knob_turned_at_step_ten_acts_from_there_on(granularity, knob, value):
    made, seen = recipe(granularity, **{"optimizer.alpha": 0.2}), {}
    for turned in (False, True):
        run = Run(made).advance(10)
        if turned:
            run.change({f"optimizer.{knob}": value})
        seen[turned] = weights_digest(run.model), weights_digest(run.advance().model)
    assert seen[True][0] == seen[False][0] and seen[True][1] != seen[False][1]


def test_bounds_hold_from_the_next_step_on():
    run = Run(recipe("unit")).advance(10)
    run.change({"optimizer.normalize_phi": False, "optimizer.phi_clip_value": 0.5})
    assert phi(run.advance(11)).max() <= 0.5 + 1e-6
    for name, value in dict(normalize_phi=False, phi_clip_value=0.5).items():
        assert run.optimizer.param_groups[0][name] == value and getattr(run.optimizer.wrapper.knobs, name) == value


def test_what_is_built_asks_for_a_reset():
    run = Run(recipe())
    assert {k.name for k in walk(VWPRAdam) if not k.live} == {"granularity", "signal"}
    for name in ("granularity", "signal"):
        with pytest.raises(KnobError, match="reset"):
            run.change({f"optimizer.{name}": "unit"})
    live = Live(recipe())
    live.run.advance(5)
    live.reset({"optimizer.granularity": "output"})
    assert live.run.index == 0 and list(live.run.optimizer.wrapper.values) == ["output"]


def test_streams_without_numbers_are_refused_at_once_and_others_are_not():
    short = {"run.steps": 30, "run.eval_every": 30, "data.limit": 20_000, "model.num_layers": 1, "model.dim": 16}
    text = lambda granularity: Recipe("dialect", "adaptive_transformer", "vwpr", short | {"optimizer.granularity": granularity})
    with pytest.raises(RecipeError, match="samples are numbered.*Windows.*another granularity"):
        Run(text("output+sample"))
    live = Live(text("unit"))
    with pytest.raises(RecipeError, match="rows"):
        live.reset({"optimizer.granularity": "sample"})
    assert live.run.optimizer.wrapper.weights == "unit" and len(live.run.advance().losses) == 30
    tasks = Run(recipe("sample", "split_digits", **{"data.steps_per_task": 10})).advance()
    assert len(phi(tasks)) == len(tasks.data.train.y) and (phi(tasks) != 1).any()


def test_rows_are_those_of_the_batches():
    stream = Run(recipe()).data.train
    for i in (0, 14, 15, 500):  # 1438 samples in batches of 96: the 15th runs over the end
        x, y = stream[i]
        assert torch.equal(stream.X[stream.rows(i)], x) and torch.equal(stream.y[stream.rows(i)], y)
    half = stream.shard(1, 2)
    assert torch.equal(stream.rows(3, half.part), stream.rows(3)[48:]) and torch.equal(half[3][1], stream.y[stream.rows(3)[48:]])


def test_only_the_samples_met_get_another_value_all_batches_of_a_step():
    run = Run(recipe(**{"training.accumulate": 3, "run.steps": 2})).advance(1)
    met = torch.cat([run.data.train.rows(i) for i in range(3)])
    moved = (phi(run) != 1).nonzero().flatten()
    assert len(met) == 288 and torch.equal(met.sort().values, moved)


def test_wrong_labels_lose_their_value():
    from adaptive_lab.data.digits import digit_arrays

    run = Run(recipe(**{"data.noise": 0.3, "run.steps": 600, "run.eval_every": 600, "data.batch_size": 32, "optimizer.alpha": 0.3})).advance()
    wrong = run.data.train.y != digit_arrays()[1]
    assert 0.25 < wrong.float().mean() < 0.35
    assert phi(run)[wrong].median() < 0.3 < 1 < phi(run)[~wrong].median()


def test_features_and_margins_act_in_the_plain_training_loop():
    torch.manual_seed(0)
    X, y = torch.randn(64, 6), torch.arange(64) % 3
    model = perceptron([6, 8, 3])
    optimizer = ValuedAdam(VWPRAdam(granularity="feature+output", alpha=0.05), model, features=6, outputs=3)
    steps = train(model, optimizer, [(X, y)], 5)
    with torch.no_grad():
        optimizer.wrapper.values["output"].raw[0] += 3.0
        before = model(X).clone() - model.eval()(X)
    assert torch.allclose(before[:, 0], -optimizer.wrapper.values["output"].phi[0].log().expand(64)) and (before[:, 1:] == 0).all()
    list(steps)
    with torch.no_grad():
        x = X * optimizer.wrapper.values["feature"].phi
        h = torch.relu(x @ model[1].weight.T + model[1].bias) @ model[3].weight.T + model[3].bias
        assert torch.allclose(model.eval()(X), h, atol=1e-6) and (optimizer.wrapper.values["feature"].phi != 1).all()


def test_a_copy_of_a_run_goes_its_own_way():
    made = recipe("feature+output", **{"optimizer.alpha": 0.2})
    run = Run(made).advance(10)
    model, optimizer = copy.deepcopy((run.model, run.optimizer))
    assert len(hooks(model)) == 2 and not {id(h.values) for h in hooks(model)} & {id(h.values) for h in hooks(run.model)}
    assert {id(h.values) for h in hooks(model)} == {id(v) for v in optimizer.wrapper.values.values()}
    digest, values = weights_digest(model), [v.phi.clone() for v in optimizer.wrapper.values.values()]
    run.advance()
    assert weights_digest(model) == digest and all(torch.equal(v.phi, old) for v, old in zip(optimizer.wrapper.values.values(), values))
    list(train(model, optimizer, run.data.train, 30, loss=optimizer.loss, start=dict(batch=10, step=10)))
    assert weights_digest(model) == weights_digest(run.model) == weights_digest(replay(made).model)


@pytest.mark.parametrize("granularity, signal", [("feature+output", "gradient"), ("unit", "rarity")])
def test_a_second_optimizer_of_a_model_replaces_the_hooks_of_the_first(granularity, signal):
    run = Run(recipe(granularity, **{"optimizer.signal": signal})).advance(3)
    many = len(hooks(run.model))
    copied = copy.deepcopy(run.model)  # hooks are copied with it
    for model in (run.model, copied):
        ValuedAdam(run.knobs["optimizer"], model, **run._needed["optimizer"])
        assert len(hooks(model)) == many
        ValuedAdam(VWPRAdam(granularity="tensor"), model)
        assert not hooks(model)


def test_a_state_that_does_not_fit_changes_nothing():
    run, other = Run(recipe()).advance(5), Run(recipe("unit")).advance(5)
    adam = Run(Recipe("noisy_digits", "mlp", "adam", {k: v for k, v in SHORT.items() if "alpha" not in k})).advance(5)
    before = copy.deepcopy(run.optimizer.state_dict())
    for state, said in ((other.optimizer.state_dict(), "sample.raw.samples"), (adam.optimizer.state_dict(), "and here are .'values'.")):
        with pytest.raises(ValueError, match=said):
            run.optimizer.load_state_dict(state)
    after = run.optimizer.state_dict()
    mine, theirs = after["mechanisms"]["values"], before["mechanisms"]["values"]
    assert torch.equal(mine["values"]["sample.raw.samples"], theirs["values"]["sample.raw.samples"]) and mine["record"] == theirs["record"]
    assert all(torch.equal(after["state"][i]["exp_avg"], s["exp_avg"]) for i, s in before["state"].items())


def test_a_loaded_state_shares_no_tensor_with_its_source():
    a, b = Run(recipe()).advance(5), Run(recipe())
    b.optimizer.load_state_dict(a.optimizer.state_dict())
    kept = copy.deepcopy(b.optimizer.state_dict())
    a.advance()
    now = b.optimizer.state_dict()
    mine, theirs = now["mechanisms"]["values"], kept["mechanisms"]["values"]
    assert torch.equal(mine["values"]["sample.raw.samples"], theirs["values"]["sample.raw.samples"]) and mine["record"] == theirs["record"]
    assert all(torch.equal(now["state"][i][k], v) for i, s in kept["state"].items() for k, v in s.items())


def test_a_loss_of_nobody_or_of_unknown_samples_is_named():
    run = Run(recipe())
    batch = run.data.train[0]
    with pytest.raises(ValueError, match="96 samples and meet.. was told nothing"):
        run.optimizer.loss(run.model, batch)
    run.optimizer.meet([torch.arange(3)])
    with pytest.raises(ValueError, match="told 3 samples"):
        run.optimizer.loss(run.model, batch)
    torch.nn.functional.cross_entropy(run.model(batch[0]), batch[1]).backward()
    with pytest.raises(ValueError, match="loss=optimizer.loss"):
        run.optimizer.step()
    assert (phi(run) == 1).all()


@pytest.mark.parametrize("granularity", ["sample", "feature", "output"])
def test_a_batch_that_is_not_finite_leaves_no_trace_in_the_next_step(granularity):
    made = recipe(granularity)
    run, clean = Run(made).advance(5), Run(made).advance(6)
    good, before = run.data.train.X, phi(run)
    run.data.train.X = torch.full_like(good, float("nan"))
    with pytest.raises(NonFiniteLoss):
        run.advance(6)
    assert torch.equal(phi(run), before)
    run.data.train.X = good
    run.advance(6)
    assert weights_digest(run.model) == weights_digest(clean.model) and torch.equal(phi(run), phi(clean))


def test_the_record_stays_small_and_ends_with_the_present():
    optimizer = ValuedAdam(VWPRAdam(granularity="tensor"), perceptron([4, 3, 2]))
    for optimizer.wrapper.steps in range(1, 20_001):
        optimizer.mechanisms["values"]._record()
    h = optimizer.history
    assert LINES / 2 <= len(h) <= LINES and h.steps[0] == 0 and h.steps[-1] > 20_000 - h.stride and set(h.rows[0]) == set(h.rows[-1])


def test_the_bounds_of_a_picture_are_the_bounds_of_a_step():
    "What a histogram shows for waiting knobs is what the next step makes, but for the step itself."
    for granularity in ("unit", "feature", "output"):
        run = Run(recipe(granularity, **{"optimizer.normalize_phi": False})).advance(20)
        seen = phi_at(sample_phi(run.optimizer.mechanisms["values"], 10**6), True, 1.1)
        run.change({"optimizer.normalize_phi": True, "optimizer.phi_clip_value": 1.1, "optimizer.alpha": 0.0})
        assert torch.allclose(seen, phi(run.advance(21)), atol=2e-6), granularity
