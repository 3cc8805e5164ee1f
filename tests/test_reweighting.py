"The protocol for methods that weigh samples: equal data and order, validation apart from the test, each loss by hand, the learnt weights."
import math

import numpy as np
import pytest
import torch
import torch.nn.functional as F

import adaptive_lab.peers.metaweights  # noqa: F401 (registers weightings)
import adaptive_lab.peers.reweighting  # noqa: F401
import adaptive_lab.peers.trees  # noqa: F401
from adaptive_lab.data.streams import DataError
from adaptive_lab.knobs import KnobError, Knobs, knob
from adaptive_lab.models import perceptron
from adaptive_lab.parts import find_part, parts
from adaptive_lab.peers.metaweights import balanced_rows, irreducible_loss
from adaptive_lab.reweighting import (
    EMBEDDED, Plain, Problem, Protocol, Weighting, averaged, build_optimizer, dealt, learning_rates, measure, order_of, prepared, problem_of, run,
)

METHODS = sorted(parts("weighting"))
TREES = ["isolation_forest", "random_forest", "xgboost"]
NEURAL = sorted(set(METHODS) - set(TREES))
SHORT = {"epochs": 3, "hidden": 16}
DIGITS = {"data": "digits", "samples": 500, **SHORT}


def needs(method):
    if method == "xgboost":
        pytest.importorskip("xgboost")


def test_the_methods_asked_for_are_there():
    rivals = "class_weighted class_balanced focal oversampling loss_proportional generalized_cross_entropy logit_adjustment label_smoothing"
    assert set(METHODS) >= {"cross_entropy", *rivals.split(), "meta_weight_net", "rho_loss", *TREES}


# The protocol


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("task", [{"table": "cancer", "schedule": "cosine"}, {**DIGITS, "imbalance": 5, "noise": 0.2, "average": 0.9}])
def test_every_method_repeats_bit_for_bit(method, task):
    needs(method)
    recipe = {"method": method, **task, **SHORT, **({"trees": 20} if "forest" in method else {})}
    if method == "isolation_forest" and "table" not in task:
        with pytest.raises(KnobError, match="data='table'"):
            measure(recipe, 0)
        return
    one, two, other = run(recipe, 3), run(recipe, 3), run(recipe, 4)
    assert torch.equal(one.scores, two.scores) and not torch.equal(one.scores, other.scores)
    assert one.scores.isfinite().all() and one.scores.shape == (len(one.problem.y_test), one.problem.classes)


def test_the_global_generators_play_no_part():
    torch.manual_seed(1)
    one = run({"method": "meta_weight_net", **SHORT}, 0).scores
    torch.manual_seed(2)
    np.random.seed(2)
    assert torch.equal(one, run({"method": "meta_weight_net", **SHORT}, 0).scores)


@pytest.mark.parametrize("method", sorted(set(NEURAL) - {"oversampling", "rho_loss"}))
def test_all_methods_see_the_same_samples_and_begin_with_the_same_weights(method):
    (_, plain), (_, own) = (prepared({"method": m, **SHORT}, 5) for m in ("cross_entropy", method))
    assert own.problem is plain.problem and torch.equal(own.rows, plain.rows)
    assert all(torch.equal(a, b) for a, b in zip(own.model.parameters(), plain.model.parameters()))


@pytest.mark.parametrize("method", NEURAL)
def test_all_methods_take_as_many_steps_of_as_many_samples(method, monkeypatch):
    steps, sizes = [], []
    step, forward = torch.optim.AdamW.step, Weighting.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: steps.append(self) or step(self))
    monkeypatch.setattr(Weighting, "step", lambda self, rows, i: sizes.append(len(rows)) or forward(self, rows, i))
    out = run({"method": method, **DIGITS, "batch": 40}, 0)
    assert sum(s is out.method.optimizer for s in steps) == 12 * 3
    assert set(sizes) <= {40}


def test_an_incomplete_batch_is_left_out():
    order = order_of(100, 30, 2, 0)
    assert order.shape == (6, 30) and all(len(set(e.flatten().tolist())) == 90 for e in order.split(3))
    assert not torch.equal(order[:3], order[3:]) and torch.equal(order, order_of(100, 30, 2, 0))
    assert sorted(order_of(8, 30, 1, 0)[0].tolist()) == list(range(8))


def table(path, X, y):
    np.savez(path, X=X, y=y)
    return str(path)


@pytest.fixture
def blobs():
    rng = np.random.default_rng(0)
    y = np.repeat([0, 1], [180, 20])
    return rng.normal(size=(200, 4)) + y[:, None], y


def test_validation_never_touches_test_rows(tmp_path, blobs):
    X, y = blobs
    numbered = X.copy()
    numbered[:, 0] = np.arange(200)  # standardised, the order of the numbers remains: it tells the test rows
    made = problem_of(Protocol(table=table(tmp_path / "numbered.npz", numbered, y)), 3)
    ranks = torch.cat([made.X[:, 0], made.X_test[:, 0]]).argsort().argsort()[len(made.y) :]
    changed = X.copy()
    changed[ranks] = 1e4
    assert len(ranks) == 60 and torch.equal(torch.from_numpy(y)[ranks], made.y_test)
    files = [table(tmp_path / n, data, y) for n, data in (("a.npz", X), ("b.npz", changed))]
    one, other = (run({"table": f, "tested_on": "validation", **SHORT}, 3).scores for f in files)
    assert torch.equal(one, other) and len(one) == 42
    assert not torch.equal(*(run({"table": f, **SHORT}, 3).scores for f in files))


def test_validation_never_touches_test_digits(monkeypatch):
    import adaptive_lab.reweighting as module

    real, recipe = module.digit_arrays("digits", ""), {**DIGITS, "imbalance": 5, "noise": 0.2, "tested_on": "validation"}
    before = run(recipe, 11).scores
    monkeypatch.setattr(module, "digit_arrays", lambda *_: (*real[:2], real[2] * torch.nan, real[3] * 0))
    module._made.cache_clear()
    again = run(recipe, 11)
    module._made.cache_clear()
    assert torch.equal(before, again.scores)
    counts = torch.bincount(again.problem.y_test)
    assert counts.max() - counts.min() < 5  # balanced and clean, as the test is


def test_digits_by_the_knobs():
    noisy = problem_of(Protocol(**{**DIGITS, "noise": 0.3}), 0)
    assert len(noisy.y) == 500 and (noisy.y != noisy.clean).sum() == 150
    assert torch.equal(noisy.X, problem_of(Protocol(**DIGITS), 0).X)
    rare = {int(problem_of(Protocol(data="digits", imbalance=30), s).counts.argmin()) for s in range(6)}
    assert len(rare) > 2
    tail = problem_of(Protocol(data="digits", imbalance=30), 0)
    pictures = {tuple(x.tolist()): int(c) for x, c in zip(problem_of(Protocol(data="digits"), 0).X, problem_of(Protocol(data="digits"), 0).y)}
    assert all(pictures[tuple(x.tolist())] == c for x, c in zip(tail.X, tail.y.tolist()))  # each keeps its own label


@pytest.mark.parametrize("name", EMBEDDED)
def test_embedded_tables_have_a_rare_class(name):
    made = problem_of(Protocol(table=name), 0)
    assert made.rare == 1 and 0.03 < made.counts[1] / len(made.y) < 0.11
    deviation = made.X.std(0, correction=0)
    assert made.X.mean(0).abs().max() < 1e-5 and ((deviation - 1).abs() < 1e-3).logical_or(deviation == 0).all()


def test_constant_columns_and_several_classes(tmp_path):
    rng = np.random.default_rng(1)
    X = np.c_[rng.normal(size=(90, 2)), np.full(90, 0.1)]
    y = np.repeat([0, 1, 2], [50, 12, 28])
    found = run({"table": table(tmp_path / "three.npz", X, y), **SHORT}, 0)
    assert found.problem.rare == 1 and found.problem.classes == 3 and found.problem.X[:, 2].abs().max() < 1e-6
    assert set(measure({"table": str(tmp_path / "three.npz"), **SHORT}, 0)) == {"auprc", "auroc"}


def test_figures_of_digits():
    found = measure({"data": "digits"}, 0)
    assert set(found) == {"accuracy", "worst_recall", "balanced_accuracy"} and found["worst_recall"] <= found["balanced_accuracy"] <= 100
    assert found["accuracy"] > 85


def test_schedule_reaches_the_optimizer(monkeypatch):
    seen = []
    step = torch.optim.AdamW.step
    monkeypatch.setattr(torch.optim.AdamW, "step", lambda self: seen.append(self.param_groups[0]["lr"]) or step(self))
    run({"schedule": "cosine", "lr": 0.02, **SHORT}, 0)
    assert seen == [0.01 * (1 + math.cos(math.pi * i / 6)) for i in range(6)] == pytest.approx(learning_rates("cosine", 0.02, 6))


def test_the_average_is_what_is_tested():
    plain, mean = run(SHORT, 0), run({"average": 0.9, **SHORT}, 0)
    _, method = prepared(SHORT, 0)
    by_hand = averaged(method.model, 0.9)
    weights = []
    method.fit([1e-3] * 6, lambda: (by_hand.update_parameters(method.model), weights.append(method.model[1].weight.detach().clone())))
    expected = weights[0]
    for k, w in enumerate(weights[1:], 2):
        expected = expected + (w - expected) * max(0.1, 1 / k)
    assert torch.allclose(mean.method.model[1].weight, expected, atol=1e-6) and not torch.equal(plain.scores, mean.scores)


# Errors


@pytest.mark.parametrize(
    "recipe, error, word",
    [
        ({"epoch": 3}, KnobError, "unknown knob 'epoch'"),
        ({"method": "focal", "q": 0.5}, KnobError, "unknown knob 'q'"),
        ({"batch": 0}, KnobError, "batch=0"),
        ({"table": "cancr"}, KnobError, "cancer, diabetes, digits-8"),
        ({"table": "no/such.npz"}, FileNotFoundError, "not there"),
        ({"imbalance": 3}, KnobError, "no effect with data='table'"),
        ({"data": "digits", "table": "diabetes"}, KnobError, "no effect with data='digits'"),
        ({"data": "digits", "samples": 10_000}, DataError, "there are 1438|there are 14"),
        ({"data": "digits", "samples": 12}, DataError, "no training sample left"),
        ({"method": "focl"}, LookupError, "Did you mean 'focal'"),
    ],
)
def test_a_bad_recipe_is_refused_by_name(recipe, error, word):
    with pytest.raises(error, match=word):
        measure(recipe, 0)


def test_a_table_that_cannot_be_used_is_refused(tmp_path):
    X = np.random.default_rng(0).normal(size=(30, 2))
    one, few = np.zeros(30, int), np.r_[np.zeros(28, int), 1, 1]
    with pytest.raises(DataError, match="single class"):
        measure({"table": table(tmp_path / "one.npz", X, one)}, 0)
    path = table(tmp_path / "few.npz", X, few)
    measure({"table": path, **SHORT}, 0)  # one row of it to train on, one to test on
    with pytest.raises(DataError, match="class 1 has one sample"):
        measure({"table": path, "tested_on": "validation"}, 0)
    with pytest.raises(DataError, match="class 1 has one sample"):
        measure({"table": table(tmp_path / "single.npz", X, np.r_[one[1:], 1])}, 0)


def test_a_run_that_diverges_is_named():
    with pytest.raises(ValueError, match="diverged at lr=1"):
        run({"lr": 1, "weight_decay": 100, "epochs": 400, "hidden": 8, "table": "diabetes"}, 0)


def test_dealing_a_recipe():
    class Other(Knobs):
        lr: float = knob(1.0, "again")

    with pytest.raises(KnobError, match="'lr' is declared twice"):
        dealt({}, Protocol, Other)
    assert dealt({"lr": 0.5, "q": 0.2}, Protocol, find_part("weighting", "generalized_cross_entropy").knobs)[1].q == 0.2


@pytest.mark.parametrize("method", METHODS)
def test_no_name_is_declared_twice(method):
    dealt({}, Protocol, find_part("weighting", method).knobs)


# The losses, by hand in float64


y10 = torch.tensor([0] * 6 + [1] * 3 + [2])


def small(name, values, dtype=torch.float64):
    "A method on ten samples of three classes, with a linear model in float64."
    generator = torch.Generator().manual_seed(0)
    problem = Problem(torch.randn(10, 4, generator=generator, dtype=dtype), y10, torch.zeros(1, 4), torch.zeros(1, dtype=torch.long), 3)
    model = perceptron([4, 3]).to(dtype)
    with torch.no_grad():
        for p in model.parameters():
            p.copy_(torch.randn(p.shape, generator=generator))
    return find_part("weighting", name)(values, problem, model, build_optimizer(model, 0.1, 0), 0)


def cui(beta):
    w = [(1 - beta) / (1 - beta**n) for n in (6, 3, 1)]
    return [3 * v / sum(w) for v in w]


BY_CLASS = [10 / 18, 10 / 9, 10 / 3]
LOSSES = [
    ("cross_entropy", {}, lambda p, c, every: -math.log(p[c])),
    ("class_weighted", {}, lambda p, c, every: -BY_CLASS[c] * math.log(p[c])),
    ("class_balanced", {"beta": 0.9}, lambda p, c, every: -cui(0.9)[c] * math.log(p[c])),
    ("focal", {"gamma": 2}, lambda p, c, every: -((1 - p[c]) ** 2) * math.log(p[c])),
    ("focal", {"gamma": 0.5, "alpha": "inverse"}, lambda p, c, every: -BY_CLASS[c] * (1 - p[c]) ** 0.5 * math.log(p[c])),
    ("loss_proportional", {"power": 2}, lambda p, c, every: -(math.log(p[c]) ** 3) / np.mean(np.log(every) ** 2)),
    ("generalized_cross_entropy", {"q": 0.7}, lambda p, c, every: (1 - p[c] ** 0.7) / 0.7),
    ("logit_adjustment", {"tau": 2}, lambda p, c, every: -math.log(p[c] * (36, 9, 1)[c] / (p[0] * 36 + p[1] * 9 + p[2]))),
    ("label_smoothing", {"smoothing": 0.3}, lambda p, c, every: -0.7 * math.log(p[c]) - 0.1 * sum(map(math.log, p))),
]


@pytest.mark.parametrize("name, values, by_hand", LOSSES, ids=[n for n, *_ in LOSSES])
def test_losses_by_hand(name, values, by_hand):
    method = small(name, values)
    logits = method.model(method.problem.X)
    p = [[math.exp(a) / sum(math.exp(b) for b in row) for a in row] for row in logits.tolist()]
    given = [row[c] for row, c in zip(p, y10.tolist())]
    found = method.losses(logits, y10, torch.arange(10))
    assert found.dtype == torch.float64 and found.tolist() == pytest.approx([by_hand(row, c, given) for row, c in zip(p, y10.tolist())], rel=1e-6)
    found.mean().backward()
    assert all(q.grad.isfinite().all() for q in method.model.parameters())


@pytest.mark.parametrize("name", [m for m in NEURAL if m not in ("meta_weight_net", "rho_loss")])
def test_extreme_logits_give_finite_gradients(name):
    method = small(name, {"gamma": 0.5} if name == "focal" else {}, torch.float32)
    for logits in (torch.full((10, 3), -300.0).index_fill(1, torch.tensor([0]), 300.0), torch.zeros(10, 3)):
        logits.requires_grad_()
        grad, = torch.autograd.grad(method.losses(logits, torch.tensor([0] * 8 + [1] * 2), torch.arange(10)).mean(), logits)
        assert grad.isfinite().all()


def test_weights_are_not_differentiated_where_they_are_fixed():
    method = small("loss_proportional", {})
    logits = method.model(method.problem.X).detach().requires_grad_()
    grad, = torch.autograd.grad(method.losses(logits, y10, None).sum(), logits)
    plain, = torch.autograd.grad(F.cross_entropy(logits, y10, reduction="sum"), logits)
    loss = F.cross_entropy(logits, y10, reduction="none").detach()
    assert torch.allclose(grad, plain * (loss / loss.mean())[:, None])


def test_oversampling_gives_each_class_its_share():
    method = small("oversampling", {})
    method.plan(torch.zeros(2000, 20, dtype=torch.long))
    shares = torch.bincount(y10[method.rows.flatten()]) / 40_000
    assert method.rows.shape == (2000, 20) and (shares - 1 / 3).abs().max() < 0.01
    within = torch.bincount(method.rows.flatten()[y10[method.rows.flatten()] == 0])
    assert within.min() > 0.9 * within.max()


# Weights that are learnt


def test_the_meta_gradient_is_that_of_finite_differences():
    method = small("meta_weight_net", {"meta": 9, "lookahead": 0.7})
    method.net.double()
    method.plan(torch.arange(10)[None])
    losses = method.losses(method.model(method.problem.X), y10, None)
    params = list(method.net.parameters())
    found = torch.autograd.grad(method.meta_loss(losses, method.meta_rows[0]), params, retain_graph=True)
    for p, g in zip(params, found):
        for at in range(0, p.numel(), 37):
            values = []
            for shift in (1e-6, -1e-6):
                with torch.no_grad():
                    p.view(-1)[at] += shift
                values.append(method.meta_loss(losses, method.meta_rows[0]).item())
                with torch.no_grad():
                    p.view(-1)[at] -= shift
            assert (values[0] - values[1]) / 2e-6 == pytest.approx(g.view(-1)[at].item(), rel=1e-4, abs=1e-9)


def test_the_look_ahead_is_a_plain_step_and_leaves_the_model_alone():
    method = small("meta_weight_net", {"meta": 9, "lookahead": 0.7})
    method.net.double()
    method.plan(torch.arange(10)[None])
    before = [p.detach().clone() for p in method.model.parameters()]
    losses = method.losses(method.model(method.problem.X), y10, None)
    found = method.meta_loss(losses, method.meta_rows[0]).item()
    assert all(torch.equal(a, b) for a, b in zip(before, method.model.parameters()))
    method.descend = lambda loss: None
    stepped = torch.optim.SGD(method.model.parameters(), 0.7)
    (method.weights(losses).detach() * losses).mean().backward()
    stepped.step()
    X, y = (t[method.meta_rows[0]] for t in method.meta)
    assert F.cross_entropy(method.model(X), y).item() == pytest.approx(found)


def test_the_meta_set_is_balanced_and_clean_and_of_the_training_part():
    out = run({"method": "meta_weight_net", **DIGITS, "noise": 0.4}, 0)
    X, y = out.method.meta
    assert torch.bincount(y).tolist() == [10] * 10
    rows = balanced_rows(out.problem.clean, 100, 0)
    assert torch.equal(X, out.problem.X[rows]) and torch.equal(y, out.problem.clean[rows]) and (y != out.problem.y[rows]).any()
    assert len(set(rows.tolist())) == 100


def test_no_other_method_is_told_the_right_labels(monkeypatch):
    for method in NEURAL:
        recipe = {"method": method, **DIGITS, "noise": 0.4}
        before = run(recipe, 0).scores
        problem = problem_of(Protocol(**{k: v for k, v in recipe.items() if k != "method"}), 0)
        with monkeypatch.context() as m:
            m.setattr(problem, "clean", problem.clean.flip(0))
            assert torch.equal(before, run(recipe, 0).scores) == (method != "meta_weight_net")


def test_rho_takes_the_samples_with_the_highest_reducible_loss(monkeypatch):
    method, seen = small("rho_loss", {"keep": 0.5, "held_out": "crossed"}), []
    method.problem.y = torch.tensor([0] * 6 + [1] * 2 + [2] * 2)
    method.plan(torch.arange(8).view(2, 4))
    losses = F.cross_entropy(method.scores(method.problem.X), method.problem.y, reduction="none")
    method.irreducible = losses - torch.tensor([0.0, 9, 1, 8, 2, 7, 3, 6, 4, 5])
    monkeypatch.setattr(Weighting, "step", lambda self, rows, i: seen.append(rows.tolist()))
    method.step(torch.arange(8), 0)
    method.step(torch.tensor([0, 2, 4, 6, 8, 9]), 1)
    assert method.rows.shape == (2, 8) and seen == [[1, 3, 5, 7], [9, 8, 6, 4]]


@pytest.mark.parametrize("held_out, judged", [("half", 250), ("crossed", 500)])
def test_the_other_network_never_sees_what_it_judges(held_out, judged, monkeypatch):
    _, method = prepared({"method": "rho_loss", "held_out": held_out, **DIGITS}, 0)
    seen, step = [], Weighting.step
    monkeypatch.setattr(Weighting, "step", lambda self, rows, i: seen.append(rows) or step(self, rows, i))
    for k, (learnt, rows) in enumerate(method.halves):
        seen.clear()
        assert irreducible_loss(method, learnt, rows, [1e-3] * 9, k).shape == rows.shape
        assert len(seen) >= method.passes and set(torch.cat(seen).tolist()) <= set(learnt.tolist()) and not set(learnt.tolist()) & set(rows.tolist())
    assert abs(sum(len(rows) for _, rows in method.halves) - judged) < 6
    assert set(method.rows.flatten().tolist()) <= set(torch.cat([rows for _, rows in method.halves]).tolist())


def test_rho_with_fewer_samples_than_a_large_batch_chooses_among_all():
    _, method = prepared({"method": "rho_loss", "table": "cancer", "held_out": "crossed"}, 0)
    assert method.rows.shape == (80, len(method.problem.y)) and method.batch == 128


def test_trees_have_the_same_splits_and_figures():
    pytest.importorskip("xgboost")
    found = {m: run({"method": m, "table": "digits-8"}, 0) for m in ("random_forest", "xgboost", "cross_entropy")}
    assert all(out.problem is found["cross_entropy"].problem for out in found.values())
    assert all(measure({"method": m, "table": "digits-8"}, 0)["auprc"] > 85 for m in found)
    assert measure({"method": "xgboost", "data": "digits", "rounds": 20}, 0)["accuracy"] > 80


def test_a_missing_package_is_named(monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "xgboost", None)
    with pytest.raises(ImportError, match="pip install xgboost-cpu"):
        measure({"method": "xgboost"}, 0)


def test_a_method_of_ones_own_may_bring_its_own_optimizer():
    "What a weighting that acts on updates needs: its own step, the samples' numbers, and an optimizer of its own."

    class Halved(Weighting):
        def __init__(self, *given):
            super().__init__(*given)
            self.inner, self.met = self.optimizer, []
            self.optimizer = self

        param_groups = property(lambda self: self.inner.param_groups)
        zero_grad = lambda self: self.inner.zero_grad()

        def losses(self, logits, y, rows):
            self.met.append(rows)
            return super().losses(logits, y, rows)

        def step(self, rows=None, i=None):
            return super().step(rows, i) if rows is not None else self.inner.step()

    _, plain = prepared(SHORT, 0)
    _, twin = prepared(SHORT, 0)
    own = Halved(Plain(), twin.problem, twin.model, twin.optimizer, 0)
    own.plan(twin.rows)
    plain.fit([1e-3] * 6), own.fit([1e-3] * 6)
    assert all(torch.equal(a, b) for a, b in zip(plain.model.parameters(), own.model.parameters()))
    assert torch.equal(torch.stack(own.met), own.rows)
