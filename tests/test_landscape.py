"Planes of weights: what is measured is what the network at that point does, and nothing that was measured is lost."
import copy
import threading
import time
import warnings

import numpy as np
import pytest
import torch
from torch import nn

from adaptive_lab.epsilon_vae import landscape as module
from adaptive_lab.epsilon_vae.gate import recalibrated, verify
from adaptive_lab.epsilon_vae.landscape import Landscape, Seat, coarse_to_fine, empty_slice, filter_normalised, plane_through, random_plane, run_plane
from adaptive_lab.epsilon_vae.population import populations
from adaptive_lab.epsilon_vae.weights import flatten, layout_of
from adaptive_lab.evaluator import Evaluator, Unfit, scores
from adaptive_lab.store import Store


def mlp(seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(6, 12), nn.ReLU(), nn.Linear(12, 3)).to(dtype)


def cnn(seed=0):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Unflatten(1, (1, 4, 4)), nn.Conv2d(1, 5, 3), nn.BatchNorm2d(5), nn.ReLU(), nn.Dropout(0.5), nn.Flatten(), nn.Linear(20, 3))


def judge(build=mlp, inputs=6, dtype=torch.float32, n=80):
    X = torch.randn(n, inputs, generator=torch.Generator().manual_seed(9)).to(dtype)
    return Evaluator(build, X[:50], {"test": (X, torch.arange(n) % 3)})


def alone(evaluator, state, found):
    X, y = (t[torch.from_numpy(found.rows)] for t in evaluator.tests["test"])
    return scores(evaluator.outputs(state, X), y)


@pytest.fixture(autouse=True)
def threads():
    "Three threads for torch, whatever the environment says; they must be three afterwards."
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    yield
    after = torch.get_num_threads()
    torch.set_num_threads(before)
    assert after == 3


@pytest.mark.parametrize("workers", [1, 3])
def test_every_cell_is_the_network_at_its_point(workers):
    evaluator, plane = judge(), random_plane(mlp().state_dict())
    found = plane.slice(evaluator, n=9, samples=50, workers=workers, limits=((-2, 1), (-0.5, 3)))
    assert found.done.all() and "50 of 80 samples of 'test' (seed 0)" in found.samples and found.loss.std() > 0.01
    for (i, j), loss in np.ndenumerate(found.loss):
        assert alone(evaluator, plane.point(found.a[j], found.b[i]), found) == dict(loss=loss, accuracy=found.accuracy[i, j])


def test_the_plane_is_what_it_says():
    plane = random_plane(mlp().state_dict(), seed=3)
    v = flatten(plane.layout, plane.point(0.5, -2))
    assert torch.equal(v, plane.origin + -2.0 * plane.directions[1] + 0.5 * plane.directions[0])
    assert plane.place(v) == pytest.approx((0.5, -2, 0), abs=1e-4)
    aside = v + torch.randn(v.shape, generator=torch.Generator().manual_seed(0))
    a, b, off = plane.place(aside)
    d = torch.linalg.lstsq(plane.directions.T.double(), (aside - plane.origin).double()).solution
    assert (a, b) == pytest.approx(d.tolist(), abs=1e-6) and off == pytest.approx(float(torch.dist(flatten(plane.layout, plane.point(a, b)), aside)), rel=1e-4)
    assert not torch.equal(plane.directions, random_plane(mlp().state_dict(), seed=4).directions)


def test_filters_have_the_norm_of_the_weights_and_a_dead_filter_stays():
    state = cnn().state_dict()
    state["1.weight"][2] = 0
    plane = random_plane(state)
    moved = plane.point(1.0, 0.0)
    step = {n: moved[n] - state[n] for n in state if state[n].is_floating_point()}
    for name in ("1.weight", "6.weight"):
        assert torch.allclose(step[name].flatten(1).norm(dim=1), state[name].flatten(1).norm(dim=1), atol=1e-5)
    assert not step["1.weight"][2].any() and not any(step[n].any() for n in ("1.bias", "2.weight", "2.bias", "6.bias"))


def test_a_rescaled_network_has_the_same_picture():
    "ReLU layers may be multiplied and divided: the function is the same, and so is the landscape."
    state = mlp().state_dict()
    other = state | {"0.weight": 4 * state["0.weight"], "0.bias": 4 * state["0.bias"], "2.weight": state["2.weight"] / 4}
    a, b = (random_plane(s).slice(judge(), n=7) for s in (state, other))
    assert np.allclose(a.loss, b.loss, rtol=1e-4)
    plain = torch.randn(layout_of(state).size, generator=torch.Generator().manual_seed(0))  # without normalisation it is not
    planes = [Landscape(layout_of(s), flatten(layout_of(s), s), torch.stack([plain, plain.flip(0)]), s, "plain") for s in (state, other)]
    a, b = (p.slice(judge(), n=7) for p in planes)
    assert not np.allclose(a.loss, b.loss, rtol=0.05)


def test_normalisation_is_measured_anew_at_each_point_and_dropout_stays_off():
    evaluator, net = judge(cnn, 16), cnn()
    net(evaluator.probes)
    plane = random_plane(net.state_dict())
    anew, old = plane.slice(evaluator, n=5, workers=2), plane.slice(evaluator, n=5, recalibrate=False)
    assert "recalibrated" in anew.samples and "recalibrated" not in old.samples
    for i, j in ((0, 0), (2, 2), (4, 1)):
        state = plane.point(anew.a[j], anew.b[i])
        assert alone(evaluator, recalibrated(state, evaluator), anew)["loss"] == pytest.approx(anew.loss[i, j], abs=1e-6)
        assert alone(evaluator, state, old)["loss"] == old.loss[i, j]
    assert abs(anew.loss - old.loss).max() > 0.01
    assert verify(plane.point(1, 1), evaluator).measured["loss"] == pytest.approx(anew.loss[4, 4], abs=1e-6)


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_other_types(dtype):
    build = lambda seed=0: mlp(seed, dtype)
    evaluator, plane = judge(build, dtype=dtype), random_plane(build().state_dict())
    found = plane.slice(evaluator, n=4)
    assert plane.point(1, 0)["0.weight"].dtype == dtype
    for i, j in ((0, 0), (3, 2)):
        assert alone(evaluator, plane.point(found.a[j], found.b[i]), found)["loss"] == found.loss[i, j]


def test_tied_weights_move_together():
    class Tied(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b = nn.Linear(6, 6), nn.Linear(6, 6)
            self.b.weight = self.a.weight

        def forward(self, x):
            return self.b(self.a(x).relu())

    torch.manual_seed(0)
    plane = plane_through([Tied().state_dict() for _ in range(3)])
    found = plane.slice(judge(Tied), n=3)
    state = plane.point(found.a[0], found.b[2])
    assert torch.equal(state["a.weight"], state["b.weight"]) and alone(judge(Tied), state, found)["loss"] == found.loss[2, 0]


def stored(folder, nets, run="r"):
    store = Store(folder)
    for i, net in enumerate(nets):
        store.save(run, i + 1, {"model": net.state_dict()}, metrics={})
    return populations(folder)[0]


def test_the_plane_of_a_run(tmp_path):
    nets = [mlp()]
    for i in range(5):
        nets.append(copy.deepcopy(nets[-1]))
        with torch.no_grad():
            for p in nets[-1].parameters():
                p += torch.randn(p.shape, generator=torch.Generator().manual_seed(i)) * 0.3
    population = stored(tmp_path, nets)
    plane = run_plane(population, "r")
    V = torch.stack([flatten(plane.layout, n.state_dict()) for n in nets]).double()
    _, sizes, twin = torch.linalg.svd(V - V.mean(0), full_matrices=False)
    assert plane.share == pytest.approx(float((sizes[:2] ** 2).sum() / (sizes**2).sum()))
    for i in range(6):  # naive projection onto the twin's plane through the last
        away = V[i] - V[-1]
        inside = twin[:2].T @ (twin[:2] @ away)
        assert plane.off[i] == pytest.approx(float((away - inside).norm()), abs=1e-4)
        assert np.linalg.norm(plane.path[i]) == pytest.approx(float(inside.norm()), abs=1e-4)
    (a0, a1), (b0, b1) = plane.limits()
    assert ((plane.path > [a0, b0]) & (plane.path < [a1, b1])).all()
    with pytest.raises(ValueError, match="no checkpoint in this population"):
        run_plane(population, "s")


def test_what_spans_no_plane_is_refused(tmp_path):
    net, other = mlp(), mlp(1)
    with pytest.raises(ValueError, match="on one line"):
        run_plane(stored(tmp_path / "two", [net, other]), "r")
    with pytest.raises(ValueError, match="on one line"):
        run_plane(stored(tmp_path / "same", [net, net, net]), "r")
    a, b = net.state_dict(), other.state_dict()
    for states in ([a, b, {n: (a[n] + b[n]) / 2 for n in a}], [a, a, b], [a, a, a]):
        with pytest.raises(ValueError, match="on one line"):
            plane_through(states)
    with pytest.raises(ValueError, match="three make a plane"):
        plane_through([a, b])
    with pytest.raises(ValueError, match="another architecture"):
        plane_through([a, b, nn.Linear(3, 2).state_dict()])
    with pytest.raises(ValueError, match="no matrix or kernel"):
        random_plane({"scale": torch.ones(3)})
    with pytest.raises(ValueError, match="state is not finite: 2.bias has inf"):
        random_plane(a | {"2.bias": torch.tensor([0, np.inf, 0])})


def test_bad_arguments_are_named():
    plane, evaluator = random_plane(mlp().state_dict()), judge()
    for wrong, text in ((dict(n=1), "n=1"), (dict(samples=0), "samples=0"), (dict(limits=((0, 1), (1, 0))), "low below high"), (dict(limits=(0, 1)), "limits="),
                        (dict(limits=((0, np.nan), (0, 1))), "limits="), (dict(workers=0), "workers=0")):
        with pytest.raises(ValueError, match=text):
            plane.slice(evaluator, **wrong)
    with pytest.raises(Unfit):
        plane.slice(judge(cnn, 16), n=3)
    with pytest.raises(ValueError, match="finite"):
        plane.point(float("nan"), 0)
    assert "80 of 80" in empty_slice(plane, evaluator, samples=10**6).samples


def test_losses_that_are_not_finite_are_kept_as_such():
    plane = random_plane(mlp().state_dict())
    found = plane.slice(judge(), n=5, limits=((-1e30, 1e30), (-1e30, 1e30)))
    assert found.done.all() and np.isfinite(found.loss[2, 2]) and not np.isfinite(found.loss[0, 0]) and "not finite" in repr(found)


def test_a_point_leaves_no_trace_on_the_next():
    evaluator, net = judge(cnn, 16), cnn()
    seat = Seat(random_plane(net.state_dict()), evaluator, *evaluator.tests["test"], True)
    before = seat.measure(0.3, 0.1)
    seat.measure(1e30, -1e30)
    assert seat.measure(0.3, 0.1) == before


def test_the_order_is_coarse_to_fine_and_complete():
    for n, m in ((51, 51), (2, 3), (16, 40), (33, 1)):
        order = coarse_to_fine(n, m)
        assert sorted(order) == [(i, j) for i in range(n) for j in range(m)] and (n // 2, m // 2) in order[: max(1, len(order) // 4)]
    first = np.array(coarse_to_fine(51, 51)[:169])  # every fourth row and column
    assert len({*map(tuple, first % 4)}) == 1


def test_interrupted_it_keeps_what_is_done_and_goes_on(monkeypatch):
    plane, evaluator, calls = random_plane(mlp().state_dict()), judge(), []
    whole = plane.slice(evaluator, n=15)
    measure = Seat.measure

    def broken(self, a, b):
        calls.append((a, b))
        if len(calls) == 60:
            raise KeyboardInterrupt
        return measure(self, a, b)

    monkeypatch.setattr(Seat, "measure", broken)
    with pytest.warns(UserWarning, match="of 225 points are measured"):
        part = plane.slice(evaluator, n=15, workers=1)
    assert 30 < part.done.sum() < 60 and np.isnan(part.loss[~part.done]).all() and np.isfinite(part.filled()).all()
    assert np.array_equal(part.loss[part.done], whole.loss[part.done])
    known = {(part.a[j], part.b[i]) for i, j in np.argwhere(part.done)}
    calls[:] = [None] * 100
    again = plane.slice(evaluator, into=part)
    assert again is part and np.array_equal(part.loss, whole.loss) and not known & set(calls[100:])


def test_an_error_in_a_thread_comes_out_and_the_threads_end(monkeypatch):
    def broken(self, a, b):
        raise RuntimeError("no memory")

    before, threads = threading.active_count(), torch.get_num_threads()
    monkeypatch.setattr(Seat, "measure", broken)
    with pytest.raises(RuntimeError, match="no memory"):
        random_plane(mlp().state_dict()).slice(judge(), n=9, workers=2)
    assert threading.active_count() == before and torch.get_num_threads() == threads


def test_a_scan_that_is_not_asked_does_not_run_ahead(monkeypatch):
    calls, measure = [], Seat.measure
    monkeypatch.setattr(Seat, "measure", lambda self, a, b: calls.append(a) or measure(self, a, b))
    scan, threads = random_plane(mlp().state_dict()).scan(judge(), n=31, workers=2), torch.get_num_threads()
    found = next(scan)
    time.sleep(0.2)
    assert found.done.sum() == module.BLOCK and len(calls) <= 5 * module.BLOCK < 31 * 31
    scan.close()
    assert torch.get_num_threads() == threads


def test_subsets_and_directions_follow_from_their_seeds():
    layout, w = layout_of(mlp().state_dict()), flatten(layout_of(mlp().state_dict()), mlp().state_dict())
    assert torch.equal(filter_normalised(layout, w, 1, 0), filter_normalised(layout, w, 1, 0))
    assert not torch.equal(filter_normalised(layout, w, 1, 0), filter_normalised(layout, w, 1, 1))
    plane, evaluator = random_plane(mlp().state_dict()), judge()
    rows = [empty_slice(plane, evaluator, samples=20, seed=s).rows.tolist() for s in (0, 0, 1)]
    assert rows[0] == rows[1] != rows[2] and len(set(rows[0])) == 20


def test_filled_takes_the_nearest():
    grid = empty_slice(random_plane(mlp().state_dict()), judge(), n=12)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert np.isnan(grid.filled()).all()
    for i, j, v in ((0, 0, 1.0), (11, 11, np.inf), (0, 11, 3.0)):
        grid.loss[i, j], grid.done[i, j] = v, True
    for i in range(12):
        for j in range(12):
            distance = {v: (i - p) ** 2 + (j - q) ** 2 for p, q, v in ((0, 0, 1.0), (11, 11, np.inf), (0, 11, 3.0))}
            assert distance[grid.filled()[i, j]] == min(distance.values())
