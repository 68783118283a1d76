"""Prepares a self-check: synthetic images after the first subject, and a patch of it that the network has predicted."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from math import prod
from pathlib import Path

import torch
from lightning.pytorch import LightningModule
from torch import Tensor

from voxquilt.data.batch_buffer import BatchBuffer
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.formats.image_file import open_image
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.data.subject_task import SubjectTask
from voxquilt.errors import ConfigError, InputError
from voxquilt.geometry.frame import Padding, Triple, to_triple
from voxquilt.geometry.grid import overlap_of_step
from voxquilt.geometry.output_layout import factor_of
from voxquilt.geometry.padding import NO_PADDING
from voxquilt.geometry.space import Box, Space
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.network_check import check_network, find_halo
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.selfcheck.images import (
    CLASSES,
    CONSTANT,
    NOISE,
    RAMPS,
    Channel,
    describe,
    patterns_of,
    read_forms,
    reduced_shape,
    with_margin,
    write_subject,
)
from voxquilt.selfcheck.masks import masked, write_mask
from voxquilt.selfcheck.networks import OutputForm
from voxquilt.selfcheck.trial import Trial, outputs_on_host
from voxquilt.text import reason_of


@dataclass
class Prepared:
    """What all processes of a self-check need to know.

    Args:
        folder: Where it lies, and where rounds write.
        form: How the network's outputs lie in patches.
        files: The images of each synthetic subject.
        channels: What the channels of ramps, constant and classes are.
        span: The least and the greatest value of the image of classes.
        trial: A patch, and what the network gives for it.
        description: What was sent through.
        where: Where the trial's patch lies.
        box: The voxels that `preprocess.crop`, or else `data.within`, has to leave; None where neither crops.
    """

    folder: Path
    form: OutputForm
    files: dict[str, dict[str, Path]]
    channels: dict[str, list[Channel]]
    span: tuple[float, float]
    trial: Trial
    description: str = ""
    where: str = ""
    box: Box | None = None

    @property
    def voxels(self) -> int:
        """Voxels of a synthetic image."""
        return prod(open_image(next(iter(self.files[CLASSES].values()))).frame.shape)

    def write(self) -> None:
        """Leave it for the other processes."""
        content = {
            "form": asdict(self.form), "span": self.span,
            "files": {name: {image: str(path) for image, path in files.items()} for name, files in self.files.items()},
            "channels": {name: [asdict(channel) for channel in own] for name, own in self.channels.items()},
        }  # fmt: skip
        (self.folder / "prepared.json").write_text(json.dumps(content))
        torch.save({"patch": self.trial.patch, "outputs": dict(self.trial.outputs)}, self.folder / "trial.pt")

    @classmethod
    def read(cls, folder: Path) -> "Prepared":
        """What rank 0 has written."""
        content = json.loads((folder / "prepared.json").read_text())
        form = content["form"]
        halo = [(before, after) for before, after in form["halo"]]
        factors = {name: to_triple(factor, "a factor") for name, factor in form["factors"].items()}
        return cls(
            folder,
            OutputForm(form["channels"], factors, (halo[0], halo[1], halo[2])),
            {name: {i: Path(path) for i, path in files.items()} for name, files in content["files"].items()},
            {name: [Channel(**one) for one in own] for name, own in content["channels"].items()},
            (content["span"][0], content["span"][1]),
            Trial(**torch.load(folder / "trial.pt", weights_only=True)),
        )


def prepare(
    predictor: LightningModule,
    data: GridDataModule,
    class_names: Sequence[str] | None,
    folder: Path,
    *,
    has_splines: bool = False,
    is_series: bool = False,
) -> Prepared:
    """Run the network on a patch of the first subject, and write synthetic images of its form.

    Args:
        predictor: The user's, which stays on the host.
        data: The user's subjects.
        class_names: Names of the labels.
        folder: Where to write; it is made.
        has_splines: Whether cubic splines interpolate somewhere.
        is_series: Whether 4-D files are series of volumes, of which one is imitated.

    Raises:
        VoxquiltError: the first subject or the network cannot be used.
    """
    folder.mkdir(parents=True)
    case, grids = data.cases[0], data.grids
    one_hot = grids.preprocess.one_hot or {}
    names = [name for name in case.images if name not in one_hot]
    forms = read_forms(case, names)
    forms = [replace(form, channels=1) if is_series else form for form in forms]
    native = open_image(case.images[names[0]]).frame
    count = sum(form.channels for form in forms) + sum(map(len, one_hot.values()))
    form, trial, where = _try_network(predictor, grids, case, names, count, class_names)
    space = grids.preprocess.space(Subject({name: ScalarImage(case.images[name]) for name in names}))
    shape = native.shape  # whose patches line up with an output of larger voxels
    if form.factor == (1, 1, 1):
        shape = reduced_shape(shape, *_along_native(grids, space), has_splines=has_splines)
    box = mask = None
    if grids.preprocess.crop:  # of which 0 in the file has to be 0 as an intensity
        forms = [replace(one, scaling=(1.0, 0.0)) for one in forms]
        shape, box = with_margin(shape)
    elif grids.within is not None:
        shape, mask, box = masked(shape, native.spacing, grids.margin)
    files, noise = {}, []
    for kind in (*RAMPS, CONSTANT, NOISE, CLASSES):
        subject, written = write_subject(folder / "in" / kind, kind, forms, shape, None if mask else box)
        files[kind] = dict(subject.images)
        if mask is not None:
            write_mask(next(iter(subject.images.values())), mask)
        noise += written
    torch.save([torch.from_numpy(values.astype("float64")) for values in noise], folder / "noise.pt")
    written_frame = open_image(next(iter(files[RAMPS[0]].values()))).frame
    forms = [replace(one, affine=written_frame.affine) for one in forms]
    channels = {kind: patterns_of(kind, forms, shape) for kind in (*RAMPS, CONSTANT, CLASSES)}
    span = _span(channels[CLASSES][0], shape)
    prepared = Prepared(folder, form, files, channels, span, trial, describe(forms, shape), where, box)
    prepared.write()
    return prepared


def _try_network(
    predictor: LightningModule,
    grids: GridLoader,
    case: SubjectFiles,
    names: Sequence[str],
    channels: int,
    class_names: Sequence[str] | None,
) -> tuple[OutputForm, Trial, str]:
    patch_size = grids.patch_size
    halo, layout = NO_PADDING, "auto"
    if isinstance(predictor, PatchPredictor):
        network = predictor.network
        layout = network.layout
        check_network(network, names, channels, patch_size, class_names)
        if layout == "cropped":
            halo = find_halo(network, [case], patch_size)
        network.leave_out_flips()  # they are checked with the stand-ins
    patch, where = _real_patch(grids, case, channels, halo)
    try:
        outputs = outputs_on_host(predictor, patch)
    except Exception as error:  # a network's own code may raise anything
        raise ConfigError(
            f"run.selfcheck: the network cannot predict a patch of {case.subject} on the host in float32: "
            f"{reason_of(error)}"
        ) from error
    inner: Triple = to_triple(
        [n - before - after for n, (before, after) in zip(patch_size, halo, strict=True)], "an output's voxels"
    )  # fmt: skip
    factors = {name: factor_of(layout, name, output.shape, inner) for name, output in outputs.items()}
    form = OutputForm({name: output.shape[1] for name, output in outputs.items()}, factors, halo)
    return form, Trial(patch, outputs), where


def _real_patch(grids: GridLoader, case: SubjectFiles, channels: int, halo: Padding) -> tuple[Tensor, str]:
    """A patch from the middle of a subject, as the network gets it, and where it lies."""
    one_hot = grids.preprocess.one_hot or {}
    if any(not case.images[name].is_file() for name in one_hot if name in case.images):
        noise = torch.randn(1, channels, *grids.patch_size, generator=torch.Generator().manual_seed(0))
        return noise, "noise, since there are no labels of the stage before"
    loaded = replace(grids, halo=halo).load(SubjectTask(case))
    numbers = loaded.work.numbers
    if not numbers:
        raise InputError(f"run.selfcheck: {case.subject} has no patch to predict (data.skip, data.within).")
    buffer = BatchBuffer((1, loaded.source.channels, *grids.patch_size))
    number = numbers[len(numbers) // 2]
    loaded.source.hand_over()
    buffer.begin()
    buffer.fill(loaded.source, [number], 0)
    return buffer.data.clone(), f"patch {number} of {len(loaded.work.grid)} of {case.subject}"


def _along_native(grids: GridLoader, space: Space) -> tuple[list[float], Triple, Triple]:
    """Native voxels per model voxel, voxels of a patch, and voxels from patch to patch, along the native axes."""
    overlap = grids.patch_overlap if grids.step is None else overlap_of_step(grids.patch_size, grids.step)
    axes = [m.axis for m in space.maps]
    ratio = [abs(1 / m.scale) for m in space.maps]
    patch = [grids.patch_size[axis] for axis in axes]
    step = [grids.patch_size[axis] - overlap[axis] for axis in axes]
    return ratio, to_triple(patch, "a patch"), to_triple(step, "a step")


def _span(channel: Channel, shape: Triple) -> tuple[float, float]:
    ends = [channel.offset, channel.offset]
    for slope, n in zip(channel.slope, shape, strict=True):
        ends = [min(ends[0], ends[0] + slope * (n - 1)), max(ends[1], ends[1] + slope * (n - 1))]
    return (ends[0], ends[1]) if ends[1] > ends[0] else (ends[0] - 1, ends[1] + 1)
