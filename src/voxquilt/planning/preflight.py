"""With which batches does a run go on, and does it go on at all? Agreed by all processes before the first patch."""

import logging
from collections.abc import Callable, Mapping
from dataclasses import replace
from typing import Any, TypeVar

import psutil
import torch
from lightning.pytorch import LightningModule, Trainer

from voxquilt.data.subject_size import SubjectSize
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.output_layout import described
from voxquilt.models.ensemble import size_of
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.network_check import ChannelsError, check_fits
from voxquilt.planning.planner import MOST, Forecast, Planner
from voxquilt.planning.resource_estimate import MIB, Settings

log = logging.getLogger("voxquilt")

T = TypeVar("T")

AUTO = "auto"


def settings_of(module: LightningModule, data: Any, writer: Any, device: torch.device) -> Settings:
    """What decides memory and disk, of a network, a GridDataModule and a VolumeWriter."""
    return Settings(
        data.grids.patch_size,
        1 if data.batch_size == AUTO else data.batch_size,
        data.num_workers,
        writer.in_memory * MIB,
        writer.form.suffix.endswith(".gz"),
        psutil.Process().memory_info().rss,
        gpu=device.type == "cuda",
        weights=on_device(module),
        skips=data.grids.skip is not None,
        postprocess=bool(writer.stitch.postprocess),
        overlay=writer.form.overlay or writer.tensorboard,
    )


def settled(
    trainer: Trainer, module: LightningModule, data: Any, writer: Any, *, refuse: bool = True
) -> Forecast | None:
    """Work out the plan, agree on the batch size, and refuse what does not fit, alike in all processes.

    A subject that alone cannot be predicted, for its channels or its size, is set apart to fail by itself.

    Args:
        trainer, module: Of the run.
        data: Its GridDataModule, set up; its batch size is settled.
        writer: Its VolumeWriter.
        refuse: False leaves the refusal in the plan.

    Returns:
        None if there is nothing to predict, no header can be used, or an output does not have a product: every subject
        fails by that.

    Raises:
        ConfigError: the run cannot fit, or network and patches do not fit each other; what would fit is said.
    """
    group, auto = data.plan.group, data.batch_size == AUTO
    settings = settings_of(module, data, writer, trainer.strategy.root_device)

    first = Planner(trainer, module, writer.stitch, data.plan.extent, settings, writer.output_dir)

    def planner(settings: Settings) -> Planner:
        return first.changed(data.plan.extent, settings)

    _set_other_channels_apart(module, data)
    _set_misfits_apart(lambda: planner(settings), data)
    of = data.plan.extent

    def largest() -> int:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            return _by_trial(module, of.channels, data.grids.patch_size, device)
        return planner(settings).largest()

    if auto:
        # One for all: what fits the smallest device.
        data.batch_size = min(group.gather(_tried(largest) or 1 if of.channels else 1))
        settings = replace(settings, batch_size=data.batch_size)
    found = _tried(lambda: planner(settings).plan()) if of.channels else None
    if found is not None and isinstance(module, PatchPredictor):
        known = None if found.probe.guessed else found.probe
        images, names = list(data.plan.cases[0].images), writer.stitch.class_names
        try:
            passed = check_fits(module.network, images, of.channels, data.grids.patch_size, names, known)
        except ChannelsError as error:
            if not _others_can(data):
                raise
            takes = {of.channels: error.wanted}
            _set_apart(data, lambda one: _of_channels(one, takes))
            return None
        lines = described(module.network.layout, passed.outputs, data.grids.patch_size) if passed else []
        found.notes.extend(lines)
        if group.rank == 0 and refuse:
            for line in lines:
                log.info("%s", line)
    if found is not None and any(task.team for task in data.plan.tasks):
        found.notes.append("each process is counted as if it did the volumes that several share by itself.")
    reasons = list(filter(None, group.gather(found.refusal if found else None)))
    if reasons and refuse:
        raise ConfigError(reasons[0])
    return found


def _others_can(data: Any) -> bool:
    """Whether there are subjects beside those of the plan, so that it may be no fault of the configuration if it has
    none that can be predicted: some that are done, or of another shard."""
    return bool(data.plan.done) or data.shard[1] > 1


def _set_other_channels_apart(module: LightningModule, data: Any) -> None:
    """Where subjects differ in their number of channels, those fail of which the network takes no patch."""
    counts = sorted(data.plan.extent.of_channels)
    if len(counts) < 2 or not isinstance(module, PatchPredictor):
        return
    takes: dict[int, int] = {}
    for count in counts:
        try:
            check_fits(module.network, [], count, data.grids.patch_size, None)
        except ChannelsError as error:
            takes[count] = error.wanted
        except ConfigError:  # of the patch size, say, which concerns all subjects
            return
    if len(takes) < len(counts) or _others_can(data):
        _set_apart(data, lambda one: _of_channels(one, takes))


def _of_channels(one: SubjectSize, takes: Mapping[int, int]) -> str | None:
    """What is wrong with a subject's channels, if they are not what the network takes."""
    count, wanted = one.channels, takes.get(one.channels)
    return None if wanted is None else f"it has {count} channel{'s' * (count != 1)}, and the network takes {wanted}."


def _set_misfits_apart(planner: Callable[[], Planner], data: Any) -> None:
    """Where the run does not fit, but would with small subjects, those fail that would not fit by themselves."""
    gather = data.plan.group.gather
    refusal = _tried(lambda: planner().plan().refusal) if data.plan.extent.of_channels else None
    if any(gather(refusal is not None)):
        alone = planner()
        if all(gather(alone.of_one(alone.smallest) is None)):
            _set_apart(data, alone.of_one)


def _set_apart(data: Any, problem: Callable[[SubjectSize], str | None]) -> None:
    """Have subjects fail that have a problem, unless all have it: then it is one of the run."""
    outlines = data.outlines()
    files = {case.subject: ", ".join(map(str, case.images.values())) for case in data.plan.cases}
    found = {name: problem(one) for name, one in outlines.items()}
    problems = {name: f"{files[name]}: {reason}" for name, reason in found.items() if reason is not None}
    if any(data.plan.group.gather(len(problems) < len(outlines))) or _others_can(data):
        data.set_apart(problems, [one for name, one in outlines.items() if name not in problems])


def on_device(module: LightningModule) -> int:
    """Bytes of weights on the device at a time; of an ensemble that takes turns there, those of the largest."""
    if not isinstance(module, PatchPredictor):
        return size_of(module)
    members = module.network.networks
    sizes = [size_of(member) for member in members]
    return max(sizes) if members.offload is True else sum(sizes)


def _tried(make: Callable[[], T]) -> T | None:
    """Nothing where an output does not have a product: each subject fails by that, and says so."""
    try:
        return make()
    except ConfigError:
        raise
    except VoxquiltError as error:
        log.debug("no plan: %s", error)
        return None


def _by_trial(module: LightningModule, channels: int, patch: Triple, device: torch.device) -> int:
    """Patches that a device takes in a real forward pass, with room for as many as were tried and a fifth."""
    forward: Callable[[torch.Tensor], object] = module.to(device).eval()
    size = 1
    with torch.inference_mode():
        while size <= MOST:
            try:
                forward(torch.zeros(size * 5 // 4 + 1, channels, *patch, device=device, dtype=torch.float32))
            except torch.OutOfMemoryError:
                break
            size *= 2
    torch.cuda.empty_cache()
    return max(1, size // 2)
