"""Checks before the first patch that a run fits the machine and that network and patches fit each other."""

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Protocol, TypeVar, runtime_checkable

import torch
from lightning.pytorch import LightningModule, Trainer

from voxquilt.data.subject_size import RunSize, SubjectSize
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.output_layout import described
from voxquilt.models.ensemble import size_of
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.network_check import ChannelsError, check_fits
from voxquilt.planning.planner import MOST, Forecast, Planner
from voxquilt.planning.resource_estimate import RunSettings

log = logging.getLogger("voxquilt")

T = TypeVar("T")

AUTO = "auto"
"""The batch size that is chosen here."""


@runtime_checkable
class PlannedSubjects(Protocol):
    """The subjects of a run, as far as it has to be known whether they fit."""

    batch_size: int | str

    @property
    def group(self) -> Group:
        """The processes of the run."""
        ...

    @property
    def run_size(self) -> RunSize:
        """What the subjects that can be predicted take."""
        ...

    @property
    def images(self) -> Sequence[str]:
        """Names of a subject's images."""
        ...

    @property
    def are_shared(self) -> bool:
        """Whether several processes share some volume."""
        ...

    @property
    def has_others(self) -> bool:
        """Whether there are subjects beside these: some that are done, or of another shard. If none of these can be
        predicted, it may then be no fault of the configuration."""
        ...

    def set_apart(self, problem: Callable[[SubjectSize], str | None]) -> None:
        """Have subjects fail that have a problem, unless all have it; called by all processes."""
        ...


def check_before_run(
    trainer: Trainer, module: LightningModule, settings: RunSettings, subjects: PlannedSubjects, *, refuse: bool = True
) -> tuple[int, Forecast | None]:
    """Work out the plan, agree on the batch size, and refuse what does not fit, alike in all processes.

    A subject that alone cannot be predicted, for its channels or its size, is set apart to fail by itself.

    Args:
        trainer, module: Trainer and network of the run.
        settings: Settings of the run; the batch size is chosen if that of the subjects is 'auto'.
        subjects: The subjects of the run.
        refuse: False leaves the refusal in the plan.

    Returns:
        The batch size, and the plan: None if there is nothing to predict, no header can be used, or an output does not
        have a product, by which every subject fails.

    Raises:
        ConfigError: the run cannot fit, or network and patches do not fit each other; what would fit is said.
    """
    group = subjects.group
    first = Planner(trainer, module, subjects.run_size, settings)
    _set_other_channels_apart(module, settings.patch_size, subjects)
    _set_misfits_apart(first, subjects, settings)
    channels = subjects.run_size.channels if subjects.run_size.of_channels else 0
    if subjects.batch_size == AUTO:
        settings = replace(settings, batch_size=_batch_size(trainer, module, first, settings, subjects))
    planner = first.changed(subjects.run_size, settings)
    forecast = _unless_a_product_is_missing(planner.plan) if channels else None
    if forecast is not None and isinstance(module, PatchPredictor):
        known = None if forecast.probe.guessed else forecast.probe
        names = settings.stitch.class_names
        try:
            passed = check_fits(module.network, subjects.images, channels, settings.patch_size, names, known)
        except ChannelsError as error:
            if not subjects.has_others:
                raise
            takes = {channels: error.wanted}
            subjects.set_apart(lambda size: _channels_problem(size, takes))
            return settings.batch_size, None
        lines = described(module.network.layout, passed.outputs, settings.patch_size) if passed else []
        forecast.notes.extend(lines)
        if group.rank == 0 and refuse:
            for line in lines:
                log.info("%s", line)
    if forecast is not None and subjects.are_shared:
        forecast.notes.append("each process is counted as if it did the volumes that several share by itself.")
    reasons = list(filter(None, group.gather(forecast.refusal if forecast else None)))
    if reasons and refuse:
        raise ConfigError(reasons[0])
    return settings.batch_size, forecast


def weights_on_device(module: LightningModule) -> int:
    """Bytes of weights on the device at a time; for an ensemble that takes turns there, those of the largest member."""
    if not isinstance(module, PatchPredictor):
        return size_of(module)
    members = module.network.networks
    sizes = [size_of(member) for member in members]
    return max(sizes) if members.offload is True else sum(sizes)


def _batch_size(
    trainer: Trainer, module: LightningModule, first: Planner, settings: RunSettings, subjects: PlannedSubjects
) -> int:
    """Patches that fit; one number for all processes, which the smallest device decides."""
    size = subjects.run_size
    if not size.of_channels:
        return min(subjects.group.gather(1))

    def largest() -> int:
        device = trainer.strategy.root_device
        if device.type == "cuda":
            return _largest_by_trial(module, size.channels, settings.patch_size, device)
        return first.changed(size, settings).largest()

    return min(subjects.group.gather(_unless_a_product_is_missing(largest) or 1))


def _set_other_channels_apart(module: LightningModule, patch_size: Triple, subjects: PlannedSubjects) -> None:
    """Where subjects differ in their number of channels, those fail that the network cannot take."""
    counts = sorted(subjects.run_size.of_channels)
    if len(counts) < 2 or not isinstance(module, PatchPredictor):
        return
    takes: dict[int, int] = {}
    for count in counts:
        try:
            check_fits(module.network, [], count, patch_size, None)
        except ChannelsError as error:
            takes[count] = error.wanted
        except ConfigError:  # for the patch size, say, which concerns all subjects
            return
    if len(takes) < len(counts) or subjects.has_others:
        subjects.set_apart(lambda size: _channels_problem(size, takes))


def _channels_problem(size: SubjectSize, takes: Mapping[int, int]) -> str | None:
    """What is wrong with a subject's channels, if they are not what the network takes."""
    count, wanted = size.channels, takes.get(size.channels)
    return None if wanted is None else f"it has {count} channel{'s' * (count != 1)}, and the network takes {wanted}."


def _set_misfits_apart(first: Planner, subjects: PlannedSubjects, settings: RunSettings) -> None:
    """Where the run does not fit, but would with small subjects, those fail that would not fit by themselves."""
    gather = subjects.group.gather

    def planner() -> Planner:
        return first.changed(subjects.run_size, settings)

    refusal = _unless_a_product_is_missing(lambda: planner().plan().refusal) if subjects.run_size.of_channels else None
    if any(gather(refusal is not None)):
        alone = planner()
        if all(gather(alone.of_one(alone.smallest) is None)):
            subjects.set_apart(alone.of_one)


def _unless_a_product_is_missing(action: Callable[[], T]) -> T | None:
    """None where an output does not have a product: each subject fails by that, and its row says so."""
    try:
        return action()
    except ConfigError:
        raise
    except VoxquiltError as error:
        log.debug("no plan: %s", error)
        return None


def _largest_by_trial(module: LightningModule, channels: int, patch: Triple, device: torch.device) -> int:
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
