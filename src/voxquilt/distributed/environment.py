"""Reads from the environment which process of a run this is, and which launcher has started it."""

import os
import threading
from time import sleep

# The environment variable with rank 0's process id, for the processes that Lightning starts for it.
_PARENT = "VOXQUILT_PARENT"
# Names of SLURM jobs whose tasks Lightning does not count.
_INTERACTIVE = ("interactive", "bash")


def slurm_tasks() -> int:
    """Number of the run's processes that SLURM started; 1 without SLURM.

    Counted as Lightning does: also 1 in an interactive shell of SLURM, and where SLURM's tasks are torchrun's agents.
    """
    if is_interactive() or "TORCHELASTIC_RUN_ID" in os.environ:
        return 1
    return int(os.environ.get("SLURM_NTASKS", "1"))


def is_interactive() -> bool:
    """Whether the name of the SLURM job says that its tasks are not the processes of a run."""
    return os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE


def leave_slurm() -> None:
    """Make this task of SLURM a run of its own, for Lightning as well."""
    os.environ["SLURM_JOB_NAME"] = _INTERACTIVE[0]


def not_the_tasks(world_size: int) -> str:
    """The error message where SLURM started another number of processes than the trainer has."""
    return (
        f"SLURM started {slurm_tasks()} tasks, but trainer.devices and trainer.num_nodes make {world_size} process"
        f"{'es' * (world_size > 1)}: each task would do all of it. Set trainer.devices to the tasks per node and "
        f"trainer.num_nodes to the nodes, or for predict.py shard.count=$SLURM_NTASKS with shard.index=$SLURM_PROCID."
    )


def is_external() -> bool:
    """Whether torchrun or SLURM has started the processes, so that Lightning starts none."""
    return "TORCHELASTIC_RUN_ID" in os.environ or slurm_tasks() > 1


def is_first() -> bool:
    """Whether this process prints for the run: rank 0, or the only process."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if slurm_tasks() > 1:
        return env.get("SLURM_PROCID", "0") == "0"
    return env.get("LOCAL_RANK", "0") == "0" and env.get("NODE_RANK", "0") == "0"


def end_with_parent() -> None:
    """End this process when the one that started it is gone: otherwise it could run or wait for hours.

    Rank 0 passes its process id to the processes that Lightning starts; torchrun's agent counts as a parent too. A
    process that a user has put into the background is not ended.
    """
    parent = os.getppid()
    if os.environ.get(_PARENT) == str(parent) or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_exit_without_parent, args=(parent,), daemon=True, name="voxquilt-parent").start()
    os.environ[_PARENT] = str(os.getpid())


def disarm_observer() -> None:
    """Keep Lightning's observer from killing rank 0 within 5 seconds of another process's end.

    Rank 0 notices the end itself and shuts down in order. If a later Lightning hides the observer, rank 0 is killed as
    without this function: with a status other than 0, and every finished file complete.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def _exit_without_parent(parent: int) -> None:
    while os.getppid() == parent:
        sleep(1)
    # Immediately: files appear only when they are complete, so that no finished file is lost.
    os._exit(1)
