"""Says whether processes on this machine can meet by gloo, over the network as those of a run do."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

from voxquilt.distributed.environment import is_external, is_interactive, slurm_tasks
from voxquilt.doctor.line import Line
from voxquilt.text import first_line

_PATIENCE = timedelta(seconds=3)
# torch's stubs lack what its documentation has.
_C10D: Any = dist


def check_processes() -> Iterator[Line]:
    """A line each for gloo, for GPUs that talk to each other, and for a launcher."""
    yield _check_gloo()
    gpus = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if gpus > 1:
        apart = [f"0 and {n}" for n in range(1, gpus) if not torch.cuda.can_device_access_peer(0, n)]
        note = f"gpus {', '.join(apart)} reach each other through the host only." if apart else ""
        yield Line.of("between gpus", "NCCL, which is not tried here", note=note)
    if is_external() or is_interactive():
        yield Line.of(
            "launcher", f"{'SLURM' if slurm_tasks() > 1 or is_interactive() else 'torchrun'} started this process",
            note="in an interactive job of SLURM a run starts its processes itself." if is_interactive() else "",
        )  # fmt: skip


def _check_gloo() -> Line:
    """Have two threads, each with a gloo group of its own, add two numbers over the network.

    That takes a tenth of a second, where two processes would each import torch.
    """
    if not dist.is_available() or not dist.is_gloo_available():
        return Line.of("processes", "torch has no gloo", problem="several processes cannot run: install another torch.")
    pool = ThreadPoolExecutor(2)
    try:
        store = _C10D.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False, timeout=_PATIENCE)
        sums = [pool.submit(_sum, store.port, rank) for rank in range(2)]
        if [future.result(2 * _PATIENCE.total_seconds()) for future in sums] != [3.0, 3.0]:
            raise RuntimeError("they added two numbers wrongly")
    except Exception as error:  # whatever gloo and sockets raise
        return Line.of(
            "processes", "they cannot meet by gloo",
            problem=f"{first_line(error)}. Does the machine's own name resolve (getent hosts $(hostname))? Or set "
            f"GLOO_SOCKET_IFNAME=lo.",
        )  # fmt: skip
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
    return Line.of("processes", "they meet by gloo")


def _sum(port: int, rank: int) -> float:
    store = _C10D.TCPStore("127.0.0.1", port, is_master=False, timeout=_PATIENCE)
    group = _C10D.ProcessGroupGloo(store, rank, 2, _PATIENCE)
    value = torch.tensor([rank + 1.0])
    group.allreduce([value]).wait()
    return float(value)
