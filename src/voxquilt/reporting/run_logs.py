"""Logs a run's numbers, pictures and settings by any loggers of Lightning's, none of which fails the run."""

import logging
import posixpath
import re
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Protocol, runtime_checkable

import numpy as np
from jaxtyping import UInt8
from lightning.pytorch import Trainer
from lightning.pytorch.loggers import Logger, MLFlowLogger, TensorBoardLogger, WandbLogger
from lightning.pytorch.loggers.logger import DummyLogger

from voxquilt.reporting.database_turns import turn
from voxquilt.reporting.event_threads import leave_errors_to_writers
from voxquilt.text import digest, escaped, first_line
from voxquilt.vocabulary import flattened

log = logging.getLogger("voxquilt")

# MLflow takes 1000 numbers at a time.
_AT_ONCE = 500
_SECTIONS = ("data", "preprocess", "model", "stitch", "trainer", "run", "shard", "task", "ckpt_path", "output_dir")
# The methods of a logger that Lightning, callbacks and voxquilt call during a run.
_METHODS = ("log_metrics", "log_image", "log_graph", "save", "finalize", "after_save_checkpoint")
_GUARD = "_voxquilt_guard"


@runtime_checkable
class RunLog(Protocol):
    """Takes what a run has to show, on rank 0; never raises."""

    @property
    def takes_pictures(self) -> bool:
        """Whether pictures need to be drawn."""
        ...

    @property
    def takes_statistics(self) -> bool:
        """Whether numbers of each label are logged too."""
        ...

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        """Log numbers by their names."""
        ...

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        """Log a picture."""
        ...

    def end(self, files: Iterable[Path]) -> None:
        """Keep the tables of a run that has ended, where the log keeps files."""
        ...


@runtime_checkable
class _TakesImages(Protocol):
    """A logger with the method for pictures (H, W, 3) that Lightning's WandbLogger has."""

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None: ...


class Guard:
    """Lets something write until it fails, for example on a full disk: then there is one warning, and it does nothing.

    Args:
        consequence: What the warning says before the reason.
    """

    def __init__(self, consequence: str) -> None:
        self._consequence = consequence
        self._failed = False

    def __call__(self, write: Callable[[], object]) -> None:
        """Call a function, unless there was an error before."""
        if self._failed:
            return
        leave_errors_to_writers()  # here, since a process of ddp_spawn begins with a guard that was pickled
        try:
            write()
        except Exception as error:
            self._failed = True
            log.warning("%s: %s: %s", self._consequence, type(error).__name__, first_line(error))


class LightningLog:
    """A run's log in a logger of Lightning's.

    Args:
        logger: Of any class; it gets pictures if it has `log_image`, or is TensorBoard's or MLflow's.
    """

    takes_statistics = True

    def __init__(self, logger: Logger) -> None:
        self._logger = logger
        self._guard: Guard = vars(logger).get(_GUARD) or _guard_of(logger)
        self._name = _mlflow_name if isinstance(logger, MLFlowLogger) else escaped
        self._draw = _drawing(logger)

    @property
    def takes_pictures(self) -> bool:
        return self._draw is not None

    def settings(self, settings: Mapping[str, Any]) -> None:
        """Log settings by their full keys."""
        named = {self._name(key): value for key, value in settings.items()}
        _settings_guard(self._logger)(lambda: self._logger.log_hyperparams(named))

    def numbers(self, numbers: Mapping[str, float], step: int) -> None:
        self._guard(lambda: self._log({self._name(name): float(number) for name, number in numbers.items()}, step))

    def picture(self, name: str, picture: UInt8[np.ndarray, "h w 3"], step: int) -> None:
        if (draw := self._draw) is not None:
            self._guard(lambda: draw(self._name(name), picture, step))

    def end(self, files: Iterable[Path]) -> None:
        for path in filter(Path.is_file, files):
            self._guard(lambda path=path: _keep(self._logger, path))

    def _log(self, numbers: Mapping[str, float], step: int) -> None:
        pairs = list(numbers.items())
        size = _AT_ONCE if isinstance(self._logger, MLFlowLogger) else max(1, len(pairs))
        for begin in range(0, len(pairs), size):
            self._logger.log_metrics(dict(pairs[begin : begin + size]), step)
        self._logger.save()  # now, since the run may be killed


def logs_of(loggers: Iterable[Logger]) -> list[LightningLog]:
    """A log for each logger, except those that stand for one that could not be opened."""
    return [LightningLog(logger) for logger in loggers if not isinstance(logger, DummyLogger)]


def loggable(configuration: Mapping[str, Any]) -> dict[str, bool | int | float | str]:
    """The settings of a run by their full keys, as plain values, which is all that loggers take; without nulls.

    >>> loggable({"data": {"patch_size": [8, 8, 8], "skip": None}, "logger": {"api_key": "secret"}})
    {'data.patch_size': '[8, 8, 8]'}
    """
    settings: dict[str, Any] = {}
    for section in _SECTIONS:
        settings |= flattened(configuration.get(section), section)
    return {
        key: value if isinstance(value, bool | int | float | str) else str(value)
        for key, value in settings.items()
        if value is not None
    }


@contextmanager
def open_loggers(trainer: Trainer, *, is_first: bool) -> Iterator[None]:
    """Open the loggers of a run on rank 0, such as a connection to a server, and close them when the block ends.

    None of them fails the run: one that cannot be opened, of which there is a warning, is replaced by one that logs
    nothing, and one that fails later logs nothing more.

    Args:
        trainer: Has the loggers.
        is_first: Whether this process is rank 0; others leave their loggers as they are.
    """
    if is_first:
        leave_errors_to_writers()
        trainer.loggers = [_opened(logger) for logger in trainer.loggers]
    status = 1
    try:
        yield
        status = 0
    finally:
        for logger in trainer.loggers if is_first else ():
            if isinstance(logger, WandbLogger):  # the next job of a sweep would go on with its run
                _guard_of(logger)(lambda logger=logger: logger.experiment.finish(exit_code=status))


def _opened(logger: Logger) -> Logger:
    try:
        if isinstance(logger, WandbLogger) and logger.save_dir:  # without the folder it would write elsewhere
            Path(logger.save_dir).mkdir(parents=True, exist_ok=True)
        with turn(getattr(logger, "_tracking_uri", None)):  # MLflow's, which makes the experiment
            _ = getattr(logger, "experiment", None)
    except Exception as error:
        name, kind = type(logger).__name__, type(error).__name__
        log.warning("nothing is logged by %s: %s: %s", name, kind, first_line(error))
        return DummyLogger()
    guard = vars(logger)[_GUARD] = _guard_of(logger)
    for name in _METHODS:
        if hasattr(type(logger), name):
            vars(logger)[name] = _Guarded(logger, name, guard)
    vars(logger)["log_hyperparams"] = _Guarded(logger, "log_hyperparams", _settings_guard(logger))
    return logger


class _Guarded:
    """A logger's method that does not raise. A class, since loggers are pickled for processes of ddp_spawn."""

    def __init__(self, logger: Logger, name: str, guard: Guard) -> None:
        self._logger, self._name, self._guard = logger, name, guard

    def __call__(self, *args: Any, **kwargs: Any) -> None:
        method = getattr(type(self._logger), self._name)
        self._guard(lambda: method(self._logger, *args, **kwargs))


def _guard_of(logger: Logger) -> Guard:
    return Guard(f"nothing more is logged by {type(logger).__name__}")


def _settings_guard(logger: Logger) -> Guard:
    """Apart from the rest: MLflow refuses other values for a run that goes on, but takes its numbers."""
    return Guard(f"{type(logger).__name__} has not all settings")


def _drawing(logger: Logger) -> Callable[[str, np.ndarray, int], object] | None:
    """How a logger takes pictures, if it does."""
    if isinstance(logger, TensorBoardLogger):
        return lambda name, picture, step: logger.experiment.add_image(name, picture, step, dataformats="HWC")
    if isinstance(logger, MLFlowLogger):
        return lambda name, picture, step: logger.experiment.log_image(
            str(logger.run_id), picture, key=name, step=step, synchronous=True
        )
    if isinstance(logger, _TakesImages):
        return lambda name, picture, step: logger.log_image(key=name, images=[picture], step=step)
    return None


def _keep(logger: Logger, path: Path) -> None:
    if isinstance(logger, MLFlowLogger):
        logger.experiment.log_artifact(str(logger.run_id), str(path))
    if isinstance(logger, WandbLogger):
        logger.experiment.save(str(path), base_path=str(path.parent), policy="now")


def _mlflow_name(name: str) -> str:
    """A name that MLflow takes, and that differs where names differ.

    >>> _mlflow_name("volume_ml/left lung"), _mlflow_name("volume_ml/<5 mm")
    ('volume_ml/left lung', 'volume_ml/_5 mm-7239e1ce')
    """
    shown = re.sub(r"[^A-Za-z0-9_/. -]", "_", name)
    if posixpath.normpath(shown) != shown or shown.startswith(("/", "..")):
        shown = re.sub(r"[/.]", "_", shown)
    return shown if shown == name else f"{shown}-{digest(escaped(name), 8)}"
