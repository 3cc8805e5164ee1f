"Mechanisms around an optimizer: every combination that makes sense runs and replays to the last bit, any other says why."
import copy
import itertools
import json

import pytest
import torch

from adaptive_lab.cli import recipe_from_flags
from adaptive_lab.knobs import KnobError
from adaptive_lab.live import Live
from adaptive_lab.mechanisms import Composed, Mechanism
from adaptive_lab.parts import UnknownPart
from adaptive_lab.run import Run, replay, weights_digest
from adaptive_lab.store import Store
from adaptive_lab.tape import Recipe, RecipeError, Session, session_code
from adaptive_lab.training import NonFiniteLoss, cross_entropy

SHORT = {"run.steps": 24, "run.eval_every": 12, "run.threads": 1}
TEXT = {"data.context": 16, "data.limit": 30_000, "data.validation_windows": 4, "model.num_layers": 2, "model.dim": 16, "values.granularity": "output",
        "heads.every": 4, "heads.efficiency_factor": 1.0, "heads.remove_after": 1}
PLASTIC = {"optimizer.warmup_steps": 4, "optimizer.coincidence": 2.0}
SETS = [c for n in (1, 2, 3) for c in itertools.combinations(("heads", "rate", "values"), n)]
TURNS = {"heads": ("heads.budget", 0.25), "rate": ("rate.q_epsilon", 0.0), "values": ("values.alpha", 0.05)}


def recipe(optimizer="adam", mechanisms=(), data="noisy_digits", model="mlp", **more):
    known = {"optimizer", "data", "model", "run", *mechanisms}
    knobs = SHORT | (TEXT if model == "adaptive_transformer" else {}) | (PLASTIC if optimizer == "plasticity" else {}) | more
    return Recipe(data, model, optimizer, {a: v for a, v in knobs.items() if a.split(".")[0] in known}, mechanisms)


def text(optimizer, mechanisms, **more):
    return recipe(optimizer, mechanisms, "dialect", "adaptive_transformer", **more)


@pytest.mark.parametrize("mechanisms", SETS, ids="+".join)
@pytest.mark.parametrize("optimizer", ["sgd", "adamw", "plasticity", "hakmem"])
def test_every_combination_replays_and_resumes_to_the_last_bit(optimizer, mechanisms, tmp_path):
    made = text(optimizer, mechanisms)
    if optimizer == "hakmem" and "rate" in mechanisms:
        with pytest.raises(ValueError, match="'hakmem', which has a Q-controller of its own"):
            Run(made).optimizer
        return
    run = Run(made).advance(9)
    run.change(dict(TURNS[m] for m in mechanisms))
    run.advance(17)
    run.save(Store(tmp_path), "a")
    run.advance()
    end = run.session().weights
    assert replay(Recipe.from_dict(json.loads(json.dumps(made.to_dict()))), run.tape).session().weights == end
    back = Run.resume(Store(tmp_path), "a")
    assert back.index == 17 and back.advance().session().weights == end and back.losses == run.losses
    if "heads" in mechanisms:
        assert run.model.present_heads.sum() < run.model.present_heads.numel()


def test_without_mechanisms_it_is_the_base_to_the_last_bit():
    plain, around = Run(recipe()), Run(recipe())
    around.__dict__["optimizer"] = Composed(around.optimizer, {})
    assert weights_digest(plain.advance().model) == weights_digest(around.advance().model)


@pytest.mark.parametrize("mechanism, turned", TURNS.values(), ids=TURNS)
def test_a_knob_that_is_turned_acts(mechanism, turned):
    at = mechanism.split(".")[0]
    make = lambda: Run(text("adamw", [at], **({"heads.active": False, "heads.every": 1} if at == "heads" else {}))).advance(4)
    run, twin = make(), make()
    run.change({"heads": {"heads.active": True}, "rate": {"rate.hold": True}, "values": {"values.alpha": 0.0}}[at])
    assert run.advance().session().weights != twin.advance().session().weights


@pytest.mark.parametrize("optimizer, mechanisms", [("adamw", ["rate"]), ("plasticity", ["values"]), ("sgd", ["rate", "values"])])
def test_a_copy_goes_its_own_way_and_a_state_shares_nothing(optimizer, mechanisms):
    run = Run(recipe(optimizer, mechanisms)).advance(6)
    saved, digest = run.optimizer.state_dict(), weights_digest(run.model)
    kept = copy.deepcopy(saved)
    twin = Run(recipe(optimizer, mechanisms))
    twin.optimizer.load_state_dict(saved)
    twin.advance()
    assert str(run.optimizer.state_dict()) == str(kept) and weights_digest(run.model) == digest
    model, optimizer_ = copy.deepcopy((run.model, run.optimizer))
    run.advance()
    assert weights_digest(model) == digest and all(str(optimizer_.state_dict()[k]) == str(kept[k]) for k in ("state", "mechanisms"))


@pytest.mark.parametrize("mechanisms", [["rate"], ["values"], ["rate", "values"]], ids="+".join)
def test_a_batch_that_is_not_finite_leaves_no_trace(mechanisms):
    run, clean = Run(recipe("adamw", mechanisms)).advance(5), Run(recipe("adamw", mechanisms)).advance(7)
    good, run.data.train.X = run.data.train.X, torch.full_like(run.data.train.X, float("nan"))
    with pytest.raises(NonFiniteLoss):
        run.advance(6)
    run.data.train.X = good
    assert weights_digest(run.advance(7).model) == weights_digest(clean.model)
    assert run.optimizer.param_groups[0]["lr"] == run.recipe["optimizer.lr"]


def test_a_step_that_fails_is_taken_back():
    run = Run(recipe("adamw", ["rate"])).advance(5)
    before, o = weights_digest(run.model), run.optimizer
    o.base.step = lambda: 1 / 0
    for p in run.model.parameters():
        p.grad = torch.ones_like(p)
    with pytest.raises(ZeroDivisionError):
        o.step()
    assert weights_digest(run.model) == before and o.param_groups[0]["lr"] == 0.001 and o.param_groups[0]["betas"] == (0.9, 0.999)


def test_what_is_measured_is_the_average():
    run = Run(recipe("adamw", ["rate"], **{"run.eval_every": 24})).advance()
    own = {n: p.detach().clone() for n, p in run.model.named_parameters()}
    with run.optimizer.slow_weights():
        assert any(not torch.equal(p, own[n]) for n, p in run.model.named_parameters())
        X, y = next(iter(run.data.tests.values()))
        assert (run.model.eval()(X).argmax(1) == y).float().mean().item() == run.evaluations[-1]["accuracy"]
    assert all(torch.equal(p, own[n]) for n, p in run.model.named_parameters())


def test_what_makes_no_sense_says_why():
    for make, error, said in (
        (lambda: recipe("adam", ["heads"]), RecipeError, "needs an AdaptiveTransformer"),
        (lambda: recipe("vwpr", ["values"]), ValueError, "both bring a loss"),
        (lambda: text("adamw", ["values"], **{"values.granularity": "sample"}), RecipeError, "samples are numbered"),
    ):
        with pytest.raises(error, match=said):
            Run(make()).optimizer
    for wrong, error, said in ((["nothing"], UnknownPart, "no mechanism is called 'nothing'"), ("rate", RecipeError, "a list"), (["rate", "rate"], RecipeError, "different"), ([3], RecipeError, "list")):
        with pytest.raises(error, match=said):
            Recipe("digits", "mlp", "adam", mechanisms=wrong)
    with pytest.raises(KnobError, match="unknown knob 'values.alpha'"):
        Recipe("digits", "mlp", "adam", {"values.alpha": 1.0})
    with pytest.raises(RecipeError, match="list of different names"):
        Recipe.from_dict({**recipe().to_dict(), "mechanisms": "rate"})


def test_a_state_of_other_mechanisms_or_another_model_is_refused_and_nothing_changes():
    run, other = Run(recipe("adamw", ["rate"])).advance(4), Run(recipe("adamw", ["values"])).advance(4)
    wide = Run(recipe("adamw", ["rate"], **{"model.hidden": 33})).advance(4)
    before = str(run.optimizer.state_dict())
    for state, said in ((other.optimizer.state_dict(), "of the mechanisms .'values'."), (wide.optimizer.state_dict(), "another model")):
        with pytest.raises(ValueError, match=said):
            run.optimizer.load_state_dict(state)
        assert str(run.optimizer.state_dict()) == before


def test_a_recipe_with_mechanisms_is_plain_data_code_and_flags():
    made = recipe("plasticity", ["values", "rate"])
    assert made.mechanisms == ("rate", "values") and made == Recipe.from_dict(made.to_dict()) != recipe("plasticity", ["rate"])
    assert "mechanisms" not in recipe().to_dict()  # files of before stay what they were
    scope = {}
    exec(session_code(Session(made, Run(made).tape, 0)).replace("run = replay", "rerun = lambda: replay"), scope)
    assert scope["recipe"] == made
    _, read = recipe_from_flags(["--data", "noisy_digits", "--optimizer", "plasticity", "--mechanisms", "rate,values", "--values.alpha", "0.2", "--rate.momentum", "0.8"])
    assert read.mechanisms == ("rate", "values") and (read["values.alpha"], read["rate.momentum"]) == (0.2, 0.8)


def test_flags_change_the_mechanisms_of_a_recipe_in_a_file(tmp_path):
    from adaptive_lab.tape import save_session

    save_session(tmp_path / "s.json", Session(recipe("adam", ["rate"], **{"optimizer.lr": 0.01, "rate.momentum": 0.8}), Run(recipe()).tape, 0))
    read = lambda *flags: recipe_from_flags(["--recipe", str(tmp_path / "s.json"), *flags])[1]
    assert read().mechanisms == ("rate",) and read()["rate.momentum"] == 0.8
    assert read("--mechanisms", "").mechanisms == () and read("--mechanisms", "")["optimizer.lr"] == 0.01
    both = read("--mechanisms", "rate,values", "--values.alpha", "0.1")
    assert both["rate.momentum"] == 0.8 and both["values.alpha"] == 0.1 and both["optimizer.lr"] == 0.01


def test_a_reset_keeps_the_mechanisms_and_their_knobs():
    live = Live(recipe("adam", ["values"]))
    live.run.change({"values.alpha": 0.2})
    live.run.advance(3)
    live.reset()
    assert live.run.recipe.mechanisms == ("values",) and live.run.recipe["values.alpha"] == 0.2


def test_a_loss_that_nobody_told_is_missed_before_the_step():
    run = Run(text("adamw", ["heads"]))
    cross_entropy(run.model, run.data.train[0]).backward()
    before = weights_digest(run.model)
    with pytest.raises(ValueError, match="no loss was heard"):
        run.optimizer.step()
    assert weights_digest(run.model) == before


def test_a_mechanism_of_ones_own_is_a_class_of_a_few_lines():
    class Counting(Mechanism):
        def __init__(self):
            self.losses = []

        def after(self, optimizer, loss):
            self.losses.append(loss)

    run = Run(recipe("sgd"))
    counting = Counting()
    run.__dict__["optimizer"] = Composed(run.optimizer, {"counting": counting})
    run.advance()
    assert counting.losses == list(run.losses)


def test_a_first_rate_that_is_far_too_small_is_raised():
    last = lambda mechanisms: sum(Run(recipe("adam", mechanisms, "digits", **{"run.steps": 200, "run.eval_every": 200, "optimizer.lr": 1e-5})).advance().losses[-20:]) / 20
    assert last(["rate"]) < 0.5 * last([])
