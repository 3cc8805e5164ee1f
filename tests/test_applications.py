"Applications of the map: trials, choosing, ensembles and starts; what the notebooks do not show."
import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.applications.ensembles import average, brier, disagreement, members, soup, with_brier
from adaptive_lab.applications.select import early, halving, labelled, search, selection, together
from adaptive_lab.applications.starts import STEPS, at_rates, best_rates, features_of, fresh, head, measured, trained, with_head
from adaptive_lab.applications.trials import compared, lines, look, pools, probe_labels, strongest
from adaptive_lab.epsilon_vae.alignment import permuted, symmetries
from adaptive_lab.epsilon_vae.population import populations
from adaptive_lab.epsilon_vae.prediction import Prediction
from adaptive_lab.evaluator import Evaluator
from adaptive_lab.zoo import Zoo, grow

SMALL = Prediction(folds=2, trees=3)


@pytest.fixture(scope="module")
def zoo(tmp_path_factory):
    folder = tmp_path_factory.mktemp("zoo")
    for seed in (0, 1):
        grow(folder, Zoo(runs=4, steps=40, width=8, seed=seed), many=3, workers=1, progress=False)
    every = populations(folder)[0]
    return [look(every.only(lambda c, s=s: f"digits-{s}-" in c.run)) for s in (0, 1)]


def rows_of(gain, higher=True, draws=12):
    rng = np.random.default_rng(0)
    names = (("hand", "rival", 0.0), ("random", "rival", -1.0), ("map", "ours", gain), ("best", "bound", 5.0))
    return [dict(choice=n, kind=k, draw=d, setting="s", worth=(1 if higher else -1) * (g + 0.1 * rng.normal())) for d in range(draws) for n, k, g in names]


def test_pools_share_no_run_and_leave_no_checkpoint_out():
    groups = np.repeat(np.arange(7), 3)[np.random.default_rng(0).permutation(21)]
    found = pools(groups, 3)
    assert len(found) == 2 and all(len(p) == 9 for p in found)
    assert not set(groups[found[0]]) & set(groups[found[1]])
    for runs in (0, 8):
        with pytest.raises(ValueError, match=f"runs={runs} in a pool"):
            pools(groups, runs)


@pytest.mark.parametrize("higher", [True, False])
@pytest.mark.parametrize("gain, said", [(1.0, "better"), (-1.0, "worse"), (0.0, "undecided")])
def test_verdicts_in_both_directions(gain, said, higher):
    found = {r["choice"]: r for r in compared(rows_of(gain, higher), "worth", higher)}
    assert found["map"]["verdict"] == said and found["map"]["rival"] == "hand" and found["best"]["verdict"] == "bound"
    assert ("**" in lines(rows_of(gain, higher), "worth", higher)) == (said == "better")


def test_draws_are_paired_whatever_their_order():
    rows = rows_of(1.0)
    mixed = [rows[i] | dict(worth=rows[i]["worth"] + rows[i]["draw"]) for i in np.random.default_rng(2).permutation(len(rows))]
    first, again = (next(r["difference"] for r in compared(x, "worth") if r["choice"] == "map") for x in (rows, mixed))
    assert (first.low, first.high) == pytest.approx((again.low, again.high))


def test_no_rival_no_comparison():
    with pytest.raises(ValueError, match="no row of kind 'rival'"):
        strongest([r for r in rows_of(1.0) if r["kind"] == "ours"], "worth", True, "s")


def test_labels_of_probes_are_theirs(zoo):
    from adaptive_lab.data.digits import digit_arrays

    X, y, *_ = digit_arrays("digits", "")
    own = probe_labels(zoo[0].population.rows[0].recipe)
    where = [(X == p).all(1).nonzero()[0, 0].item() for p in zoo[0].judge.probes[:20]]
    assert own[:20].tolist() == y[where].tolist()


def test_no_choice_without_labels_sees_labels(zoo, monkeypatch):
    told = {(r["choice"], r["draw"], r["setting"]): r["regret"] for r in selection(*zoo, runs=2, knobs=SMALL)}
    wrong = lambda recipe: probe_labels(recipe).flip(0)
    monkeypatch.setattr("adaptive_lab.applications.select.probe_labels", wrong)
    lied = {(r["choice"], r["draw"], r["setting"]): r["regret"] for r in selection(*zoo, runs=2, knobs=SMALL)}
    free = [k for k in told if "labels" not in k[0]]
    assert len(free) >= 7 * 4 and all(told[k] == lied[k] for k in free) and any(told[k] != lied[k] for k in told)
    assert min(told.values()) >= 0


def test_two_opinions_between_them_and_nearer_the_surer():
    predicted = np.array([[0.9, 0.89, 0.91], [0.9, 0.5, 1.0]])
    found = together(predicted, np.array([0.5, 0.5]), 100)
    assert 0.5 < found[1] < found[0] < 0.9
    more = together(predicted, np.array([0.5, 0.5]), 10**6)
    assert (more < found).all() and more == pytest.approx([0.5, 0.5], abs=0.02)


def test_ties_of_few_labels_are_broken_by_the_loss():
    p = np.log(np.array([[[0.6, 0.4]], [[0.9, 0.1]], [[0.1, 0.9]]]))
    score = labelled(p, torch.tensor([0])).score(np.array([0]))
    assert score[1] > score[0] > score[2]


@pytest.mark.parametrize("many", [2, 3, 8, 16])
@pytest.mark.parametrize("budget", [4, 62, 141])
def test_halving_spends_no_more_than_all_do(many, budget):
    steps = np.array([4, 16, 35, 62, 98, 141, 191, 250, 316, 391, 473, 562, 660, 766, 879, 1000])
    rungs = halving(steps, many, budget)
    at = [0, *(steps[k] for k, _ in rungs)]
    assert sum(left * (b - a) for (_, left), a, b in zip(rungs, at, at[1:])) <= many * budget
    assert rungs[0][1] == many and all(b < a for (_, a), (_, b) in zip(rungs, rungs[1:])) and rungs[-1][0] < len(steps) - 1


def test_an_early_look_has_no_late_signs(zoo):
    first = zoo[0].population.rows[0].step
    now, votes = early([zoo[0]], first)
    end = zoo[0].population.last()
    changed = zoo[0].seen.logits.copy()
    changed[end] = 0
    from dataclasses import replace

    late = replace(zoo[0], seen=replace(zoo[0].seen, logits=changed))
    assert np.array_equal(early([late], first, votes)[0].X, early([zoo[0]], first, votes)[0].X)
    assert np.allclose(now.final, zoo[0].accuracy[end])
    with pytest.raises(ValueError, match="budget=7 is not a step"):
        early([zoo[0]], 7)


def test_search_finds_no_more_than_there_is(zoo):
    rows = search([zoo[0]], [zoo[1]], budgets=(int(zoo[0].steps[1]),), recipes=2, knobs=SMALL)
    assert all(r["regret"] >= 0 for r in rows) and {r["regret"] for r in rows if r["choice"] == "best"} == {0.0}


def test_the_brier_score_of_an_ensemble_is_that_of_its_members_less_their_disagreement():
    rng = np.random.default_rng(0)
    for k in (1, 2, 5):
        p, y = rng.dirichlet(np.ones(4), (k, 50)), rng.integers(0, 4, 50)
        assert brier(p.mean(0), y) == pytest.approx(brier(p, y).mean() - disagreement(p), abs=1e-12)


@pytest.mark.parametrize("seed", range(5))
def test_members_are_those_that_a_search_over_all_finds_next(seed):
    rng = np.random.default_rng(seed)
    p, y = rng.dirichlet(np.ones(3), (8, 40)), rng.integers(0, 3, 40)
    p[1] = 0.99 * p[0] + 0.01 / 3  # a twin brings nothing
    worth, chosen = brier(p, y), []
    for _ in range(4):
        left = [i for i in range(8) if i not in chosen]
        chosen.append(min(left, key=lambda i: brier(p[[*chosen, i]].mean(0), y)))
    assert members(p, worth, 4).tolist() == chosen
    with pytest.raises(ValueError, match="k=9 members of 8"):
        members(p, worth, 9)


def test_a_soup_of_one_network_in_other_orders_is_that_network(zoo):
    judge, state = zoo[0].judge, zoo[0].population.state(int(zoo[0].accuracy.argmax()))
    groups = symmetries(judge.build())
    others = [permuted(state, groups, [torch.randperm(g.size, generator=torch.Generator().manual_seed(s)) for g in groups]) for s in (1, 2)]
    said = judge.outputs(state)
    assert torch.allclose(judge.outputs(soup([state, *others], judge, "REPAIR")), said, atol=1e-3)
    assert not torch.allclose(judge.outputs(average([state, *others], judge)), said, atol=1e-1)
    with pytest.raises(ValueError, match="how='mean'"):
        soup([state], judge, "mean")


def test_the_brier_score_is_a_metric_of_what_was_learnt(zoo):
    d = with_brier(zoo[0])
    assert d.names == ["accuracy", "brier"] and np.allclose(d.metrics[:, 0], zoo[0].accuracy) and (d.metrics[:, 1] < 2).all()


def test_left_out_errors_are_those_of_leaving_out():
    rng = torch.Generator().manual_seed(0)
    H, y = torch.cat([torch.randn(12, 3, generator=rng), torch.ones(12, 1)], 1).double(), torch.arange(12) % 3
    found = []
    for strength in (1e-3, 1e-2, 1e-1):
        T, out = nn.functional.one_hot(y, 3).double() - 1 / 3, []
        ridge = strength * 12 * H.pow(2).mean() * torch.eye(4).double()
        for i in range(12):
            rest = torch.arange(12) != i
            out.append(H[i] @ torch.linalg.solve(H[rest].T @ H[rest] + ridge, H[rest].T @ T[rest]))
        found.append((T - torch.stack(out)).pow(2).sum(1).mean().item())
    assert head(H, y, 3)[0] == pytest.approx(min(found), rel=1e-9)


def test_only_the_last_layer_is_solved_and_nothing_given_is_changed(zoo):
    judge, state = zoo[0].judge, zoo[0].population.state(0)
    before = {n: t.clone() for n, t in state.items()}
    new = with_head(state, judge, judge.probes[:40], torch.arange(40) % 10)
    assert all(torch.equal(state[n], before[n]) for n in state)
    assert [n for n in state if not torch.equal(new[n], state[n])] == [f"{features_of(state, judge, judge.probes[:2])[0]}.{w}" for w in ("weight", "bias")]
    judge.model(new)


def test_networks_trained_side_by_side_do_not_see_each_other(zoo):
    judge, states = zoo[0].judge, [zoo[0].population.state(i) for i in (0, 5)]
    X, y = judge.probes[:60].reshape(2, 30, -1), torch.arange(60).reshape(2, 30) % 10
    both = trained(states, judge, X, y, torch.tensor([1e-2, 1e-3]), (1, 5))
    alone = trained(states[1:], judge, X[1:], y[1:], torch.tensor([1e-3]), (1, 5))
    assert len(both) == 2 and all(torch.allclose(both[1][n][1], alone[1][n][0], atol=1e-6) for n in states[0])
    assert not torch.equal(both[0]["1.weight"], both[1]["1.weight"]) and measured(both[1], judge, X, y).shape == (2,)


def test_fresh_weights_follow_from_the_seed_alone(zoo):
    torch.manual_seed(3)
    now = torch.get_rng_state()
    a, b, c = (fresh(zoo[0].judge, s) for s in (1, 1, 2))
    assert torch.equal(torch.get_rng_state(), now)
    assert torch.equal(a["1.weight"], b["1.weight"]) and not torch.equal(a["1.weight"], c["1.weight"])


def test_rates_are_chosen_by_choice_and_setting():
    row = lambda choice, rate, accuracy, task="t", draw=0: dict(choice=choice, kind="rival", setting="s", rate=rate, accuracy=accuracy, task=task, draw=draw)
    old = [row("a", 0.1, 0.5), row("a", 0.2, 0.7), row("b", 0.1, 0.9), row("b", 0.2, 0.1)]
    rates = best_rates(old)
    assert rates == {("a", "s"): 0.2, ("b", "s"): 0.1} and STEPS == (25, 100, 400)
    new = [row("a", 0.1, 1.0), row("a", 0.2, 0.2), row("a", 0.2, 0.4, "u"), row("b", 0.1, 0.3)]
    assert [r["accuracy"] for r in at_rates(new, rates)] == pytest.approx([0.3, 0.3]) and [r["accuracy"] for r in at_rates(new, rates, "u")] == [0.4]
