"""How fast are patches stitched and turned into labels? voxquilt beside TorchIO and MONAI, each in its own process.

    python benchmarks/stitching.py [--repeats 5] [--classes 2 14 105] [--device cpu]

The job: a grid of 181 x 217 x 181 voxels, patch 96, overlap 48; the network's outputs are already in memory (eight
patches that take turns) and leave as uint8 labels; three volumes in a row. Peers' labels are made as their users make
them, by arg-max. `bound` is what no aggregator can beat by much: each output patch is read once, added without weights
into warm memory, and one pass makes labels. voxquilt's gaussian labels are checked against a plain float64 reference.
"""

import argparse
import json
import resource
import statistics
import subprocess
import sys
import time
import warnings
from collections.abc import Callable

import torch
from torch import Tensor

SHAPE, PATCH, OVERLAP, VOLUMES = (181, 217, 181), 96, 48, 3
Job = Callable[[], Tensor]


def outputs(classes: int, device: str) -> list[Tensor]:
    """Eight patches of scores."""
    generator = torch.Generator().manual_seed(0)
    return [torch.randn(classes, PATCH, PATCH, PATCH, generator=generator).to(device) for _ in range(8)]


def to_labels(scores: Tensor) -> Tensor:
    """(C, ...) to (...) uint8, the quick way for any number of classes."""
    return (scores[1] > scores[0] if len(scores) == 2 else scores.max(0).indices).to(torch.uint8)


def bound(patches: list[Tensor], device: str) -> Job:
    """Adding without weights into memory that is there already."""
    from voxquilt.grid import make_grid

    grid = make_grid(SHAPE, PATCH, OVERLAP)
    sums = torch.zeros(len(patches[0]), *SHAPE, device=device)

    def job() -> Tensor:
        sums.zero_()
        for n, (i0, j0, k0, i1, j1, k1) in enumerate(grid.locations.tolist()):
            sums[:, i0:i1, j0:j1, k0:k1].add_(patches[n % 8])
        return to_labels(sums)

    return job


def voxquilt(mode: str) -> Callable[[list[Tensor], str], Job]:
    """The streaming Quilt of the predict loop."""

    def prepare(patches: list[Tensor], device: str) -> Job:
        import numpy as np

        from voxquilt import GridSampler, ScalarImage, Subject
        from voxquilt.buffers import Buffers
        from voxquilt.geometry import Frame
        from voxquilt.preprocess import Preprocess
        from voxquilt.quilt import Quilt
        from voxquilt.stitch import Stitch

        subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, *SHAPE)))
        sampler, space = GridSampler(subject, PATCH, OVERLAP), Preprocess().space(subject)
        assert space.native == Frame(SHAPE, np.eye(4))
        buffers, stitch, order = Buffers(), Stitch(mode), sampler.grid.streaming_order.tolist()

        def job() -> Tensor:
            quilt = Quilt(stitch, sampler, space, device=device, buffers=buffers)
            for n in order:
                quilt.add({"": patches[n % 8][None]}, sampler.locations[n : n + 1])
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


def monai(mode: str) -> Callable[[list[Tensor], str], Job]:
    """MONAI's sliding window around a network that hands out the patches."""

    def prepare(patches: list[Tensor], device: str) -> Job:
        from monai.inferers import sliding_window_inference

        volume = torch.zeros(1, 1, *SHAPE, device=device)

        def job() -> Tensor:
            numbers = iter(range(10**6))
            scores = sliding_window_inference(
                volume, (PATCH,) * 3, 1, lambda window: patches[next(numbers) % 8][None], overlap=0.5, mode=mode
            )
            return scores[0].argmax(0).to(torch.uint8)

        return job

    return prepare


CONTENDERS = {
    "bound": bound,
    "voxquilt crop": voxquilt("crop"),
    "voxquilt gaussian": voxquilt("gaussian"),
    "TorchIO crop": torchio("crop"),
    "TorchIO average": torchio("average"),
    "TorchIO hann": torchio("hann"),
    "MONAI constant": monai("constant"),
    "MONAI gaussian": monai("gaussian"),
}


def reference(patches: list[Tensor], mode: str) -> Tensor:
    """Labels where a plain float64 sum is sure of them, 255 elsewhere."""
    from voxquilt.blend import BLENDS
    from voxquilt.grid import make_grid

    grid, blend = make_grid(SHAPE, PATCH, OVERLAP), BLENDS[mode]
    i, j, k = (blend.axis_weights(grid, axis) for axis in range(3))
    sums = torch.zeros(len(patches[0]), *SHAPE, dtype=torch.float64)
    for n in range(len(grid)):
        (a, b, c), (i0, j0, k0, i1, j1, k1) = grid.place(n), grid.location(n)
        weights = i[a][:, None, None] * j[b][:, None] * k[c]
        sums[:, i0:i1, j0:j1, k0:k1] += patches[n % 8].cpu().double() * weights
    two = sums.topk(2, 0)
    return torch.where(two.values[0] - two.values[1] > 1e-4, two.indices[0], 255).to(torch.uint8)


def measure(name: str, classes: int, device: str, check: bool) -> None:
    """Run one contender here and print what it took, as JSON."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    patches = outputs(classes, device)
    with torch.inference_mode():
        job = CONTENDERS[name](patches, device)
        before, seconds = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, []
        for _ in range(VOLUMES):
            start = time.perf_counter()
            labels = job()
            if device != "cpu":
                torch.cuda.synchronize()
            seconds.append(time.perf_counter() - start)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    right = True
    if check and name == "voxquilt gaussian":
        truth = reference(patches, "gaussian")
        right = bool(((truth == 255) | (truth == labels.cpu())).all()) and float((truth == 255).float().mean()) < 0.01
    result = {"first": seconds[0], "next": statistics.median(seconds[1:]), "above": (peak - before) / 1024}
    print(json.dumps(result | {"right": right}))


def main() -> None:
    """Print a table of medians for each number of classes."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--classes", type=int, nargs="+", default=[2, 14, 105])
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--contender")
    parser.add_argument("--check", action="store_true")
    arguments = parser.parse_args()
    if arguments.contender:
        measure(arguments.contender, arguments.classes[0], arguments.device, arguments.check)
        return
    for classes in arguments.classes:
        results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
        for repeat in range(arguments.repeats):  # interleaved, so that a slow minute of the machine meets all of them
            for name, runs in results.items():
                command = [sys.executable, __file__, "--contender", name, "--classes", str(classes)]
                command += ["--device", arguments.device, *(["--check"] if repeat == 0 else [])]
                output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
                runs.append(json.loads(output.splitlines()[-1]))
        print(f"\n{classes} classes, {arguments.device}, medians of {arguments.repeats}\n")
        print("| | first volume [s] | next volumes [s] | memory [MB] |\n|---|---|---|---|")
        for name, runs in results.items():
            first, after, above = (statistics.median(run[key] for run in runs) for key in ("first", "next", "above"))
            wrong = "" if all(run["right"] for run in runs) else " WRONG LABELS"
            print(f"| {name} | {first:.2f} | {after:.2f} | {above:.0f} |{wrong}", flush=True)


if __name__ == "__main__":
    main()
