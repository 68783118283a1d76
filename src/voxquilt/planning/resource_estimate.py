"""What will a run need? Memory of each process and disk, from its extent, the network's outputs and the settings."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

from voxquilt.data.subject_size import RunSize
from voxquilt.geometry.frame import Triple
from voxquilt.planning.shape_probe import Probe
from voxquilt.stitching.products.disagreement import Moments
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS

MIB = 2**20

# Measured: what a process grows by once it runs (code that is loaded late, threads, oneDNN's kernels), and the pieces
# in which scores go back to native space.
_LATE, _PIECES = 70 * MIB, 60 * MIB
# Likewise, of drawing pictures while the network runs.
_PICTURES = 25 * MIB
# Tensors up to 32 MiB are kept by malloc when they are freed, at most so much in all.
_KEPT = 110 * MIB


@dataclass(frozen=True)
class OutputFile:
    """A volume that is written of each subject.

    Args:
        name: '<product>' or '<output>_<product>'.
        voxel_bytes: Of all of its channels.
        packed: Its expected size as .nii.gz, as a share of its voxels.
        labels: Whether it holds labels.
    """

    name: str
    voxel_bytes: int
    packed: float
    labels: bool


@dataclass(frozen=True)
class OutputPlan:
    """What a network's outputs become.

    Args:
        made: Volumes of each subject.
        sums: Bytes of sums for each voxel of the ring, of all outputs and blends.
        blends: How many sums there are.
    """

    made: list[OutputFile]
    sums: float
    blends: int


@dataclass(frozen=True)
class RunSettings:
    """What decides how much memory and disk a run takes, beside its subjects and its network.

    Args:
        stitch: How patches become volumes.
        folder: Folder of the outputs.
        patch_size: Voxels along i, j, k.
        batch_size: Patches per forward pass.
        num_workers: Threads that load ahead.
        in_memory: Bytes; larger products wait on disk.
        compress: Whether outputs are .nii.gz.
        base: Bytes that the process holds before the run, its libraries and weights included.
        gpu: Whether the network runs on a GPU.
        weights: Bytes of the network's weights, as far as they are on the device at a time.
        skips: Whether patches are left out.
        pictures: Whether pictures are drawn.
    """

    stitch: Stitch
    folder: Path
    patch_size: Triple
    batch_size: int
    num_workers: int
    in_memory: float
    compress: bool
    base: int
    gpu: bool = False
    weights: int = 0
    skips: bool = False
    pictures: bool = False


@dataclass(frozen=True)
class Requirements:
    """Bytes.

    Args:
        host: Of a process at its peak, by what takes them.
        device: Of its GPU, likewise; empty without one.
        disk: Of outputs, as they are expected.
        bound: The most that outputs can take: unpacked.
        scratch: Of unnamed files beside, while the run goes on, in one process.
    """

    host: Mapping[str, int]
    device: Mapping[str, int]
    disk: int
    bound: int
    scratch: int

    @property
    def memory(self) -> int:
        """Of the host, in all."""
        return sum(self.host.values())


def forms(stitch: Stitch, outputs: Mapping[str, Sequence[int]], patch_size: Triple, layout: str = "auto") -> OutputPlan:
    """What becomes of outputs (B, C, I, J, K) by name, which lie in patches as `voxquilt.geometry.output_layout` has
    it.

    Raises:
        OutputError: a product that an output does not have.
    """
    made, sums, blends = [], 0.0, 0
    for output, shape in outputs.items():
        # Of a cropped patch the ring has as many voxels as the output.
        channels, share = shape[1], 1.0 if layout == "cropped" else prod(shape[2:]) / prod(patch_size)
        for _, specs in stitch.specs(output, channels):
            for averaged in dict.fromkeys(spec.averaged for spec in specs.values()):
                moments = averaged if isinstance(averaged, Moments) else None
                sums += share * (
                    moments.channels(channels) * (8 if moments.is_double else 4) if moments else channels * 4
                )
                blends += 1
            for product, spec in specs.items():
                count, dtype = spec.product.form(channels)
                name = "_".join(filter(None, (output, product)))
                made.append(OutputFile(name, count * dtype.itemsize, spec.packed, spec.product.kind == LABELS))
    return OutputPlan(made, sums, blends)


def voxels_of(made: Sequence[OutputFile], voxels: int, *, compress: bool) -> int:
    """Expected bytes on disk of what is made of so many native voxels."""
    return round(sum(one.voxel_bytes * (one.packed if compress else 1) for one in made) * voxels)


def needs(of: RunSize, passed: Probe, become: OutputPlan, settings: RunSettings) -> Requirements:
    """What a process needs at its peak, at most what its largest subjects meet in, and the disk of all subjects."""
    patch, batch = prod(settings.patch_size), settings.batch_size
    ahead = min(of.subjects, settings.num_workers + 1)
    # One is filled while one is written; a third waits only where writing takes longer than predicting.
    held = min(of.subjects, 2)
    sizes = [one.voxel_bytes * of.largest for one in become.made]
    large = [size for size in sizes if size > settings.in_memory]
    labels = any(one.labels for one in become.made)
    sums = round(of.ring * (become.sums + 4 * become.blends * settings.skips)) + 4 * patch * become.blends
    writing = of.largest * (32 if settings.stitch.postprocess and labels else labels)
    network = passed.peak_bytes
    host = {
        "process": settings.base + _LATE + _PICTURES * settings.pictures,
        "images": ahead * of.loaded,
        "reading": of.reading if of.subjects > 1 or settings.pictures else max(0, of.reading - network),
        "batches": 2 * batch * of.channels * patch * 4,
        "products": held * (sum(sizes) - sum(large)),
        "writing": writing if of.subjects > 1 else max(0, writing - network),
    }
    if settings.gpu:
        host |= {"network": passed.output_bytes, "sums": 0}
        device = {
            "weights": settings.weights,
            "network": network,
            "batches": batch * of.channels * patch * 4,
            "sums": sums,
        }
    else:
        host |= {"network": max(network + min(network // 2, _KEPT), passed.output_bytes + _PIECES), "sums": sums}
        device = {}
    disk = voxels_of(become.made, of.voxels, compress=settings.compress)
    bound = voxels_of(become.made, of.voxels, compress=False)
    return Requirements(host, device, disk, bound, held * sum(large))
