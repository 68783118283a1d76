"""Tests messages between processes: those to a process that has died hold up no others."""

import os
import subprocess
import sys
from pathlib import Path

THREE = """
import os, sys, time
from datetime import timedelta
from types import SimpleNamespace
import torch.distributed as dist
from voxquilt.distributed.process_group import _PENDING, Group
from voxquilt.errors import RunError

rank, store = int(sys.argv[1]), sys.argv[2]
dist.init_process_group("gloo", store=dist.FileStore(store, 3), rank=rank, world_size=3, timeout=timedelta(seconds=40))
group = Group(SimpleNamespace(global_rank=rank, world_size=3))
group.gather(None)
if rank == 2:
    sys.stdin.readline()
    os._exit(9)
if rank == 1:
    for n in range(_PENDING):
        group.send(2, n, {"n": n})  # nobody receives them
    print("sent", flush=True)
    sys.stdin.readline()
    try:
        group.receive(2, 99)
    except RunError as error:
        print("died" if "another process of the run died" in str(error) else error, flush=True)
    group.send(0, 5, {"n": 5})
    sys.stdin.readline()
else:
    print(group.receive(1, 5)[0], flush=True)
os._exit(0)
"""


def test_a_message_reaches_its_receiver_though_earlier_ones_went_to_a_process_that_died(tmp_path: Path) -> None:
    """Else the receiver would wait forever; the death itself is an error where something is received."""
    command = [sys.executable, "-c", THREE]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    processes = [
        subprocess.Popen(
            [*command, str(rank), str(tmp_path / "store")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=environment,
        )
        for rank in range(3)
    ]
    receiver, sender, victim = processes
    try:
        assert sender.stdout is not None
        assert sender.stdin is not None
        assert receiver.stdout is not None
        assert sender.stdout.readline() == "sent\n"
        victim.communicate("\n")
        assert victim.returncode == 9
        sender.stdin.write("\n")
        sender.stdin.flush()
        assert sender.stdout.readline() == "died\n"
        assert receiver.stdout.readline() == "{'n': 5}\n"
    finally:
        for process in processes:
            process.kill()
            process.communicate()
