"Learned regrowth: what is asked is counted, the choice is what was measured best, the model changes only when the choice stands."
import copy
import itertools

import pytest
import torch
from torch.nn import functional as F

from adaptive_lab.bench import growth as bench
from adaptive_lab.controller import growth
from adaptive_lab.controller.growth import BACKWARD, LOOK, Choice, Policy, choose, covariance, expected_gain, grow, learn, lesson, neighbours, predict, top, view
from adaptive_lab.controller.model import AdaptiveTransformer

MANY = 3


@pytest.fixture
def model():
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        m = AdaptiveTransformer(2, 4, 16, 12).eval()
    for block in m.blocks:
        block.attention.out.data.mul_(8)  # so that heads matter
    for place in [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2), (1, 3)]:
        m.set_gate(*place, 0)
    m.set_gate(1, 1, 0.5)
    m.prune()
    return m


@pytest.fixture
def text():
    b = torch.randint(0, 256, (64, 13), generator=torch.Generator().manual_seed(1))
    return b[:, :-1], b[:, 1:]


@pytest.fixture
def choice(model, text):
    return Choice(model, *text, MANY)


def every(n=6, k=MANY):
    return torch.stack([torch.zeros(n, dtype=torch.float64).index_fill(0, torch.tensor(s), 1.0) for s in itertools.combinations(range(n), k)])


def bits(m):
    return {k: v.clone() for k, v in m.state_dict().items()}, sorted(m.removed, key=str), len(m._past)


def same(a, b):
    return a[0].keys() == b[0].keys() and all(torch.equal(v, b[0][k]) for k, v in a[0].items()) and a[1:] == b[1:]


# -- what is measured, and counted -----------------------------------------------------------------------------------------------------


def test_a_loss_is_that_of_the_model_with_those_heads_back_and_the_others_as_they_were(model, text, choice):
    s = torch.tensor([0.0, 1, 0, 1, 0, 1])
    grown = copy.deepcopy(model)
    growth.bring_back(grown, [p for p, taken in zip(choice.places, s) if taken])
    assert grown.gate_heads[1, 1] == 0.5 and grown.present_heads.sum() == 5
    with torch.no_grad():
        wanted = F.cross_entropy(grown(text[0][:32]).flatten(0, 1), text[1][:32].flatten()).item()
    assert choice.losses(s[None])[0].item() == pytest.approx(wanted, abs=1e-6)


def test_slopes_are_those_of_the_loss(choice):
    level, eps = torch.full((6,), 0.4), 1e-2
    found = choice.slopes(level).mean(0)
    for i in range(6):
        step = torch.zeros(6).index_fill(0, torch.tensor([i]), eps)
        up, down = choice.losses(torch.stack([level + step, level - step]))
        assert found[i].item() == pytest.approx((up - down).item() / (2 * eps), abs=2e-3)


@pytest.mark.parametrize("evaluations", [LOOK + 1, 11, 16])
def test_every_pass_through_the_model_is_counted_and_none_too_many(choice, evaluations, monkeypatch):
    forwards, backwards = [], []
    choice.whole.register_forward_pre_hook(lambda _, args: forwards.append(len(args[0])))
    real = growth.gate_gradients
    monkeypatch.setattr(growth, "gate_gradients", lambda *a: backwards.append(1) or real(*a))
    choose(Policy(), choice, evaluations)
    assert len(backwards) == 2 and choice.asked == evaluations == len(forwards) + (BACKWARD - 1) * len(backwards)
    assert set(forwards) == {32}


def test_rivals_keep_to_the_same_count(model, text, monkeypatch):
    monkeypatch.setattr(bench, "EVALUATIONS", 12)
    for name, (kind, f) in bench.methods(Policy()).items():
        c = Choice(model, *text, MANY)
        s = f(c, 0)
        assert s.sum() == MANY and set(s.tolist()) == {0, 1} and 1 <= c.asked <= 12, name
        if "swaps" in name or "averaged" in name or name in ("learned", "best of random sets"):
            assert c.asked == 12, name


def test_batches_follow_each_other_in_a_circle(text, model):
    c = Choice(model, *text, MANY, windows=24)
    assert [len(c.batch(i)[0]) for i in range(4)] == [24, 24, 16, 24] and torch.equal(c.batch(3)[0], c.batch(0)[0])


# -- beliefs ---------------------------------------------------------------------------------------------------------------------------


def test_the_covariance_is_the_sum_over_shared_heads_and_pairs(choice):
    p, seen, sets = Policy(), view(choice), every()
    v, (a, b) = p.numbers[:3].exp(), p.numbers[4:]
    one, two = seen.size ** (2 * a), seen.size ** (2 * b)
    for s, t in [(sets[0], sets[1]), (sets[3], sets[11]), (sets[5], sets[5])]:
        shared = [i for i in range(6) if s[i] and t[i]]
        pairs = sum((v[1] if seen.layer[i] == seen.layer[j] else v[2]) * two[i] * two[j] for i, j in itertools.combinations(shared, 2))
        wanted = growth.LEVEL + v[0] * sum(one[i] for i in shared) + pairs
        assert covariance(p, seen, s[None], t[None]).item() == pytest.approx(float(wanted), rel=1e-9)
    assert torch.allclose(covariance(p, seen, sets, sets).diagonal(), covariance(p, seen, sets))


def test_what_was_measured_is_believed_and_what_was_not_is_less_sure(choice):
    seen, sets = view(choice), every()
    sure = Policy(numbers=torch.tensor([-1.0, -2, -4, -12, 0.5, 0.5], dtype=torch.float64))
    losses = choice.losses(sets)
    mean, spread = predict(sure, seen, sets[:8], losses[:8], sets)
    assert torch.allclose(mean[:8], losses[:8], atol=1e-2 * seen.scale) and spread[:8].max() < spread[8:].min()


def test_expected_gain_is_the_mean_of_what_lies_below():
    draws = torch.randn(400_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    for mean, spread in ((0.3, 0.5), (-1.0, 0.2), (2.0, 1.5)):
        found = expected_gain(torch.tensor(0.1), torch.tensor([mean]).double(), torch.tensor([spread]).double()).item()
        assert found == pytest.approx((0.1 - mean - spread * draws).clamp_min(0).mean().item(), abs=4e-3)


def test_practice_makes_the_measured_losses_likelier(choice):
    one = lesson(choice, draws=30)
    assert one.sets.sum(1).eq(MANY).all() and torch.equal(one.losses, choice.losses(one.sets))

    def surprise(p):
        r = growth.root(p, one.seen, one.sets)
        missed = one.losses / one.seen.scale - one.sets @ (one.seen.features @ p.worth)
        return torch.linalg.solve_triangular(r, missed[:, None], upper=False).square().sum() / 2 + r.diagonal().log().sum()

    learnt = learn([one], steps=40)
    assert surprise(learnt) < surprise(Policy()) - 1 and not any(t.requires_grad for t in learnt)
    assert all(torch.equal(a, b) for a, b in zip(learnt, learn([one], steps=40)))


# -- the search ------------------------------------------------------------------------------------------------------------------------


def test_neighbours_are_all_exchanges_of_one_head():
    s = torch.tensor([1.0, 0, 1, 0, 0])
    near = neighbours(s)
    assert len(near) == len(near.unique(dim=0)) == 6 and (near.sum(1) == 2).all() and ((near - s).abs().sum(1) == 2).all()
    assert len(neighbours(torch.ones(3))) == 0


def test_top_takes_the_first_of_equals():
    assert top(torch.tensor([[1.0, 2, 2, 2], [0, 0, 0, 0]]), 2).tolist() == [[0, 1, 1, 0], [1, 1, 0, 0]]


def test_the_answer_is_the_best_of_what_was_measured_and_no_set_twice(choice, monkeypatch):
    seen, real = [], Choice.losses

    def heard(self, sets):
        found = real(self, sets)
        seen.extend((tuple(s.tolist()), v.item()) for s, v in zip(sets, found))
        return found

    monkeypatch.setattr(Choice, "losses", heard)
    found = choose(Policy(), choice, 18)
    assert len({s for s, _ in seen}) == len(seen) == 18 - LOOK
    assert tuple(found.tolist()) == min(seen, key=lambda p: p[1])[0]


def test_each_set_asked_is_the_exchange_in_one_of_the_two_best_that_promises_most(choice, monkeypatch):
    asked, losses, real = [], [], Choice.losses

    def heard(self, sets):
        found = real(self, sets)
        asked.extend(sets)
        losses.extend(found)
        return found

    monkeypatch.setattr(Choice, "losses", heard)
    choose(Policy(), choice, 14)
    seen = view(choice)
    assert torch.equal(asked[0], top(-(seen.features @ Policy().worth), MANY))
    for i in range(1, len(asked)):
        known, found = torch.stack(asked[:i]), torch.stack(losses[:i])
        pool = [s for s in every() if any((s - known[j]).abs().sum() == 2 for j in found.argsort()[:2]) and not any(torch.equal(s, k) for k in known)]
        gain = expected_gain(found.min(), *predict(Policy(), seen, known, found, torch.stack(pool)))
        at = next(j for j, s in enumerate(pool) if torch.equal(s, asked[i]))
        assert gain[at] >= gain.max() - 1e-9 * gain.max().abs() - 1e-15


def test_with_enough_evaluations_the_best_set_is_found_and_the_search_ends(choice):
    losses = choice.losses(every())
    before = choice.asked
    assert torch.equal(choose(Policy(), choice, 60), every()[losses.argmin()])
    assert choice.asked - before <= LOOK + 20


def test_same_bits_again(model, text):
    a, b = (choose(Policy(), Choice(model, *text, MANY), 14) for _ in range(2))
    assert torch.equal(a, b)


# -- growing ---------------------------------------------------------------------------------------------------------------------------


def test_heads_come_back_open_and_the_way_back_is_exact(model, text):
    before = bits(model)
    found = choose(Policy(), Choice(model, *text, MANY), 14)
    wanted = [p for p, taken in zip(sorted(p for p in model.removed), found) if taken]
    assert same(bits(model), before)
    grown = grow(model, Policy(), *text, MANY, evaluations=14)
    assert grown == wanted and all(model.present_heads[p] and model.gate_heads[p] == 1 for p in grown) and int(model.present_heads.sum()) == 2 + MANY
    for _ in range(2 * MANY):
        model.undo()
    assert all(torch.equal(v, before[0][k]) for k, v in bits(model)[0].items())


def test_an_optimizer_goes_on_with_the_grown_model(model, text):
    adam = torch.optim.Adam(model.parameters(), 1e-3)
    for _ in range(2):
        adam.zero_grad()
        F.cross_entropy(model(text[0]).flatten(0, 1), text[1].flatten()).backward()
        adam.step()
        if int(model.present_heads.sum()) == 2:
            grow(model, Policy(), *text, 2, evaluations=LOOK + 1, optimizer=adam)
    out = model.blocks[0].attention.out
    assert adam.state[out]["exp_avg"].shape == out.shape


def test_all_that_was_removed_may_come_back(model, text):
    assert grow(model, Policy(), *text, 6) == [(0, 0), (0, 1), (0, 3), (1, 0), (1, 2), (1, 3)] and model.present_heads.all()


def test_heads_behind_a_closed_layer_are_no_candidates(model, text):
    model.set_gate(1, "layer", 0), model.prune()
    before = bits(model)
    with pytest.raises(ValueError, match="many=4 is not allowed: .* at most the 3 heads that can come back"):
        grow(model, Policy(), *text, 4)
    assert same(bits(model), before)
    assert grow(model, Policy(), *text, 3) == [(0, 0), (0, 1), (0, 3)]
    model.set_gate(0, "layer", 0), model.prune()
    before = bits(model)
    with pytest.raises(ValueError, match="all 8 heads .* whose own gate is 0"):
        grow(model, Policy(), *text, 1)
    assert same(bits(model), before)
    model.regrow(1, "layer"), model.set_gate(1, "layer", 1)  # as it says; then nothing of that layer is missing
    with pytest.raises(ValueError, match="all 4 heads"):
        grow(model, Policy(), *text, 1)


@pytest.mark.parametrize("many", [0, -1, 7, 2.0, True, "2", None])
def test_so_many_cannot_come_back(model, text, many):
    before = bits(model)
    with pytest.raises(ValueError, match=f"many={many!r} is not allowed"):
        grow(model, Policy(), *text, many)
    assert same(bits(model), before)


@pytest.mark.parametrize("evaluations", [LOOK, 0, -3, 24.0, True, None])
def test_too_few_evaluations(model, text, evaluations):
    before = bits(model)
    with pytest.raises(ValueError, match=f"evaluations={evaluations!r} is not allowed: .* {LOOK + 1} or more"):
        grow(model, Policy(), *text, MANY, evaluations)
    assert same(bits(model), before)


def test_nothing_was_removed_and_nothing_was_practised(text):
    with pytest.raises(ValueError, match="no head was removed"):
        grow(AdaptiveTransformer(1, 2, 8, 12), Policy(), *text, 1)
    with pytest.raises(ValueError, match="lessons is empty"):
        learn([])


def test_windows_and_texts_that_do_not_fit(model, text):
    with pytest.raises(ValueError, match="windows=0 is not allowed"):
        Choice(model, *text, MANY, windows=0)
    with pytest.raises(ValueError):
        grow(model, Policy(), text[0], text[1][:5], MANY)
    with pytest.raises(ValueError):
        grow(model, Policy(), text[0][:0], text[1][:0], MANY)


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_losses_that_are_not_finite_change_nothing(model, text, value):
    model.logits.weight.data[3, 3] = value
    before, undo = bits(model)[1:], len(model._past)
    with pytest.raises(ArithmeticError):
        grow(model, Policy(), *text, MANY)
    with pytest.raises(ArithmeticError, match="a loss is"):
        Choice(model, *text, MANY).losses(torch.ones(1, 6))
    assert bits(model)[1:] == before and len(model._past) == undo and int(model.present_heads.sum()) == 2


# -- the bench -------------------------------------------------------------------------------------------------------------------------


def rows(**better):
    names = list(bench.methods(Policy()))
    return [{n: (3 - better.get(n, 0) * (i < 8), 2 - better.get(n, 0), 24) for n in names} for i in range(10)]


def test_wins_are_counted_against_the_strongest_and_equal_is_not_won():
    held = {f.what: f for f in bench.figures([{n: (v[0] + (n != "learned") * (i < 8) / 10, *v[1:]) for n, v in r.items()} for i, r in enumerate(rows())])}
    now = held["changes won right after regrowth, against both at once"]
    assert (now.value, now.bar, now.holds) == (8, 8, True)
    after = held["changes won after a brief training, against both at once"]
    assert (after.value, after.holds) == (0, False)
    assert bench.strongest(rows(gradient=1), "gradient", 0) == "gradient"


def test_practice_and_report_share_no_text():
    assert not set(bench.PRACTICE) & set(bench.REPORTED)
    a, b = bench.dialects(100, bench.PRACTICE, 9), bench.dialects(200, bench.REPORTED, 9)
    assert len(set(a)) == len(set(b)) == 9 and {s for _, s in a} <= set(bench.PRACTICE) and {s for _, s in b} <= set(bench.REPORTED)
