"Searches for heads: each keeps to its evaluations, orders are orders, answers are right where they are known, bad input is named."
from functools import partial
from importlib.util import find_spec

import numpy as np
import pytest
import torch

from adaptive_lab.bench.controller import adversary, before, changed, needed, score_figures
from adaptive_lab.bench.searches import OURS, against_evaluations, comparison, kept_by_layer, look_for, over_models, read_table, shares
from adaptive_lab.controller.masks import TableLosses, all_losses, number_of, share
from adaptive_lab.controller.model import AdaptiveTransformer
from adaptive_lab.fronts import Known, Member
from adaptive_lab.peers.pruning import STRATEGIES, Budget, Strategy, by_score, environments, learned_gates, nested

STRATEGIES = STRATEGIES | {"learned gates (L0)": Strategy(partial(learned_gates, steps=4), True)}  # few steps: what is learned is not the matter here
THERE = [name for name in STRATEGIES if "Baselines3" not in name or find_spec("stable_baselines3")]
WORTH = np.array([3.0, 7.0, 1.0, 5.0, 2.0, 8.0, 6.0, 4.0])  # of each head, none alike


def additive(worth=WORTH):
    bits = np.arange(2 ** len(worth))[:, None] >> np.arange(len(worth)) & 1
    return TableLosses(worth.sum() - bits @ worth, 2, len(worth) // 2)


EXACT = WORTH.sum() - np.append(0, np.sort(WORTH)[::-1].cumsum())


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return AdaptiveTransformer(2, 4, 16, 16).eval()


@pytest.fixture(scope="module")
def data():
    x = torch.randint(0, 256, (4, 17), generator=torch.Generator().manual_seed(0))
    return x[:, :-1], x[:, 1:]


@pytest.fixture(scope="module")
def known(model, data):
    member = Member(2, 4, 16, "code", "all", 0, 0, context=16, limit=20_000)
    return Known(member, model, all_losses(model, *data))


@pytest.mark.parametrize("name", THERE)
@pytest.mark.parametrize("evaluations", [1, 7, 16, 45])
def test_a_search_keeps_to_its_evaluations(name, evaluations, model, data):
    s, losses = STRATEGIES[name], additive()
    if s.from_scratch and evaluations < 10:
        with pytest.raises(ValueError, match="evaluations="):
            s.search(losses, model, *data, evaluations, 0)
        assert losses.asked == 0
        return
    before = {k: v.clone() for k, v in model.state_dict().items()}
    passes = s.search(losses, model, *data, evaluations, 0)
    assert 1 <= losses.asked <= evaluations and losses.asked == len(losses.seen)
    assert passes >= 0 and 0 <= share(losses, EXACT, WORTH.sum()) <= 1 + 1e-12
    assert all(torch.equal(v, before[k]) for k, v in model.state_dict().items())
    assert all(losses.table[number_of(mask[None])[0]] == loss for mask, loss in losses.seen)


@pytest.mark.parametrize("name", THERE)
def test_the_same_seed_asks_the_same(name, model, data):
    s, found = STRATEGIES[name], []
    for seed in (3, 3):
        losses = additive()
        s.search(losses, model, *data, 40, seed)
        found.append([mask.tobytes() for mask, _ in losses.seen])
    assert found[0] == found[1]


@pytest.mark.parametrize("name", [n for n in THERE if STRATEGIES[n].random and "gates" not in n])
def test_another_seed_asks_something_else(name, model, data):
    found = []
    for seed in (0, 1):
        losses = additive()
        STRATEGIES[name].search(losses, model, *data, 40, seed)
        found.append([mask.tobytes() for mask, _ in losses.seen])
    assert found[0] != found[1]


@pytest.mark.parametrize("name, evaluations", [("leave-one-out", 16), ("greedy backward", 37), ("greedy forward", 37)])
def test_the_exact_front_where_heads_do_not_interact(name, evaluations):
    losses = additive()
    STRATEGIES[name].search(losses, None, None, None, evaluations, 0)
    assert share(losses, EXACT, WORTH.sum()) == pytest.approx(1)


@pytest.mark.parametrize("name", ["magnitude", "first order", "first order, iterative", "slope halfway", "slope halfway, iterative", "learned gates (L0)"])
def test_an_order_is_asked_as_nested_masks_of_every_size(name, model, data):
    losses = additive()
    STRATEGIES[name].search(losses, model, *data, 9, 0)
    masks = sorted((mask.ravel() for mask, _ in losses.seen), key=sum)
    assert [int(m.sum()) for m in masks] == list(range(9))
    assert all((a <= b).all() for a, b in zip(masks, masks[1:]))


def test_an_order_by_the_true_worth_is_exact_and_a_reversed_one_is_not():
    right, wrong = additive(), additive()
    by_score(right, WORTH, 9)
    by_score(wrong, -WORTH, 9)
    assert share(right, EXACT, WORTH.sum()) == pytest.approx(1) and share(wrong, EXACT, WORTH.sum()) < 0.8


def test_nested_masks_follow_the_order():
    order = np.random.default_rng(0).permutation(16)
    masks = nested(order)
    for k in range(17):
        assert set(np.flatnonzero(masks[16 - k])) == set(order[:k])


def test_swaps_repair_an_exchange_of_neighbours(model, data, monkeypatch):
    from adaptive_lab.peers import pruning

    nearly = WORTH.copy()
    nearly[[5, 1]] = nearly[[1, 5]]  # the best two change places in the order
    monkeypatch.setattr(pruning, "slopes", lambda m, X, y, level=0.5: torch.tensor(nearly).view(1, 2, 4))
    shares_ = []
    for evaluations in (9, 16):
        losses = additive()
        pruning.swaps(losses, model, *data, evaluations)
        shares_.append(share(losses, EXACT, WORTH.sum()))
    assert shares_[0] < 1 - 1e-9 and shares_[1] == pytest.approx(1)


def test_magnitude_sees_the_norm_of_a_head(data):
    torch.manual_seed(0)
    m = AdaptiveTransformer(2, 4, 16, 16)
    with torch.no_grad():
        m.blocks[1].attention.out[2] *= 100
    losses = additive()
    STRATEGIES["magnitude"].search(losses, m, *data, 9, 0)
    alone = next(mask for mask, _ in losses.seen if mask.sum() == 1)
    assert alone[1, 2]


def test_first_order_looks_at_one_and_without_sign(model, data):
    from adaptive_lab.controller.slopes import slopes

    losses = additive()
    STRATEGIES["first order"].search(losses, model, *data, 9, 0)
    alone = next(mask for mask, _ in losses.seen if mask.sum() == 1)
    assert alone.ravel().argmax() == slopes(model, *data, 1.0).abs().mean(0).argmax()


def test_passes_are_told(model, data):
    told = {name: STRATEGIES[name].search(additive(), model, *data, 16, 0) for name in THERE if not STRATEGIES[name].from_scratch}
    assert {n: told[n] for n in ("random order", "magnitude", "greedy backward", "leave-one-out")} == dict.fromkeys(("random order", "magnitude", "greedy backward", "leave-one-out"), 0)
    assert told["first order"] == told["slope halfway"] == told["slope halfway, then swaps"] == 1 and told["first order, iterative"] == 7
    assert told["learned gates (L0)"] in (8, 12, 16)


def test_a_mask_is_paid_once():
    b = Budget(additive(), 2)
    full = np.ones((3, 8), bool)
    assert (b(full) == 0).all() and b.left == 1 and b.losses.asked == 1
    assert np.isnan(b(np.eye(8, dtype=bool))[1:]).all() and b.left == 0 and (b(full) == 0).all()


def test_environments_measure_their_ends_once():
    losses = additive()
    envs = environments(losses)
    for e in envs:
        e.reset(seed=0)
    assert losses.asked == 2 and len({e.worth.budget for e in envs}) == 8
    envs[0].step(0)
    envs[0].step(1)
    assert [int(mask.sum()) for mask, _ in losses.seen] == [8, 0, 7, 6]  # what was seen stays, though the environment went on


@pytest.mark.parametrize("wrong", [0, -3, 2.5, "many", None])
def test_evaluations_that_are_none(wrong, model, data):
    for name in ("random order", "greedy backward", "slope halfway", "PPO"):
        losses = additive()
        with pytest.raises((ValueError, TypeError)):
            STRATEGIES[name].search(losses, model, *data, wrong, 0)
        assert losses.asked == 0


def test_a_table_of_results_pairs_models_and_corrects(known):
    twins = [known, known]
    results = {name: over_models(twins, STRATEGIES[name], 9, 2) for name in ("random order", "slope halfway")}
    assert len(results["random order"][0]) == 2 and len(results["slope halfway"][0]) == 1
    text = comparison(results, shares(results["slope halfway"]))
    row = next(line for line in text.splitlines() if line.startswith("| slope halfway"))
    assert "+0.00 [+0.00, +0.00]" in row and "fewer than 5 seeds" in row
    columns, rows = read_table(against_evaluations({9: results}))
    assert columns == ["9"] and rows["random order"][0] == pytest.approx(100 * shares(results["random order"]).mean(), abs=0.006)


def test_all_counted_takes_passes_from_the_evaluations(known):
    free, counted = (look_for(known, STRATEGIES["slope halfway"], 9, all_counted=c) for c in (False, True))
    assert counted.passes == 1 and counted.share <= free.share
    assert look_for(known, STRATEGIES["slope halfway"], 3, all_counted=True) is None
    same = [look_for(known, STRATEGIES["greedy backward"], 20, all_counted=c).share for c in (False, True)]
    assert same[0] == same[1]


def test_the_best_masks_of_an_additive_model_keep_the_best_layer(known):
    worth = np.array([1.0, 2, 3, 4, 10, 11, 12, 13])
    kept = kept_by_layer(Known(known.member, known.model, additive(worth).table))
    assert kept[1] > kept[0] and kept.mean() == pytest.approx(0.5)


def test_what_was_best_before_is_the_old_front(known):
    k = Known(known.member, known.model, additive().table)
    assert needed(k, before(k), 1, 20) <= 8
    mirrored = Known(known.member, known.model, additive(WORTH.max() + 1 - WORTH).table)
    assert needed(mirrored, before(k), 1, 20) == 20


def test_another_dialect_is_another_table(known):
    other = changed(known, "upper", "all")
    assert other.model is known.model and other.member.form == "upper" and not np.array_equal(other.table, known.table)


def test_pruning_everything_never_pays(known):
    k = Known(known.member, known.model, additive().table)
    assert max(adversary(k, f, b) for f in (0, 0.1, 1, 10, 100) for b in (1 / 8, 0.5, 1.0)) < 0


def test_the_bar_is_for_the_planner(known):
    results = {OURS: over_models([known] * 5, STRATEGIES["greedy backward"], 37, 1), "slope halfway": over_models([known] * 5, STRATEGIES["slope halfway"], 37, 1)}
    figure, lead = score_figures({37: results}, {37: 101.0})
    assert not figure.holds and figure.at_least and "slope halfway" in lead.what
    assert not score_figures({37: {"slope halfway": results["slope halfway"]}}, {37: 1.0})[0].holds  # not measured is not held
