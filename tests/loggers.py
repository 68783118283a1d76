"""Loggers of a user's own, as runs that the tests start name them by their _target_."""

import json
from pathlib import Path
from typing import Any

import numpy as np
from lightning.pytorch.loggers import Logger
from lightning.pytorch.utilities.rank_zero import rank_zero_only


class Recording(Logger):
    """Writes a line of JSON for each call, and pictures as PNG files' arrays."""

    def __init__(self, path: str) -> None:
        super().__init__()
        self._path = Path(path)

    name = version = "recording"

    @rank_zero_only
    def _write(self, *entry: Any) -> None:
        self._path.parent.mkdir(parents=True, exist_ok=True)
        with open(self._path, "a", encoding="utf-8") as file:
            file.write(json.dumps(entry) + "\n")

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self._write("numbers", step, {name: float(value) for name, value in metrics.items()})

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        self._write("settings", None, dict(params))

    @rank_zero_only
    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        (picture,) = images
        self._write("picture", step, {key: int(picture.astype(np.int64).sum()), "shape": list(picture.shape)})

    def save(self) -> None:
        self._write("saved", None, None)

    def finalize(self, status: str) -> None:
        self._write("end", None, status)


class Broken(Recording):
    """Fails with the second numbers, and whatever comes then."""

    calls = 0

    def log_metrics(self, metrics: Any, step: int | None = None) -> None:
        self.calls += 1
        if self.calls > 1:
            raise OSError("the server is gone")
        super().log_metrics(metrics, step)

    def log_image(self, key: str, images: list[Any], step: int | None = None) -> None:
        if self.calls > 1:
            raise OSError("the server is gone")

    def finalize(self, status: str) -> None:
        raise OSError("the server is gone")


class Unreachable(Recording):
    """Cannot even be opened."""

    @property
    def experiment(self) -> None:
        raise ConnectionError("no server answers")


class Stubborn(Recording):
    """Takes no settings, as MLflow does of a run that goes on with others."""

    def log_hyperparams(self, params: Any, *args: Any, **kwargs: Any) -> None:
        raise ValueError("changing settings is not allowed")
