"Transfer: what is equal between the rows, what is carried over, and that each rival does what it says."
import pytest
import torch

from adaptive_lab.data.digits import digit_arrays
from adaptive_lab.knobs import KnobError
from adaptive_lab.transfer import CARRIED, GRIDS, OURS, UNITS, Transfer, body, carry, chosen, distracted, measure, phase, read_recipe, run, tasks_of, trained

SHORT = dict(source_steps=40, steps=20)


@pytest.mark.parametrize("row", GRIDS)
def test_every_row_repeats_and_is_a_result(row):
    recipe = {**GRIDS[row][0], **SHORT}
    one = measure(recipe, 3)
    assert one == measure(recipe, 3) and 0 <= one["worst_recall"] <= one["accuracy"] <= 100


def test_all_rows_make_the_same_steps_on_the_target():
    plans = {row: run({**candidates[0], **SHORT}, 0)[0].rows for row, candidates in GRIDS.items()}
    first = next(iter(plans.values()))
    assert first.shape == (20, 50) and all(torch.equal(first, p) for p in plans.values())


def test_new_weights_are_the_same_for_all():
    a, b = (phase(Transfer(start=start), None, tasks_of(Transfer(), 0)[1], False, 0).model for start in ("scratch", "finetune"))
    assert all(torch.equal(p, q) for p, q in zip(a.parameters(), b.parameters()))


def test_validation_sees_no_test_sample():
    X, _, X_test, _ = digit_arrays("digits")
    rows = lambda X: {tuple(r) for r in X.tolist()}
    source, target = tasks_of(Transfer(distractors=0.0, tested_on="validation"), 1000)
    assert not rows(target.X_test) & rows(X_test) - rows(X) and rows(target.X_test) <= rows(X)
    assert not (rows(target.X_test) & rows(target.X)) | (rows(source.X_test) & rows(source.X))
    assert source.classes == target.classes == 5 and set(target.y_test.tolist()) == set(range(5))


def test_distractors_are_like_pixels_and_say_nothing():
    X, y, _, _ = digit_arrays("digits")
    wide = distracted(X, 1.0, 0, "a")
    assert torch.equal(wide[:, :64], X) and (wide[:, 64:].mean(0) - X.mean(0)).abs().max() < 0.05
    assert chosen(wide, y, 0.3)[64:].sum() == 0 and distracted(X, 0.0, 0, "a").shape == X.shape
    assert not torch.equal(wide, distracted(X, 1.0, 1, "a")) and not torch.equal(wide, distracted(X, 1.0, 0, "b"))


def test_the_f_test_leaves_the_share_and_puts_constants_last():
    X = torch.randn(60, 10, generator=torch.Generator().manual_seed(0))
    y = torch.arange(60) % 3
    X[:, 3] += 2 * y
    X[:, 7] = 1.0
    assert chosen(X, y, 0.1).nonzero().flatten().tolist() == [3]
    assert chosen(X, y, 0.9)[7] == 0 and chosen(X, y, 0.9).sum() == 9


def test_values_that_stay_are_not_moved_by_their_bounds():
    now, before = run({**CARRIED, **SHORT, "start": "scratch", "alpha": 0.5}, 0)
    was, is_ = (m.wrapper.phi_values()["features"] for m in (before, now))
    assert torch.equal(was, is_) and was.max() > 1.5 and was.std() > 0.1


def test_values_that_learn_on_begin_with_those_of_the_source():
    recipe = {**CARRIED, **SHORT, "steps": 1, "start": "scratch", "phi_clip_value": 0.0, "alpha": 0.5, "alpha_target": 1e-3}
    now, before = run(recipe, 0)
    was, is_ = (m.wrapper.phi_values()["features"] for m in (before, now))
    assert not torch.equal(was, is_) and torch.allclose(was, is_, atol=0.02) and (was - 1).abs().max() > 0.3


def test_values_anew_never_see_the_source():
    now, before = run({**OURS, **SHORT, "values": "anew", "start": "scratch"}, 0)
    assert before is None
    other = run({**OURS, **SHORT, "values": "anew", "start": "scratch", "samples": 100, "source_steps": 3}, 0)[0]
    assert torch.equal(now.wrapper.phi_values()["features"], other.wrapper.phi_values()["features"])


def test_values_of_units_are_carried_but_for_the_last_layer():
    knobs, own = read_recipe({**UNITS, **SHORT, "alpha": 1.0})
    source, target = tasks_of(knobs, 0)
    before, now = trained(phase(knobs, own, source, True, 0)), phase(knobs, own, target, False, 0)
    carry(before, now.wrapper, "values")
    was, is_ = before.wrapper.phi_values(), now.wrapper.phi_values()
    head = f"{len(now.model) - 1}.weight"
    assert all(torch.equal(was[n], is_[n]) for n in body(now.model)) and (was["1.weight"] - 1).abs().max() > 1e-3
    assert torch.equal(is_[head], torch.ones(5, 1)) and not torch.equal(was[head], is_[head])


def test_a_probe_moves_the_last_layer_alone():
    for values in ({}, CARRIED):
        now, before = run({**SHORT, **values, "start": "probe"}, 0)
        assert all(torch.equal(p, body(before.model)[n]) for n, p in body(now.model).items())
        assert not torch.equal(now.model[-1].weight, phase(Transfer(), None, now.problem, False, 0).model[-1].weight)


def test_l2_sp_pulls_back_to_the_source():
    away = [sum((p - body(b.model)[n]).square().sum() for n, p in body(a.model).items()) for a, b in (run({**SHORT, "pull": s}, 0) for s in (0.0, 0.03, 1.0))]
    assert away[0] > away[1] > 3 * away[2] > 0


@pytest.mark.parametrize("wrong, word", [
    ({"alpha": 0.1}, "without values"), ({"values": "carried", "granularity": "output"}, "granularity"),
    ({"pull": 0.1, "start": "probe"}, "pull"), ({"values": "anew", "granularity": "feature", "alpha_target": 0.1}, "alpha_target"), ({"kept": 0.0}, "kept"),
])
def test_what_would_be_ignored_is_refused(wrong, word):
    with pytest.raises(KnobError, match=word):
        read_recipe(wrong)


def test_what_only_the_validation_knows_is_not_in_the_grids():
    assert not any({"tested_on", "data", "distractors", "shots", "steps"} & set(r) for candidates in GRIDS.values() for r in candidates)
