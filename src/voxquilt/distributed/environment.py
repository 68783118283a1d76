"""Which process of a run is this, and who started it? Read from what launchers leave in the environment."""

import os
import threading
from time import sleep

# Rank 0's process number, for the processes that Lightning starts for it.
_PARENT = "VOXQUILT_PARENT"
# Names of SLURM jobs whose tasks Lightning does not count.
_INTERACTIVE = ("interactive", "bash")


def slurm_tasks() -> int:
    """Processes of the run that SLURM started; 1 elsewhere.

    As Lightning sees it: 1 in an interactive shell of SLURM too, and where SLURM's tasks are torchrun's agents.
    """
    if is_interactive() or "TORCHELASTIC_RUN_ID" in os.environ:
        return 1
    return int(os.environ.get("SLURM_NTASKS", "1"))


def is_interactive() -> bool:
    """Whether SLURM's tasks have nothing to do with the processes of a run, by the job's name."""
    return os.environ.get("SLURM_JOB_NAME") in _INTERACTIVE


def leave_slurm() -> None:
    """Have this task of SLURM be a run of its own, for Lightning too."""
    os.environ["SLURM_JOB_NAME"] = _INTERACTIVE[0]


def not_the_tasks(world_size: int) -> str:
    """What to say where SLURM started more or fewer processes than the trainer counts."""
    return (
        f"SLURM started {slurm_tasks()} tasks, but trainer.devices and trainer.num_nodes make {world_size} process"
        f"{'es' * (world_size > 1)}: each task would do all of it. Set trainer.devices to the tasks per node and "
        f"trainer.num_nodes to the nodes, or for predict.py shard.count=$SLURM_NTASKS with shard.index=$SLURM_PROCID."
    )


def is_external() -> bool:
    """Whether torchrun or SLURM started the processes, so that Lightning starts none."""
    return "TORCHELASTIC_RUN_ID" in os.environ or slurm_tasks() > 1


def is_first() -> bool:
    """Whether this process speaks for the run: rank 0, or the only one."""
    env = os.environ
    if "RANK" in env:
        return env["RANK"] == "0"
    if slurm_tasks() > 1:
        return env.get("SLURM_PROCID", "0") == "0"
    return env.get("LOCAL_RANK", "0") == "0" and env.get("NODE_RANK", "0") == "0"


def end_with_parent() -> None:
    """End this process when the one that launched it is gone: a rank alone would go on, or wait, for hours.

    Rank 0 leaves its number to the processes that Lightning starts; torchrun's agent is a parent as well. A process
    that a user put into the background by hand is left alone.
    """
    parent = os.getppid()
    if os.environ.get(_PARENT) == str(parent) or "TORCHELASTIC_RUN_ID" in os.environ:
        threading.Thread(target=_watch, args=(parent,), daemon=True, name="voxquilt-parent").start()
    os.environ[_PARENT] = str(os.getpid())


def disarm_observer() -> None:
    """Keep Lightning's observer from killing rank 0 within 5 seconds of another process's end.

    Rank 0 finds out by itself, and ends in order. If a later Lightning hides the observer better, rank 0 dies as it
    would have: with a status that is not 0, and every finished file whole.
    """
    for thread in threading.enumerate():
        if thread.name == "child-process-observer":
            thread._child_processes = []  # type: ignore[attr-defined]


def _watch(parent: int) -> None:
    while os.getppid() == parent:
        sleep(1)
    # At once: files appear whole or not at all, so nothing that is finished is lost.
    os._exit(1)
