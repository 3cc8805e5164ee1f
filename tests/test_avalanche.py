"The bench against Avalanche: without it, it says what to install; with it, both sides are what the pairs say."
import json
import runpy
import sys
from pathlib import Path

import pytest
import setuptools

from adaptive_lab.bench import avalanche
from adaptive_lab.cli import main

ROOT = Path(__file__).resolve().parent.parent


def test_the_command_without_avalanche_says_what_to_install(tmp_path, monkeypatch, capsys):
    for name in [m for m in sys.modules if m.partition(".")[0] == "avalanche"]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, "avalanche", None)
    assert main(["bench", "avalanche", "--json", str(tmp_path / "a.json")]) == 1
    said = capsys.readouterr()
    assert "Traceback" not in said.err and avalanche.INSTALL in said.out
    kept = json.loads((tmp_path / "a.json").read_text())
    assert [f["value"] for f in kept["figures"]] == [None] and not kept["holds"]


@pytest.mark.parametrize("error", [ImportError("no"), OSError("libcudart"), AttributeError("x"), RuntimeError("")])
def test_whatever_fails_in_the_import_is_a_reason(monkeypatch, error):
    def fails():
        raise error

    monkeypatch.setattr(avalanche, "import_torchvision", fails)
    assert type(error).__name__ in avalanche.why_not()
    assert type(error).__name__ in avalanche.bench().figures[0].note


def test_mnist_is_taken_only_where_it_is_at_hand(tmp_path, monkeypatch):
    monkeypatch.setenv("ADAPTIVE_LAB_DATA", str(tmp_path))
    assert avalanche.base(False)["source"] == "digits"
    (tmp_path / "mnist").mkdir()
    (tmp_path / "mnist" / "train-images-idx3-ubyte.gz").touch()
    assert avalanche.base(False)["source"] == "mnist" and avalanche.base(True)["source"] == "digits"


def test_its_extra_is_not_among_the_development_tools(monkeypatch):
    given = {}
    monkeypatch.setattr(setuptools, "setup", lambda **kw: given.update(kw))
    runpy.run_path(str(ROOT / "setup.py"))
    extras = given["extras_require"]
    assert any(r.startswith("avalanche-lib==") for r in extras["bench"])
    assert not [r for r in extras["dev"] if r.startswith(("avalanche", "torchvision"))]


@pytest.mark.skipif("avalanche.why_not()", reason="needs Avalanche: pip install -e .[bench]")
def test_both_sides_start_alike_and_are_judged_alike():
    shared = avalanche.base(True)
    still = {"fine-tuning": (dict(method="finetune", lr=1e-9), "Naive", {})}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(avalanche, "PAIRS", still)
        a, b = avalanche.ours("fine-tuning", shared, 3), avalanche.theirs("fine-tuning", shared, 3)
    assert a["accuracy"] == pytest.approx(b["accuracy"], abs=1e-6) and a["masked_accuracy"] == pytest.approx(b["masked_accuracy"], abs=1e-6)


@pytest.mark.skipif("avalanche.why_not()", reason="needs Avalanche: pip install -e .[bench]")
def test_the_same_seed_gives_the_same_run_of_theirs():
    a, b = (avalanche.theirs("ER", avalanche.base(True), 0) for _ in range(2))
    assert a["accuracy"] == b["accuracy"] and a["steps"] == b["steps"]
