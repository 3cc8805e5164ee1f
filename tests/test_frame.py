"The run frame: against its naive twin, exact at its ends, verified as it reads, small in memory, and clear about bad input."
import errno
import json
import os
import subprocess
import sys
import threading

import numpy as np
import pytest
import torch

from adaptive_lab.bench.scale import CODE, write_run
from adaptive_lab.durable import NotWritten
from adaptive_lab.epsilon_vae import blocks as blocks_module
from adaptive_lab.epsilon_vae.blocks import Held, Mapped, combine, gram, room
from adaptive_lab.epsilon_vae.frame import frame_of_states, run_frame
from adaptive_lab.epsilon_vae.population import Population, populations
from adaptive_lab.epsilon_vae.weights import flatten, layout_of
from adaptive_lab.store import Store
from adaptive_lab.tensorfile import Corrupt


def net(seed=0, width=6, dtype=torch.float32):
    "Matrix, bias, normalisation with its statistics and its counter; all different by seed."
    torch.manual_seed(seed)
    model = torch.nn.Sequential(torch.nn.Linear(5, width), torch.nn.BatchNorm1d(width), torch.nn.Linear(width, 3)).to(dtype)
    model[1].num_batches_tracked += seed
    model[1].running_mean += seed
    return {n: t.detach().clone() for n, t in model.state_dict().items()}


def stored(folder, states, run="run"):
    "The population of a store with these states, among an optimizer's."
    for i, state in enumerate(states):
        Store(folder).save(run, 10 * i, {"optimizer": {"m": torch.full((7,), float(i))}, "model": state, "epoch": i})
    return populations(folder)[0]


def matrix(states, layout=None):
    layout = layout or layout_of(states[0])
    return torch.stack([flatten(layout, s).double() for s in states]).numpy()


def same(a, b):
    "Equal to the last bit, zeros' signs included."
    return list(a) == list(b) and all(a[n].dtype == b[n].dtype and a[n].shape == b[n].shape and a[n].numpy().tobytes() == b[n].numpy().tobytes() if a[n].dtype != torch.bfloat16
                                      else torch.equal(a[n].view(torch.int16), b[n].view(torch.int16)) for n in a)


def test_against_the_naive_twin_from_files_and_from_memory(tmp_path, monkeypatch):
    states = [net(s, width=200) for s in range(7)]
    X = matrix(states)
    U, s, Vt = np.linalg.svd(X - X.mean(0), full_matrices=False)
    held = frame_of_states(states)
    monkeypatch.setattr(blocks_module, "BLOCK", 256 * 7)  # several blocks a tensor
    for frame in (held, run_frame(stored(tmp_path, states))):
        assert frame.coordinates.shape == frame.coefficients.shape == (7, 6)
        assert np.allclose(frame.share, (s**2 / (s**2).sum())[:6], rtol=1e-10)
        assert np.allclose(abs(frame.coordinates), abs(U * s)[:, :6], atol=1e-9)
        assert np.allclose(frame.coefficients.T @ X @ X.T @ frame.coefficients, np.diag(1.0 + 0 * s[:6]) + 0, atol=1e-9)  # orthonormal directions
        assert (frame.coordinates[-1] > frame.coordinates[0]).all()
        z = np.linspace(-1, 1, 6)
        by_hand = X.mean(0) + z @ (frame.coefficients.T @ X)
        assert np.allclose(matrix([frame.decode(z)], layout_of(states[0]))[0], by_hand, atol=1e-5)
        assert np.allclose(frame.first(2).missed, np.linalg.norm(frame.coordinates[:, 2:], axis=1), atol=1e-9)


def test_any_number_of_workers_gives_the_same_bits_and_torch_keeps_its_threads(monkeypatch):
    states = [net(s, width=300) for s in range(9)]
    before, found, fresh = torch.get_num_threads(), [], []
    torch.set_num_threads(3)
    for block, cores in ((2**20, 1), (256 * 9, 1), (256 * 9, 8)):
        monkeypatch.setattr(blocks_module, "BLOCK", block)
        monkeypatch.setattr(os, "cpu_count", lambda: cores)
        monkeypatch.setattr(blocks_module.Layout, "size", 10**9, raising=False)
        found.append(gram([Held(s) for s in states], layout_of(states[0]), [""] * 9))
    assert torch.equal(found[1], found[2]) and torch.allclose(found[0], found[1], rtol=1e-12)
    thread = threading.Thread(target=lambda: fresh.append(torch.get_num_threads()))
    thread.start()
    thread.join()
    assert torch.get_num_threads() == 3 and fresh == [3]
    torch.set_num_threads(before)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_ends_are_exact_for_every_type(tmp_path, dtype):
    states = [net(s, dtype=dtype) for s in range(5)]
    states[4]["0.weight"][0, 0] = -0.0
    plane = run_frame(stored(tmp_path, states), directions=2)
    for along in ("line", "run"):
        first, middle, last = plane.path(1, 4, (0, 0.4, 1), along)
        assert same(first, states[1]) and same(last, states[4])
        assert middle["0.weight"].dtype == dtype
        assert all(torch.equal(middle[n], states[2][n]) for n in plane.layout.rest)  # step 22 is nearest to 20
    whole = run_frame(population := populations(tmp_path)[0])
    back = whole.decode(whole.coordinates[3])
    assert all(torch.allclose(back[n].double(), states[3][n].double(), rtol=2 * torch.finfo(dtype).eps, atol=1e-7) for n in (s.name for s in whole.layout.slots))
    assert all(torch.equal(back[n], states[3][n]) for n in whole.layout.rest)
    assert np.allclose(whole.encode(population.state(3)), whole.coordinates[3], atol=1e-7)


def test_a_straight_path_is_linear_interpolation():
    states = [net(s) for s in range(6)]
    plane = frame_of_states(states, directions=2)
    X = matrix(states)
    for t, state in zip((0.3, 0.9), plane.path(5, 2, (0.3, 0.9))):
        assert np.allclose(matrix([state])[0], (1 - t) * X[5] + t * X[2], atol=1e-6)
    whole = frame_of_states(states)
    on_the_way = next(whole.path(0, 5, [0.4], "run"))  # step 2 of 5
    assert np.allclose(matrix([on_the_way])[0], X[2], atol=1e-6)


def test_few_and_equal_checkpoints():
    one = frame_of_states([net(1)])
    assert one.share.shape == (0,) and same(one.decode([]), net(1)) and one.distance([]) == 0
    equal = frame_of_states([net(1)] * 3)
    assert equal.share.shape == (0,) and not equal.missed.any() and same(next(equal.path(0, 2, [0.5])), net(1))
    z, missed = equal.project(net(2))
    assert z.shape == (0,) and np.isclose(missed, np.linalg.norm(matrix([net(2)]) - matrix([net(1)]))) and equal.is_far(z, missed)
    two = frame_of_states([net(1), net(1), net(2)])
    assert two.share.shape == (1,) and np.allclose(two.coordinates[0], two.coordinates[1])


def test_more_checkpoints_than_weights():
    states = [{"w": torch.tensor([float(i), i * i / 7])} for i in range(12)]
    frame = frame_of_states(states)
    assert frame.share.shape == (2,) and np.isclose(frame.share.sum(), 1)
    assert all(torch.allclose(frame.decode(z)["w"], s["w"], atol=1e-5) for z, s in zip(frame.coordinates, states))


def test_small_variance_beside_large_weights():
    "What a Gram matrix of uncentred weights in float32 would lose."
    g = torch.Generator().manual_seed(0)
    base, d = 1e3 + torch.randn(4000, generator=g), torch.randn(2, 4000, generator=g)
    states = [{"w": base + 1e-3 * (i * d[0] + (i % 2) * d[1])} for i in range(6)]
    X = matrix(states)
    s = np.linalg.svd(X - X.mean(0), compute_uv=False)
    assert np.allclose(frame_of_states(states).share[:2], (s**2 / (s**2).sum())[:2], rtol=1e-9)


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_what_is_not_finite_is_named(tmp_path, bad):
    states = [net(s) for s in range(4)]
    states[2]["2.weight"][1, 2] = bad
    with pytest.raises(ValueError, match=r"run at step 20: tensor '2.weight' holds (nan|inf) at element 8.*Leave this checkpoint out"):
        store = Store(tmp_path)
        for i, state in enumerate(states):
            store.save("run", 10 * i, {"model": state})
        run_frame(Population(store, store.checkpoints(), layout_of(states[0])))
    whole = frame_of_states([net(0), net(1)])
    with pytest.raises(ValueError, match="the given state: tensor '2.weight'"):
        whole.encode(states[2])


def test_mixed_architectures_runs_and_latents_are_refused(tmp_path):
    with pytest.raises(ValueError, match="state 1 is of another architecture: 0.weight is"):
        frame_of_states([net(0), net(0, width=7)])
    with pytest.raises(ValueError, match="needs one checkpoint at least"):
        frame_of_states([])
    with pytest.raises(ValueError, match="rising steps"):
        frame_of_states([net(0), net(1)], steps=[3, 3])
    frame = frame_of_states([net(s) for s in range(4)])
    for z in ([1.0], [np.nan] * 3, [[0.0, 0, 0]]):
        with pytest.raises(ValueError, match="3 directions: give 3 finite numbers"):
            frame.decode(z)
    with pytest.raises(ValueError, match="another architecture"):
        frame.encode(net(0, width=7))
    for a, b, t, along, word in ((0, 4, 0.5, "line", "0 to 3"), (0, 3, 1.5, "line", "t is in"), (0, 3, 0.5, "curve", "'line' or 'run'")):
        with pytest.raises(ValueError, match=word):
            list(frame.path(a, b, [t], along))
    stored(tmp_path, [net(0)], "a")
    population = stored(tmp_path, [net(1)], "b")
    with pytest.raises(ValueError, match="run='a'"):
        run_frame(population)
    with pytest.raises(ValueError, match="'c' has no checkpoint"):
        run_frame(population, "c")


def wide(seed):
    return {"a": torch.randn(700_000, generator=torch.Generator().manual_seed(seed)), "count": torch.tensor([seed] * 3), "b": torch.randn(3, generator=torch.Generator().manual_seed(seed))}


def test_each_byte_is_verified_once(tmp_path, monkeypatch):
    population, counted, real = stored(tmp_path, [wide(s) for s in range(3)]), [], blocks_module.blake3
    monkeypatch.setattr(blocks_module, "blake3", lambda piece: counted.append(len(piece)) or real(piece))
    frame = run_frame(population)
    assert sum(counted) == 3 * 4 * 700_003 and len(counted) == 3 * 4  # three pieces of a, one of b
    counted.clear()
    frame.decode(frame.coordinates[1])
    assert sum(counted) == 3 * 8  # what is copied from the nearest


@pytest.mark.parametrize("name, at", [("a", 2_000_000), ("b", 5), ("count", 9)])
def test_damage_is_found_where_it_is_read(tmp_path, name, at):
    population = stored(tmp_path, [wide(s) for s in range(3)])
    path = population.store._object(population.rows[1].hash)
    mapped = Mapped(path)
    place = mapped.header.start + mapped.header.entries[f"model.{name}"].begin + at
    raw = bytearray(path.read_bytes())
    raw[place] ^= 4
    path.chmod(0o644)
    path.write_bytes(raw)
    with pytest.raises(Corrupt) as e:
        frame = run_frame(population)
        frame.decode(frame.coordinates[1])
    assert e.value.tensor == f"model.{name}" and e.value.byte <= place < e.value.byte + 2**20


def test_a_latent_goes_into_a_store_by_way_of_a_file(tmp_path, monkeypatch):
    frame = run_frame(stored(tmp_path / "runs", [net(s) for s in range(4)]))
    z = frame.coordinates[[1, 2]].mean(0)
    row = frame.save(Store(tmp_path / "made"), "between", 5, z, metrics={"accuracy": 0.5})
    assert row.metrics == {"accuracy": 0.5} and same(Store(tmp_path / "made").load("between")["model"], frame.decode(z))
    assert not Store(tmp_path / "made").verify() and not [p for p in (tmp_path / "made").iterdir() if p.is_file() and p.name != "lock"]

    def full(*_):
        raise OSError(errno.ENOSPC, "No space left on device")
    monkeypatch.setattr(os, "posix_fallocate", full, raising=False)
    with pytest.raises(NotWritten, match="the disk is full"):
        frame.save(Store(tmp_path / "made"), "between", 6, z)
    assert [c.step for c in Store(tmp_path / "made").checkpoints()] == [5]


def test_where_files_cannot_be_claimed_they_are_written(tmp_path, monkeypatch):
    monkeypatch.delattr(os, "posix_fallocate", raising=False)
    layout = layout_of(net(0))
    made = combine([Held(net(0))], [1], layout, net(0), tmp_path)
    assert same(made, net(0)) and all(t.data_ptr() % 64 == 0 for t in room(layout, tmp_path).values()) and not list(tmp_path.iterdir())


def test_distance_is_zero_for_averages_and_grows_outside():
    rng = np.random.default_rng(0)
    states = [net(s) for s in range(8)]
    for frame in (frame_of_states(states).first(2), frame_of_states(states), frame_of_states([{n: 1000 * t for n, t in s.items()} for s in states]).first(3)):
        for _ in range(20):
            assert frame.distance(rng.dirichlet(np.ones(8)) @ frame.coordinates) < 1e-6
        edge = frame.coordinates[frame.coordinates[:, 0].argmax()]
        away = np.eye(len(edge))[0] * frame.size()
        assert np.isclose(frame.distance(edge + 3 * away), 3, rtol=1e-6) and frame.is_far(edge + 3 * away)
        assert np.isclose(frame.distance(edge + 3 * away, missed=4 * frame.size()), 5, rtol=1e-6)


@pytest.mark.skipif(sys.platform != "linux", reason="anonymous memory is read from /proc")
def test_many_small_tensors_are_not_held_either(tmp_path):
    "16 × 1,000,000 weights in tensors below the size that `load` maps: 61 MiB of them."
    write_run(tmp_path / "run", 1_000_000, width=256)
    done = subprocess.run([sys.executable, "-c", CODE, str(tmp_path / "run"), str(tmp_path / "out")], capture_output=True, text=True, check=True)
    found = json.loads(done.stdout)
    assert found["highest"] - found["before"] < 45 * 2**20


def test_a_population_of_one_run_needs_no_name(tmp_path):
    population = stored(tmp_path, [net(s) for s in range(3)])
    assert isinstance(population, Population) and run_frame(population).run == "run"
    assert np.array_equal(run_frame(population, "run", 1).steps, [0, 10, 20])
