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
from voxquilt.geometry.output_layout import describe_layouts
from voxquilt.models.ensemble import size_of
from voxquilt.models.predictor import PatchPredictor
from voxquilt.models.several_predictors import predictors_of
from voxquilt.planning.network_check import ChannelsError, check_network
from voxquilt.planning.planner import MAX_BATCH, Forecast, Planner
from voxquilt.planning.resource_estimate import RunSettings

log = logging.getLogger("voxquilt")

T = TypeVar("T")

AUTO = "auto"
"""The batch size that stands for one chosen here."""


@runtime_checkable
class PlannedSubjects(Protocol):
    """What preflight checks need to know of the subjects of a run."""

    batch_size: int | str

    @property
    def group(self) -> Group:
        """The processes of the run."""
        ...

    @property
    def run_size(self) -> RunSize:
        """The size of the run: of the subjects that can be predicted."""
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
        """Whether there are subjects besides these: some that are done, or of another shard. If none of these can be
        predicted, the configuration may then be right nonetheless."""
        ...

    def set_apart(self, problem: Callable[[SubjectSize], str | None]) -> None:
        """Have subjects with a problem fail, unless all have one; called by all processes."""
        ...


def check_models(
    trainer: Trainer,
    module: LightningModule,
    settings_of: Callable[[LightningModule, int], RunSettings],
    subjects: PlannedSubjects,
    *,
    refuse: bool = True,
) -> list[Forecast]:
    """Check each model of a run as `check_before_run` does, and agree on one batch size.

    Args:
        trainer, module: Trainer and network of the run.
        settings_of: The settings of a model, from its module and its number.
        subjects: The subjects of the run, which get the batch size.
        refuse: See `check_before_run`.

    Returns:
        The forecasts that can be made, that of the model that needs most memory first.

    Raises:
        ConfigError: see `check_before_run`.
    """
    predictors = predictors_of(module)
    weights = sum(map(weights_on_device, predictors))
    checks = [
        check_before_run(
            trainer, predictor, replace(settings_of(predictor, n), weights=weights), subjects, refuse=refuse
        )
        for n, predictor in enumerate(predictors)
    ]
    subjects.batch_size = min(size for size, _ in checks)
    forecasts = [forecast for _, forecast in checks if forecast is not None]
    return sorted(forecasts, key=lambda forecast: -forecast.requirements.memory)


def check_before_run(
    trainer: Trainer, module: LightningModule, settings: RunSettings, subjects: PlannedSubjects, *, refuse: bool = True
) -> tuple[int, Forecast | None]:
    """Forecast what the run needs, agree on the batch size, and refuse what does not fit; the same in all processes.

    A subject that cannot be predicted because of its channels or its size is set apart, to fail by itself.

    Args:
        trainer, module: Trainer and network of the run.
        settings: Settings of the run; the batch size is chosen if that of the subjects is 'auto'.
        subjects: The subjects of the run.
        refuse: False leaves the refusal in the forecast.

    Returns:
        The batch size, and the forecast: None if there is nothing to predict, if no header can be used, or if a product
        cannot be made of an output, so that every subject fails.

    Raises:
        ConfigError: the run cannot fit, or network and patches do not fit each other; the message names what would.
    """
    group = subjects.group
    base = Planner(trainer, module, subjects.run_size, settings)
    _set_other_channels_apart(module, settings.patch_size, subjects)
    _set_misfits_apart(base, subjects, settings)
    channels = subjects.run_size.channels if subjects.run_size.channel_counts else 0
    if subjects.batch_size == AUTO:
        settings = replace(settings, batch_size=_batch_size(trainer, module, base, settings, subjects))
    planner = base.with_changes(subjects.run_size, settings)
    forecast = _unless_a_product_is_missing(planner.plan) if channels else None
    if forecast is not None and isinstance(module, PatchPredictor):
        known = None if forecast.probe.guessed else forecast.probe
        names = settings.stitch.class_names
        try:
            probe = check_network(module.network, subjects.images, channels, settings.patch_size, names, known)
        except ChannelsError as error:
            if not subjects.has_others:
                raise
            expected = {channels: error.wanted}
            subjects.set_apart(lambda size: _channels_problem(size, expected))
            return settings.batch_size, None
        lines = describe_layouts(module.network.layout, probe.outputs, settings.patch_size) if probe else []
        if probe and settings.stitch.blends[""].averages:
            lines += _describe_integers(probe.types)
        forecast.notes.extend(lines)
        if group.rank == 0 and refuse:
            for line in lines:
                log.info("%s", line)
    if forecast is not None and subjects.are_shared:
        forecast.notes.append("each process is counted as if it predicted shared volumes by itself.")
    reasons = list(filter(None, group.gather(forecast.refusal if forecast else None)))
    if reasons and refuse:
        raise ConfigError(reasons[0])
    return settings.batch_size, forecast


def _describe_integers(types: Mapping[str, torch.dtype]) -> list[str]:
    """A line of text for each output of integers, which may be labels: those are no numbers to average."""
    return [
        f"the network's output {name!r} holds integers ({str(dtype).removeprefix('torch.')}), which are averaged where "
        f"patches overlap, and interpolated where voxels have other sizes. If they are labels, let the network give "
        f"scores, or set stitch.overlap_mode=crop stitch.order=0."
        for name, dtype in types.items()
        if not dtype.is_floating_point
    ]


def weights_on_device(module: LightningModule) -> int:
    """Bytes of weights on the device at a time; for an ensemble that takes turns there, those of the largest member."""
    if not isinstance(module, PatchPredictor):
        return size_of(module)
    members = module.network.networks
    sizes = [size_of(member) for member in members]
    return max(sizes) if members.offload is True else sum(sizes)


def _batch_size(
    trainer: Trainer, module: LightningModule, base: Planner, settings: RunSettings, subjects: PlannedSubjects
) -> int:
    """The batch size that fits every process; the smallest device decides."""
    size = subjects.run_size
    if not size.channel_counts:
        return min(subjects.group.gather(1))

    def largest() -> int:
        device = trainer.strategy.root_device
        planner = base.with_changes(size, settings)
        if device.type != "cuda":
            return planner.largest_batch()
        # In the type of the run's precision, which Lightning gives the module later.
        forward: Callable[[torch.Tensor], object] = trainer.precision_plugin.convert_module(module).to(device).eval()
        with torch.inference_mode(), trainer.precision_plugin.predict_step_context():
            largest = largest_by_trial(forward, (size.channels, *settings.patch_size), device, planner)
        torch.cuda.empty_cache()
        return largest

    return min(subjects.group.gather(_unless_a_product_is_missing(largest) or 1))


def _set_other_channels_apart(module: LightningModule, patch_size: Triple, subjects: PlannedSubjects) -> None:
    """Where subjects differ in their number of channels, have those fail that the network cannot take."""
    counts = sorted(subjects.run_size.channel_counts)
    if len(counts) < 2 or not isinstance(module, PatchPredictor):
        return
    expected: dict[int, int] = {}
    for count in counts:
        try:
            check_network(module.network, [], count, patch_size, None)
        except ChannelsError as error:
            expected[count] = error.wanted
        except ConfigError:  # for the patch size, say, which concerns all subjects
            return
    if len(expected) < len(counts) or subjects.has_others:
        subjects.set_apart(lambda size: _channels_problem(size, expected))


def _channels_problem(size: SubjectSize, expected: Mapping[int, int]) -> str | None:
    """Why the network cannot take a subject's channels; None if it can.

    Args:
        size: The size of the subject.
        expected: The number of channels that the network takes, by the numbers that it does not take.
    """
    count, wanted = size.channels, expected.get(size.channels)
    return None if wanted is None else f"it has {count} channel{'s' * (count != 1)}, and the network takes {wanted}."


def _set_misfits_apart(base: Planner, subjects: PlannedSubjects, settings: RunSettings) -> None:
    """Where the run does not fit, but would with small subjects, have those fail that would not fit by themselves."""
    gather = subjects.group.gather

    def planner() -> Planner:
        return base.with_changes(subjects.run_size, settings)

    refusal = (
        _unless_a_product_is_missing(lambda: planner().plan().refusal) if subjects.run_size.channel_counts else None
    )
    if any(gather(refusal is not None)):
        alone = planner()
        if all(gather(alone.explain_misfit(alone.smallest_subject) is None)):
            subjects.set_apart(alone.explain_misfit)


def _unless_a_product_is_missing(action: Callable[[], T]) -> T | None:
    """The action's result; None where a product cannot be made of an output, which each subject's row will report."""
    try:
        return action()
    except ConfigError:
        raise
    except VoxquiltError as error:
        log.debug("no plan: %s", error)
        return None


def largest_by_trial(
    forward: Callable[[torch.Tensor], object], shape: Sequence[int], device: torch.device, planner: Planner
) -> int:
    """The largest batch that a device takes in a real forward pass, with memory for a quarter more, a power of 2.

    Args:
        forward: The network on the device.
        shape: (C, pi, pj, pk).
        device: The device.
        planner: Knows what else will be on the device, whose memory is taken during the trial.
    """
    try:
        beside = torch.empty(planner.device_beside_network(), dtype=torch.uint8, device=device)
    except torch.OutOfMemoryError:
        beside = None  # then sums and images go to the host
    size = 1
    while size <= MAX_BATCH:
        try:
            forward(torch.zeros(size * 5 // 4 + 1, *shape, device=device))
        except RuntimeError:  # out of memory, or more values than an operator can count
            break
        size *= 2
    del beside
    return max(1, size // 2)
