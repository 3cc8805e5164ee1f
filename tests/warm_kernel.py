"A notebook's kernel in a forked process."
import gc
import os


def kernel(arguments, env, cwd):
    "A kernel, until it is told to end."
    from ipykernel.kernelapp import launch_new_instance

    gc.freeze()  # what it was born with need not be searched, and its memory not copied
    os.setsid()  # what it starts is not of the tests' own group
    os.environ.clear()
    os.environ.update(env)
    os.chdir(cwd)
    launch_new_instance([*arguments, f"--IPKernelApp.parent_handle={os.getppid()}"])  # it ends with the process that it was forked from
