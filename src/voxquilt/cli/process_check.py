"""Checks that the processes of a trainer belong together, as far as can be seen before torch is imported."""

from collections.abc import Mapping
from typing import Any

from voxquilt.distributed.environment import is_external, is_interactive, leave_slurm, not_the_tasks, slurm_tasks
from voxquilt.errors import ConfigError


def check_trainer(trainer: Mapping[str, Any], shards: int, *, multirun: bool) -> None:
    """Refuse processes that would wait for each other, or do each other's work.

    With several shards, SLURM's tasks may be runs of their own; from here on they are.

    Args:
        trainer: Arguments of lightning.Trainer.
        shards: Number of shards.
        multirun: Whether Hydra runs a sweep.

    Raises:
        ConfigError: a strategy that divides the network, a sweep with ddp, or processes that are not SLURM's tasks.
    """
    devices, strategy = trainer.get("devices", 1), str(trainer.get("strategy", "auto"))
    per_node = _processes_per_node(devices)
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise ConfigError(
            f"trainer.strategy={strategy} divides the network between processes, so that none may predict more patches "
            f"than another; use ddp or ddp_spawn."
        )
    if multirun and per_node != 1 and not is_external() and not strategy.startswith(("ddp_", "single")):
        raise ConfigError(
            f"--multirun with trainer.devices={devices}: each process of ddp would begin the whole sweep again. Use "
            f"trainer.strategy=ddp_spawn, or a launcher that starts the processes (hydra/launcher=submitit_slurm)."
        )
    nodes = str(trainer.get("num_nodes", 1))
    if not nodes.isdecimal():
        raise ConfigError(f"trainer.num_nodes must be an integer; it is {nodes!r}.")
    _check_slurm(trainer, shards, None if per_node is None else per_node * int(nodes))


def _check_slurm(trainer: Mapping[str, Any], shards: int, world_size: int | None) -> None:
    if slurm_tasks() not in (1, world_size):
        if shards > 1:
            leave_slurm()
        elif world_size is not None:
            raise ConfigError(not_the_tasks(world_size))
    if is_interactive() and "SLURMEnvironment" in str(trainer.get("plugins")):
        raise ConfigError(
            "this SLURM job has the name of an interactive shell, where its tasks are not taken for the processes of a "
            "run: give it another, such as salloc --job-name=predict, or use trainer=gpu."
        )


def _processes_per_node(devices: Any) -> int | None:
    """Processes on each node; None where Lightning finds out."""
    # As Lightning reads them: 4, '4', [0, 2], '0,2', '0,'.
    text = str(devices).strip()
    if text.isdecimal():
        return int(text)
    ids = devices if isinstance(devices, list) else [part for part in text.split(",") if part.strip()]
    return len(ids) if all(str(part).strip().isdecimal() for part in ids) else None
