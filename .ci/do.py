"""The commands behind `make`. They need nothing but Python 3.10 or newer, and bring the rest.

python3 .ci/do.py lab     open the workbench in JupyterLab
python3 .ci/do.py test    run the tests, the notebooks and the browser tests
python3 .ci/do.py check   are the modules, README and notebooks in step?
python3 .ci/do.py bench   measure (default: core)
python3 .ci/do.py setup   only make .venv
python3 .ci/do.py export  clean the notebooks, write the modules and README
python3 .ci/do.py readme  write README.md from nbs/index.ipynb

What follows the command is passed on: to JupyterLab, to pytest, to `adaptive-lab bench`.
"""
# This file must parse on an old Python 3, or the message that says what to install is never seen.
import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
STAMP = VENV / "stamp.json"  # written last: an environment without it is half-finished
OURS = "made-by-do.py"  # written first: an environment without it is somebody else's, and never removed
OLDEST = (3, 10)


# --- a Python that is new enough -------------------------------------------------------------------


def newer_python():
    "A Python on the path that is new enough and runs, or None."
    for minor in (13, 12, 11, 10):
        found = shutil.which("python3.%d" % minor)
        if found and subprocess.call([found, "-c", "import ensurepip, venv"], stderr=subprocess.DEVNULL) == 0:
            return found
    return None


def need_python(version=sys.version_info):
    "Continue under a newer Python when this one is too old; stop with what to install when there is none."
    if version[:2] < OLDEST:
        found, have = newer_python(), "%d.%d" % version[:2]
        if not found:
            sys.exit("Python %s is too old: 3.10 or newer is needed.\nInstall one, then name it:  make lab PYTHON=/path/to/python3.12" % have)
        print("Python %s is too old; going on with %s" % (have, found), flush=True)
        sys.exit(subprocess.call([found] + sys.argv))
    try:
        import ensurepip  # noqa: F401
        import venv  # noqa: F401
    except ImportError as e:
        sys.exit(
            "This Python has no module %r, which makes virtual environments.\n"
            "Debian and Ubuntu keep it apart:  apt install python3-venv\n"
            "Or name another Python:  make lab PYTHON=/path/to/python3.12" % e.name
        )


# --- .venv -----------------------------------------------------------------------------------------


def wanted():
    "What an up-to-date environment was made from: its place, its Python, and the files that name its packages."
    digest = hashlib.sha256()
    for name in ("constraints.txt", "settings.ini", "setup.py"):
        digest.update((ROOT / name).read_bytes())
    return {"place": str(VENV), "python": sys.version.split()[0], "packages": digest.hexdigest()}


def stamped():
    "What the present environment was made from; {} when there is none, or it was never finished, or does not run."
    try:
        runs = subprocess.call([str(PYTHON), "-I", "-c", ""], stderr=subprocess.DEVNULL) == 0
        return json.loads(STAMP.read_text(encoding="utf-8")) if runs else {}
    except (OSError, ValueError):
        return {}


@contextlib.contextmanager
def alone():
    "One set-up at a time in this folder. The system frees the lock when its holder dies."
    with open(str(ROOT / ".venv.lock"), "a") as f:
        if not _lock(f, wait=False):
            print("set-up: another one is running in this folder; waiting for it", flush=True)
            while not _lock(f, wait=True):
                time.sleep(1)
        yield


def _lock(f, wait):
    "Take the lock on the open file: True when it is ours. It goes when the file is closed."
    try:
        if os.name == "nt":
            import msvcrt

            msvcrt.locking(f.fileno(), msvcrt.LK_LOCK if wait else msvcrt.LK_NBLCK, 1)
        else:
            import fcntl

            fcntl.flock(f, fcntl.LOCK_EX | (0 if wait else fcntl.LOCK_NB))
        return True
    except OSError:
        return False


def setup():
    "Make .venv, or bring it up to date. Takes a moment when there is nothing to do."
    if stamped() == wanted():
        return
    with alone():
        have, want = stamped(), wanted()
        if have == want:
            return
        if {**have, "packages": ""} != {**want, "packages": ""}:
            make_venv()
        install(want)


def make_venv():
    "An empty .venv, in place of one that this script began."
    if VENV.is_symlink() or (VENV.exists() and not (VENV / OURS).exists() and any(VENV.iterdir())):
        sys.exit("%s was not made by this script, so it is left alone. Move it away or delete it, then try again." % VENV)
    if VENV.exists():
        print("set-up: .venv is unfinished, moved, or of another Python: making it anew", flush=True)
        shutil.rmtree(str(VENV))
    VENV.mkdir()
    (VENV / OURS).touch()
    base = getattr(sys, "_base_executable", None) or sys.executable  # not a Python inside the folder just removed
    if stage("virtual environment (Python %s)" % sys.version.split()[0], [base, "-I", "-m", "venv", str(VENV)]):
        sys.exit("The virtual environment could not be made; the reason is above.")


def install(want):
    "The packages of constraints.txt into .venv, the project itself in editable form."
    before = STAMP.with_suffix(".before")
    if STAMP.exists():
        os.replace(str(STAMP), str(before))  # killed from here on: no stamp, so the next call starts anew
    pip = [str(PYTHON), "-I", "-m", "pip", "install", "--no-input", "-c", "constraints.txt", "-e", ".[dev]"]
    if stage("packages", pip, log=VENV / "setup.log"):
        if before.exists():
            os.replace(str(before), str(STAMP))  # pip refused: what worked before still does
        sys.exit("The packages could not be installed; the reason is above, all of it in .venv/setup.log. Without a network, give pip a folder of wheels: PIP_FIND_LINKS.")
    fresh = STAMP.with_suffix(".new")
    fresh.write_text(json.dumps(want), encoding="utf-8")
    os.replace(str(fresh), str(STAMP))


# --- running things --------------------------------------------------------------------------------


def stage(name, command, log=None, env=None):
    "Run a command with one line of progress: its name, in a terminal its latest output, its time. Returns its exit status."
    start, tty, lines = time.time(), sys.stdout.isatty(), []
    print("set-up: %s ..." % name, end="" if tty else "\n", flush=True)
    env = dict(os.environ, PIP_USE_PEP517="1", PIP_USER="0", PIP_DISABLE_PIP_VERSION_CHECK="1", **(env or {}))
    streams = dict(stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    with subprocess.Popen(command, cwd=str(ROOT), env=env, encoding="utf-8", errors="replace", **streams) as p:
        for line in p.stdout:
            lines.append(line)
            if tty:
                print("\r\033[Kset-up: %s ... %3.0f s  %s" % (name, time.time() - start, line.strip()[:60]), end="", flush=True)
    if log:
        log.write_text("".join(lines), encoding="utf-8")
    if p.returncode:
        print("\n" + "".join(lines[-15:]), flush=True)
    print("%sset-up: %s: %s, %.0f s" % ("\r\033[K" if tty else "", name, "failed" if p.returncode else "done", time.time() - start), flush=True)
    return p.returncode


def activated():
    "The environment variables under which .venv is in use, also in JupyterLab's terminals and kernels."
    env = dict(os.environ, VIRTUAL_ENV=str(VENV), JUPYTER_PREFER_ENV_PATH="1")
    env["PATH"] = str(BIN) + os.pathsep + env.get("PATH", os.defpath)
    env.pop("PYTHONHOME", None)
    return env


def python(*args, **more):
    "Run .venv's Python in the project's folder; its exit status."
    return subprocess.call([str(PYTHON), *map(str, args)], cwd=str(ROOT), env=dict(activated(), **more))


def entry(module, *args):
    "The arguments that run `main` of a module of the package."
    return ["-c", "import sys; from adaptive_lab.%s import main; sys.exit(main(sys.argv[1:]))" % module, *args]


def become(*args):
    "As `python`, but in place of this process, so that signals reach it."
    if os.name == "nt":
        return python(*args)
    os.chdir(str(ROOT))
    os.execve(str(PYTHON), [str(PYTHON), *map(str, args)], activated())


# --- a browser -------------------------------------------------------------------------------------


def find_browser():
    "The path of a Chromium or Chrome that starts, or an empty string."
    found = subprocess.run([str(PYTHON), *entry("doctor", "--browser")], cwd=str(ROOT), env=activated(), stdout=subprocess.PIPE)
    return found.stdout.decode().strip()


def as_root():
    "The words before a command that needs root: none for root, sudo where it asks no password, None where it cannot be had."
    if os.name == "nt":
        return None
    if os.geteuid() == 0:
        return []
    sudo = ["sudo", "-n"]
    return sudo if shutil.which("sudo") and subprocess.call(sudo + ["true"], stderr=subprocess.DEVNULL) == 0 else None


def bring_browser():
    "Playwright's own Chromium, or the system's by apt-get; the path, or an empty string when neither works."
    playwright, root = [str(PYTHON), "-m", "playwright"], as_root()
    apt = root + ["env", "DEBIAN_FRONTEND=noninteractive"] if root is not None and shutil.which("apt-get") else None
    brought = stage("Chromium by Playwright", playwright + ["install", "chromium"]) == 0
    if brought and apt and not find_browser():  # it is there, and does not start
        stage("libraries for it", apt + playwright + ["install-deps", "chromium"])
    if apt and not find_browser():
        stage("list of packages", apt + ["apt-get", "update"])
        stage("Chromium by apt-get", apt + ["apt-get", "install", "-y", "chromium"])
    return find_browser()


# --- the commands ----------------------------------------------------------------------------------


def lab(args):
    return become(*entry("lab", *args))


def test(args):
    browser = find_browser() or bring_browser()
    if not browser and os.environ.get("CI"):
        sys.exit("No browser: with CI set the browser tests must run. Install Chromium or Chrome, or name one in ADAPTIVE_LAB_BROWSER.")
    if not browser:
        print("No browser was found or could be brought: the browser tests are skipped. Install Chromium or Chrome, or name one in ADAPTIVE_LAB_BROWSER.")
    where = [] if any((ROOT / a.split("::")[0]).exists() for a in args) else ["tests"]
    return python("-m", "pytest", "-ra", *where, *args, **({"ADAPTIVE_LAB_BROWSER": browser} if browser else {}))


def check(args):
    notebooks = python(".ci/notebooks.py", "check")
    floors = python("-m", "pytest", "-q", "tests/test_floors.py")
    return notebooks or floors


def bench(args):
    return become(*entry("cli", "bench", *(args or ["core"])))


def readme(args):
    return python(".ci/notebooks.py", "readme")


def export(args):
    return python(".ci/notebooks.py", "export")


COMMANDS = {"lab": lab, "test": test, "check": check, "bench": bench, "readme": readme, "export": export, "setup": lambda args: 0}


def main(argv):
    if not argv or argv[0] not in COMMANDS:
        print(__doc__, end="")
        return 0 if argv[:1] in (["help"], ["-h"], ["--help"]) else 2
    need_python()
    setup()
    return COMMANDS[argv[0]](argv[1:])


if __name__ == "__main__":
    try:
        sys.exit(main(sys.argv[1:]))
    except KeyboardInterrupt:
        sys.exit("\nInterrupted. The same command goes on from here.")
