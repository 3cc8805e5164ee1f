"The replay buffer: who is in it, what is drawn, what is saved, what is refused."
import io
from itertools import combinations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import chisquare

from adaptive_lab.data.streams import seeded
from adaptive_lab.replay import POLICIES, ReplayBuffer, Reservoir, distinct, distinct_rows, levels, plan_replay


def fed(capacity, labels, batches, seed=0, policy="reservoir"):
    "A buffer that has seen samples with these labels, in batches of these sizes, over and over; `x` is the sample's number."
    buffer, at, i = ReplayBuffer(capacity, seed, policy), 0, 0
    labels = torch.as_tensor(labels)
    while at < len(labels):
        part = slice(at, at := at + batches[i % len(batches)])
        i += 1
        buffer.add(torch.arange(len(labels))[part], labels[part])
    return buffer


def held(buffer):
    return sorted(buffer.columns["x"][: len(buffer)].tolist())


def by_definition(capacity, labels, seed, policy):
    "Those of the smallest (level, key) among all that were ever seen."
    labels = np.asarray(labels)
    keys = seeded(seed, "replay keys").random(len(labels))
    level = levels(keys, labels) if policy == "class_balanced" else np.zeros_like(labels)
    return sorted(np.lexsort((keys, level))[:capacity].tolist())


@settings(max_examples=150, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=120),
    st.integers(1, 30),
    st.lists(st.integers(1, 9), min_size=1, max_size=5),
    st.integers(0, 1000),
    st.sampled_from(POLICIES),
)
def test_turning_away_early_changes_nothing(labels, capacity, batches, seed, policy):
    assert held(fed(capacity, labels, batches, seed, policy)) == by_definition(capacity, labels, seed, policy)


@pytest.mark.parametrize("batches", [[6], [1], [2, 3]])
def test_every_set_is_equally_likely(batches):
    sets = {s: 0 for s in combinations(range(6), 2)}
    for seed in range(1500):
        sets[tuple(held(fed(2, [0] * 6, batches, seed)))] += 1
    assert chisquare(list(sets.values())).pvalue > 1e-3


def test_the_latest_samples_are_not_preferred():
    inside = np.zeros(300)
    for seed in range(300):
        inside[held(fed(30, [0] * 300, [10], seed))] += 1
    assert abs(inside[:100].mean() - 30) < 1.5 and abs(inside[-100:].mean() - 30) < 1.5


def test_a_class_is_sampled_uniformly_and_a_rare_one_is_kept():
    labels, inside = [0] * 30 + [1] * 3 + [0] * 30 + [2] * 40, np.zeros(103)
    for seed in range(800):
        buffer = fed(13, labels, [7], seed, "class_balanced")
        assert buffer.columns["y"].bincount().tolist() == [5, 3, 5]
        inside[held(buffer)] += 1
    zeros = np.r_[inside[:30], inside[33:63]]
    assert inside[30:33].tolist() == [800] * 3
    assert abs(zeros[:30].sum() - zeros[30:].sum()) < 5 * np.sqrt(zeros.sum())
    assert zeros.std() < 1.5 * np.sqrt(zeros.mean()) and inside[63:].std() < 1.5 * np.sqrt(inside[63:].mean())


def test_a_class_that_appears_late_gets_its_places():
    buffer = fed(20, [0] * 500 + [7] * 500, [10], policy="class_balanced")
    assert buffer.columns["y"].bincount()[[0, 7]].tolist() == [10, 10]


def test_draws_have_no_repeats_and_no_favourites():
    buffer, counts = fed(10, [0] * 10, [10]), torch.zeros(10)
    for _ in range(3000):
        x, y = buffer.sample(3)
        assert len(set(x.tolist())) == 3
        counts[x] += 1
    assert chisquare(counts.numpy()).pvalue > 1e-3


def test_every_draw_is_equally_likely():
    sets = {s: 0 for s in combinations(range(6), 3)}
    for found in distinct_rows(np.random.default_rng(0).random((6000, 3)), np.full(6000, 6)).tolist():
        sets[tuple(sorted(found))] += 1
    assert chisquare(list(sets.values())).pvalue > 1e-3


@settings(max_examples=100, deadline=None)
@given(st.integers(1, 12), st.integers(0, 15), st.integers(0, 1000))
def test_draws_for_all_steps_are_the_single_ones(n, size, seed):
    u = np.random.default_rng(seed).random((1, n))
    found = distinct_rows(u, np.array([size]))[0]
    assert found[found >= 0].tolist() == distinct(u[0], size) and len(set(distinct(u[0], size))) == min(n, size)
    assert set(distinct(u[0], size)) <= set(range(size))


@settings(max_examples=100, deadline=None)
@given(
    st.lists(st.integers(0, 4), min_size=1, max_size=90),
    st.integers(1, 6),
    st.integers(1, 25),
    st.integers(1, 9),
    st.integers(1, 3),
    st.integers(0, 1000),
    st.sampled_from(POLICIES),
)
def test_a_plan_is_what_a_buffer_does(labels, batch, capacity, n, draws, seed, policy):
    labels = torch.tensor(labels * batch).view(-1, batch)
    plan = plan_replay(Reservoir(capacity, seed, policy), labels.numpy(), n, draws)
    buffer = ReplayBuffer(capacity, seed, policy)
    for numbers, y, ahead in zip(torch.arange(labels.numel()).view(-1, batch), labels, plan):
        drawn = [buffer.sample(n)[0].tolist() for _ in range(draws)] if len(buffer) else []
        assert ahead[ahead >= 0].tolist() == sum(drawn, [])
        buffer.add(numbers, y)


def test_drawing_does_not_change_who_is_kept():
    quiet, busy = (ReplayBuffer(10, seed=3) for _ in range(2))
    for part in torch.arange(400).split(8):
        for b in (quiet, busy):
            b.add(part, part)
        busy.sample(4)
    assert held(quiet) == held(busy) and len(quiet) == 10 and quiet.seen == 400


def test_what_is_drawn_is_a_copy():
    buffer = fed(5, [1] * 5, [5])
    x, _ = buffer.sample(5)
    x.zero_()
    assert held(buffer) == [0, 1, 2, 3, 4]


def test_a_stored_sample_has_no_graph_and_no_tie_to_the_batch():
    z = torch.ones(2, 3, requires_grad=True)
    x, buffer = torch.ones(2, 4), ReplayBuffer(4)
    buffer.add(x, [0, 1], logits=z * 2)
    x.zero_()
    assert buffer.columns["x"][:2].eq(1).all() and not buffer.columns["logits"].requires_grad


@pytest.mark.parametrize("policy", POLICIES)
@pytest.mark.parametrize("before", [0, 3, 40])
def test_a_loaded_buffer_goes_on_bit_for_bit(policy, before):
    labels = torch.randint(0, 3, (200,), generator=torch.Generator().manual_seed(0))
    one = fed(8, labels[:before], [5], policy=policy) if before else ReplayBuffer(8, policy=policy)
    file = io.BytesIO()
    torch.save(one.state_dict(), file)
    file.seek(0)
    two = ReplayBuffer(8, seed=99, policy=policy)
    two.load_state_dict(torch.load(file, weights_only=True))
    for b in (one, two):
        b.add(torch.arange(before, 200), labels[before:])
    assert torch.equal(one.columns["x"], two.columns["x"]) and one.seen == two.seen == 200
    assert all(torch.equal(a, b) for a, b in zip(one.sample(5), two.sample(5)))


def refused(f, *words):
    with pytest.raises(ValueError) as e:
        f()
    for word in words:
        assert word in str(e.value)


def test_bad_arguments_are_named():
    for bad in (0, -1, 2.5, True, "9"):
        refused(lambda: ReplayBuffer(bad), "capacity", "1 or more")
    refused(lambda: ReplayBuffer(5, policy="fifo"), "fifo", "class_balanced")
    refused(lambda: ReplayBuffer(5, seed=-1), "seed")
    refused(lambda: ReplayBuffer(5).sample(1), "empty")
    refused(lambda: fed(5, [0], [1]).sample(0), "n=0")


@pytest.mark.parametrize(
    "x, y, extras, word",
    [
        (torch.zeros(3, 2), torch.zeros(2).long(), {}, "rows"),
        (torch.zeros(2, 2), torch.zeros(2, 2).long(), {}, "y of shape"),
        (torch.tensor(1.0), torch.zeros(1).long(), {}, "rows"),
        (torch.zeros(2, 3), torch.zeros(2).long(), {}, "rows of (3,)"),
        (torch.zeros(2, 2).double(), torch.zeros(2).long(), {}, "dtype"),
        (torch.zeros(2, 2), torch.zeros(2).long(), {"logits": torch.zeros(2)}, "extras"),
        (torch.zeros(2, 2), -torch.ones(2).long(), {}, "class numbers"),
    ],
)
def test_a_refused_batch_changes_nothing(x, y, extras, word):
    buffer = ReplayBuffer(4, policy="class_balanced")
    buffer.add(torch.ones(9, 2), torch.arange(9) % 3)
    before = buffer.state_dict()
    refused(lambda: buffer.add(x, y, **extras), word)
    assert str(before) == str(buffer.state_dict())


def test_a_refused_state_changes_nothing():
    buffer, other = fed(5, [0] * 9, [3]), fed(5, [0] * 9, [3], seed=1).state_dict()
    before = str(buffer.state_dict())
    refused(lambda: buffer.load_state_dict(fed(6, [0] * 9, [3]).state_dict()), "capacity=6")
    refused(lambda: buffer.load_state_dict({k: v for k, v in other.items() if k != "rng"}), "rng")
    refused(lambda: buffer.load_state_dict({**other, "columns": {**other["columns"], "y": torch.zeros(3)}}), "rows")
    refused(lambda: buffer.load_state_dict({**other, "columns": {"y": other["columns"]["y"]}}), "rows")
    refused(lambda: buffer.load_state_dict({**other, "keys": other["keys"][:-1]}), "rows")
    assert str(buffer.state_dict()) == before


def test_an_empty_batch_is_nothing():
    buffer = ReplayBuffer(3)
    buffer.add(torch.zeros(0, 2), torch.zeros(0).long())
    buffer.add(torch.ones(2, 2), torch.zeros(2).long())
    buffer.add(torch.zeros(0, 2), torch.zeros(0).long())
    assert len(buffer) == buffer.seen == 2
