"""How much does the predict loop add to the bare forward passes of the same batches?

    python benchmarks/loop.py [--repeats 5] [--job brain cohort]

    brain   the brain-extraction network on Colin27 at 1 mm, patches of 160 that share 80: from the first batch to the
            last product on disk, with and without the experiment's post-processing (largest component, holes)
    cohort  eight volumes of 181 x 217 x 181 with a network whose bare forwards take five times as long as nibabel takes
            to read a volume and to write its labels: the whole predict loop, the first reading and the last writing
            included

The bare forwards and the loop take turns in one process; the loop is that of predict.py: Trainer.predict with a
GridDataModule and a VolumeWriter.
"""

import argparse
import statistics
import tempfile
import time
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import nibabel as nib
import numpy as np
import torch
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf
from torch import Tensor, nn

from voxquilt import GridDataModule, PatchPredictor, Stitch, VolumeWriter
from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.example_files import fetch

PATCH, OVERLAP = 96, 48


class Clock(pl.Callback):
    """When the first batch came and when everything was written."""

    def on_predict_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.first = 0.0

    def on_predict_batch_start(self, *arguments: Any) -> None:
        self.first = self.first or time.perf_counter()

    def on_predict_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.end = time.perf_counter()


def loop(network: nn.Module, stitch: Stitch, folder: Path, *, whole: bool, **data: Any) -> float:
    """Seconds from the first batch, or with `whole` from the start of the loop, to the last file."""
    clock, writer = Clock(), VolumeWriter(folder, stitch, on_error="raise")
    trainer = pl.Trainer(
        logger=False,
        enable_progress_bar=False,
        enable_checkpointing=False,
        enable_model_summary=False,
        accelerator="cpu",
        callbacks=[writer, clock],  # the writer ends before the clock is stopped
    )
    start = time.perf_counter()
    trainer.predict(PatchPredictor(network), datamodule=GridDataModule(**data), return_predictions=False)
    return clock.end - (start if whole else clock.first)


@torch.inference_mode()
def bare(network: nn.Module, batches: list[Tensor]) -> float:
    """Seconds for the forward passes alone."""
    start = time.perf_counter()
    for batch in batches:
        network(batch)
    return time.perf_counter() - start


def batches_of(**data: Any) -> list[Tensor]:
    """Copies of the batches that the loop sees."""
    return [batch.data.clone() for batch in GridDataModule(**data).predict_dataloader()]


def brain(repeats: int) -> list[tuple[str, list[float], list[float]]]:
    """Bare and looped seconds, with post-processing and without."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = OmegaConf.to_container(compose("predict", ["experiment=brain_extraction"]), resolve=True)
    assert isinstance(plain, dict)
    network = build(plain["model"], "model").network.networks[0].eval()
    stitches = {"labels": Stitch(activation="none"), "labels, post-processed": build(plain["stitch"], "stitch")}
    data = {"inputs": str(fetch("colin27_t1")), "patch_size": 160, "patch_overlap": 80}
    data["preprocess"] = build(plain["preprocess"], "preprocess")
    batches = batches_of(**data)
    bare(network, batches[:1])
    found: list[tuple[str, list[float], list[float]]] = [(name, [], []) for name in stitches]
    with tempfile.TemporaryDirectory() as folder:
        for _ in range(repeats):
            for (_, alone, looped), stitch in zip(found, stitches.values(), strict=True):
                alone.append(bare(network, batches))
                looped.append(loop(network, stitch, Path(folder), whole=False, **data))
    return found


def layers(seconds: float, batches: list[Tensor]) -> nn.Module:
    """As many 1x1x1 convolutions to two channels as take so many seconds for the batches."""
    torch.manual_seed(0)
    network = nn.Sequential(nn.Conv3d(1, 2, 1))
    while median(lambda: bare(network, batches), 3) < seconds:
        network.append(nn.ReLU()).append(nn.Conv3d(2, 2, 1))
    return network.eval()


def median(job: Callable[[], float], repeats: int) -> float:
    return statistics.median(job() for _ in range(repeats))


def reading_and_writing(path: Path, folder: Path) -> float:
    """Seconds that nibabel takes to read a volume and to write its labels."""
    start = time.perf_counter()
    image = nib.load(path)
    labels = (np.asarray(image.dataobj, np.float32) > 60).astype(np.uint8)
    nib.save(nib.Nifti1Image(labels, image.affine), folder / "labels.nii.gz")
    return time.perf_counter() - start


def cohort(repeats: int) -> list[tuple[str, list[float], list[float]]]:
    """Bare and looped seconds of eight volumes."""
    with tempfile.TemporaryDirectory() as name:
        folder, image = Path(name), nib.load(fetch("colin27_t1"))
        voxels = np.asarray(image.dataobj)
        (folder / "scans").mkdir()
        for n in range(8):
            nib.save(nib.Nifti1Image(np.roll(voxels, n, 0), image.affine), folder / f"scans/{n}.nii.gz")
        data = {"inputs": str(folder / "scans"), "patch_size": PATCH, "patch_overlap": OVERLAP, "batch_size": 4}
        batches = batches_of(**data)
        files = median(lambda: reading_and_writing(folder / "scans/0.nii.gz", folder), 5)
        network = layers(5 * files, batches[: len(batches) // 8])
        print(f"reading and writing take {files:.3f} s a volume, bare forwards {bare(network, batches) / 8:.2f} s")
        alone: list[float] = []
        looped: list[float] = []
        for _ in range(repeats):
            alone.append(bare(network, batches))
            looped.append(loop(network, Stitch(), folder / "out", whole=True, **data))
    return [("eight volumes", alone, looped)]


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--job", nargs="+", choices=["brain", "cohort"], default=["brain", "cohort"])
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    register_resolvers()
    rows = [row for job in arguments.job for row in {"brain": brain, "cohort": cohort}[job](arguments.repeats)]
    print("\n| | bare forwards [s] | predict loop [s] | ratio |\n|---|---|---|---|")
    for name, alone, looped in rows:
        ratio = statistics.median(b / a for a, b in zip(alone, looped, strict=True))
        print(f"| {name} | {statistics.median(alone):.2f} | {statistics.median(looped):.2f} | {ratio:.3f} |")


if __name__ == "__main__":
    main()
