"Two processes of one training, told of each other as torchrun tells them, without torchrun, which takes as long to begin as one of them."
import os
import socket

import warm_python


def begin(*arguments, ranks=2) -> list[warm_python.Started]:
    "Python with these arguments, once for each rank."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    told = dict(MASTER_ADDR="127.0.0.1", MASTER_PORT=str(port), WORLD_SIZE=str(ranks), LOCAL_WORLD_SIZE=str(ranks), OMP_NUM_THREADS="1")
    return [warm_python.Started(arguments, env={**os.environ, **told, "RANK": str(r), "LOCAL_RANK": str(r)}) for r in range(ranks)]
