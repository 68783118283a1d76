"""Estimates the memory of each process and the disk that a run needs, before it begins."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from math import prod
from pathlib import Path

import numpy as np

from voxquilt.data.staging import STAGED
from voxquilt.data.subject_size import RunSize
from voxquilt.geometry.frame import Triple
from voxquilt.planning.shape_probe import Probe
from voxquilt.stitching.blend import FlooredBlend
from voxquilt.stitching.products.disagreement import Moments
from voxquilt.stitching.stitch import Stitch
from voxquilt.vocabulary import LABELS

MIB = 2**20

# Measured: what a process grows by once it runs (code that is loaded late, threads, oneDNN's kernels), and the pieces
# in which scores go back to native space.
_LATE, _PIECES = 70 * MIB, 60 * MIB
# Likewise, of drawing pictures while the network runs.
_PICTURES = 25 * MIB
# Likewise, of counting components of labels that are nearly noise, as those of a network that is hardly trained.
_COMPONENTS = 70 * MIB
# Tensors up to 32 MiB are kept by malloc when they are freed, at most so much in all.
_KEPT = 110 * MIB


@dataclass(frozen=True)
class OutputFile:
    """A volume that is written for each subject.

    Args:
        name: '<product>' or '<output>_<product>'.
        voxel_bytes: Bytes of a voxel, over all channels.
        packed: Its expected size as .nii.gz, as a share of its voxels.
        labels: Whether it holds labels.
        file_bytes: Bytes of a voxel in the file, unpacked.
    """

    name: str
    voxel_bytes: int
    packed: float
    labels: bool
    file_bytes: int


@dataclass(frozen=True)
class OutputPlan:
    """The files and sums that a network's outputs outputs.

    Args:
        files: Volumes that are written for each subject.
        sums: Bytes of sums per voxel of the ring, over all outputs and blends.
        blends: Number of separate sums.
    """

    files: list[OutputFile]
    sums: float
    blends: int


@dataclass(frozen=True)
class RunSettings:
    """The settings that determine how much memory and disk a run takes, besides its subjects and its network.

    Args:
        stitch: How patches become volumes.
        folder: Folder of the outputs.
        patch_size: Voxels along i, j, k.
        batch_size: Patches per forward pass.
        num_workers: Threads that load subjects ahead.
        in_memory: Bytes; larger products wait on disk.
        compress: Whether outputs are .nii.gz.
        base: Bytes that the process holds before the run, including its libraries and weights.
        gpu: Whether the network runs on a GPU.
        weights: Bytes of the network's weights that are on the device at a time.
        skips: Whether patches without foreground are skipped.
        pictures: Whether pictures are drawn.
        images_on_device: Whether images are prepared on the GPU and kept there while patches are cut from them.
        device_memory: Bytes of the GPU that the process can have.
        keeps_images: Bytes; images that take no more as they are stored are kept until their subject is written.
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
    images_on_device: bool = False
    device_memory: int = 2**63
    keeps_images: float = 0


@dataclass(frozen=True)
class Requirements:
    """The memory and disk that a run needs, in bytes.

    Args:
        host: Memory of a process at its peak, by what it is used for.
        device: Memory of its GPU, likewise; empty without one.
        disk: Expected size of the outputs.
        bound: Largest possible size of the outputs: unpacked.
        scratch: Size of the unnamed files of one process during the run.
    """

    host: Mapping[str, int]
    device: Mapping[str, int]
    disk: int
    bound: int
    scratch: int

    @property
    def memory(self) -> int:
        """Total memory on the host."""
        return sum(self.host.values())

    @property
    def images_on_device(self) -> bool:
        """Whether images are counted on the GPU."""
        return "images" in self.device


def plan_outputs(
    stitch: Stitch, outputs: Mapping[str, Sequence[int]], patch_size: Triple, layout: str = "auto"
) -> OutputPlan:
    """The files and sums that a network's outputs outputs.

    Args:
        stitch: How patches become volumes.
        outputs: Shapes (B, C, I, J, K) by name.
        patch_size: Voxels along i, j, k.
        layout: How outputs lie in patches; see `voxquilt.geometry.output_layout`.

    Raises:
        OutputError: a product that an output does not have.
    """
    files, sums, blends = [], 0.0, 0
    for output, shape in outputs.items():
        # The ring of a cropped output has the output's voxels, not the patch's.
        channels, share = shape[1], 1.0 if layout == "cropped" else prod(shape[2:]) / prod(patch_size)
        for blend, specs in stitch.specs(output, channels):
            for averaged in dict.fromkeys(spec.averaged for spec in specs.values()):
                moments = averaged if isinstance(averaged, Moments) else None
                sums += share * (
                    moments.channels(channels) * (8 if moments.is_double else 4) if moments else channels * 4
                )
                sums += share * 4 * isinstance(blend, FlooredBlend)  # sums of weights
                blends += 1
            for product, spec in specs.items():
                count, dtype = spec.product.form(channels)
                name = "_".join(filter(None, (output, product)))
                size, written = count * dtype.itemsize, count * (4 if dtype == np.float16 else dtype.itemsize)
                files.append(OutputFile(name, size, spec.packed, spec.product.kind == LABELS, written))
    return OutputPlan(files, sums, blends)


def bytes_on_disk(files: Sequence[OutputFile], voxels: int, *, compress: bool) -> int:
    """Expected bytes on disk of the output files of so many native voxels."""
    return round(sum(file.file_bytes * (file.packed if compress else 1) for file in files) * voxels)


def estimate(size: RunSize, probe: Probe, outputs: OutputPlan, settings: RunSettings) -> Requirements:
    """The memory of a process at its peak, if its largest subjects are held at a time, and the disk of all subjects.

    Args:
        size: The run's subjects.
        probe: The network's forward pass.
        outputs: What its outputs outputs.
        settings: The settings of the run.
    """
    patch, batch = prod(settings.patch_size), settings.batch_size
    ahead = min(size.subjects, settings.num_workers + 1)
    # One subject is predicted while another is written; a third waits only where writing takes longer than predicting.
    held = min(size.subjects, 2)
    volumes = [file.voxel_bytes * size.largest for file in outputs.files]
    large = [volume for volume in volumes if volume > settings.in_memory]
    labels = any(file.labels for file in outputs.files)
    sums = round(size.ring * (outputs.sums + 4 * outputs.blends * settings.skips)) + 4 * patch * outputs.blends
    writing = size.largest * (32 if settings.stitch.postprocess and labels else labels)
    network, kept = probe.peak_bytes, sum(volumes) - sum(large)
    batches = 2 * batch * size.channels * patch * 4
    images = {
        "images": ahead * size.loaded,
        "reading": size.reading if size.subjects > 1 or settings.pictures else max(0, size.reading - network),
    }
    host = {
        "process": settings.base + _LATE + _PICTURES * settings.pictures + _COMPONENTS * (settings.keeps_images > 0),
        **images,
        "batches": batches,
        "products": held * kept,
        "writing": writing if size.subjects > 1 else max(0, writing - network),
    }
    device = {}
    if settings.gpu:
        host |= {"network": probe.output_bytes, "sums": 0}
        copied = 3 * batches // 2  # the network gets a copy, since a batch may have to be predicted again
        device = {"weights": settings.weights, "network": network, "batches": copied, "sums": sums}
        # As it is decided when a subject's first outputs come: half of what is free is left to the network.
        free = settings.device_memory - settings.weights - network - copied
        device |= {"products": held * sum(volumes)} if sums + sum(volumes) <= free / 2 else {}
    else:
        host |= {"network": max(network + min(network // 2, _KEPT), probe.output_bytes + _PIECES), "sums": sums}
    # Also those of subjects that are written. Only a subject's images that are not changed share memory with these.
    stored = min(size.subjects, ahead + 1) * size.largest_file * (size.largest_file <= settings.keeps_images)
    if settings.gpu and settings.images_on_device:
        device |= images
        host |= {"images": 0, "reading": size.stored + STAGED, "batches": 0}
    host |= {"images as stored": stored} if stored else {}
    disk = bytes_on_disk(outputs.files, size.voxels, compress=settings.compress)
    bound = bytes_on_disk(outputs.files, size.voxels, compress=False)
    return Requirements(host, device, disk, bound, held * sum(large))
