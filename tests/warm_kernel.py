"""What a notebook's kernel is forked from: a process that has imported the heavy libraries, and nothing of the project.

Nearly every notebook imports torch, and its first optimizer torch's compiler: 4 CPU-seconds, 150 times.
"""
import os

import ipykernel.kernelapp
import matplotlib.figure  # noqa: F401
import torch._dynamo  # noqa: F401


def kernel(arguments, env, cwd):
    "In the forked process: a kernel, until it is told to end."
    os.setsid()  # what it starts is not of the tests' own group
    os.environ.clear()
    os.environ.update(env, JPY_PARENT_PID=str(os.getppid()))  # it ends with the process that it was forked from
    os.chdir(cwd)
    ipykernel.kernelapp.launch_new_instance(arguments)
