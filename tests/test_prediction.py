"Prediction of metrics: nothing of a run is seen where it is predicted, holes are holes, and refusals say what to do."
import math
import warnings
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.epsilon_vae.conformal import cv_plus, quantile, run_folds, run_weights
from adaptive_lab.epsilon_vae.features import SPECTRUM, consensus, consensus_signs, features, softmax, spectrum, statistics, weight_names, weight_signs
from adaptive_lab.epsilon_vae.forest import grow_forest
from adaptive_lab.epsilon_vae.population import Population, populations
from adaptive_lab.epsilon_vae.prediction import SOURCES, Columns, Described, PerformancePredictor, Prediction, describe, r2
from adaptive_lab.epsilon_vae.weights import layout_of
from adaptive_lab.evaluator import Evaluator, Unfit
from adaptive_lab.forecasting import agreed, across, against_bars, left_out, scores_of
from adaptive_lab.store import Store

SMALL = Prediction(folds=4, trees=5)


def world(runs=20, many=5, probes=60, classes=4, seed=0):
    "Networks that know a hidden labelling more or less well, as a description; weights tell the run and nothing else."
    g = np.random.default_rng(seed)
    truth = g.integers(classes, size=probes)
    groups, skill = np.repeat(np.arange(runs), many), np.repeat(g.uniform(0.2, 2.5, runs), many) * np.tile(np.linspace(0.2, 1, many), runs)
    noise = g.standard_normal((runs, 1, probes, classes)).repeat(many, 1).reshape(-1, probes, classes)
    logits = skill[:, None, None] * np.eye(classes)[truth] * 2 + noise + 0.2 * g.standard_normal(noise.shape)
    accuracy = (logits.argmax(-1) == truth).mean(-1)
    weights = g.standard_normal((runs, len(weight_names(2))))[groups] + 0.1 * g.standard_normal((len(groups), len(weight_names(2))))
    return Described(weights, logits, accuracy[:, None], ["accuracy"], groups, 2)


def net(width=6, depth=1, bias=True, seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(5, width, bias), nn.ReLU(), *[m for _ in range(depth - 1) for m in (nn.Linear(width, width), nn.ReLU())], nn.Linear(width, 3))


def judge(width=6, probes=40):
    X = torch.randn(probes, 5, generator=torch.Generator().manual_seed(0))
    return Evaluator(lambda: net(width), X, {"test": (X, torch.zeros(probes, dtype=torch.int64))})


# --- what is seen of a state


def test_the_spectrum_is_that_of_the_singular_values():
    for shape in ((7, 20), (20, 7), (5, 5), (4, 3, 2, 2)):
        w = torch.randn(shape, generator=torch.Generator().manual_seed(1))
        m = w.reshape(len(w), -1).double()
        values = (torch.linalg.svdvals(m) ** 2).numpy()
        found = dict(zip(SPECTRUM, spectrum(w)))
        noise = (math.sqrt(m.shape[0]) + math.sqrt(m.shape[1])) ** 2 / m.shape[1]
        assert found["log top"] == pytest.approx(math.log(values[0] / noise), abs=1e-6)
        assert found["log norm"] == pytest.approx(math.log(values.sum() / len(m)), abs=1e-6)
        assert found["stable rank"] == pytest.approx(values.sum() / values[0] / len(values), abs=1e-6)
        assert found["s100"] == pytest.approx(math.log(values[-1] / values[0]), abs=1e-5)


@pytest.mark.parametrize("shape", [(1, 1), (1, 5), (5, 1), (1, 1, 3, 3)])
def test_spectra_of_the_smallest_matrices_are_finite(shape):
    assert np.isfinite(spectrum(torch.ones(shape))).all() and np.isfinite(spectrum(torch.zeros(shape))).all()


def test_quantiles_of_a_large_tensor_come_from_all_of_it():
    w = torch.arange(3 * 2**17, dtype=torch.float32) / (3 * 2**17)
    assert statistics(w)[2:] == pytest.approx([0, 0.25, 0.5, 0.75, 1], abs=1e-4)


def test_signs_have_one_length_for_every_architecture():
    conv = nn.Sequential(nn.Conv2d(1, 3, 3, bias=False), nn.BatchNorm2d(3), nn.Flatten(), nn.Linear(12, 2))
    for state in (net().state_dict(), net(depth=4).state_dict(), conv.state_dict(), net().bfloat16().state_dict(), net().double().state_dict()):
        assert weight_signs(state, 3).shape == (len(weight_names(3)),) and np.isfinite(weight_signs(state, 3)).all()


def test_weights_that_are_not_finite_are_named():
    state = net().state_dict()
    state["2.bias"][1] = math.inf
    with pytest.raises(ValueError, match="2.bias has 1 of 3 elements that are not finite"):
        weight_signs(state)
    with pytest.raises(ValueError, match="nothing in this state is learnt"):
        weight_signs({"steps": torch.tensor(3)})


def test_labels_are_never_looked_at():
    blind = judge()
    blind.tests = None
    names, vector = features(net().state_dict(), blind, consensus(np.zeros((2, 40, 3)), np.arange(2)))
    assert len(names) == len(vector) and np.isfinite(vector).all()


def test_a_run_weighs_the_same_however_many_checkpoints_it_has():
    one, two = np.array([[9.0, 0]]), np.array([[0, 9.0]])
    votes = consensus(np.stack([one, two, two, two]), np.array([0, 1, 1, 1]))
    assert votes.soft() == pytest.approx(np.full((1, 2), 0.5))
    with pytest.raises(ValueError, match="leaves none"):
        votes.soft([0, 1])


def test_signs_beside_a_consensus_by_hand():
    soft = np.array([[0.9, 0.1], [0.2, 0.8], [0.6, 0.4], [0.45, 0.55]])
    logits = np.log(np.array([[[0.7, 0.3], [0.6, 0.4], [0.8, 0.2], [0.1, 0.9]]]))
    found = {n: float(v[0]) for n, v in consensus_signs(logits, soft).items()}
    assert found["agreement"] == 0.75 and found["soft agreement"] == pytest.approx((0.9 + 0.2 + 0.6 + 0.55) / 4)
    assert found["alone"] == pytest.approx(0.6 / 4) and found["confidence with"] == pytest.approx((0.7 + 0.8 + 0.9) / 3)
    assert found["agreement easy"] == 0.5 and found["agreement hard"] == 1 and found["least recall"] == 0.5


# --- intervals


def test_folds_and_weights_count_runs():
    groups = np.array([5, 5, 5, 2, 9, 9, 7])
    fold, weights = run_folds(groups, 3), run_weights(groups)
    assert all(len(set(fold[groups == r])) == 1 for r in set(groups)) and set(fold) == {0, 1, 2}
    assert weights.sum() == pytest.approx(4 / 5) and weights[groups == 5].sum() == pytest.approx(weights[groups == 2].sum())
    many = np.arange(30)
    assert run_weights(many, promised=False).sum() == pytest.approx(1) and run_weights(many).sum() == pytest.approx(30 / 31)
    with pytest.raises(ValueError, match="there is 1 run"):
        run_folds(np.zeros(4), 3)


@pytest.mark.parametrize("runs, finite", [(8, False), (9, True)])
def test_too_few_runs_have_no_interval(runs, finite):
    groups = np.repeat(np.arange(runs), 3)
    assert math.isfinite(quantile(np.ones(3 * runs), run_weights(groups, promised=False), 0.9)) == finite


def test_cv_plus_by_hand():
    scores, fold, weights = np.array([1.0, 2, 3]), np.array([0, 1, 1]), np.full(3, 1 / 3)
    low, high = cv_plus(np.array([[10.0, 20]]), np.array([[1.0, 2]]), scores, fold, weights, coverage=0.6)
    assert (low[0], high[0]) == (14.0, 24.0)  # of 10-1, 20-4, 20-6 and of 10+1, 20+4, 20+6 the second from the middle


def test_a_promise_is_kept():
    def covered(seed, promised):
        g = np.random.default_rng(seed)
        groups, errors = np.repeat(np.arange(12), 4), np.abs(g.standard_normal((24, 1)) + 0.3 * g.standard_normal((24, 4)))
        reach = quantile(errors[:12].ravel(), run_weights(groups, promised=promised), 0.9)
        return (errors[12:] <= reach).mean()

    kept, near = (np.mean([covered(s, p) for s in range(400)]) for p in (True, False))
    assert 0.895 < kept < 0.96 and 0.84 < near < kept


def test_a_forest_says_the_same_of_one_row_and_of_many():
    g = np.random.default_rng(0)
    X, Y = g.standard_normal((150, 6)), g.standard_normal((150, 2))
    forest = grow_forest(X, Y, trees=7)
    assert np.array_equal(forest.predict(X), np.concatenate([forest.predict(x[None]) for x in X]))
    assert forest.predict(X[:0]).shape == (0, 2)


# --- nothing is seen of a run where it is predicted


def test_own_run_and_left_out_runs_have_no_vote():
    d, out = world(), np.array([3, 4])
    columns, other = Columns(SOURCES, 2), replace(d, logits=np.where(np.isin(d.groups, out)[:, None, None], 7.0 * np.eye(4)[0], d.logits))
    a, b = (columns.apart(d, consensus(x.logits, x.groups), out) for x in (d, other))
    assert np.array_equal(a, b)
    own = replace(d, logits=np.where((d.groups == 0)[:, None, None], 7.0 * np.eye(4)[0], d.logits))
    c = columns.apart(d, consensus(own.logits, own.groups), out)
    assert np.array_equal(a[d.groups == 0], c[d.groups == 0]) and not np.array_equal(a[d.groups == 1], c[d.groups == 1])


def test_a_folds_models_have_seen_nothing_of_it():
    d, seen = world(), {}
    for change in (False, True):
        first = PerformancePredictor(knobs=SMALL).fit(d, progress=False).heads[0]
        inside = np.isin(d.groups, first.out[0])
        if change:
            d = replace(d, logits=np.where(inside[:, None, None], 0.0, d.logits), weights=np.where(inside[:, None], 0.0, d.weights),
                        metrics=np.where(inside[:, None], 0.0, d.metrics))
            first = PerformancePredictor(knobs=SMALL).fit(d, progress=False).heads[0]
        seen[change] = first
    assert np.array_equal(seen[0].lines[0].slope, seen[1].lines[0].slope) and np.array_equal(seen[0].forests[0].value, seen[1].forests[0].value)
    assert not np.array_equal(seen[0].lines[1].slope, seen[1].lines[1].slope)


def test_what_belongs_to_a_run_alone_cannot_be_predicted():
    d = world()
    d = replace(d, metrics=np.random.default_rng(5).uniform(size=20)[d.groups][:, None])
    assert r2(d.metrics[:, 0], left_out(d, ("statistics",), folds=5, knobs=SMALL, progress=False)["accuracy"][:, 0]) < 0.2
    mixed = replace(d, groups=np.arange(len(d)))
    assert r2(d.metrics[:, 0], left_out(mixed, ("statistics",), folds=5, knobs=SMALL, progress=False)["accuracy"][:, 0]) > 0.5


def test_accuracy_of_runs_left_out():
    d = world(runs=24)
    said = left_out(d, folds=6, knobs=SMALL, progress=False)
    row = scores_of(d, said, np.arange(4, len(d), 5))[0]
    assert row["r2"] > 0.9 and row["coverage"] > 0.8 and 0 < row["width"] < 0.5
    assert r2(d.metrics[:, 0], agreed(d, folds=6)[:, 0]) > 0.8
    assert (said["accuracy"] >= 0).all() and (said["accuracy"] <= 1).all() and (said["accuracy"][:, 1] <= said["accuracy"][:, 2]).all()


# --- metrics with holes


def table(seed=0, runs=12, many=6):
    g = np.random.default_rng(seed)
    X, groups = g.standard_normal((runs * many, 4)), np.repeat(np.arange(runs), many)
    return X, {"a": X[:, 0] + 0.1 * g.standard_normal(len(X)), "b": X[:, 1] ** 2}, groups


def test_a_missing_value_is_left_out_and_not_a_zero():
    X, metrics, groups = table()
    holes = np.zeros(len(X), bool)
    holes[::4] = True
    a = PerformancePredictor(knobs=SMALL).fit((X, {"a": np.where(holes, np.nan, metrics["a"]), "b": metrics["b"]}, groups), progress=False)
    b = PerformancePredictor(knobs=SMALL).fit((X[~holes], {"a": metrics["a"][~holes]}, groups[~holes]), progress=False)
    assert np.array_equal(a.predict_many(X)["a"], b.predict_many(X)["a"]) and len(a.heads) == 2


def test_constant_and_lonely_metrics():
    X, metrics, groups = table()
    lonely = np.where(groups == 3, X[:, 0], np.nan)
    with pytest.warns(UserWarning, match="'lonely' is measured in fewer than two runs"):
        p = PerformancePredictor(knobs=SMALL).fit((X, metrics | {"same": np.full(len(X), 2.5), "lonely": lonely}, groups), progress=False)
    said = p.predict(X[0])
    assert said["same"] == (2.5, 2.5, 2.5) and "lonely" not in said and set(said) == {"a", "b", "same"}
    assert math.isnan(r2(np.full(5, 2.5), np.full(5, 2.5))) and math.isnan(r2(np.full(3, np.nan), np.ones(3)))


def test_only_constant_metrics():
    X, _, groups = table()
    p = PerformancePredictor(knobs=SMALL).fit((X, {"same": np.ones(len(X))}, groups), progress=False)
    assert p.predict(X[0]) == {"same": (1.0, 1.0, 1.0)} and p.predict_many(X)["same"].shape == (len(X), 3)


def test_the_same_seed_says_the_same():
    a, b = (PerformancePredictor(knobs=SMALL).fit(table(), progress=False).predict(np.ones(4)) for _ in range(2))
    assert a == b


def test_few_runs_say_that_they_know_no_limits():
    X, metrics, groups = table(runs=5)
    value, low, high = PerformancePredictor(knobs=SMALL).fit((X, metrics, groups), progress=False).predict(X[0])["a"]
    assert math.isfinite(value) and (low, high) == (-math.inf, math.inf)


def test_a_promise_makes_intervals_wider():
    near, kept = (PerformancePredictor(knobs=Prediction(folds=4, trees=5, promised=p)).fit(table(), progress=False).predict_many(table()[0])["a"] for p in (False, True))
    assert (np.diff(kept[:, 1:]) >= np.diff(near[:, 1:])).all() and np.array_equal(kept[:, 0], near[:, 0])


# --- refusals


def test_bad_input_is_refused_in_words():
    X, metrics, groups = table()
    with pytest.raises(ValueError, match="there is 1 run"):
        PerformancePredictor().fit((X, metrics, np.zeros(len(X))), progress=False)
    with pytest.raises(ValueError, match="'entropy': choose among"):
        PerformancePredictor(use=("entropy",))
    with pytest.raises(ValueError, match=r"call fit\(population\) first"):
        PerformancePredictor().predict_many(X)
    with pytest.raises(ValueError, match="not finite"):
        PerformancePredictor().fit((np.where(X > 2, np.nan, X), metrics, groups))
    with pytest.raises(ValueError, match="are wanted"):
        PerformancePredictor().fit((X[:-1], metrics, groups))
    with pytest.raises(ValueError, match=r"\(n, 4\) is wanted"):
        PerformancePredictor(knobs=SMALL).fit((X, metrics, groups), progress=False).predict(X[0, :3])
    with pytest.raises(ValueError, match="there are none"):
        PerformancePredictor(use=("consensus",)).fit(replace(world(), logits=None))
    with pytest.raises(ValueError, match="leaves none"):
        PerformancePredictor(knobs=SMALL).fit(world(runs=2), progress=False)
    with pytest.raises(ValueError, match="give the same kind"):
        PerformancePredictor(knobs=SMALL).fit(world(), progress=False).predict_many(X)
    with pytest.raises(ValueError, match="differ in positions"):
        world() + replace(world(), positions=3)


# --- states and stores


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    store, made = Store(tmp_path_factory.mktemp("zoo")), 0
    for width, runs in ((6, 10), (9, 4)):
        for r in range(runs):
            for step in (1, 2, 3):
                made += 1
                model = net(width, seed=made)
                store.save(f"w{width}-{r}", step, {"model": model.state_dict()}, metrics={"score": model[0].weight.std().item() * step})
    return store.folder


def test_a_population_without_a_recipe_gives_weights_only(folder):
    narrow, wide = populations(folder)
    p = PerformancePredictor(knobs=SMALL).fit(narrow, progress=False)
    assert p.columns.use == ("statistics", "spectra") and describe(narrow, progress=False).logits is None
    assert set(p.predict(wide.state(0))) == {"score"}


def test_another_width_needs_its_own_evaluator(folder):
    narrow, wide = populations(folder)
    p = PerformancePredictor(knobs=SMALL).fit(narrow, judge(6), progress=False)
    assert p.columns.use == SOURCES
    with pytest.raises(Unfit):
        p.predict(wide.state(0))
    assert math.isfinite(p.predict({"model": wide.state(0)}, judge(9))["score"][0])


def test_one_state_and_many_are_told_the_same(folder):
    narrow = populations(folder)[0]
    p = PerformancePredictor(knobs=SMALL).fit(narrow, judge(6), progress=False)
    many = p.predict_many(describe(narrow, judge(6), progress=False))["score"]
    assert p.predict(narrow.state(4))["score"] == pytest.approx(tuple(many[4]), abs=1e-9)


def test_a_broken_checkpoint_is_named(folder, tmp_path):
    store, state = Store(tmp_path), net().state_dict()
    state["0.weight"][0, 0] = math.nan
    store.save("lost", 7, {"model": state}, metrics={"score": 1.0})
    with pytest.raises(ValueError, match="lost at step 7: 0.weight has 1 of 30"):
        describe(Population(store, store.checkpoints(), layout_of(state)), progress=False)


def test_runs_with_the_same_seed_are_not_learnt_from_across_widths(tmp_path):
    store = Store(tmp_path)
    for width, seeds in ((6, range(12)), (9, range(8, 12))):
        for s in seeds:
            store.save(f"w{width}-{s}", 1, {"model": net(width, seed=s).state_dict()}, metrics={"score": float(s)}, recipe={"knobs": {"run.seed": s}})
    narrow, wide = populations(tmp_path)
    for p in (narrow, wide):  # what a recipe would build is not asked for
        p.evaluator = lambda i=0, w=p.layout.slots[0].shape[0]: judge(w)
    learnt = []
    with warnings.catch_warnings(), pytest.MonkeyPatch.context() as patch:
        warnings.simplefilter("ignore")
        patch.setattr("adaptive_lab.forecasting.describe", lambda p, **k: learnt.append(p) or describe(p, outputs=False, **k))
        across(narrow, [wide], ("statistics",), ("score",), SMALL, progress=False)
    assert {c.recipe["knobs"]["run.seed"] for c in learnt[0].rows} == set(range(8))


def test_bars_take_the_harder_gap():
    rows = [dict(signs="all", metric="accuracy", r2=0.98, r2_last=0.9, coverage=0.9), dict(signs="all", metric="gap", r2=0.9, r2_last=0.7, coverage=0.95)]
    assert [r["holds"] for r in against_bars(rows)] == [True, True, False, True, False]


def test_softmax_of_large_numbers():
    assert softmax(np.array([[1e4, 0.0]])).tolist() == [[1.0, 0.0]]
