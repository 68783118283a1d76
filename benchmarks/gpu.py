"""What does a GPU do during a run? One command of at most eight minutes; prints a table and a line of JSON.

    python benchmarks/gpu.py [--part stitching ct cohort loop] [--device cuda] [--small] [--minutes 8]

    stitching   36 outputs of 96^3 that are on the device already, with 2, 14 and 105 classes, to labels on the host;
                beside MONAI's sliding window, and the bound: all outputs read once, sums read and written once and
                labels written once, at the speed at which the device copies memory
    ct          a CT of 512 x 512 x 531 voxels (int16, 0.78 x 0.78 x 1 mm) to 118 classes at 1.5 mm and back to labels:
                seconds of each stage, the share of time in which the GPU computes forwards, and memory; beside MONAI's
                sliding window with the inverse of its resampling, where that fits
    cohort      eight volumes of 256^3 in a row, 14 classes: the share of time in which the GPU computes forwards, when
                it does so for the first time and again
    loop        the predict loop beside bare forwards of such batches: batches of 1, 2 and 4, channels last or not, and
                the largest also compiled

The network is like nnU-Net's (6 stages of 32 to 320 features, patch 128) with random weights, in bf16; its labels are
as smooth as organs. Numbers of labels are computed, as by default. No package is needed beyond voxquilt's and MONAI.
`--small --device cpu` shows in a minute that it runs; those figures mean nothing.
"""

import argparse
import contextlib
import json
import statistics
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from common import peak
from lightning.pytorch import Callback, LightningModule, Trainer
from torch import Tensor, nn

from voxquilt import GridDataModule, GridSampler, PatchPredictor, Preprocess, ScalarImage, Stitch, Subject, VolumeWriter
from voxquilt.prediction.output_files import OutputFiles
from voxquilt.stitching.buffer_pool import BufferPool
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.subject_stitcher import SubjectStitcher

Row = dict[str, Any]

INTENSITY = 900
"""The highest intensity of volumes; the lowest is its negative."""


@dataclass(frozen=True)
class Sizes:
    """What is measured; `small` shows that everything runs."""

    brain: tuple[int, int, int] = (181, 217, 181)
    brain_patch: int = 96
    classes: tuple[int, ...] = (2, 14, 105)
    ct: tuple[int, int, int] = (512, 512, 531)
    ct_classes: int = 118
    volume: int = 256
    patch: int = 128
    features: tuple[int, ...] = (32, 64, 128, 256, 320, 320)
    cohort: int = 8
    batches: tuple[int, ...] = (1, 2, 4)
    repeats: int = 5


SMALL = Sizes((24, 28, 20), 16, (2, 3), (40, 40, 50), 5, 24, 16, (4, 8), 2, (1, 2), 2)


class UNet(nn.Module):
    """A U-Net of two convolutions a stage, with instance norm and leaky ReLU; strides of 2.

    Its weights are random, but its labels are not noise, which takes longer to pack and to count than organs: each
    class is a range of intensities, about a seventh of the highest.
    """

    def __init__(self, features: tuple[int, ...], classes: int) -> None:
        super().__init__()
        torch.manual_seed(0)
        pairs = list(zip((1, *features), features, strict=False))
        self.down = nn.ModuleList(_stage(i, o, stride=1 if n == 0 else 2) for n, (i, o) in enumerate(pairs))
        self.up, self.merge = nn.ModuleList(), nn.ModuleList()
        for small, large in zip(features[-2::-1], features[:0:-1], strict=True):
            self.up.append(nn.ConvTranspose3d(large, small, 2, stride=2))
            self.merge.append(_stage(2 * small, small, stride=1))
        self.head, self.ranges = nn.Conv3d(features[0], classes, 1), nn.Conv3d(1, classes, 1)
        with torch.no_grad():
            self.head.weight *= 1e-3
            self.ranges.weight.fill_(1 / INTENSITY)
            self.ranges.bias = nn.Parameter(1 - torch.arange(classes) / 7)  # so that 14 of all classes are found

    def forward(self, x: Tensor) -> Tensor:
        distances = self.ranges(x).abs_()  # of the intensity from the middle of each class's range
        skips: list[Tensor] = []
        for stage in self.down:
            x = stage(x)
            skips.append(x)
        for up, merge, skip in zip(self.up, self.merge, skips[-2::-1], strict=True):
            x = merge(torch.cat([up(x), skip], 1))
        return self.head(x).sub_(distances)


def _stage(channels: int, features: int, stride: int) -> nn.Sequential:
    def half(before: int, step: int) -> list[nn.Module]:
        conv = nn.Conv3d(before, features, 3, step, padding=1)
        return [conv, nn.InstanceNorm3d(features, affine=True), nn.LeakyReLU(0.01, inplace=True)]

    return nn.Sequential(*half(channels, stride), *half(features, 1))


class Device:
    """The device and its clock."""

    def __init__(self, name: str) -> None:
        self.type = name
        self.cuda = name == "cuda"

    def __str__(self) -> str:
        return torch.cuda.get_device_name() if self.cuda else "cpu"

    def wait(self) -> None:
        """Until everything that was begun on the device is done."""
        if self.cuda:
            torch.cuda.synchronize()

    def seconds(self, job: Callable[[], object]) -> float:
        """How long a job takes, with what it begins on the device."""
        self.wait()
        start = time.perf_counter()
        job()
        self.wait()
        return time.perf_counter() - start

    def copied_per_second(self) -> float:
        """Bytes that the device reads and writes per second when it copies memory."""
        source = torch.empty(2**28 if self.cuda else 2**22, device=self.type)
        target = torch.empty_like(source)
        target.copy_(source)
        seconds = statistics.median(self.seconds(lambda: target.copy_(source)) for _ in range(10))
        return 2 * source.nbytes / seconds

    @contextlib.contextmanager
    def peak(self, found: Row) -> Iterator[None]:
        """Note the most memory that the block holds on the device, and on the host, in GiB."""
        if self.cuda:
            torch.cuda.empty_cache()
            torch.cuda.reset_peak_memory_stats()
        yield
        found["device GiB"] = torch.cuda.max_memory_allocated() / 2**30 if self.cuda else 0.0
        found["host GiB so far"] = peak() / 1024


class Clock(Callback):
    """Measures a predict loop: how long it takes, and its forwards on the device, and reading and writing.

    The device's clock counts, since the host is up to two volumes ahead of it.

    Args:
        device: Where the network is.
        predictor: The network.
        skip: Batches at the beginning that do not count.
        alone: A batch that is predicted again and again when the loop is over, as often as batches count.
    """

    def __init__(self, device: Device, predictor: PatchPredictor, skip: int = 0, alone: Tensor | None = None) -> None:
        self._device, self._skip, self._alone = device, skip, alone
        self._forwards: list[tuple[Any, Any]] = []
        self._batches = 0
        self.stages = {"load": 0.0, "write": 0.0}
        predictor.network.register_forward_pre_hook(lambda *_: self._forwards.append((self._mark(), None)))
        predictor.network.register_forward_hook(self._close)

    def _mark(self) -> Any:
        if not self._device.cuda:
            return time.perf_counter()
        event = torch.cuda.Event(enable_timing=True)
        event.record()
        return event

    def _close(self, *_: object) -> None:
        self._forwards[-1] = self._forwards[-1][0], self._mark()

    def on_predict_batch_start(self, *_: object) -> None:
        self._batches += 1

    def on_predict_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """The writer, which comes before this callback, has written everything; the network is still on the device."""
        end = self._mark()
        self._device.wait()
        count = self._batches - self._skip
        marks = self._forwards[-count:]  # others came before, when the run was planned
        self.loop = self._seconds(marks[0][0], end)
        """Seconds from the first batch that counts to the last file."""
        self.forwards = sum(self._seconds(*forward) for forward in marks)
        """Seconds in which the device computed the forwards of the batches that count."""
        if self._alone is not None:
            with torch.inference_mode(), trainer.precision_plugin.forward_context():
                for _ in range(3):
                    pl_module(self._alone)
                self.bare = self._device.seconds(lambda: self._repeat(pl_module, count))

    def _repeat(self, network: nn.Module, count: int) -> None:
        for _ in range(count):
            network(self._alone)

    def _seconds(self, start: Any, end: Any) -> float:
        return start.elapsed_time(end) / 1000 if self._device.cuda else end - start

    @contextlib.contextmanager
    def timing_stages(self) -> Iterator[None]:
        """Time reading and preparing, and writing, in the threads that do so."""
        load, write = GridDataModule.load, OutputFiles.write

        def timed(name: str, function: Callable[..., Any]) -> Callable[..., Any]:
            def run(*arguments: Any) -> Any:
                start = time.perf_counter()
                try:
                    return function(*arguments)
                finally:
                    self.stages[name] += time.perf_counter() - start

            return run

        GridDataModule.load, OutputFiles.write = timed("load", load), timed("write", write)
        try:
            yield
        finally:
            GridDataModule.load, OutputFiles.write = load, write


def predict(
    device: Device, network: nn.Module, data: Row, skip: int = 0, alone: Tensor | None = None, **options: bool
) -> Clock:
    """Predict files to labels as predict.py does."""
    predictor = PatchPredictor(network, **options)
    clock = Clock(device, predictor, skip, alone)
    with tempfile.TemporaryDirectory() as folder, clock.timing_stages(), contextlib.redirect_stdout(sys.stderr):
        trainer = Trainer(
            accelerator="gpu" if device.cuda else "cpu",
            devices=1,
            precision="bf16-mixed" if device.cuda else "32-true",
            logger=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            enable_checkpointing=False,
            callbacks=[VolumeWriter(folder, Stitch(), on_error="raise", log="plain"), clock],
        )
        trainer.predict(predictor, datamodule=GridDataModule(**data), return_predictions=False)
    return clock


def volume_file(folder: Path, name: str, shape: tuple[int, int, int], spacing: tuple[float, float, float]) -> Path:
    """A smooth int16 volume."""
    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    wave = INTENSITY / 3 * (np.sin(i / 17) + np.sin(j / 13) + np.sin(k / 11 + len(name)))
    path = folder / f"{name}.nii.gz"
    nib.save(nib.Nifti1Image(wave.astype(np.int16), np.diag([*spacing, 1.0])), path)
    return path


def stitching(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Outputs to labels, without a network."""
    from monai.inferers import sliding_window_inference

    shape, patch = sizes.brain, sizes.brain_patch
    speed, volume = device.copied_per_second(), torch.zeros(1, 1, *shape, device=device.type)
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, *shape)))
    sampler, space, buffers = GridSampler(subject, patch, patch // 2), Preprocess().space(subject), BufferPool()
    order, stitch = sampler.grid.streaming_order.tolist(), Stitch()
    for classes in sizes.classes:
        outputs = torch.randn(4, classes, patch, patch, patch, device=device.type, dtype=torch.bfloat16)

        def ours(outputs: Tensor = outputs) -> np.ndarray:
            stitcher = SubjectStitcher(stitch, sampler, space, memory=Memory(device.type, buffers))
            for first in range(0, len(order), 4):
                numbers = order[first : first + 4]
                stitcher.add({"": outputs[: len(numbers)]}, numbers)
            return stitcher.volumes()["labels"]

        def monai(outputs: Tensor = outputs) -> np.ndarray:
            def hand_out(windows: Tensor) -> Tensor:
                return outputs[: len(windows)]

            scores = sliding_window_inference(volume, (patch,) * 3, 4, hand_out, overlap=0.5, mode="gaussian")
            return scores[0].argmax(0).to(torch.uint8).cpu().numpy()

        found: dict[str, list[float]] = {"voxquilt": [], "MONAI": []}
        with torch.inference_mode():
            for repeat in range(sizes.repeats + 1):
                for name, job in (("voxquilt", ours), ("MONAI", monai)):
                    seconds = device.seconds(job)
                    found[name] += [seconds] if repeat else []  # the first takes memory and compiles kernels
        voxels = int(np.prod(shape))
        moved = len(order) * outputs[0].nbytes + 2 * 4 * classes * voxels + voxels
        medians = {name: statistics.median(seconds) for name, seconds in found.items()}
        yield {"job": f"stitching, {classes} classes [s]", **medians, "bound": moved / speed}


def ct(device: Device, sizes: Sizes) -> Iterator[Row]:
    """One large CT with many classes."""
    network = UNet(sizes.features, sizes.ct_classes).eval()
    with tempfile.TemporaryDirectory() as folder:
        path = volume_file(Path(folder), "ct", sizes.ct, (0.78, 0.78, 1.0))
        jobs = ("voxquilt", _ct_voxquilt), ("voxquilt again", _ct_voxquilt), ("MONAI", _ct_monai)
        for name, run in jobs:  # the first one loads libraries, too
            row: Row = {"job": f"CT, {sizes.ct_classes} classes: {name}"}
            try:
                with device.peak(row):
                    row |= run(device, sizes, network, path)
            except torch.OutOfMemoryError:
                row["problem"] = "out of device memory"
            yield row


def _ct_voxquilt(device: Device, sizes: Sizes, network: nn.Module, path: Path) -> Row:
    grid = {"patch_size": sizes.patch, "patch_overlap": sizes.patch // 2, "batch_size": sizes.batches[-1]}
    data = {"inputs": str(path), "preprocess": Preprocess(spacing=1.5), **grid}
    start = time.perf_counter()
    clock = predict(device, network, data)
    seconds = time.perf_counter() - start
    stages = {f"{name} [s]": spent for name, spent in clock.stages.items()}
    share = clock.forwards / clock.loop
    return {"s": seconds, "loop [s]": clock.loop, "forwards [s]": clock.forwards, **stages, "forwards' share": share}


def _ct_monai(device: Device, sizes: Sizes, network: nn.Module, path: Path) -> Row:
    from monai.inferers import sliding_window_inference
    from monai.transforms import Compose, EnsureChannelFirstd, Invertd, LoadImaged, Spacingd

    before = Compose([LoadImaged("image"), EnsureChannelFirstd("image"), Spacingd("image", (1.5, 1.5, 1.5))])
    # Labels are inverted, since scores of all classes at the CT's resolution fit no device.
    after = Invertd("labels", before, orig_keys="image", nearest_interp=True, to_tensor=True)
    network = network.to(device.type)
    start = time.perf_counter()
    data: Any = before({"image": str(path)})
    with torch.inference_mode(), torch.autocast("cuda", torch.bfloat16, enabled=device.cuda):
        image = data["image"][None].to(device.type)
        roi = (sizes.patch,) * 3
        scores = sliding_window_inference(image, roi, sizes.batches[-1], network, overlap=0.5, mode="gaussian")
        data["labels"] = scores[0].argmax(0, keepdim=True).to(torch.uint8)  # type: ignore[index]
    labels: Any = after(data)
    nib.save(nib.Nifti1Image(np.asarray(labels["labels"][0].cpu()), np.eye(4)), path.parent / "labels.nii.gz")
    return {"s": time.perf_counter() - start}


def cohort(device: Device, sizes: Sizes) -> Iterator[Row]:
    """Several volumes one after the other."""
    network = UNet(sizes.features, 14).eval()
    with tempfile.TemporaryDirectory() as folder:
        for n in range(sizes.cohort):
            volume_file(Path(folder), f"volume{'-' * n}", (sizes.volume,) * 3, (1.0, 1.0, 1.0))
        batch = sizes.batches[-1]
        data = {"inputs": folder, "patch_size": sizes.patch, "patch_overlap": sizes.patch // 2, "batch_size": batch}
        for again in ("", " again"):  # the first time the device's memory is taken from the driver, and files are new
            row: Row = {"job": f"{sizes.cohort} volumes{again}, 14 classes"}
            with device.peak(row) if not again else contextlib.nullcontext():
                clock = predict(device, network, data)
            share = clock.forwards / clock.loop
            yield row | {"loop [s]": clock.loop, "forwards [s]": clock.forwards, "forwards' share": share}


def loop(device: Device, sizes: Sizes) -> Iterator[Row]:
    """The predict loop beside bare forwards, for what may make a network faster."""
    choices = [(size, False, last) for last in (False, True) for size in sizes.batches]
    if device.cuda:  # compiling takes a minute
        choices += [(sizes.batches[-1], True, last) for last in (False, True)]
    count = len(GridSampler(torch.zeros(1, *(sizes.volume,) * 3), sizes.patch, sizes.patch // 2))
    with tempfile.TemporaryDirectory() as folder:
        for n in range(sizes.cohort):
            volume_file(Path(folder), f"volume{'-' * n}", (sizes.volume,) * 3, (1.0, 1.0, 1.0))
        for size, compiled, last in choices:
            # The first volume is not counted: cuDNN chooses its algorithms, and torch compiles.
            skip, alone = count // size, torch.rand(size, 1, *(sizes.patch,) * 3, device=device.type)
            data = {"inputs": folder, "patch_size": sizes.patch, "patch_overlap": sizes.patch // 2, "batch_size": size}
            network = UNet(sizes.features, 14).eval()
            clock = predict(device, network, data, skip, alone, compile=compiled, channels_last=last)
            row = {"job": f"loop, batch {size}{', compiled' * compiled}{', channels last' * last}"}
            figures = {"loop [s]": clock.loop, "forwards [s]": clock.forwards, "bare [s]": clock.bare}
            patches = sizes.cohort * count - skip * size
            yield row | figures | {"loop / bare": clock.loop / clock.bare, "patches/s": patches / clock.loop}
            torch.compiler.reset()


PARTS = {"stitching": stitching, "ct": ct, "cohort": cohort, "loop": loop}


def main() -> None:
    """Print the table and the JSON."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--part", nargs="+", default=list(PARTS), choices=list(PARTS))
    parser.add_argument("--device", default="cuda", choices=("cuda", "cpu"))
    parser.add_argument("--small", action="store_true", help="only show that everything runs")
    parser.add_argument("--minutes", type=float, default=8, help="what has not begun by then is left out")
    arguments = parser.parse_args()
    warnings.simplefilter("ignore")
    device, sizes = Device(arguments.device), SMALL if arguments.small else Sizes()
    end, rows = time.monotonic() + 60 * arguments.minutes, list[Row]()
    print(f"{device}, torch {torch.__version__}\n\n| | |\n|---|---|", flush=True)
    for row in (row for part in arguments.part for row in PARTS[part](device, sizes)):
        rows.append(row)
        figures = [f"{name} {value:.4g}" if isinstance(value, float) else value for name, value in row.items()]
        print(f"| {figures[0]} | {', '.join(figures[1:])} |", flush=True)
        if time.monotonic() > end:
            print(f"\nAfter {arguments.minutes:g} minutes the rest is not measured.")
            break
    print(
        "\n" + json.dumps({"device": str(device), "torch": torch.__version__, "small": arguments.small, "rows": rows})
    )


if __name__ == "__main__":
    main()
