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
    long = ["--run.steps", "40000", "--data.steps-per-task", "3000", "--run.eval-every", "10000", "--quiet", "--store", str(tmp_path)]
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
