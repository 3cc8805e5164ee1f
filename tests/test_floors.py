"Imports point down only: a notebook's number is its floor. Held by reading the modules' imports, not by running them."
import ast
import re
import subprocess
import sys
from functools import lru_cache
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parent.parent
FLOOR = {m[2]: int(m[1]) for p in (ROOT / "nbs").glob("[0-9]*.ipynb") if (m := re.fullmatch(r"(\d+)_(.+)\.ipynb", p.name))}
MECHANISMS, FACES = range(20, 70), 80  # floors
PLAIN = {"knobs": ("torch",), "draw": ("torch", "widgets"), "heat": ("torch", "widgets"), "maps": ("torch", "widgets"), "spheres": ("torch", "widgets"), "gatepictures": ("torch", "widgets"), "spherepictures": ("torch", "widgets"), "textpictures": ("torch", "widgets")}  # what these never import
PLASTIC = {("gated_lists", "gates"), *(("gated_adam", m) for m in ("gated_kernel", "gated_lists"))}
PLASTIC |= {("consolidation", m) for m in ("gates", "gated_lists", "gated_adam", "coincidence", "novelty")}
PLASTIC |= {("plasticity", m) for m in ("gates", "gated_lists", "gated_adam", "consolidation")}
VALUED = {("value_pictures", "value_history"), ("value_stream", "error_signals"), ("value_stream", "value_weights"), ("forward_values", "value_stream"), ("forward_values", "value_weights")}
VALUED |= {("value_kinds", m) for m in ("error_signals", "value_stream", "forward_values")}
VALUED |= {("valued_adam", m) for m in ("error_signals", "forward_values", "value_history", "value_kinds", "value_weights", "vwpr")}
VALUED |= {("vwpr", m) for m in ("error_signals", "forward_values", "step_checks", "value_history", "value_kinds", "value_pictures", "value_stream")}
STANDS_ON = PLASTIC | VALUED | {(m, shared) for m in ("controller", "bytropix") for shared in ("transformer", "sampling")} | {("bytropix", "wubu")}
WIDGETS = ("ipywidgets", "anywidget", "IPython", "traitlets", "jupyterlab", "ipykernel")
HEAVY = ("nbdev", "fastcore", "IPython", "ipywidgets", "jupyter_core", "jupyter_client", "matplotlib", "sklearn", "scipy", "accelerate", "distributed", "dask")


def imports(tree, package="adaptive_lab"):
    "Every module that a syntax tree imports, `from a import b` as both a and a.b; True where importing the module runs it."
    lazy = {id(n) for f in ast.walk(tree) if isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef, ast.Lambda)) for n in ast.walk(f)}
    for n in ast.walk(tree):
        if isinstance(n, ast.Import):
            yield from ((a.name, id(n) not in lazy) for a in n.names)
        elif isinstance(n, ast.ImportFrom):
            above = package.split(".")[: package.count(".") + 2 - n.level] if n.level else []  # nbdev exports imports relative
            name = ".".join([*above, *filter(None, [n.module])])
            yield name, id(n) not in lazy
            yield from ((f"{name}.{a.name}", id(n) not in lazy) for a in n.names)


@lru_cache(None)
def of_module(module, source):
    "What `imports` finds in a module."
    return list(imports(ast.parse(source), ".".join(["adaptive_lab", *module.split(".")[:-1]])))


def faults(module, source, floors=FLOOR):
    "What a module imports that its floor may not."
    here, found = floors[module], []
    for name, at_once in of_module(module, source):
        root, _, mine = name.partition(".")
        if root == "adaptive_lab" and mine in floors:
            found += _above(module, mine, floors)
        if root in WIDGETS and (here < FACES or "widgets" in PLAIN.get(module, ())):
            found.append(f"{module} imports {name}, which is for the faces")
        if root in PLAIN.get(module, ()):
            found.append(f"{module} imports torch")
        if root == "matplotlib" and at_once and here < FACES:
            found.append(f"{module} imports {name} outside the function that draws")
    return sorted(set(found))


def _above(module, other, floors):
    "Is the other module above, beside, or another mechanism?"
    here, there = module.split(".")[0], other.split(".")[0]
    if floors[other] >= floors[module] and other != module:
        return [f"{module} ({floors[module]}) imports {other} ({floors[other]}), which is not below it"]
    if floors[module] in MECHANISMS and floors[other] in MECHANISMS and here != there and (here, there) not in STANDS_ON:
        return [f"{module} imports {other}: one mechanism does not stand on another"]
    return []


def source(module):
    return ROOT.joinpath("adaptive_lab", *module.split(".")).with_suffix(".py").read_text(encoding="utf-8")


@pytest.mark.parametrize("module", sorted(FLOOR, key=lambda m: (FLOOR[m], m)))
def test_imports_point_down(module):
    assert faults(module, source(module)) == []


def test_no_more_is_allowed_than_is_used():
    used = {(m.split(".")[0], name.split(".")[1]) for m in FLOOR for name, _ in of_module(m, source(m)) if name.count(".")}
    rooms = {m.split(".")[0] for m in FLOOR}
    assert {(a, b) for a, b in STANDS_ON if a in rooms} <= used


SMALL = {"knobs": 0, "training": 10, "plasticity": 22, "vwpr": 20, "transformer": 30, "controller.head": 32, "controller.loop": 34, "draw": 80, "heat": 81, "panels": 86}


@pytest.mark.parametrize(
    "module, line, word",
    [
        ("knobs", "import torch", "imports torch"),
        ("knobs", "from torch import nn", "imports torch"),
        ("draw", "def f():\n    import torch", "imports torch"),
        ("heat", "import torch", "imports torch"),
        ("heat", "import ipywidgets", "faces"),
        ("training", "from adaptive_lab.plasticity import gates", "not below"),
        ("training", "from adaptive_lab import plasticity", "not below"),
        ("training", "def f():\n    import adaptive_lab.draw", "not below"),
        ("plasticity", "from adaptive_lab.vwpr import reward", "one mechanism"),
        ("training", "from .plasticity import gates", "not below"),
        ("training", "from . import plasticity", "not below"),
        ("controller.head", "from adaptive_lab.controller.loop import run", "not below"),
        ("controller.head", "from .loop import run", "not below"),
        ("controller.head", "from ..draw import svg", "not below"),
        ("plasticity", "def f():\n    from IPython.display import HTML", "faces"),
        ("draw", "import ipywidgets", "faces"),
        ("training", "import matplotlib.pyplot as plt", "outside the function"),
        ("training", "class A:\n    import matplotlib", "outside the function"),
    ],
)
def test_a_wrong_import_is_found(module, line, word):
    assert [f for f in faults(module, line, SMALL) if word in f]


@pytest.mark.parametrize(
    "module, line",
    [
        ("plasticity", "from adaptive_lab.knobs import Knobs"),
        ("controller.loop", "from adaptive_lab.controller.head import Head\nfrom adaptive_lab.transformer import Block"),
        ("plasticity", "def draw():\n    import matplotlib.pyplot"),
        ("panels", "import ipywidgets, torch\nfrom adaptive_lab.draw import svg"),
    ],
)
def test_a_right_import_is_left_alone(module, line):
    assert faults(module, line, SMALL) == []


def heavy_after(*modules):
    "The development tools and heavy libraries that importing these modules brings into a fresh interpreter."
    code = f"import sys, importlib\nfor m in {modules}: importlib.import_module('adaptive_lab.' + m)\nprint(*sorted(set({HEAVY}) & set(sys.modules)))"
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif("plasticity" not in FLOOR, reason="no notebook of plasticity")
def test_a_mechanism_alone_brings_little():
    assert heavy_after("plasticity") == []


def test_nothing_below_the_faces_brings_tools_or_heavy_libraries():
    assert heavy_after(*(m for m in FLOOR if FLOOR[m] < FACES), "lab", "doctor") == []


def test_every_module_has_its_notebook():
    there = {".".join(p.relative_to(ROOT / "adaptive_lab").with_suffix("").parts) for p in (ROOT / "adaptive_lab").rglob("*.py")}
    assert {m for m in there if not m.endswith(("__init__", "_modidx"))} == set(FLOOR)
