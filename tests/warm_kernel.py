"A notebook's kernel in a forked process."
import contextlib
import gc
import os


def _wait_for_others():
    "Run where a core is idle: the other tests come one after the other, so that what they lose to notebooks is lost at the end."
    os.nice(10)
    with contextlib.suppress(OSError), open("/proc/self/autogroup", "w") as f:  # where a session as a whole has its rank among others
        f.write("10")


def kernel(arguments, env, cwd):
    "A kernel, until it is told to end."
    from ipykernel.kernelapp import launch_new_instance

    gc.freeze()  # what it was born with need not be searched, and its memory not copied
    os.setsid()  # what it starts is not of the tests' own group
    _wait_for_others()
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    launch_new_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends with the process that it was forked from
