"""What do the processes of a run owe each other? To be quiet, to forward signals, and to outlive those they started."""

import contextlib
import logging
import subprocess
import sys
import warnings
from collections.abc import Iterator

import lightning.fabric
import lightning.pytorch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch.multiprocessing.spawn import ProcessException

from voxquilt.distributed.environment import disarm_observer
from voxquilt.distributed.signals import Signals
from voxquilt.errors import ConfigError, InputError, OutputError, RunError, VoxquiltError
from voxquilt.text import escape_streams

# Seconds that processes are given to end after the run has.
_PATIENCE = 30


def quiet() -> None:
    """Lightning's advertisements and remarks on a loop that is not a DataLoader tell users nothing.

    What nibabel says of a header is said again, with the file's name, where it matters.
    """
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
    for package in (lightning, lightning.fabric, lightning.pytorch):
        logging.getLogger(package.__name__).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class SpawnedLogging(Callback):
    """Has processes of ddp_spawn print what others print: they start without Hydra's logging.

    Args:
        to_stderr: What is logged, since stdout is for JSON.
    """

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._to_stderr = to_stderr

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The first thing that can be done there."""
        escape_streams()
        if not logging.getLogger().handlers:
            stream = sys.stderr if self._to_stderr else sys.stdout
            logging.basicConfig(stream=stream, level=logging.INFO, format="%(message)s")
            quiet()


@contextlib.contextmanager
def attended(trainer: Trainer) -> Iterator[None]:
    """Around `Trainer.predict`: afterwards none of the processes that it started is left.

    Raises:
        VoxquiltError: of a process that Lightning spawned, as if it were raised here.
    """
    launcher = trainer.strategy.launcher
    spawns = hasattr(launcher, "_start_method")  # spawn or fork: this process only waits
    signals = Signals(lambda name, status: launcher.kill(status - 128) if launcher is not None else None)
    if spawns:
        signals.hold()
    try:
        yield
    except ProcessException as error:
        raise _as_ours(str(error)) from error
    finally:
        signals.release()
        disarm_observer()
        for process in getattr(launcher, "procs", ()):
            if isinstance(process, subprocess.Popen):
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()


def _as_ours(text: str) -> VoxquiltError:
    """The error that a spawned process's traceback ends with, if it is one of ours."""
    for kind in (ConfigError, InputError, OutputError, RunError):
        _, found, message = text.rpartition(f"{kind.__module__}.{kind.__name__}: ")
        if found:
            return kind(message.strip())
    return RunError(f"a process of the run ended: {text}")
