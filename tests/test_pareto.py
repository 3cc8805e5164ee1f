"The Pareto front and the hypervolume against their definitions, on many small cases and on awkward numbers."
import itertools
import math
from fractions import Fraction

import numpy as np
import pytest
import torch

from adaptive_lab import pareto
from adaptive_lab.pareto import contributions, hypervolume, pareto_front

WORDS = np.array(["minimize", "maximize"])


def brute(rows, up):
    "The front from the definition: a row is on it if no row is at least as good everywhere and better somewhere."
    z = np.where(up, -rows, rows)
    no_worse = np.logical_and.reduce([c[:, None] <= c for c in z.T])  # (n, n): row i against row j
    better = np.logical_or.reduce([c[:, None] < c for c in z.T])
    return np.flatnonzero(~(no_worse & better).any(0))


def boxes_volume(boxes):
    "Inclusion and exclusion over all sets of boxes at the origin, in whole numbers."
    sets = (s for k in range(1, len(boxes) + 1) for s in itertools.combinations(boxes, k))
    return sum((-1) ** (len(s) + 1) * math.prod(map(min, zip(*s))) for s in sets)


def a_case(rng):
    "A small table with ties, duplicates, infinities or gaps, and a direction for each column."
    n, d, kind = rng.integers(0, 40), rng.integers(1, 7), rng.integers(4)
    rows = rng.integers(-3, rng.integers(-2, 8), (n, d)).astype(float) if kind else rng.normal(size=(n, d))
    if kind == 2 and n:
        rows = np.concatenate([rows, rows[rng.integers(0, n, n)]])
    if kind == 3:
        rows = np.where(rng.random(rows.shape) < 0.1, rng.choice([np.inf, -np.inf, 0.0, -0.0], rows.shape), rows)
    return rows, rng.integers(0, 2, d).astype(bool)


@pytest.mark.parametrize("pieces", ["whole", "in small pieces"])
def test_front_is_exact_on_ten_thousand_cases(pieces, monkeypatch):
    if pieces != "whole":  # so that small tables take every branch
        monkeypatch.setattr(pareto, "PAIRS", 8)
        monkeypatch.setattr(pareto, "SAMPLE", 4)
        monkeypatch.setattr(pareto, "SMALL", 2)
    rng = np.random.default_rng(0)
    for _ in range(5000):
        rows, up = a_case(rng)
        found = pareto_front(rows, WORDS[up.astype(int)].tolist())
        assert found.dtype == np.int64 and found.tolist() == brute(rows, up).tolist(), (rows.tolist(), up)


@pytest.mark.parametrize("d", [2, 3, 5])
@pytest.mark.parametrize("shape", ["front", "sorted", "reversed", "grid", "heavy", "copies"])
def test_front_of_larger_tables(d, shape):
    rng = np.random.default_rng(d)
    rows = rng.integers(0, 30, (3000, d)).astype(float)
    if shape in ("front", "sorted", "reversed"):
        rows[:, -1] = -rows[:, :-1].sum(1)
    if shape == "heavy":
        rows[rng.random(rows.shape) < 0.6] = 7
    if shape == "copies":
        rows[:] = rows[0]
    if shape in ("sorted", "reversed"):
        rows = rows[np.lexsort(rows.T[::-1])][:: 1 if shape == "sorted" else -1]
    assert pareto_front(rows).tolist() == brute(rows, np.zeros(d, bool)).tolist()


@pytest.mark.parametrize("dtype", [np.bool_, np.int8, np.uint8, np.int64, np.uint64, np.float16, np.float32, np.longdouble])
def test_every_dtype_at_its_ends(dtype):
    info = None if dtype is np.bool_ else np.iinfo(dtype) if np.issubdtype(dtype, np.integer) else np.finfo(dtype)
    low, high = (False, True) if info is None else (info.min, info.max)
    rows = np.array([[low, high], [high, low], [low, low], [high, high], [low, low]], dtype)
    assert pareto_front(rows).tolist() == [2, 4]
    assert pareto_front(rows, ["maximize"] * 2).tolist() == [3]
    assert pareto_front(rows, ["minimize", "maximize"]).tolist() == [0]
    assert pareto_front(np.repeat(rows, 2, 1), ["maximize"] * 4).tolist() == [3]


def test_neighbouring_huge_numbers_differ():
    a, b = 2**63 - 1, 2**63 - 2
    for rows in (np.array([[a, a], [b, b]]), np.array([[a, a], [b, b]], np.uint64), [[a, 0.5], [b, 0.5]], [[a, -1], [b, -1]], [[10**30 + 1, 1, 1], [10**30, 1, 1]]):
        assert pareto_front(rows).tolist() == [1]
    assert pareto_front([[a, 0.5], [b, 0.5]], ["maximize", "minimize"]).tolist() == [0]
    assert hypervolume(np.array([[2**62, 2**62]]), [2**62 + 1, 2**62 + 3]) == 3
    assert hypervolume([[10**30, 0.5]], [10**30 + 4, 1.5]) == 4
    assert hypervolume(np.array([[0, 5]], np.uint8), [200, 300]) == 200 * 295
    many = [[a + i % 3, -i, 0.5 - (i > 2000)] for i in range(3000)]
    assert pareto_front(many, ["maximize"] * 3).tolist() == [0, 1, 2]
    assert pareto_front([row[:2] for row in many], ["minimize"] * 2).tolist() == [2997, 2998, 2999]
    assert pareto_front([[Fraction(1, 3), 1], [Fraction(1, 4), 1]]).tolist() == [1]


def test_zero_has_no_sign_and_infinities_are_values():
    assert pareto_front([[0.0, 1.0], [-0.0, 1.0]]).tolist() == [0, 1]
    assert pareto_front([[0.0, 1.0, 2.0], [-0.0, 1.0, 2.0]]).tolist() == [0, 1]
    inf = math.inf
    assert pareto_front([[inf, -inf], [inf, 0], [0, inf]]).tolist() == [0, 2]
    assert pareto_front([[inf, inf]]).tolist() == [0]


@pytest.mark.parametrize("d", [1, 2, 4])
def test_missing_metrics_are_never_zero(d):
    rows = np.ones((4, d))
    rows[1, -1], rows[2] = math.nan, math.nan
    assert pareto_front(rows).tolist() == pareto_front(rows, ["maximize"] * d).tolist() == [0, 3]
    assert pareto_front([[None if v != v else v for v in row] for row in rows.tolist()]).tolist() == [0, 3]
    assert pareto_front(np.ma.masked_array(np.zeros((2, d)), [[False] * d, [True] * d])).tolist() == [0]
    assert hypervolume(rows, [2] * d) == 1
    assert contributions(rows[:3], [2] * d).tolist() == [1, 0, 0]
    assert pareto_front(rows[1:3]).size == 0 and hypervolume(rows[1:3], [2] * d) == 0


def test_tensors_lists_and_strides():
    rows = np.random.default_rng(0).integers(0, 9, (50, 4))
    wanted = brute(rows, np.zeros(4, bool)).tolist()
    for given in (torch.tensor(rows), torch.tensor(rows, dtype=torch.bfloat16), torch.tensor(rows, dtype=torch.float16), rows.tolist(), np.asfortranarray(rows)):
        assert pareto_front(given).tolist() == wanted
    assert pareto_front(torch.tensor(rows, dtype=torch.float32, requires_grad=True)).tolist() == wanted
    assert pareto_front(rows[::-1, ::2][::3]).tolist() == brute(rows[::-1, ::2][::3], np.zeros(2, bool)).tolist()


def test_empty():
    for none in ([], np.zeros((0, 3)), torch.zeros(0, 3)):
        assert pareto_front(none, ["minimize"] * 3).tolist() == [] and pareto_front(none).dtype == np.int64
        assert hypervolume(none, [1, 1, 1]) == 0 and contributions(none, [1, 1, 1]).shape == (0,)


@pytest.mark.parametrize("call, said", [
    (lambda: pareto_front([[1, 2]], ["minimize"]), "objectives has 1 and the table 2 columns"),
    (lambda: pareto_front([], []), "objectives has 0"),
    (lambda: pareto_front([[1, 2]], ["minimize", "maximise"]), "Did you mean 'maximize'"),
    (lambda: pareto_front([[1, 2]], ["min", "max"]), "Did you mean 'minimize'"),
    (lambda: pareto_front([[1, 2]], ["minimize", None]), "objectives: None is not known"),
    (lambda: pareto_front([1, 2]), "metrics has the shape (2,)"),
    (lambda: pareto_front(np.zeros((2, 2, 2))), "metrics has the shape (2, 2, 2)"),
    (lambda: pareto_front(np.zeros((2, 0))), "metrics has the shape (2, 0)"),
    (lambda: pareto_front(3.0), "metrics has the shape ()"),
    (lambda: pareto_front([[1, 2], [3]]), "metrics is not a table"),
    (lambda: pareto_front([["a", "b"]]), "only real numbers"),
    (lambda: pareto_front([[1j, 2]]), "only real numbers"),
    (lambda: pareto_front([[object(), 2]]), "only real numbers"),
    (lambda: hypervolume([[1, 2]], [3]), "reference=[3]"),
    (lambda: hypervolume([[1, 2]], 3), "reference=3"),
    (lambda: hypervolume([[1, 2]], [3, math.nan]), "none of them missing"),
    (lambda: hypervolume([[1, 2]], [3, "x"]), "reference holds"),
    (lambda: hypervolume([1, 2], [3, 3]), "points has the shape (2,)"),
    (lambda: hypervolume([[1, 2]], [3, 3], ["maximize"]), "objectives has 1"),
    (lambda: contributions([[1, 2]], [3, 3], ["more", "less"]), "objectives: 'more' is not known"),
])
def test_errors_say_what_came(call, said):
    with pytest.raises(ValueError) as e:
        call()
    assert said in str(e.value)


def test_hypervolume_is_exact_on_whole_numbers():
    rng = np.random.default_rng(1)
    for _ in range(400):
        n, d = rng.integers(0, 8), rng.integers(1, 7)
        gain, up = rng.integers(-1, 5, (n, d)), rng.integers(0, 2, d).astype(bool)
        reference = rng.integers(-9, 9, d)
        points, words = reference + np.where(up, gain, -gain), WORDS[up.astype(int)].tolist()
        inside = [g for g in gain.tolist() if min(g) > 0]
        whole = boxes_volume(inside)
        assert hypervolume(points, reference, words) == whole
        left = [whole - hypervolume(np.delete(points, i, 0), reference, words) for i in range(n)]
        assert contributions(points, reference, words).tolist() == left


@pytest.mark.parametrize("d", range(1, 7))
def test_hypervolume_counts_the_cells_of_a_grid(d):
    side = {1: 50, 2: 40, 3: 14, 4: 9, 5: 6, 6: 5}[d]
    for n, seed in itertools.product((3, 30, 300), range(3)):
        boxes = np.random.default_rng(seed).integers(1, side + 1, (n, d))
        cells = np.zeros([side] * d, bool)
        for box in boxes:
            cells[tuple(slice(0, b) for b in box)] = True
        assert hypervolume(-boxes, [0] * d) == cells.sum()


def test_duplicates_contribute_nothing_whatever_the_rounding():
    rows = np.random.default_rng(0).random((12, 3)) / 3
    front = rows[pareto_front(rows)]
    assert not contributions(np.concatenate([front, front]), [1.0] * 3).any()
    assert (contributions(front, [1.0] * 3) > 0).all()


def test_hypervolume_at_the_ends_of_floats():
    assert hypervolume([[-math.inf, 0]], [1, 1]) == math.inf
    assert hypervolume([[0, 0]], [math.inf, 1]) == math.inf
    assert hypervolume([[math.inf, 0], [-math.inf, 2]], [math.inf, 1]) == 0
    assert hypervolume([[1e300, 1e-300, 1, 2]], [2e300, 2e-300, 2, 4], None) == pytest.approx(2, rel=1e-15)
    assert hypervolume([[0.0, 0.0]], [1e200, 1e200]) == math.inf
    rows = np.random.default_rng(0).random((60, 5))
    assert hypervolume(rows, [1.0] * 5) == pytest.approx(hypervolume(rows[::-1, ::-1], [1.0] * 5), rel=1e-12)


def test_input_is_left_alone():
    rows = np.random.default_rng(0).random((5000, 3))
    kept = rows.copy()
    pareto_front(rows, ["maximize"] * 3), hypervolume(rows[:50], [1, 1, 1]), contributions(rows[:50], [1, 1, 1])
    assert (rows == kept).all()
