"""The notebooks, and what is made from them. Runs in .venv, from any folder.

notebooks.py clean [FILE ...]   take out counts, widget views and metadata, in place
notebooks.py export             clean all, write the modules and README.md
notebooks.py readme             write README.md from nbs/index.ipynb
notebooks.py check              is all of it in step? Exit status 1 and one line a fault when not
"""
import ast
import base64
import json
import os
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

import nbformat
from nbdev.clean import clean_nb

ROOT = Path(__file__).resolve().parent.parent
NBS, LIB = ROOT / "nbs", ROOT / "adaptive_lab"
WIDGET = "application/vnd.jupyter.widget-"
CELL, MODULE, OUTPUT = 30, 350, 60_000  # lines, lines, bytes
PATHS = re.compile(r"""(?<![\w.:/])(?:/(?:home|root|Users|work|mnt|opt|private|var/folders)/[\w.-]+|/tmp/[\w.-]+|[A-Z]:\\\\?Users\\)""")
REPAIR = "python3 .ci/do.py export"  # or: make export


def notebooks():
    "Every notebook under nbs, in order."
    return [p for p in sorted(NBS.rglob("*.ipynb")) if ".ipynb_checkpoints" not in p.parts]


# --- clean -----------------------------------------------------------------------------------------


def cleaned(nb):
    "The notebook without what changes by itself: counts, widget views, metadata, random ids, addresses of objects."
    clean_nb(nb)
    nb.metadata = nbformat.from_dict({"kernelspec": {"display_name": "python3", "language": "python", "name": "python3"}})
    nb.nbformat, nb.nbformat_minor = 4, 5
    for i, cell in enumerate(nb.cells):
        cell.metadata, cell["id"] = nbformat.from_dict({}), f"{i:04d}"
        if cell.cell_type == "code":
            cell.execution_count = None
            cell.outputs = [o for o in map(_output, cell.outputs) if o]
    return nb


def _output(o):
    "One output, clean; None when only a widget's view was in it."
    if "execution_count" in o:
        o["execution_count"] = None
    if "metadata" in o:
        o["metadata"] = nbformat.from_dict({})
    if any(kind.startswith(WIDGET) for kind in o.get("data", {})):
        o["data"] = nbformat.from_dict({k: v for k, v in o["data"].items() if not k.startswith(WIDGET)})
        if set(o["data"]) <= {"text/plain"}:
            return None
    return o


def as_text(nb):
    "A notebook as the text of its file."
    return nbformat.writes(nb, version=4).rstrip("\n") + "\n"


def read(path):
    "The notebook in a file."
    return nbformat.reads(path.read_text(encoding="utf-8"), as_version=4)


def clean(paths):
    "Clean these notebooks in place; one that is clean is not touched."
    for path in paths:
        before, after = path.read_text(encoding="utf-8"), as_text(cleaned(read(path)))
        if before != after:
            replace(path, after)
            print("cleaned", path.relative_to(ROOT).as_posix())


def replace(path, text):
    "Write a text file in one piece, with the same line ends on every system."
    fresh = path.with_name(path.name + ".new")
    fresh.write_bytes(text.encode("utf-8"))
    os.replace(fresh, path)


# --- README ----------------------------------------------------------------------------------------


def readme(path=NBS / "index.ipynb"):
    "README's text: prose as it is, code as code, outputs below it. Hidden cells stay out."
    parts = ["<!-- Made from nbs/index.ipynb; to change it, change that and run: make readme -->"]
    for cell in read(path).cells:
        if cell.cell_type == "markdown":
            parts.append(_relinked(cell.source))
        elif cell.cell_type == "code":
            parts += _code(cell)
    return "\n\n".join(p.strip("\n") for p in parts if p.strip()) + "\n"


def _code(cell):
    "A code cell's parts of README: its source and its outputs, less what its directives hide."
    lines = cell.source.splitlines()
    marks = " ".join(line for line in lines if line.startswith("#|"))
    source = "\n".join(line for line in lines if not line.startswith("#|"))
    shown = [] if re.search(r"\bhide\b|include: *false", marks) else [] if "echo: false" in marks else [f"```python\n{source.strip()}\n```"]
    return shown + ([] if re.search(r"\bhide\b|include: *false|output: *false", marks) else [_shown(o) for o in cell.outputs])


def _shown(o):
    "An output as Markdown: Markdown as it is, text in a block. Pictures belong into nbs/images and a Markdown cell."
    data = o.get("data", {})
    if "text/markdown" in data:
        return _relinked(data["text/markdown"])
    text = o.get("text") or data.get("text/plain", "")
    return f"```console\n{text.rstrip()}\n```" if text.strip() and not any(k.startswith("image/") for k in data) else ""


def _relinked(markdown):
    "Links that are relative to nbs, made relative to the folder above."
    fences = re.split(r"(```.*?```|`[^`\n]*`)", markdown, flags=re.S)  # code is left alone
    target = r"(?!\w[\w+.-]*:|/|#|\.\./)(?:\./)?"
    for i in range(0, len(fences), 2):
        text = re.sub(r"(\]\(\s*<?)" + target, r"\1nbs/", fences[i])
        text = re.sub(r"""((?:src|href)=["'])""" + target, r"\1nbs/", text)
        text = re.sub(r"(?m)^(\[[^\]]+\]:\s*<?)" + target, r"\1nbs/", text)
        fences[i] = re.sub(r"""(\]\(\s*<?|(?:src|href)=["']|^\[[^\]]+\]:\s*<?)\.\./""", r"\1", text, flags=re.M)
    return "".join(fences)


def write_readme():
    "README.md from nbs/index.ipynb."
    if not (NBS / "index.ipynb").exists():
        sys.exit("nbs/index.ipynb is not there: README.md is made from it")
    replace(ROOT / "README.md", readme())


# --- export ----------------------------------------------------------------------------------------


def modules(root=ROOT):
    "The exported modules there are, as bytes by path. nbdev's index, which only serves its own documentation, is left out."
    found = {p.relative_to(root).as_posix(): p.read_bytes() for p in sorted((root / "adaptive_lab").rglob("*.py"))}
    return {name: text for name, text in found.items() if not name.endswith("_modidx.py") and (name.endswith("__init__.py") or b"AUTOGENERATED" in text[:500])}


def exported():
    "The modules as the notebooks export them now: made by nbdev in a copy, so that an error leaves the folder as it was."
    with tempfile.TemporaryDirectory() as folder:
        copy = Path(folder, "project")
        shutil.copytree(NBS, copy / "nbs", ignore=shutil.ignore_patterns("__pycache__", ".ipynb_checkpoints", "images"))
        shutil.copytree(LIB, copy / "adaptive_lab", ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copy(ROOT / "settings.ini", copy)
        for name in modules(copy):
            if not name.endswith("__init__.py"):
                (copy / name).unlink()
        run = [sys.executable, "-c", "from nbdev.doclinks import nbdev_export; nbdev_export.__wrapped__()"]
        if subprocess.run(run, cwd=copy, stdin=subprocess.DEVNULL).returncode:
            sys.exit("nbdev could not export the notebooks; the reason is above")
        return modules(copy)


def export():
    "Write the modules whose text has changed. A module whose notebook is gone goes too."
    now, fresh = modules(), exported()
    for name in sorted(set(now) - set(fresh)):
        (ROOT / name).unlink()
        print("removed", name)
    for name in sorted(fresh):
        if now.get(name) != fresh[name]:
            (ROOT / name).parent.mkdir(parents=True, exist_ok=True)
            replace(ROOT / name, fresh[name].decode("utf-8"))
            print("wrote", name)


# --- check -----------------------------------------------------------------------------------------


def check():
    "All faults, one line each."
    faults = [f for path in notebooks() for f in check_notebook(path)]
    return faults + check_modules() + check_readme()


def check_modules():
    "Is each module what its notebook exports now, and short enough to be read?"
    now, fresh = modules(), exported()
    faults = [f"{name}: not what its notebook exports: {REPAIR}" for name in sorted(set(now) | set(fresh)) if now.get(name) != fresh.get(name)]
    return faults + [f"{name}: {n} lines, at most {MODULE}: split its notebook" for name in sorted(now) if (n := _lines(now[name])) > MODULE]


def _lines(module):
    "The lines of a module that its notebook exported: without nbdev's line above each cell."
    return re.sub(rb"\n*# %% .*", b"", module).count(b"\n")


def check_readme():
    "Is README what nbs/index.ipynb makes?"
    if not (NBS / "index.ipynb").exists():
        return ["nbs/index.ipynb: not there, README.md is made from it"]
    path = ROOT / "README.md"
    missing = [f"nbs/index.ipynb: the picture {link} is not there" for link in re.findall(r"!\[[^\]]*\]\(([^):]+)\)", readme()) if not (ROOT / link).exists()]
    return missing + ([] if path.exists() and path.read_text(encoding="utf-8") == readme() else [f"README.md: not what nbs/index.ipynb makes: {REPAIR}"])


def check_notebook(path):
    "A notebook's faults."
    name, text = path.relative_to(ROOT).as_posix(), path.read_text(encoding="utf-8")
    nb = nbformat.reads(text, as_version=4)
    faults = [fault for i, cell in enumerate(nb.cells) for fault in check_cell(cell, f"{name}, cell {i}")]
    if text != as_text(cleaned(nb)):
        faults.append(f"{name}: not clean (counts, widget views, metadata or ids): {REPAIR}")
    return faults


def check_cell(cell, where):
    "A cell's faults."
    faults = [f"{where}: a path of one machine: {p}" for p in sorted(set(PATHS.findall(_visible(cell))))]
    if cell.cell_type != "code":
        return faults
    lines = [line for line in cell.source.splitlines() if not line.startswith("#|")]
    if re.search(r"(?m)^#\| *exporti?\b", cell.source) and len(lines) > CELL:
        faults.append(f"{where}: exports {len(lines)} lines, at most {CELL}: split it")
    if _star(cell.source):
        faults.append(f"{where}: imports *: name what is imported")
    faults += [f"{where}: an error is kept as output" for o in cell.outputs if o.output_type == "error"]
    return faults + [f"{where}: an output of {n} bytes, at most {OUTPUT}" for n in map(_size, cell.outputs) if n > OUTPUT]


def _visible(cell):
    "The text of a cell in which a path would be seen: its prose or code, and its text outputs."
    kept = [o.get("text", "") for o in cell.get("outputs", [])] + [v for o in cell.get("outputs", []) for k, v in o.get("data", {}).items() if k.startswith("text/")]
    return "\n".join([cell.source, *kept])


def _star(source):
    "Does a cell import everything from somewhere? A cell with magics is not Python, and is read by its lines."
    try:
        return any(isinstance(n, ast.ImportFrom) and n.names[0].name == "*" for n in ast.walk(ast.parse(source)))
    except SyntaxError:
        return bool(re.search(r"(?m)^\s*from\s+\S+\s+import\s+\*", source))


def _size(o):
    "The bytes of an output; those of a picture as a file."
    size = lambda kind, v: len(base64.b64decode(v)) if kind in ("image/png", "image/jpeg") else len(v if isinstance(v, str) else json.dumps(v))
    return len(o.get("text", "")) + sum(size(k, v) for k, v in o.get("data", {}).items())


def main(argv):
    what, *files = argv or [""]
    if what == "clean":
        clean([Path(f).resolve() for f in files] or notebooks())
    elif what == "export":
        clean(notebooks())
        export()
        if (NBS / "index.ipynb").exists():
            write_readme()
    elif what == "readme":
        write_readme()
    elif what == "check":
        faults = check()
        print("\n".join(faults) or f"{len(notebooks())} notebooks are clean; the modules and README are in step with them")
        return int(bool(faults))
    else:
        print(__doc__, end="")
        return 2
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
