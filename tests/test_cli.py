"The command line as a user meets it."
import json
import re
import signal
import subprocess
import sys
import time

import pytest

from adaptive_lab.cli import COMMANDS, main

FAST = ["--data.steps-per-task", "20", "--run.steps", "100", "--model.hidden", "16", "--quiet"]


def test_train_resume_replay(tmp_path, capsys):
    store = ["--store", str(tmp_path / "runs")]
    assert main(["train", *FAST, *store, "--name", "a", "--session", str(tmp_path / "s.json"), "--log", str(tmp_path / "log.jsonl")]) == 0
    digest = re.search(r"weights (\w+)", capsys.readouterr().out)[1]
    assert json.loads((tmp_path / "log.jsonl").read_text().splitlines()[-1])["step"] == 100
    assert main(["replay", str(tmp_path / "s.json")]) == 0
    assert digest in capsys.readouterr().out
    assert main(["train", "--recipe", str(tmp_path / "s.json"), *store, "--name", "b", "--quiet"]) == 0
    assert digest in capsys.readouterr().out
    assert main(["train", "--recipe", str(tmp_path / "s.json"), "--optimizer", "adam", *store, "--quiet"]) == 0
    assert digest not in capsys.readouterr().out


def test_ctrl_c_saves_and_says_how_to_go_on(tmp_path, capsys):
    "The run that was interrupted and resumed goes on with the weights of the one that was not."
    long = ["--run.steps", "40000", "--run.threads", "1", "--data.steps-per-task", "3000", "--run.eval-every", "10000", "--quiet", "--store", str(tmp_path)]
    command = [sys.executable, "-m", "adaptive_lab.cli", "train", *long, "--name", "c", "--save-every", "100"]
    p = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    while not any((tmp_path).rglob("*.json")) and p.poll() is None:
        time.sleep(0.05)
    p.send_signal(signal.SIGINT)
    out, err = p.communicate(timeout=60)
    assert p.returncode == 130, out + err
    at = int(re.search(r"step (\d+) of 40000", out)[1])
    digest = re.search(r"weights (\w+)", out)[1]
    assert f"adaptive-lab resume --store {tmp_path} c" in out
    from adaptive_lab.run import Run, replay, weights_digest
    from adaptive_lab.store import Store

    resumed = Run.resume(Store(tmp_path), "c")
    assert resumed.index == at and weights_digest(resumed.model) == digest
    resumed.advance(at + 50)
    assert weights_digest(resumed.model) == weights_digest(replay(resumed.recipe, None, at + 50).model)


@pytest.mark.parametrize("argv, message", [
    (["train", "--optimizer.plasticity-k", "99"], "plasticity_k"),
    (["train", "--optimizer", "adan"], "no optimizer is called 'adan'"),
    (["train", "--data", "table", "--data.path", "nothing.csv"], "nothing.csv"),
    (["resume", "nobody"], "nobody"),
    (["replay", "nothing.json"], "nothing.json"),
])
def test_mistakes_are_explained_without_a_traceback(argv, message, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    try:
        status = main(argv)
    except SystemExit as e:
        status = e.code
    said = capsys.readouterr()
    assert status == 2 and message in said.err + said.out and "Traceback" not in said.err


def test_usage(capsys):
    assert main(["--help"]) == 0
    text = capsys.readouterr().out
    assert all(name in text for name in COMMANDS)
    assert main(["--version"]) == 0 and main([]) == 2 and main(["dance"]) == 2


def test_an_old_run_is_let_go_only_after_the_new_one_is_saved(tmp_path, capsys):
    from adaptive_lab.store import Store

    store = ["--store", str(tmp_path / "runs")]
    assert main(["train", *FAST, *store, "--name", "a", "--save-every", "40"]) == 0
    assert main(["train", *FAST, *store, "--name", "a"]) == 2
    assert "--overwrite" in capsys.readouterr().err
    (tmp_path / "file").write_text("")
    assert main(["train", *FAST, *store, "--name", "a", "--overwrite", "--log", str(tmp_path / "file" / "x.jsonl")]) == 2
    assert [c.step for c in Store(tmp_path / "runs").checkpoints("a")] == [40, 80, 100]
    shorter = [*FAST[:3], "60", *FAST[4:]]
    assert main(["train", *shorter, *store, "--name", "a", "--overwrite", "--log", str(tmp_path / "new" / "x.jsonl")]) == 0
    assert [c.step for c in Store(tmp_path / "runs").checkpoints("a")] == [60]
    assert main(["train", *FAST, *store, "--name", "b", "--save-every", "10", "--keep", "2"]) == 0
    assert [c.step for c in Store(tmp_path / "runs").checkpoints("b")] == [90, 100]
    assert main(["train", *FAST, *store, "--name", "s", "--session", str(tmp_path / "s.json")]) == 0
    assert main(["replay", str(tmp_path / "s.json"), *store, "--name", "b"]) == 2


def test_resume_goes_on_for_longer_and_names_the_newest_good_checkpoint(tmp_path, capsys):
    store = ["--store", str(tmp_path / "runs")]
    assert main(["train", *FAST, *store, "--name", "a", "--save-every", "50"]) == 0
    assert main(["resume", "a", *store]) == 0 and "--steps" in capsys.readouterr().out
    assert main(["resume", "a", *store, "--steps", "120", "--quiet"]) == 0 and "step 120 of 120" in capsys.readouterr().out
    from adaptive_lab.store import Store

    newest = max((c for c in Store(tmp_path / "runs").checkpoints("a")), key=lambda c: c.step)
    path = next(p for p in (tmp_path / "runs").rglob("*") if newest.hash in p.name)
    data = bytearray(path.read_bytes())
    data[-9] ^= 1
    path.write_bytes(data)
    assert main(["resume", "a", *store, "--steps", "150"]) == 2
    assert f"adaptive-lab resume --store {tmp_path / 'runs'} a --step 100" in capsys.readouterr().err


@pytest.mark.parametrize("flag", ["0", "-3", "x"])
def test_counts_are_checked(flag, capsys):
    with pytest.raises(SystemExit):
        main(["train", *FAST, "--save-every", flag])
    assert "1 or more" in capsys.readouterr().err
