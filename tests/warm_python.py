"""Python in a process of its own, forked from one that has torch imported: 2 to 4 CPU-seconds less than a start, for what is no matter of starts.

On other systems than Linux it is started. What it prints goes through files, so that it never waits for a reader.
"""
import multiprocessing
import os
import runpy
import subprocess
import sys
import tempfile

HEAVY = "torch torch._dynamo torch.distributed torch.nn.parallel torch.utils.data pydantic safetensors.torch blake3 numpy".split()  # nothing of the project


def _python(arguments, env, cwd, out, err):
    "What the interpreter does with such arguments."
    for number, path in ((1, out), (2, err)):
        os.dup2(os.open(path, os.O_WRONLY | os.O_APPEND), number)
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    what, *rest = arguments
    if what == "-m":
        sys.argv, sys.path[0:0] = rest, [cwd]
        runpy.run_module(rest[0], run_name="__main__", alter_sys=True)
    else:
        sys.argv, sys.path[0:0] = arguments, [os.path.dirname(os.path.abspath(what))]
        runpy.run_path(what, run_name="__main__")


class Started:
    "A process like a `Popen` with text in its pipes."

    def __init__(self, arguments, env=None, cwd=None):
        self._files = [tempfile.NamedTemporaryFile("r", encoding="utf-8") for _ in range(2)]
        arguments, env, cwd = [str(a) for a in arguments], dict(env or os.environ), str(cwd or os.getcwd())
        self._forked = sys.platform == "linux"
        if self._forked:
            context = multiprocessing.get_context("forkserver")
            context.set_forkserver_preload(HEAVY)
            self._process = context.Process(target=_python, args=(arguments, env, cwd, *(f.name for f in self._files)), daemon=True)
            self._process.start()
        else:
            out, err = (open(f.name, "ab") for f in self._files)
            self._process = subprocess.Popen([sys.executable, *arguments], env=env, cwd=cwd, stdout=out, stderr=err)
        self.pid = self._process.pid

    def poll(self):
        return self._process.exitcode if self._forked else self._process.poll()

    returncode = property(poll)

    def wait(self, timeout=None):
        "Its exit status; `subprocess.TimeoutExpired` when it has not ended by then."
        if not self._forked:
            return self._process.wait(timeout)
        self._process.join(timeout)
        if (status := self.poll()) is None:
            raise subprocess.TimeoutExpired(str(self.pid), timeout)
        return status

    def kill(self):
        self._process.kill()

    def communicate(self, timeout=None):
        "What it has printed, and its errors, when it has ended."
        self.wait(timeout)
        out, err = (f.read() for f in self._files)
        return out, err


def run(arguments, timeout, **how) -> subprocess.CompletedProcess:
    "As `subprocess.run` of Python with these arguments; ended after `timeout` seconds."
    p = Started(arguments, **how)
    try:
        out, err = p.communicate(timeout)
    except subprocess.TimeoutExpired:
        p.kill()
        raise
    return subprocess.CompletedProcess(arguments, p.returncode, out, err)
