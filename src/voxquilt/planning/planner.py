"""Compares what a run needs with what the machine has, and finds settings that fit if that is too little."""

import contextlib
from copy import copy
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from voxquilt.data.subject_size import RunSize, SubjectSize, run_size
from voxquilt.errors import VoxquiltError
from voxquilt.geometry.frame import Triple
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.machine import MachineResources, disk_free, memory_available
from voxquilt.planning.resource_estimate import OutputPlan, Requirements, RunSettings, estimate, plan_outputs
from voxquilt.planning.shape_probe import Probe, probe
from voxquilt.planning.smaller_settings import smaller_settings
from voxquilt.text import byte_size, of_subjects

# Voxels of a batch beyond which a CPU's throughput no longer rises: its cores are busy with one patch.
_CPU_VOXELS = 2**20
MAX_BATCH = 64
"""The largest batch size that is chosen."""
# The share of memory that a chosen batch size may use; the rest is left to the operating system and the unforeseen.
_SHARE = 0.8


@dataclass(frozen=True)
class Forecast:
    """What a process will need.

    Args:
        size: The size of the run.
        settings: The settings that will be used, with the batch size as a number and the place of images that fits.
        outputs: What the network's outputs become.
        probe: A forward pass with that batch size.
        requirements: Memory and disk of the process, in bytes.
        machine: What this process's machine has free.
        notes: What a reader of the numbers should know.
        refusal: Why the run cannot fit, and what would; None if it can.
    """

    size: RunSize
    settings: RunSettings
    outputs: OutputPlan
    probe: Probe
    requirements: Requirements
    machine: MachineResources
    notes: list[str]
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        """The forecast as in plan.json, in bytes."""
        required = self.requirements
        return {
            "batch_size": self.settings.batch_size,
            "outputs": {name: list(shape) for name, shape in self.probe.outputs.items()},
            "products": [asdict(file) for file in self.outputs.files],
            "memory": {"host": dict(required.host), "host_total": required.memory}
            | {"device": dict(required.device), "device_total": sum(required.device.values())},
            "sums_on": "device, if it has twice their room free" if required.device else "host",
            "images_on": "device" if required.images_on_device else "host",
            "disk": {"expected": required.disk, "at_most": required.bound, "scratch": required.scratch},
            "room": asdict(self.machine),
            "notes": self.notes,
        }


class Planner:
    """Forecasts what a process of a run needs.

    Args:
        trainer: The trainer of the run.
        module: The network.
        size: The size of the run.
        settings: The settings of the run.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, size: RunSize, settings: RunSettings) -> None:
        self._module, self._size, self._settings = module, size, settings
        self._device = trainer.strategy.root_device
        self._autocast = _autocast(str(trainer.precision))
        self._machine = MachineResources(memory_available(), disk_free(settings.folder), trainer.num_devices)
        self._notes: list[str] = []
        # Shared with the planners that are derived from this one: probing a large network takes a while.
        self._probes: dict[tuple[int, Triple, int], Probe] = {}
        self._layout = module.network.layout if isinstance(module, PatchPredictor) else "auto"
        self._guesses: dict[tuple[int, Triple, int], str] = {}

    def with_changes(self, size: RunSize, settings: RunSettings) -> "Planner":
        """A planner for other subjects and settings."""
        other = copy(self)
        other._size, other._settings, other._notes = size, settings, []
        return other

    def plan(self) -> Forecast:
        """Forecast what the run needs with these settings.

        Raises:
            OutputError: a product that the network's output does not have.
        """
        settings = self._settings
        probe, outputs, required = self._estimate(settings)
        if required.images_on_device < settings.images_on_device:
            self._notes.append("images stay on the host: the device has too little memory for them beside the rest.")
            settings = replace(settings, images_on_device=False)
        if isinstance(self._module, PatchPredictor) and self._module.network.compiled:
            self._notes.append("torch.compile takes memory and time of its own, which are not counted.")
        if self._size.unread:
            self._notes.append(f"{of_subjects(self._size.unread)} cannot be predicted, and will fail.")
        return Forecast(
            self._size,
            settings,
            outputs,
            probe,
            required,
            self._machine,
            self._notes,
            self._refusal(settings, required),
        )

    def _refusal(self, settings: RunSettings, required: Requirements) -> str | None:
        shortage = self._shortage(required)
        if shortage is None:
            return None
        advice = self._advice(settings)
        return (
            f"the run does not fit {shortage} {advice} (run.dry_run=true shows what takes how much. Nothing was "
            f"started.)"
        )

    @property
    def smallest_subject(self) -> SubjectSize:
        """The size of a subject of a single patch: where not even this fits, the subjects are not to blame."""
        patch, channels = self._settings.patch_size, min(self._size.channel_counts, default=self._size.channels)
        loaded = 4 * channels * prod(patch)
        return SubjectSize(patch, patch, (1.0, 1.0, 1.0), channels, 1, prod(patch), *[loaded] * 4)

    def explain_misfit(self, subject: SubjectSize) -> str | None:
        """Why a subject cannot be predicted even by itself, and what would help; None if it can.

        Args:
            subject: The size of the subject.

        Raises:
            OutputError: a product that the network's output does not have.
        """
        settings = self._settings
        alone = self.with_changes(run_size([subject]), settings)
        shortage = alone._shortage(alone._estimate(settings)[2])
        if shortage is None:
            return None
        sizes = (
            " x ".join(f"{n:.5g}" for n in numbers) for numbers in (subject.native, subject.spacing, subject.model)
        )
        return "it does not fit {} {} The file has {} voxels of {} mm, model space {}.".format(
            shortage, alone._advice(settings), *sizes
        )

    def _advice(self, settings: RunSettings) -> str:
        ways = [words for words, changed in smaller_settings(settings) if self._fits(changed)]
        return f"It fits with {ways[0]}." if ways else "No single setting does it; use a larger machine or disk."

    def _shortage(self, required: Requirements) -> str | None:
        """What the machine has too little of, in words; None if the run fits."""
        machine, new = self._machine, required.memory - self._settings.base
        if new * machine.processes > machine.memory:
            most = max((size, what) for what, size in required.host.items() if what != "process")
            several = f" for each of {machine.processes} processes" if machine.processes > 1 else ""
            return (
                f"the host's memory: it needs {byte_size(new)} more{several}, of which {byte_size(most[0])} "
                f"for {most[1]}, and {byte_size(machine.memory)} are available (limits of cgroups included)."
            )
        disk = required.disk + required.scratch * machine.processes
        if disk > machine.disk:
            beside = (
                f", of which {byte_size(required.scratch * machine.processes)} for a while" if required.scratch else ""
            )
            return f"the disk: it needs about {byte_size(disk)}{beside}, and {byte_size(machine.disk)} are free."
        return None

    def _fits(self, settings: RunSettings) -> bool:
        with contextlib.suppress(VoxquiltError):
            return self._shortage(self._estimate(settings)[2]) is None
        return False

    def _estimate(self, settings: RunSettings) -> tuple[Probe, OutputPlan, Requirements]:
        probe = self._probe(settings.patch_size, settings.batch_size)
        stitch = settings.stitch
        if probe.guessed:  # guessed channels must not be reported as differing from the number of labels
            stitch = replace(stitch, label_values=None)
        outputs = plan_outputs(stitch, probe.outputs, settings.patch_size, self._layout)
        # A ring has as many planes as a patch.
        ring = self._size.ring * max(settings.patch_size) // max(self._settings.patch_size)
        size = replace(self._size, ring=ring)
        required = estimate(size, probe, outputs, settings)
        if required.images_on_device and sum(required.device.values()) > _SHARE * settings.device_memory:
            required = estimate(size, probe, outputs, replace(settings, images_on_device=False))
        return probe, outputs, required

    def _probe(self, patch_size: Triple, batch_size: int) -> Probe:
        key = self._size.channels, patch_size, batch_size
        if key not in self._probes:
            self._probes[key] = self._probe_or_guess(*key)
        if key in self._guesses:
            self._note(self._guesses[key])
        return self._probes[key]

    def _probe_or_guess(self, channels: int, patch_size: Triple, batch_size: int) -> Probe:
        problem = "it is not voxquilt's PatchPredictor"
        if isinstance(self._module, PatchPredictor):
            try:
                network: nn.Module = self._module.network
                return probe(network, channels, patch_size, batch_size, device=self._device, autocast=self._autocast)
            except Exception as error:  # a network's own code may raise anything
                problem = f"{type(error).__name__}: {error}".split("\n")[0]
        self._guesses[channels, patch_size, batch_size] = (
            "the network cannot be run without voxels, so its memory is a guess, 64 channels of a patch, and so are "
            f"its outputs, 2 channels ({problem})."
        )
        voxels = batch_size * prod(patch_size)
        return Probe(
            {"": (batch_size, 2, *patch_size)}, 64 * 4 * voxels, 2 * 4 * voxels, {"": torch.float32}, guessed=True
        )

    def _note(self, text: str) -> None:
        if text not in self._notes:
            self._notes.append(text)

    def device_beside_network(self) -> int:
        """Bytes on the device beside weights, network and batches: images if they fit, sums and products.

        Raises:
            OutputError: a product that the network's output does not have.
        """
        _, _, required = self._estimate(replace(self._settings, batch_size=1))
        return sum(size for what, size in required.device.items() if what not in ("weights", "network", "batches"))

    def largest_batch(self) -> int:
        """The largest batch size that fits the host, a power of 2."""

        def fits(size: int) -> bool:
            required = self._estimate(replace(self._settings, batch_size=size))[2]
            new = (required.memory - self._settings.base) * self._machine.processes
            return new <= _SHARE * self._machine.memory

        size, voxels = 1, prod(self._settings.patch_size)
        while 2 * size <= MAX_BATCH and 2 * size * voxels <= _CPU_VOXELS and fits(2 * size):
            size *= 2
        return size


def _autocast(precision: str) -> torch.dtype | None:
    return {"16": torch.float16, "bf16": torch.bfloat16}.get(precision.partition("-")[0])
