"""Provides tiny volumes and networks with known results; subprocesses import it too, as `synthetic.Over50`."""

import gzip
import os
import signal
import subprocess
import sys
import time
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.subject_size import SubjectCost
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.output_files import OutputFiles

ROOT = Path(__file__).parents[1]


def save(path: Path, array: np.ndarray, affine: np.ndarray | None = None) -> np.ndarray:
    """Write a NIfTI file and its folders; returns the array."""
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(array, np.eye(4) if affine is None else affine), path)
    return array


def read(path: Path) -> np.ndarray:
    """Voxels of a NIfTI file in the stored type."""
    return np.asarray(nib.load(path).dataobj)


def noise(shape: tuple[int, ...], seed: int = 0) -> np.ndarray:
    """Integers 0 to 99 as int16."""
    return np.random.default_rng(seed).integers(0, 100, shape).astype(np.int16)


class Over50(nn.Conv3d):
    """A 1x1x1 convolution whose scores are 50 - x and x - 50, so that labels are exactly x > 50."""

    def __init__(self, channels: int = 1) -> None:
        super().__init__(channels, 2, 1)
        with torch.no_grad():
            self.weight.zero_()
            self.weight[:, 0, 0, 0, 0] = torch.tensor([-1.0, 1.0])
            self.bias.copy_(torch.tensor([50.0, -50.0]))


class Plus(nn.Module):
    """One channel: the first image plus a number."""

    def __init__(self, number: float = 1.0) -> None:
        super().__init__()
        self.number = number

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] + self.number


class FirstMinusSecond(nn.Module):
    """One channel: the first image minus the second, which shows their order."""

    def forward(self, x: Tensor) -> Tensor:
        return x[:, :1] - x[:, 1:2]


class Touchy(Over50):
    """Over50, except for patches with a voxel of 77 (raises), 88 (gives NaN) or 66 (gives another shape)."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        if (x == 77).any():
            raise ValueError("there is a 77")
        if (x == 66).any():
            return scores[..., :-1]
        return torch.where((x == 88).flatten(1).any(1).reshape(-1, 1, 1, 1, 1), torch.nan, scores)


def run(
    script: str, *arguments: str, cwd: Path, env: Mapping[str, str] | None = None
) -> "subprocess.CompletedProcess[str]":
    """Run predict.py or train.py of the checkout in a folder, with this module importable."""
    given = (env or os.environ).get("PYTHONPATH") or os.environ.get("PYTHONPATH")
    path = os.pathsep.join(filter(None, [given, str(ROOT / "tests")]))
    return subprocess.run(
        [sys.executable, str(ROOT / script), *arguments],
        cwd=cwd, env=os.environ | {"COLUMNS": "200"} | dict(env or {}) | {"PYTHONPATH": path},
        capture_output=True, text=True, timeout=120, check=False,
    )  # fmt: skip


def is_planned(x: Tensor) -> bool:
    """Whether a plan asks for shapes: patches have no values."""
    return x.is_meta or isinstance(x, FakeTensor)


class Slow(Over50):
    """Over50 that takes SLOW seconds per batch, read from the environment so that it is not a setting of the run."""

    def forward(self, x: Tensor) -> Tensor:
        if not is_planned(x):
            time.sleep(float(os.environ.get("SLOW", "0")))
        return super().forward(x)


class Cramped(Over50):
    """Runs out of device memory with more than `most` patches at once, and in the first `times` passes."""

    def __init__(self, most: int = 1, times: int = 0) -> None:
        super().__init__()
        self.most, self.times = most, times

    def forward(self, x: Tensor) -> Tensor:
        if is_planned(x):  # which takes no memory
            return super().forward(x)
        self.times -= 1
        if len(x) > self.most or self.times >= 0:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return super().forward(x)


class Fault(Callback):
    """Causes a fault in one process after a number of batches."""

    def __init__(self, action: str, rank: int = 0, batch: int = 1) -> None:
        self.action, self.rank, self.batch = action, rank, batch

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        if trainer.global_rank == self.rank and self.action == "loader":
            GridDataModule.load = _dies  # type: ignore[method-assign]
        if trainer.global_rank == self.rank and self.action == "writer":
            OutputFiles.write = _dies  # type: ignore[method-assign]

    def on_predict_batch_start(
        self, trainer: Trainer, pl_module: LightningModule, batch: object, batch_idx: int, dataloader_idx: int = 0
    ) -> None:
        if trainer.global_rank != self.rank or batch_idx != self.batch:
            return
        if self.action == "raise":
            raise ValueError("a fault of the test")
        if self.action == "stop":
            raise StopIteration
        if self.action == "exit":
            os._exit(7)
        if self.action == "kill":
            os.kill(os.getpid(), signal.SIGKILL)
        if self.action == "term":
            os.kill(os.getpid(), signal.SIGTERM)


def _dies(*_: object) -> None:
    raise SystemExit("a thread's end")


class StopAfter(Callback):
    """Ends a training: after some epochs in order, like a time limit, or after some steps as by Ctrl-C."""

    def __init__(self, epochs: int = 1000, steps: int = 0) -> None:
        self.epochs, self.steps = epochs, steps

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, batch_idx: int
    ) -> None:
        """Raise what Ctrl-C raises."""
        if trainer.global_step == self.steps:
            raise KeyboardInterrupt

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Ask the trainer to stop."""
        trainer.should_stop = trainer.current_epoch + 1 >= self.epochs


def has_tmpfs(folder: Path, size: str) -> bool:
    """Mount a small file system; False if this may not be done here."""
    folder.mkdir()
    done = subprocess.run(["mount", "-t", "tmpfs", "-o", f"size={size}", "tmpfs", str(folder)], capture_output=True)
    return done.returncode == 0


class FillDisk(Callback):
    """Fills the file system of a folder as the second epoch of a training begins."""

    def __init__(self, folder: str) -> None:
        self.folder = folder

    def on_train_epoch_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Write until there is no room."""
        if trainer.current_epoch == 1:
            with suppress(OSError), open(f"{self.folder}/fill", "wb", buffering=0) as file:
                while True:
                    file.write(bytes(2**12))


def unpacked(path: Path) -> bytes:
    """Header and voxels of a .nii or .nii.gz file; equal volumes may be packed differently."""
    content = path.read_bytes()
    return gzip.decompress(content) if path.name.endswith(".gz") else content


def count_headers(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """A list to which the id of each subject is appended when a data module reads its headers."""
    read: list[str] = []
    cost = GridLoader.cost

    def counted(grids: GridLoader, case: SubjectFiles, ranks: int = 1) -> SubjectCost:
        read.append(case.subject)
        return cost(grids, case, ranks)

    monkeypatch.setattr(GridLoader, "cost", counted)
    return read
