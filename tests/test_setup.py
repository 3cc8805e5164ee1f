"The set-up behind `make`: what it makes, what it repairs, and what it refuses."
import ast
import importlib.util
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import urllib.error
import urllib.request
from pathlib import Path

import nbformat
import pytest

ROOT = Path(__file__).resolve().parent.parent


def script(name):
    "A file of .ci as a module."
    spec = importlib.util.spec_from_file_location(name, ROOT / ".ci" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


@pytest.fixture
def do(tmp_path, monkeypatch):
    "do.py in a folder of its own, whose .venv runs and was made from the files there."
    do = script("do")
    for name in ("constraints.txt", "settings.ini", "setup.py"):
        shutil.copy(ROOT / name, tmp_path)
    venv = tmp_path / ".venv"
    for name, value in dict(ROOT=tmp_path, VENV=venv, PYTHON=Path(sys.executable), STAMP=venv / "stamp.json").items():
        monkeypatch.setattr(do, name, value)
    venv.mkdir()
    do.STAMP.write_text(json.dumps(do.wanted()))
    return do


@pytest.fixture
def made(do, monkeypatch):
    "What `setup` decides to make, instead of making it."
    made = []
    monkeypatch.setattr(do, "make_venv", lambda: made.append("venv"))
    monkeypatch.setattr(do, "install", lambda want: made.append("packages"))
    return made


# --- .venv -----------------------------------------------------------------------------------------


def test_nothing_is_done_twice(do, made):
    do.setup()
    assert made == []


@pytest.mark.parametrize("name", ["constraints.txt", "settings.ini", "setup.py"])
def test_other_packages_are_brought_in_place(do, made, name):
    with open(do.ROOT / name, "a") as f:
        f.write("\n# more\n")
    do.setup()
    assert made == ["packages"]


@pytest.mark.parametrize("change", [{"place": "/elsewhere/.venv"}, {"python": "3.10.0"}])
def test_a_moved_folder_or_another_python_is_made_anew(do, made, change):
    do.STAMP.write_text(json.dumps({**do.wanted(), **change}))
    do.setup()
    assert made == ["venv", "packages"]


@pytest.mark.parametrize("damage", ["no stamp", "half a stamp", "no python"])
def test_a_broken_environment_is_made_anew(do, made, damage, monkeypatch):
    if damage == "no stamp":
        do.STAMP.unlink()
    elif damage == "half a stamp":
        do.STAMP.write_text(do.STAMP.read_text()[:20])
    else:
        monkeypatch.setattr(do, "PYTHON", do.VENV / "bin" / "python")
    do.setup()
    assert made == ["venv", "packages"]


def test_an_environment_of_somebody_else_is_never_removed(do, monkeypatch):
    monkeypatch.setattr(do, "stage", lambda *a, **k: 0)
    do.STAMP.rename(do.VENV / "mine")
    with pytest.raises(SystemExit, match="left alone"):
        do.make_venv()
    assert (do.VENV / "mine").exists()
    (do.VENV / do.OURS).touch()
    do.make_venv()
    assert [p.name for p in do.VENV.iterdir()] == [do.OURS]


def test_when_pip_refuses_what_worked_before_stays(do, monkeypatch):
    monkeypatch.setattr(do, "stage", lambda *a, **k: 1)
    with pytest.raises(SystemExit, match="setup.log"):
        do.install(do.wanted())
    assert do.stamped() == do.wanted()


def test_killed_while_pip_works_it_counts_as_unfinished(do, monkeypatch):
    def killed(*args, **kwargs):
        raise KeyboardInterrupt

    monkeypatch.setattr(do, "stage", killed)
    with pytest.raises(KeyboardInterrupt):
        do.install(do.wanted())
    assert do.stamped() == {}


@pytest.mark.skipif(os.name == "nt", reason="no SIGKILL on Windows")
def test_one_setup_at_a_time_and_a_killed_one_frees_the_next(do):
    hold = f"import sys, time; sys.path.insert(0, {str(ROOT / '.ci')!r}); import do; f = open({str(do.ROOT / '.venv.lock')!r}, 'a'); print(do._lock(f, False), flush=True); time.sleep(60)"
    with subprocess.Popen([sys.executable, "-c", hold], stdout=subprocess.PIPE, text=True) as holder:
        assert holder.stdout.readline().strip() == "True"
        with open(do.ROOT / ".venv.lock", "a") as f:
            assert not do._lock(f, wait=False)
            holder.send_signal(signal.SIGKILL)
            holder.wait()
            assert do._lock(f, wait=False)


def test_a_stage_shows_why_it_failed_and_keeps_the_whole_log(do, capsys):
    command = [sys.executable, "-c", "for i in range(99): print('line', i)\nraise SystemExit(3)"]
    assert do.stage("trial", command, log=do.ROOT / "log") == 3
    shown = capsys.readouterr().out
    assert "trial" in shown and "line 98" in shown and "line 5\n" not in shown
    assert "line 5\n" in (do.ROOT / "log").read_text()


# --- Python, browser, commands ---------------------------------------------------------------------


def test_an_old_python_can_read_the_script_and_is_told_what_to_do(do, monkeypatch):
    ast.parse((ROOT / ".ci" / "do.py").read_text(encoding="utf-8"), feature_version=(3, 6))
    monkeypatch.setattr(do, "newer_python", lambda: None)
    with pytest.raises(SystemExit, match=r"Python 3.9 is too old: 3.10 or newer(.|\n)*PYTHON="):
        do.need_python((3, 9, 2))
    do.need_python((3, 10, 0))


def test_a_python_without_venv_is_told_what_to_install(do, monkeypatch):
    monkeypatch.setitem(sys.modules, "ensurepip", None)
    with pytest.raises(SystemExit, match="'ensurepip'(.|\n)*python3-venv"):
        do.need_python()


def test_a_missing_browser_fails_in_ci_and_is_a_notice_elsewhere(do, monkeypatch, capsys):
    monkeypatch.setattr(do, "find_browser", lambda: "")
    monkeypatch.setattr(do, "bring_browser", lambda: "")
    ran = []
    monkeypatch.setattr(do, "python", lambda *a, **k: ran.append(a) or 0)
    monkeypatch.setenv("CI", "true")
    with pytest.raises(SystemExit, match="must run"):
        do.test([])
    monkeypatch.delenv("CI")
    assert do.test([]) == 0 and len(ran) == 1 and "skipped" in capsys.readouterr().out


PLAYWRIGHT, LIBRARIES, APT = "Chromium by Playwright", "libraries for it", "Chromium by apt-get"


@pytest.mark.parametrize(
    "works, download, tries",
    [(PLAYWRIGHT, 0, [PLAYWRIGHT]), (LIBRARIES, 0, [PLAYWRIGHT, LIBRARIES]), (APT, 1, [PLAYWRIGHT, "list of packages", APT])],
)
def test_a_browser_is_brought_by_the_first_way_that_works(do, monkeypatch, works, download, tries):
    tried = []
    monkeypatch.setattr(do, "as_root", lambda: [])
    monkeypatch.setattr(do.shutil, "which", lambda name: "/usr/bin/" + name)
    monkeypatch.setattr(do, "stage", lambda name, command: tried.append(name) or download)
    monkeypatch.setattr(do, "find_browser", lambda: "/a/browser" if tried[-1] == works else "")
    assert do.bring_browser() == "/a/browser" and tried == tries


def test_make_knows_the_same_commands(do):
    targets = re.search(r"(?m)^\.PHONY: (.+)$", (ROOT / "Makefile").read_text())[1].split()
    assert set(targets) == set(do.COMMANDS)


# --- the notebooks' checks -------------------------------------------------------------------------


@pytest.fixture(scope="module")
def books():
    return script("notebooks")


def code(source, *outputs):
    return nbformat.v4.new_code_cell(source, outputs=list(outputs), execution_count=7)


def shows(**data):
    kinds = dict(text="text/plain", html="text/html", view="application/vnd.jupyter.widget-view+json", png="image/png")
    return nbformat.v4.new_output("execute_result", {kinds[k]: v for k, v in data.items()}, execution_count=7)


def test_cleaning_takes_out_what_changes_by_itself_and_nothing_else(books):
    nb = nbformat.v4.new_notebook(cells=[code("x", shows(text="VBox()", view={"model_id": "1"})), code("y", shows(text="<A at 0x7f00aa>")), code("z", shows(html="<b>", view={}))])
    nb.metadata.update(widgets={"state": 1}, language_info={"version": "3.11.7"})
    nb.cells[0].metadata["scrolled"] = True
    once = books.as_text(books.cleaned(nb))
    assert once == books.as_text(books.cleaned(nbformat.reads(once, as_version=4)))
    assert not re.search(r"widget|0x7f|3\.11\.7|scrolled|: 7", once) and "<b>" in once and "VBox" not in once


def test_nbdev_leaves_a_clean_notebook_alone(books, tmp_path):
    from nbdev.clean import process_write, clean_nb

    path = tmp_path / "a.ipynb"
    path.write_text(books.as_text(books.cleaned(nbformat.v4.new_notebook(cells=[code("x = 'é'", shows(text="1"))]))), encoding="utf-8")
    before = path.read_bytes()
    process_write("", clean_nb, path)
    assert path.read_bytes() == before


@pytest.mark.parametrize(
    "cell, word",
    [
        (code("#| export\n" + "x = 1\n" * 31), "exports 31 lines"),
        (code("from math import *"), "imports *"),
        (code("%time x\nfrom math import *"), "imports *"),
        (code("x", shows(text="/" + "home/ada/lab/x.py")), "a path of one machine"),
        (code("x", shows(text="y" * 60_001)), "an output of 60001 bytes"),
        (code("1/0", nbformat.v4.new_output("error", ename="E", evalue="", traceback=[])), "an error is kept"),
    ],
)
def test_a_fault_in_a_cell_is_found(books, cell, word):
    assert [f for f in books.check_cell(cell, "here") if word in f]


def test_a_good_cell_has_no_fault(books):
    assert books.check_cell(code("#| export\n" + "x = 1\n" * 30, shows(text="see https://example.org/home/page and a/home/b")), "here") == []


def test_readme_shows_code_outputs_and_pictures_under_nbs(books, tmp_path):
    cells = [nbformat.v4.new_markdown_cell("![bench](images/a.png) [it](https://a.org) [top](#x) [up](../LICENSE) `[no](b)`"), code("1+1", shows(text="2")), code("#| echo: false\nx", shows(text="3")), code("#| hide\nsecret")]
    nbformat.write(nbformat.v4.new_notebook(cells=cells), tmp_path / "index.ipynb")
    text = books.readme(tmp_path / "index.ipynb")
    assert "![bench](nbs/images/a.png) [it](https://a.org) [top](#x) [up](LICENSE) `[no](b)`" in text
    assert "```python\n1+1\n```\n\n```console\n2\n```\n\n```console\n3\n```" in text and "secret" not in text


# --- JupyterLab, the doctor, an installation -------------------------------------------------------


def answer(url):
    "The status and text behind an address, asked without a proxy."
    try:
        with urllib.request.build_opener(urllib.request.ProxyHandler({})).open(url, timeout=20) as r:
            return r.status, r.read().decode()
    except urllib.error.HTTPError as e:
        return e.code, ""


def test_lab_prints_an_address_that_works_and_needs_its_token(tmp_path):
    notebook = tmp_path / "nbs" / "mine.ipynb"
    notebook.parent.mkdir()
    nbformat.write(nbformat.v4.new_notebook(), notebook)
    env = {k: v for k, v in os.environ.items() if not k.startswith("JUPYTER")}
    env.update(HOME=str(tmp_path), JUPYTER_RUNTIME_DIR=str(tmp_path / "runtime"), JUPYTER_CONFIG_DIR=str(tmp_path / "config"))
    run = [sys.executable, "-c", "from adaptive_lab.lab import main; main()", "--notebook", str(notebook), "--port", "18888", "--no-browser"]
    with subprocess.Popen(run, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True, env=env) as server:
        try:
            url = next(line.strip() for line in server.stdout if line.startswith("http"))
            assert re.fullmatch(r"http://127\.0\.0\.1:\d+/lab/tree/nbs/mine\.ipynb\?token=\w{20,}", url)
            status, page = answer(url)
            assert status == 200 and "@jupyterlab/apputils-extension:announcements" in page
            base, token = url.split("/lab/")[0], url.split("token=")[1]
            assert answer(f"{base}/api/contents")[0] == 403
            assert "mine.ipynb" in answer(f"{base}/api/contents/nbs?token={token}")[1]
        finally:
            server.terminate()
    assert not [p for p in (tmp_path / "config").rglob("*") if "page_config" in p.name]  # the user's settings are untouched


@pytest.mark.parametrize("broken, status, word", [("numpy", 1, "BROKEN"), ("matplotlib", 0, "broken")])
def test_the_doctor_reports_a_broken_package_and_says_by_its_status_if_it_matters(broken, status, word):
    run = f"import sys; sys.modules[{broken!r}] = None\nfrom adaptive_lab.doctor import main\nsys.exit(main())"
    done = subprocess.run([sys.executable, "-c", run], capture_output=True, text=True, cwd=ROOT)
    assert done.returncode == status, done.stderr
    assert re.search(rf"(?m)^{word} +{broken} ", done.stdout) and "pip install --force-reinstall" in done.stdout


@pytest.mark.skipif(not os.environ.get("CI"), reason="takes a minute: set CI=1 to install the package into an empty environment")
def test_the_installed_library_needs_no_development_tools(tmp_path):
    copy, venv = tmp_path / "project", tmp_path / "venv"
    skip = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "nbs", "tests", "runs")
    shutil.copytree(ROOT, copy, ignore=skip)
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / ("Scripts/python.exe" if os.name == "nt" else "bin/python")
    subprocess.run([sys.executable, "-I", "-m", "pip", "--python", str(python), "install", "-q", "--no-compile", "-c", "constraints.txt", "."], cwd=copy, check=True)
    look = "import sys, adaptive_lab.plasticity, adaptive_lab.training, importlib.util as u; print(adaptive_lab.__file__, [n for n in ('nbdev', 'jupyterlab', 'IPython', 'playwright', 'matplotlib') if u.find_spec(n)])"
    done = subprocess.run([str(python), "-I", "-c", look], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert str(venv.name) in done.stdout and done.stdout.strip().endswith("[]")
    assert (venv / ("Scripts/adaptive-lab.exe" if os.name == "nt" else "bin/adaptive-lab")).exists()
