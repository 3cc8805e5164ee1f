"Data that lies, lines that break, files too large to read, and streams as functions of the step."
import gzip
import hashlib
import http.server
import io
import os
import subprocess
import sys
import threading
import tracemalloc
import zipfile

import numpy as np
import pytest
import torch
from hypothesis import example, given, settings
from hypothesis import strategies as st

from adaptive_lab.data import digits, fetch, files, tables, text, tree
from adaptive_lab.data.streams import Batches, DataError, Task, TaskStream, Windows
from adaptive_lab.knobs import walk
from adaptive_lab.parts import find_part

few = settings(max_examples=40, deadline=None)


def numbered(n):
    "A table whose inputs and labels are their row numbers."
    return torch.arange(float(n))[:, None], torch.arange(n)


# streams


@few
@given(n=st.integers(1, 40), size=st.integers(1, 90), seed=st.integers(0, 2**32))
def test_each_epoch_holds_every_sample_once(n, size, seed):
    stream = Batches(*numbered(n), size, seed)
    seen = torch.cat([stream[i][1] for i in range(3 * n // size + 2)])
    assert all(len(stream[i][1]) == size for i in range(3))
    for epoch in range(3):
        assert seen[epoch * n : (epoch + 1) * n].sort()[0].tolist() == list(range(n))
    x, y = stream[2]
    assert torch.equal(x[:, 0].long(), y)


@few
@given(
    kind=st.sampled_from(["batches", "tasks", "windows"]),
    steps=st.lists(st.integers(0, 10**7), min_size=1, max_size=6),
    world=st.integers(1, 4),
)
def test_a_batch_depends_on_seed_and_step_alone_and_shards_make_it_up(kind, steps, world):
    def make():
        if kind == "batches":
            return Batches(*numbered(17), 12, seed=3)
        if kind == "windows":
            return Windows(np.arange(200, dtype=np.uint8), 7, 12, seed=3)
        return TaskStream([Task(str(n), *numbered(n), *numbered(n)) for n in (5, 30, 8)], 12, 10, seed=3)

    stream = make()
    walked = {i: stream[i] for i in steps}
    assert not torch.equal(stream[0][1], stream[1][1])
    for i in steps:
        for there, again in zip(walked[i], make()[i]):
            assert torch.equal(there, again)
        for side in (0, 1):
            assert torch.equal(torch.cat([make().shard(rank, world)[i][side] for rank in range(world)]), walked[i][side])


def test_epochs_and_seeds_differ():
    stream, other = Batches(*numbered(100), 100, seed=1), Batches(*numbered(100), 100, seed=2)
    orders = [tuple(s[i][1].tolist()) for s in (stream, other) for i in (0, 1, 2)]
    assert len(set(orders)) == 6


@pytest.mark.parametrize("rank, world, says", [(0, 3, "use 3 or 6"), (2, 2, r"\[0, 1\]"), (-1, 2, "rank=-1"), (0, 0, "rank=0")])
def test_a_shard_that_cannot_be_is_refused(rank, world, says):
    with pytest.raises(ValueError, match=says):
        Batches(*numbered(9), 4).shard(rank, world)


def test_a_shard_of_a_shard_is_refused():
    with pytest.raises(ValueError, match="shard already"):
        Batches(*numbered(9), 4).shard(0, 2).shard(0, 2)


@pytest.mark.parametrize(
    "X, y, says",
    [
        (np.zeros((0, 3)), [], "no samples"),
        (np.zeros((2, 3)), [0], "X has 2 samples"),
        (np.zeros((2, 3)), [[0], [1]], "X has 2 samples"),
        (np.array([[0.0], [np.inf]]), [0, 1], r"X is inf at \(1, 0\)"),
        (np.array([[1e300]]), [0], r"X is inf at \(0, 0\)"),
        (np.zeros((1, 1)), [np.nan], r"y is nan at \(0,\)"),
        (np.zeros((1, 1)), [-2], r"y\[0\]=-2"),
        (np.zeros((1, 1)), [0.5], r"y\[0\]=0.5"),
        (np.zeros((1, 1), complex), [0], "X holds complex128"),
        (np.array([[None]]), [0], "X holds object"),
        (torch.zeros(1, 1, dtype=torch.complex64), [0], "complex"),
    ],
)
def test_unusable_data_is_refused_by_name(X, y, says):
    with pytest.raises(DataError, match=says):
        Batches(X, y)


def test_float64_arrays_become_float32_and_tensors_stay():
    assert Batches(np.zeros((2, 2)), [0, 1]).X.dtype == torch.float32
    assert Batches(torch.zeros(2, 2, dtype=torch.float64), [0.0, 1.0]).X.dtype == torch.float64
    assert Batches(np.zeros((2, 2), np.uint8), np.array([0, 1], np.uint16)).X.dtype == torch.uint8


# files: byte streams, idx, closures


@pytest.mark.parametrize("name", ["a.txt.gz", "renamed.txt", "a.npy"])
def test_compressed_bytes_are_never_taken_for_text(tmp_path, name):
    (tmp_path / name).write_bytes(gzip.compress(b"a text " * 100))
    with pytest.raises(DataError, match="is gzip: unpack it first"):
        files.open_bytes(tmp_path / name)
    with pytest.raises(DataError, match="is gzip"):
        find_part("data", "text")({"path": str(tmp_path / name)}, 0)


def test_a_file_of_gigabytes_is_not_read(tmp_path):
    path = tmp_path / "huge.bin"
    with open(path, "wb") as f:
        f.seek(3 * 2**30)
        f.write(b"end")
    code = f"""
import os, sys, numpy as np
from adaptive_lab.data.files import open_bytes, split_tail
from adaptive_lab.data.streams import Windows
def resident():
    with open("/proc/self/statm") as f: return int(f.read().split()[1]) * os.sysconf("SC_PAGE_SIZE")
Windows(np.zeros(99, np.uint8), 64, 8)[0]; before = resident()
stream = Windows(split_tail(open_bytes({str(path)!r}))[0], 64, 8)
for i in range(50): stream[i]
print(resident() - before)
"""
    if not os.path.exists("/proc/self/statm"):
        pytest.skip("needs /proc")
    grown = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)
    assert grown < 64 * 2**20


IDX = [(0x08, ">u1"), (0x09, ">i1"), (0x0B, ">i2"), (0x0C, ">i4"), (0x0D, ">f4"), (0x0E, ">f8")]


def idx(array, code, kind):
    return bytes([0, 0, code, array.ndim]) + np.array(array.shape, ">u4").tobytes() + array.astype(kind).tobytes()


@pytest.mark.parametrize("code, kind", IDX)
@pytest.mark.parametrize("pack", [bytes, gzip.compress])
def test_idx_of_every_type(tmp_path, code, kind, pack):
    array = np.array([[1, 2, 3], [100, 0, 7]])
    (tmp_path / "a").write_bytes(pack(idx(array, code, kind)))
    found = files.read_idx(tmp_path / "a")
    assert (found == array).all() and found.dtype == np.dtype(kind).newbyteorder("=") and found.dtype.isnative


@few
@given(cut=st.integers(0, 200), flip=st.integers(0, 10**6), packed=st.booleans())
def test_a_damaged_idx_is_a_clear_error_or_the_right_shape(tmp_path_factory, cut, flip, packed):
    good = idx(np.arange(60).reshape(3, 4, 5), 0x08, ">u1")
    bad = bytearray(gzip.compress(good) if packed else good)
    bad[flip % len(bad)] ^= 1 << flip % 8
    path = tmp_path_factory.mktemp("idx") / "a"
    path.write_bytes(bytes(bad[: len(bad) - cut % 3]))
    try:
        assert files.read_idx(path).size == 60
    except DataError as e:
        assert str(path) in str(e)


def peak(f):
    "The error `f` raises and the most memory it takes, in bytes."
    tracemalloc.start()
    try:
        with pytest.raises(DataError) as caught:
            f()
        return str(caught.value), tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()


def npz_claiming(path, shape):
    "An archive whose X has a header that claims a shape, over eight bytes."
    head = io.BytesIO()
    np.lib.format.write_array_header_1_0(head, dict(descr="<f8", fortran_order=False, shape=shape))
    with zipfile.ZipFile(path, "w") as z:
        z.writestr("X.npy", head.getvalue() + bytes(8))
        z.writestr("y.npy", head.getvalue())


def test_hostile_headers_take_no_memory(tmp_path):
    (tmp_path / "idx").write_bytes(bytes([0, 0, 8, 1]) + (4 * 10**9).to_bytes(4, "big") + bytes(16))
    said, used = peak(lambda: files.read_idx(tmp_path / "idx"))
    assert "holds 16" in said and used < 8 * 2**20
    npz_claiming(tmp_path / "a.npz", (10**9, 1))
    said, used = peak(lambda: tables.read_npz(tmp_path / "a.npz"))
    assert "8000000000 bytes, but it holds 8" in said and used < 8 * 2**20
    with open(tmp_path / "b.npy", "wb") as f:
        np.lib.format.write_array_header_1_0(f, dict(descr="|u1", fortran_order=False, shape=(10**12,)))
        f.write(bytes(8))
    said, used = peak(lambda: files.open_bytes(tmp_path / "b.npy"))
    assert "1000000000000 bytes, but it holds 8" in said and used < 8 * 2**20


def test_an_idx_larger_than_allowed_is_refused(tmp_path):
    (tmp_path / "a").write_bytes(idx(np.zeros(100), 0x08, ">u1"))
    with pytest.raises(DataError, match="100 bytes after the header, more than max_bytes=99"):
        files.read_idx(tmp_path / "a", max_bytes=99)
    assert len(files.read_idx(tmp_path / "a", max_bytes=100)) == 100


def test_a_zip_bomb_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "bomb.npz", "w", zipfile.ZIP_DEFLATED) as z:
        for name in ("X", "y"):
            with z.open(f"{name}.npy", "w") as f:
                np.lib.format.write_array_header_1_0(f, dict(descr="<f8", fortran_order=False, shape=(2**20, 1)))
                f.write(bytes(2**23))
    with pytest.raises(DataError, match="max_bytes=1000000"):
        tables.read_npz(tmp_path / "bomb.npz", max_bytes=10**6)


@pytest.mark.parametrize(
    "content, says",
    [
        (b"", "no pairs"),
        (b"\n\n# nothing\n", "no pairs"),
        (b"a\tb\n\na\tb\tc\n", "line 3: 3 columns"),
        (b"a\tb\na\t\n", "line 2: 2 columns"),
        (b"a\tb\n\xff\xfe\tc\n", "line 2: not UTF-8"),
    ],
)
def test_a_wrong_closure_names_its_line(tmp_path, content, says):
    for name, pack in (("a.tsv", bytes), ("a.tsv.gz", gzip.compress)):
        (tmp_path / name).write_bytes(pack(content))
        with pytest.raises(DataError, match=says):
            files.read_closure(tmp_path / name)


def test_names_in_a_closure_are_taken_as_they_are(tmp_path):
    (tmp_path / "a.tsv").write_bytes("\ufeffchild\tparent\n'hood.n.01\tarea, \"x\"\n#1\tarea, \"x\"\r\n".encode())
    found = files.read_closure(tmp_path / "a.tsv")
    assert found.nodes == ["#1", "'hood.n.01", 'area, "x"'] and found.pairs.tolist() == [[1, 2], [0, 2]]


# tables


@few
@given(st.text(alphabet="01.,;\n\t\"-ey nainf\ufeff\u00e9", max_size=60))
def test_any_text_is_a_table_or_a_clear_error(tmp_path_factory, content):
    path = tmp_path_factory.mktemp("csv") / "a.csv"
    path.write_text(content, encoding="utf-8", newline="")
    try:
        found = tables.read_csv(path)
        assert np.isfinite(found.X).all() and len(found.X) == len(found.y) and found.X.shape[1] == len(found.columns)
        assert found.y.max() < len(found.classes)
    except DataError as e:
        assert str(path) in str(e)


def test_a_table_with_a_quoted_line_break_and_another_place_of_the_class(tmp_path):
    (tmp_path / "a.csv").write_text('"kind\n of bird",w,"h, cm"\nowl,1,2\nkiwi,3,4\n')
    found = tables.read_csv(tmp_path / "a.csv", target="kind\n of bird")
    assert found.columns == ["w", "h, cm"] and found.classes == ["kiwi", "owl"] and found.X.tolist() == [[1, 2], [3, 4]]


def test_pickles_are_never_opened(tmp_path):
    class Evil:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    np.savez(tmp_path / "a.npz", X=np.array([[Evil()]], object), y=[0])
    for read in (tables.read_npz, tables.read_table):
        with pytest.raises(DataError, match="never loaded"):
            read(tmp_path / "a.npz")
    assert not (tmp_path / "ran").exists()


@few
@given(st.integers(0, 10**6), st.integers(0, 7))
@example(107140, 0)  # the place of a member is before the beginning of the file
def test_a_flipped_bit_in_an_npz_is_a_clear_error_or_harmless(tmp_path_factory, place, bit):
    path = tmp_path_factory.mktemp("npz") / "a.npz"
    np.savez(path, X=np.arange(12.0).reshape(6, 2), y=[0, 1] * 3)
    raw = bytearray(path.read_bytes())
    raw[place % len(raw)] ^= 1 << bit
    path.write_bytes(raw)
    try:
        assert tables.read_npz(path).X.tolist() == np.arange(12.0).reshape(6, 2).tolist()
    except DataError as e:
        assert str(path) in str(e)


# fetching

BODY = np.random.default_rng(0).bytes(300_000)


class Server(http.server.BaseHTTPRequestHandler):
    "Serves BODY by the behaviour in the path: whole, cut, ignores and shifted (a Range), wrong, absent, busy, silent (no length)."

    asked = []

    def do_GET(self):
        how, ranged = self.path[1:], self.headers.get("Range")
        begin = int(ranged[6:-1]) if ranged and how != "ignores" else 0
        Server.asked.append((how, begin))
        if how in ("absent", "busy"):
            return self.send_error(404 if how == "absent" else 503)
        if begin >= len(BODY):
            return self.send_error(416)
        body = BODY if how != "wrong" else BODY[::-1]
        first = sum(h == how for h, _ in Server.asked) == 1
        self.send_response(206 if begin else 200)
        if begin and how == "shifted":
            begin = 0
            self.send_header("Content-Range", f"bytes 0-{len(body) - 1}/{len(body)}")
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(body) - 1}/{len(body)}")
        if how != "silent":
            self.send_header("Content-Length", str(len(body) - begin))
        self.end_headers()
        cut = how == "cut" or how in ("ignores", "shifted") and first
        self.wfile.write(body[begin : begin + 120_000] if cut else body[begin:])

    def log_message(self, *_):
        pass


@pytest.fixture
def url(monkeypatch):
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    monkeypatch.delenv("ADAPTIVE_LAB_DATA", raising=False)
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    Server.asked = []
    yield f"http://127.0.0.1:{server.server_port}/"
    server.shutdown()
    server.server_close()


def remote(*urls, body=BODY):
    return fetch.Remote(urls, "sha256:" + hashlib.sha256(body).hexdigest())


def left(folder):
    "What lies in a folder besides locks."
    return sorted(p.name for p in folder.rglob("*") if p.is_file() and p.suffix != ".lock")


@pytest.mark.parametrize("how", ["whole", "cut", "ignores", "shifted", "silent"])
def test_the_file_arrives(url, tmp_path, how):
    path = fetch.retrieve("a/body", remote(url + how), tmp_path, wait=0)
    assert path.read_bytes() == BODY and left(tmp_path) == ["body"]
    begins = [b for _, b in Server.asked]
    assert begins[0] == 0 and (how != "cut" or len(begins) == 3 and begins[1] > 100_000)
    fetch.retrieve("a/body", remote(url + how), tmp_path)
    assert len(Server.asked) == len(begins)  # it is there: nothing is asked


def test_what_arrived_is_kept_for_the_next_run(url, tmp_path):
    with pytest.raises(fetch.FetchError, match="1 tries failed"):
        fetch.retrieve("body", remote(url + "cut"), tmp_path, tries=1)
    assert left(tmp_path) == ["body.part"]
    fetch.retrieve("body", remote(url + "whole"), tmp_path)
    assert Server.asked[-1][1] > 100_000 and left(tmp_path) == ["body"]


def test_a_wrong_file_is_removed_and_both_hashes_are_told(url, tmp_path):
    with pytest.raises(fetch.FetchError) as caught:
        fetch.retrieve("body", remote(url + "wrong"), tmp_path, wait=0)
    for body in (BODY, BODY[::-1]):
        assert hashlib.sha256(body).hexdigest() in str(caught.value)
    assert left(tmp_path) == []


def test_the_next_mirror_is_asked(url, tmp_path):
    path = fetch.retrieve("body", remote(url + "absent", url + "wrong", url + "busy", url + "whole"), tmp_path, wait=0)
    assert path.read_bytes() == BODY and [h for h, _ in Server.asked] == ["absent", "wrong", "busy", "busy", "busy", "busy", "whole"]


@pytest.mark.parametrize("stale", [b"x" * 1000, BODY[:1000], BODY, BODY + b"more"])
def test_a_stale_part_does_no_harm(url, tmp_path, stale):
    (tmp_path / "body.part").write_bytes(stale)
    assert fetch.retrieve("body", remote(url + "whole"), tmp_path, wait=0).read_bytes() == BODY
    assert left(tmp_path) == ["body"]


def test_no_server_is_a_clear_error(tmp_path):
    with pytest.raises(fetch.FetchError, match="ADAPTIVE_LAB_DATA"):
        fetch.retrieve("body", remote("http://127.0.0.1:9/body"), tmp_path, tries=2, wait=0)
    assert left(tmp_path) == []


def test_a_full_disk_leaves_nothing(url, tmp_path, monkeypatch):
    class Full(io.FileIO):
        def write(self, piece):
            if self.tell() > 50_000:
                raise OSError(28, "No space left on device")
            return super().write(piece)

    monkeypatch.setattr(fetch, "open", lambda p, m: Full(p, m) if str(p).endswith(".part") else open(p, m), raising=False)
    with pytest.raises(fetch.FetchError, match="No space left"):
        fetch.retrieve("body", remote(url + "whole"), tmp_path, wait=0)
    assert left(tmp_path) == []


def test_a_file_larger_than_the_disk_is_not_begun(url, tmp_path, monkeypatch):
    monkeypatch.setattr(fetch.shutil, "disk_usage", lambda p: type("Usage", (), dict(free=1000)))
    with pytest.raises(fetch.FetchError, match="needs 300000 bytes and 1000 are free"):
        fetch.retrieve("body", remote(url + "whole"), tmp_path, wait=0)
    assert left(tmp_path) == []


def test_a_folder_that_cannot_be_written_is_a_clear_error(url, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(fetch.FetchError, match="cannot write"):
        fetch.retrieve("body", remote(url + "whole"), tmp_path / "file")


def test_several_at_once_fetch_once(url, tmp_path):
    found = []
    each = [threading.Thread(target=lambda: found.append(fetch.retrieve("body", remote(url + "cut"), tmp_path, wait=0))) for _ in range(4)]
    [t.start() for t in each]
    [t.join() for t in each]
    assert len(found) == 4 and found[0].read_bytes() == BODY and len(Server.asked) == 3


def test_a_zip_is_unpacked_and_checked(tmp_path, monkeypatch):
    archive = io.BytesIO()
    with zipfile.ZipFile(archive, "w") as z:
        z.writestr("text", b"abc")
    monkeypatch.setattr(sys.modules[__name__], "BODY", archive.getvalue())
    monkeypatch.setenv("NO_PROXY", "127.0.0.1")
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Server)
    threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
    url, served = f"http://127.0.0.1:{server.server_port}/whole", "md5:" + hashlib.md5(archive.getvalue()).hexdigest()
    known = lambda content: fetch.Remote((url,), served, "md5:" + hashlib.md5(content).hexdigest(), "text")
    with pytest.raises(fetch.FetchError, match="in .* is wrong"):
        fetch.retrieve("text", known(b"abd"), tmp_path / "wrong")
    assert left(tmp_path) in ([], ["text.zip"])
    assert fetch.retrieve("text", known(b"abc"), tmp_path / "right").read_bytes() == b"abc" and left(tmp_path / "right") == ["text"]
    asked = len(Server.asked)
    fetch.retrieve("text", known(b"abc"), tmp_path / "right")
    assert len(Server.asked) == asked
    server.shutdown()
    server.server_close()


def test_a_known_text_is_checked_in_the_users_folder(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_LAB_DATA", str(tmp_path))
    (tmp_path / "tinyshakespeare").mkdir()
    (tmp_path / "tinyshakespeare" / "input.txt").write_text("not Shakespeare " * 100)
    (tmp_path / "mine.txt").write_text("my own text " * 100)
    with pytest.raises(fetch.FetchError, match="not the known file"):
        find_part("data", "text")({"path": "tinyshakespeare/input.txt"}, 0)
    assert len(find_part("data", "text")({"path": "mine.txt"}, 0).train.bytes) == 1080


def test_the_users_folder_comes_first(tmp_path, monkeypatch):
    body = gzip.compress(b"abc", mtime=1)
    packed, content = ("md5:" + hashlib.md5(b).hexdigest() for b in (body, b"abc"))
    monkeypatch.setitem(fetch.KNOWN, "kind/a.gz", fetch.Remote((), packed, content))
    monkeypatch.setenv("ADAPTIVE_LAB_DATA", str(tmp_path))
    (tmp_path / "kind").mkdir()
    for name, content in (("a.gz", body), ("a.gz", gzip.compress(b"abc", 1, mtime=9)), ("a", b"abc")):
        (tmp_path / "kind" / name).write_bytes(content)
        assert fetch.fetch("kind/a.gz") == tmp_path / "kind" / name
        (tmp_path / "kind" / name).unlink()
    (tmp_path / "kind" / "a.gz").write_bytes(gzip.compress(b"other"))
    with pytest.raises(fetch.FetchError, match="expected md5.*found md5"):
        fetch.fetch("kind/a.gz")
    monkeypatch.setenv("ADAPTIVE_LAB_DATA", str(tmp_path / "gone"))
    with pytest.raises(fetch.FetchError, match="ADAPTIVE_LAB_DATA"):
        fetch.fetch("kind/a.gz")


# parts

NAMES = "digits mnist split_digits permuted_digits rotated_digits longtail_digits noisy_digits table text".split()
OFFLINE = [n for n in NAMES if n not in ("mnist", "table")]


@pytest.mark.parametrize("name", NAMES)
def test_knobs_of_data_need_a_reset(name):
    assert not any(k.live for k in walk(find_part("data", name).knobs))


@pytest.mark.parametrize("name", OFFLINE)
def test_a_part_is_reproducible_and_tested_on_the_same_samples(name):
    first, again, other = (find_part("data", name)({}, seed) for seed in (0, 0, 1))
    for i in (0, 5, 10**6):
        assert all(torch.equal(a, b) for a, b in zip(first.train[i], again.train[i]))
    assert not all(torch.equal(a, b) for a, b in zip(first.train[0], other.train[0]))
    for (test, (X, y)), (_, (X2, y2)) in zip(first.tests.items(), other.tests.items()):
        assert len(X) == len(y) > 0 and torch.equal(y, y2) and int(y.max()) < first.classes
        assert torch.equal(X.sort(-1)[0], X2.sort(-1)[0]), test
    x, y = first.train[0]
    assert tuple(x.shape[1:]) == first.inputs and y.dtype == torch.int64 and 0 <= y.min() and y.max() < first.classes


def test_the_split_depends_on_the_labels_alone():
    X, y = numbered(40)[0], [0, 1] * 20
    splits = []
    for seed, scale in ((0, 1), (1, 1), (1, -3)):
        np.random.seed(seed), torch.manual_seed(seed)
        splits.append([part.flatten() for part in digits.hold_out(scale * X, y)])
    assert all(torch.equal(a, b) for a, b in zip(*splits[:2])) and torch.equal(splits[2][2], -3 * splits[0][2])


@pytest.mark.parametrize("setting", ["domain", "", "Class-Incremental", None])
def test_a_setting_that_is_none_is_refused(setting):
    X, y = numbered(40)[0], torch.arange(40) % 4
    with pytest.raises(DataError, match="class-incremental.*domain-incremental"):
        digits.split_tasks(*digits.hold_out(X, y), setting=setting)


def test_noise_and_tail_follow_the_seed():
    X, y = numbered(40)[0], torch.arange(40) % 4
    assert torch.equal(digits.label_noise(y, 0.5, 1), digits.label_noise(y, 0.5, 1))
    assert not torch.equal(digits.label_noise(y, 0.5, 1), digits.label_noise(y, 0.5, 2))
    assert not torch.equal(digits.long_tail(X, y, 5, 1)[0], digits.long_tail(X, y, 5, 2)[0])


def test_no_test_sample_is_trained_on():
    X, y, X_test, y_test = digits.digit_arrays()
    assert len(X) + len(X_test) == 1797
    both = torch.cat([X, X_test])
    from sklearn.datasets import load_digits

    whole = torch.from_numpy(load_digits().data / 16).float()
    assert sorted(map(tuple, both.tolist())) == sorted(map(tuple, whole.tolist()))


def test_mnist_by_its_own_files(tmp_path, monkeypatch):
    rng, digits_cache = np.random.default_rng(0), digits.digit_arrays.cache_clear
    for name, n in (("train", 50), ("t10k", 20)):
        for kind, array in (("images-idx3", rng.integers(0, 256, (n, 28, 28))), ("labels-idx1", np.arange(n) % 10)):
            path = tmp_path / f"{name}-{kind}-ubyte.gz"
            path.write_bytes(gzip.compress(idx(array, 0x08, ">u1")))
            monkeypatch.setitem(fetch.KNOWN, f"mnist/{path.name}", fetch.Remote((), fetch.digest(path, "md5:")))
    digits_cache()
    data = find_part("data", "split_digits")({"source": "mnist", "root": str(tmp_path), "batch_size": 4}, 0)
    assert data.inputs == (784,) and [len(y) for _, y in data.tests.values()] == [4] * 5 and data.train[0][0].max() <= 1
    assert find_part("data", "mnist")({"root": str(tmp_path)}, 0).classes == 10


def test_a_table_part_never_scales_by_the_test(tmp_path):
    X = np.random.default_rng(0).normal(5, 3, (100, 2))
    np.savez(tmp_path / "a.npz", X=X, y=["rare"] * 10 + ["common"] * 90)
    data = find_part("data", "table")({"path": str(tmp_path / "a.npz")}, 0)
    X_test, y_test = data.tests["test"]
    assert torch.bincount(y_test).tolist() == [18, 2] and data.train.X.mean(0).abs().max() < 1e-6 < X_test.mean(0).abs().max()


# text and tree


def test_no_more_text_is_read_than_asked(tmp_path, monkeypatch):
    for i in range(30):
        (tmp_path / f"{i:02}.py").write_bytes(bytes([65 + i]) * 100)
    (tmp_path / "test").mkdir()
    (tmp_path / "test" / "a.py").write_text("left out")
    opened = []
    monkeypatch.setattr(text, "open", lambda p, m: opened.append(p.name) or open(p, m), raising=False)
    assert bytes(text.stdlib_bytes(250, folder=tmp_path)) == b"A" * 100 + b"B" * 100 + b"C" * 50
    assert opened == ["00.py", "01.py", "02.py"]
    assert bytes(text.stdlib_bytes(10**6, True, tmp_path)) == b"".join(bytes([65 + i]) * 100 for i in (9, 19, 29))


def test_the_tree_is_a_transitive_hierarchy_in_any_session():
    closure = tree.class_tree()
    pairs = set(map(tuple, closure.pairs.tolist()))
    assert len(pairs) == len(closure.pairs) and closure.nodes == sorted(set(closure.nodes))
    above = {}
    for a, b in pairs:
        assert a != b and (b, a) not in pairs
        above.setdefault(a, set()).add(b)
    assert all(above.get(b, set()) <= above[a] for a, b in pairs)
    code = "from adaptive_lab.data.tree import class_tree; c = class_tree(); print(c.nodes, c.pairs.tolist())"
    said = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert said.strip() == f"{closure.nodes} {closure.pairs.tolist()}"
