"Two processes of one training, told of each other as torchrun tells them, without torchrun, which takes as long to begin as one of them."
import os
import socket
import subprocess
import sys


def begin(*arguments, ranks=2, **how) -> list[subprocess.Popen]:
    "Python with these arguments, once for each rank; `how` is for `Popen`."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    command = [sys.executable, *map(str, arguments)]
    return [subprocess.Popen(command, env={**os.environ, **told, "RANK": str(r), "LOCAL_RANK": str(r)}, **how) for r in range(ranks)]
