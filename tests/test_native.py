"Native code: compiled once, kept whole, and never an error of the program that uses it."
import hashlib
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from adaptive_lab.native import NoNative, cache_key, compile_into, compiler, is_whole, library, opened

SOURCE = "int seven(void) { return 7; }"
STEP = """
import logging, sys
import adaptive_lab.plasticity as plasticity
from pathlib import Path
cache = Path(sys.argv[1])
assert not cache.exists(), "importing compiles nothing"
logging.basicConfig(level="INFO", stream=sys.stdout, format="%(message)s")
import torch
p = torch.nn.Parameter(torch.ones(100_000))
opt = plasticity.SelectivePlasticityOptimizer([p], warmup_steps=0)
for _ in range(3):
    p.grad = torch.linspace(1, 2, 100_000)
    opt.step()
assert p.min() < 1
print("path:", opt.get_diagnostics()["path"])
maps = Path("/proc/self/maps")
print("runtimes:", len({l.split()[-1] for l in maps.read_text().splitlines() if "omp" in Path(l.split()[-1]).name}) if maps.exists() else 1)
"""
needs_compiler = pytest.mark.skipif(not any(map(shutil.which, ("cc", "gcc", "clang"))), reason="no C compiler")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    "A cache folder of its own, and no switch set."
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    for name in ("CC", "ADAPTIVE_LAB_NATIVE"):
        monkeypatch.delenv(name, raising=False)
    return tmp_path / "cache"


def step_in_a_process(cache):
    done = subprocess.run([sys.executable, "-c", STEP, str(cache)], capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stdout + done.stderr
    return done.stdout


def fresh_library(source=SOURCE):
    "The library as a process finds it that has not asked before."
    return library.__wrapped__("test", source)


def script(path, body):
    path.write_text("#!/bin/sh\n" + body, encoding="utf-8")
    path.chmod(0o755)
    return str(path)


def kept(cache):
    return [f for f in cache.rglob("*") if f.is_file()]


# whole programs


@needs_compiler
def test_an_optimizer_finds_its_kernel(cache):
    out = step_in_a_process(cache)
    assert "path: native" in out and out.count("selective plasticity steps by native") == 1 and "runtimes: 1" in out
    assert [is_whole(f) for f in kept(cache)] == [True]


def test_a_broken_compiler_leads_to_tensor_operations(cache, tmp_path, monkeypatch):
    monkeypatch.setenv("CC", script(tmp_path / "cc", "exit 1"))
    out = step_in_a_process(cache)
    assert "path: fused" in out and "exit status 1" in out and out.count("selective plasticity steps by") == 1 and not kept(cache)


# the library


@needs_compiler
def test_it_is_compiled_once_and_found_again(cache, monkeypatch):
    assert fresh_library().seven() == 7
    (file,) = kept(cache)
    monkeypatch.setattr("adaptive_lab.native.compile_into", lambda *_: pytest.fail("compiled again"))
    assert is_whole(file) and fresh_library().seven() == 7


@needs_compiler
@pytest.mark.parametrize("damage", [lambda b: b[:5000], lambda b: b"", lambda b: b[:200] + bytes([b[200] ^ 1]) + b[201:]], ids=["cut off", "empty", "one bit"])
def test_a_damaged_file_is_made_anew(cache, damage):
    fresh_library("int eight(void) { return 8; }")
    (file,) = kept(cache)
    good = file.read_bytes()
    file.unlink()  # this process has it mapped
    file.write_bytes(damage(good))
    assert fresh_library("int eight(void) { return 8; }").eight() == 8
    again = file.read_bytes()
    assert again[-32:] == hashlib.sha256(again[:-32]).digest()


@needs_compiler
def test_a_cache_that_cannot_be_written_is_no_hindrance(cache):
    cache.write_text("a file where a folder should be")
    assert fresh_library().seven() == 7


@needs_compiler
def test_processes_that_start_together_leave_one_whole_file(cache):
    code = "from adaptive_lab.native import library\nassert library('x', 'int nine(void) { return 9; }').nine() == 9"
    running = [subprocess.Popen([sys.executable, "-c", code]) for _ in range(4)]
    assert [p.wait(timeout=120) for p in running] == [0] * 4
    assert [is_whole(f) for f in kept(cache)] == [True]


@pytest.mark.parametrize(
    "body, why",
    [
        ("echo 'cannot open header' >&2; exit 1", "cannot open header"),
        ("exit 0", "wrote nothing"),
        ('while [ "$1" != -o ]; do shift; done; echo rubbish > "$2"', "cannot be used"),
        ("kill -9 $$", "exit status -9"),
    ],
    ids=["fails", "writes nothing", "writes rubbish", "dies"],
)
def test_a_compiler_may_be_broken_in_any_way(cache, tmp_path, monkeypatch, body, why):
    monkeypatch.setenv("CC", script(tmp_path / "cc", body))
    with pytest.raises(NoNative, match=why):
        fresh_library()


@pytest.mark.parametrize("name, value, why", [("ADAPTIVE_LAB_NATIVE", "0", "switched off"), ("PATH", os.sep + "nowhere", "no C compiler"), ("CC", "nothing-here", "not a program")])
def test_without_a_compiler_the_reason_is_told(cache, monkeypatch, name, value, why):
    monkeypatch.setenv(name, value)
    with pytest.raises(NoNative, match=why):
        fresh_library()
    assert not kept(cache)


@needs_compiler
def test_a_name_holds_all_that_the_code_depends_on(tmp_path):
    other, command = tmp_path / "other", compiler()
    other.write_bytes(b"x")
    keys = cache_key(SOURCE, command), cache_key(SOURCE + " ", command), cache_key(SOURCE, [*command, "-g"]), cache_key(SOURCE, [str(other)])
    assert len(set(keys)) == 4


@needs_compiler
def test_an_error_in_the_source_leaves_nothing_behind(tmp_path):
    with pytest.raises(NoNative, match="does not compile"):
        compile_into(tmp_path / "folder" / "x.so", "no C", compiler())
    assert list((tmp_path / "folder").iterdir()) == []
    assert opened(tmp_path / "folder" / "x.so", SOURCE, compiler()).seven() == 7
