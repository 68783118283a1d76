"""Sets up logging in a run's processes, forwards signals to those that Lightning starts, and waits for their end."""

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

# Seconds in which processes have to end after the run has.
_PATIENCE = 30


def quiet() -> None:
    """Silence Lightning's advertisements, its remarks on loops without a DataLoader, and nibabel's log.

    Where nibabel's remarks on a header matter, voxquilt repeats them with the file's name.
    """
    logging.getLogger("nibabel.global").setLevel(logging.CRITICAL + 1)
    for package in (lightning, lightning.fabric, lightning.pytorch):
        logging.getLogger(package.__name__).setLevel(logging.WARNING)
    warnings.filterwarnings("ignore", module="lightning.*")
    warnings.filterwarnings("ignore", category=DeprecationWarning)


class SpawnedLogging(Callback):
    """Sets up logging in processes of ddp_spawn, which start without Hydra's.

    Args:
        to_stderr: Log to stderr, since stdout is for JSON.
    """

    def __init__(self, *, to_stderr: bool = False) -> None:
        self._to_stderr = to_stderr

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """The first method that Lightning calls in such a process."""
        escape_streams()
        if not logging.getLogger().handlers:
            stream = sys.stderr if self._to_stderr else sys.stdout
            logging.basicConfig(stream=stream, level=logging.INFO, format="%(message)s")
            quiet()


@contextlib.contextmanager
def attended(trainer: Trainer) -> Iterator[None]:
    """A context for `Trainer.predict` or `fit`, after which no process that Lightning has started is left.

    Raises:
        VoxquiltError: a process that Lightning spawned raised it.
    """
    launcher = trainer.strategy.launcher
    spawns = hasattr(launcher, "_start_method")  # spawn or fork: this process only waits
    signals = Signals(lambda name, status: launcher.kill(status - 128) if launcher is not None else None)
    if spawns:
        signals.hold()
    try:
        yield
    except ProcessException as error:
        raise _error_of(str(error)) from error
    except SystemExit:  # of a signal, which they may not have got
        for process in getattr(launcher, "procs", ()):
            process.terminate()
        raise
    finally:
        signals.release()
        disarm_observer()
        for process in getattr(launcher, "procs", ()):
            if isinstance(process, subprocess.Popen):
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()


def _error_of(text: str) -> VoxquiltError:
    """The VoxquiltError that the traceback of a spawned process ends with, or a RunError with the traceback."""
    for kind in (ConfigError, InputError, OutputError, RunError):
        _, separator, message = text.rpartition(f"{kind.__module__}.{kind.__name__}: ")
        if separator:
            return kind(message.strip())
    return RunError(f"a process of the run ended: {text}")
