"""How fast are patches stitched and turned into labels? Peers beside voxquilt, each in its own process.

    python benchmarks/stitching.py [--repeats 5] [--classes 2 14 105] [--device cpu] [--json results.json]

The job: a grid of 181 x 217 x 181 voxels, patch 96, overlap 48; the network's outputs are already in memory (eight
patches that take turns) and leave as uint8 labels; three volumes in a row. Peers' labels are made as their users make
them, by arg-max. `bound` is what no aggregator can beat by much: each output patch is read once, added without weights
into warm memory, and one pass makes labels.
Up to 20 classes, voxquilt's gaussian labels are checked against a plain float64 reference.
"""

import argparse
import itertools
import json
import statistics
import time
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from common import THREADS, Contender, Run, machine, median, peak, resident, rounds, run, save, table
from files import nnunet_predictor
from torch import Tensor

SHAPE, PATCH, OVERLAP, VOLUMES = (181, 217, 181), 96, 48, 3
Job = Callable[[], Tensor]


class HandsOut(torch.nn.Module):
    """A network that hands out the patches in turn, as copies, since some peers weight them in place.

    Args:
        patches: (C, I, J, K) each.
    """

    def __init__(self, patches: list[Tensor]) -> None:
        super().__init__()
        self._patches = patches
        self._warm = torch.zeros_like(patches[0])
        self._count = 0
        self.seconds = 0.0
        """What the copies took so far, which is no part of stitching."""

    def forward(self, window: Tensor) -> Tensor:
        start = time.perf_counter()
        self._warm.copy_(self._patches[self._count % len(self._patches)])
        self._count += 1
        self.seconds += time.perf_counter() - start
        return self._warm[None]

    def unpaid(self) -> float:
        """The seconds since this was asked last."""
        seconds, self.seconds = self.seconds, 0.0
        return seconds


def outputs(classes: int, device: str) -> list[Tensor]:
    """Eight patches of scores."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(classes, PATCH, PATCH, PATCH, generator=generator).to(device) for _ in range(8)]


def to_labels(scores: Tensor) -> Tensor:
    """(C, ...) to (...) uint8, the quick way for any number of classes."""
    return (scores[1] > scores[0] if len(scores) == 2 else scores.max(0).indices).to(torch.uint8)


def bound(patches: list[Tensor], device: str) -> Job:
    """Adding without weights into memory that is there already."""
    from voxquilt.geometry.grid import make_grid

    grid = make_grid(SHAPE, PATCH, OVERLAP)
    sums = torch.zeros(len(patches[0]), *SHAPE, device=device)

    def job() -> Tensor:
        sums.zero_()
        for n, (i0, j0, k0, i1, j1, k1) in enumerate(grid.locations.tolist()):
            sums[:, i0:i1, j0:j1, k0:k1].add_(patches[n % 8])
        return to_labels(sums)

    return job


def voxquilt(mode: str) -> Callable[[list[Tensor], str], Job]:
    """The streaming SubjectStitcher of the predict loop."""

    def prepare(patches: list[Tensor], device: str) -> Job:
        import numpy as np

        from voxquilt import GridSampler, Preprocess, ScalarImage, Stitch, Subject
        from voxquilt.geometry.frame import Frame
        from voxquilt.stitching.buffer_pool import BufferPool
        from voxquilt.stitching.output_rings import Memory
        from voxquilt.stitching.subject_stitcher import SubjectStitcher

        subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, *SHAPE)))
        sampler, space = GridSampler(subject, PATCH, OVERLAP), Preprocess().space(subject)
        assert space.native == Frame(SHAPE, np.eye(4))
        buffers, stitch, order = BufferPool(), Stitch(mode), sampler.grid.streaming_order.tolist()

        def job() -> Tensor:
            quilt = SubjectStitcher(stitch, sampler, space, memory=Memory(device, buffers))
            for n in order:
                quilt.add({"": patches[n % 8][None]}, [n])
            return torch.from_numpy(quilt.volumes()["labels"][0])

        return job

    return prepare


def torchio(mode: str) -> Callable[[list[Tensor], str], Job]:
    """TorchIO's GridAggregator."""

    def prepare(patches: list[Tensor], device: str) -> Job:
        import torchio as tio

        sampler = tio.GridSampler(tio.Subject(t1=tio.ScalarImage(tensor=torch.zeros(1, *SHAPE))), PATCH, OVERLAP)
        locations = torch.from_numpy(sampler.locations)

        def job() -> Tensor:
            aggregator = tio.GridAggregator(sampler, overlap_mode=mode)
            for n in range(len(locations)):
                aggregator.add_batch(patches[n % 8][None], locations[n : n + 1])
            return aggregator.get_output_tensor().argmax(0).to(torch.uint8)

        return job

    return prepare


def monai(mode: str, **options: int) -> Callable[[list[Tensor], str], tuple[Job, HandsOut]]:
    """MONAI's sliding window around a network that hands out the patches."""

    def prepare(patches: list[Tensor], device: str) -> tuple[Job, HandsOut]:
        from monai.inferers import sliding_window_inference

        volume, net = torch.zeros(1, 1, *SHAPE, device=device), HandsOut(patches)

        def job() -> Tensor:
            scores = sliding_window_inference(volume, (PATCH,) * 3, 1, net, overlap=0.5, mode=mode, **options)
            return scores[0].argmax(0).to(torch.uint8)

        return job, net

    return prepare


def nnunet(patches: list[Tensor], device: str) -> tuple[Job, HandsOut]:
    """nnU-Net's sliding window around a network that hands out the patches, and its way to labels."""
    net, volume = HandsOut(patches), torch.zeros(1, *SHAPE)
    predictor = nnunet_predictor(net, len(patches[0]), device)

    def job() -> Tensor:
        logits = predictor.predict_sliding_window_return_logits(volume)
        return torch.as_tensor(predictor.label_manager.convert_logits_to_segmentation(logits)).to(torch.uint8)

    return job, net


def konfai(combine: str) -> Callable[[list[Tensor], str], Job]:
    """KonfAI's streaming accumulator, in float16 as its predictor fills it; labels slab by slab."""

    def prepare(patches: list[Tensor], device: str) -> Job:
        from konfai.data import patching

        starts = [[*range(0, n - PATCH, OVERLAP), n - PATCH] for n in SHAPE]
        slices = [tuple(slice(n, n + PATCH) for n in place) for place in itertools.product(*starts)]
        blend = getattr(patching, combine)()
        blend.set_patch_config([PATCH] * 3, OVERLAP)

        def job() -> Tensor:
            labels = torch.empty(SHAPE, dtype=torch.uint8, device=device)
            accumulator = patching.StreamingAccumulator(slices, [PATCH] * 3, blend)

            def finish(slabs: list[tuple[slice, Tensor]]) -> None:
                for rows, scores in slabs:
                    labels[rows] = scores[0].argmax(0)

            for n in range(len(slices)):
                finish(accumulator.add_layer(n, patches[n % 8][None].half()))
            finish(accumulator.finalize())
            return labels

        return job

    return prepare


CONTENDERS = {
    "bound": Contender(bound),
    "voxquilt crop": Contender(voxquilt("crop")),
    "voxquilt gaussian": Contender(voxquilt("gaussian")),
    "TorchIO crop": Contender(torchio("crop")),
    "TorchIO average": Contender(torchio("average")),
    "TorchIO hann": Contender(torchio("hann")),
    "MONAI constant": Contender(monai("constant")),
    "MONAI gaussian": Contender(monai("gaussian")),
    "MONAI gaussian, buffered": Contender(monai("gaussian", buffer_steps=4)),
    "KonfAI trim": Contender(konfai("Trim"), "konfai", half=True),
    "KonfAI gaussian": Contender(konfai("Gaussian"), "konfai", half=True),
    "nnU-Net gaussian": Contender(nnunet, "nnunet", half=True),
}


def reference(patches: list[Tensor], mode: str) -> Tensor:
    """Labels where a plain float64 sum is sure of them, 255 elsewhere."""
    from voxquilt.geometry.grid import make_grid
    from voxquilt.stitching.blend import to_blend

    grid, blend = make_grid(SHAPE, PATCH, OVERLAP), to_blend(mode)
    i, j, k = (blend.axis_weights(grid, axis) for axis in range(3))
    sums = torch.zeros(len(patches[0]), *SHAPE, dtype=torch.float64)
    for n in range(len(grid)):
        (a, b, c), (i0, j0, k0, i1, j1, k1) = grid.place(n), grid.location(n)
        weights = i[a][:, None, None] * j[b][:, None] * k[c]
        sums[:, i0:i1, j0:j1, k0:k1] += patches[n % 8].cpu().double() * weights
    two = sums.topk(2, 0)
    return torch.where(two.values[0] - two.values[1] > 1e-4, two.indices[0], 255).to(torch.uint8)


def measure(name: str, classes: int, device: str, check: bool) -> Run:
    """Run one contender here."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    patches, seconds = outputs(classes, device), []
    with torch.inference_mode():
        made = CONTENDERS[name].prepare(patches, device)
        job, net = made if isinstance(made, tuple) else (made, None)
        before = resident()
        for _ in range(VOLUMES):
            start = time.perf_counter()
            labels = job()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start - (net.unpaid() if net else 0))
    result = {"first": seconds[0], "next": statistics.median(seconds[1:]), "peak": peak(), "above": peak() - before}
    if check and name == "voxquilt gaussian":
        truth = reference(patches, "gaussian")
        right = bool(((truth == 255) | (truth == labels.cpu())).all()) and float((truth == 255).float().mean()) < 0.01
        return result | {"right": right}
    return result


def main() -> None:
    """Print a table of medians for each number of classes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 14, 105])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), help="names as in the tables")
    parser.add_argument("--json", type=Path, help="save every run")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--report", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--check", action="store_true", help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        result = measure(arguments.contender, arguments.classes[0], arguments.device, arguments.check)
        arguments.report.write_text(json.dumps(result))
        return
    print(f"{machine(arguments.repeats, arguments.device)}\n")
    for classes in arguments.classes:

        def once(name: str, repeat: int, classes: int = classes) -> Run:
            options = ["--classes", classes, "--device", arguments.device]
            return run(
                __file__, CONTENDERS[name], name, *options, *(["--check"] if repeat == 0 and classes < 20 else [])
            )

        runs = rounds(arguments.contenders, arguments.repeats, once)
        header = ("first volume [s]", "next volumes [s]", "memory [MB]")
        print(f"{classes} classes:\n\n{table(header, runs, row)}\n", flush=True)
        if not all(result.get("right", True) for done in runs.values() for result in done):
            raise SystemExit("voxquilt's labels are WRONG")
        save(arguments.json, f"stitching {classes}", runs)


def row(name: str, done: list[Run]) -> list[str]:
    """A contender's line."""
    first, following, above = (median(done, key) for key in ("first", "next", "above"))
    return [f"{first:.2f}", f"{following:.2f}", f"{above:.0f}"]


if __name__ == "__main__":
    main()
