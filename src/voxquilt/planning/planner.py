"""Will it fit? What a run needs beside what the machine has, and what to change if that is too little."""

import contextlib
from collections.abc import Iterator
from copy import copy
from dataclasses import asdict, dataclass, replace
from math import prod
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer
from torch import nn

from voxquilt.data.subject_size import RunSize, SubjectSize, extent
from voxquilt.errors import VoxquiltError
from voxquilt.geometry.frame import Triple
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.machine import MachineResources, disk_free, memory_available
from voxquilt.planning.resource_estimate import MIB, OutputPlan, Requirements, RunSettings, forms, needs
from voxquilt.planning.shape_probe import Probe, probe
from voxquilt.text import of_subjects

# Voxels of a batch beyond which a CPU's throughput no longer rises: its cores are busy with one patch.
_CPU_VOXELS = 2**20
MOST = 64
"""Patches of a batch that is found."""
# What is left to the operating system and to what cannot be foreseen, when a batch size is chosen.
_SHARE = 0.8


@dataclass(frozen=True)
class Forecast:
    """What a process will need.

    Args:
        extent: Of the run's subjects.
        settings: As they will be used, the batch size in numbers.
        forms: What is made of the network's outputs.
        probe: Of a forward pass with that batch size.
        needs: In bytes.
        room: On this process's machine.
        notes: What a reader of the numbers should know.
        refusal: Why the run cannot fit, and what would; None if it can.
    """

    extent: RunSize
    settings: RunSettings
    forms: OutputPlan
    probe: Probe
    needs: Requirements
    room: MachineResources
    notes: list[str]
    refusal: str | None = None

    def as_json(self) -> dict[str, Any]:
        """For plan.json; bytes."""
        outputs = {name: list(shape) for name, shape in self.probe.outputs.items()}
        return {
            "batch_size": self.settings.batch_size,
            "outputs": outputs,
            "products": [asdict(one) for one in self.forms.made],
            "memory": {"host": dict(self.needs.host), "host_total": self.needs.memory}
            | {"device": dict(self.needs.device), "device_total": sum(self.needs.device.values())},
            "sums_on": "device, if it has twice their room free" if self.needs.device else "host",
            "disk": {"expected": self.needs.disk, "at_most": self.needs.bound, "scratch": self.needs.scratch},
            "room": asdict(self.room),
            "notes": self.notes,
        }


class Planner:
    """Works out a process's needs.

    Args:
        trainer: Trainer of the run.
        module: Its network.
        size: The run's subjects.
        settings: RunSettings of the run.
    """

    def __init__(self, trainer: Trainer, module: LightningModule, size: RunSize, settings: RunSettings) -> None:
        self._module, self._of, self._settings = module, size, settings
        self._device = trainer.strategy.root_device
        self._autocast = _autocast(str(trainer.precision))
        self._room = MachineResources(memory_available(), disk_free(settings.folder), trainer.num_devices)
        self._notes: list[str] = []
        # Shared by those that are made of this one: a large network takes a while to be asked.
        self._passes: dict[tuple[int, Triple, int], Probe] = {}
        self._layout = module.network.layout if isinstance(module, PatchPredictor) else "auto"
        self._guesses: dict[tuple[int, Triple, int], str] = {}

    def changed(self, of: RunSize, settings: RunSettings) -> "Planner":
        """The same for other subjects and settings."""
        other = copy(self)
        other._of, other._settings, other._notes = of, settings, []
        return other

    def plan(self) -> Forecast:
        """What the settings need.

        Raises:
            OutputError: a product that the network's output does not have.
        """
        settings = self._settings
        passed, become, required = self._needs(settings)
        if isinstance(self._module, PatchPredictor) and self._module.network.compiled:
            self._notes.append("torch.compile takes memory and time of its own, which are not counted.")
        if self._of.unread:
            self._notes.append(f"{of_subjects(self._of.unread)} cannot be predicted, and will fail.")
        return Forecast(
            self._of, settings, become, passed, required, self._room, self._notes, self._refusal(settings, required)
        )

    def _refusal(self, settings: RunSettings, required: Requirements) -> str | None:
        over = self._over(required)
        if over is None:
            return None
        advice = self._advice(settings)
        return (
            f"the run does not fit {over} {advice} (run.dry_run=true shows what takes how much. Nothing was started.)"
        )

    @property
    def smallest(self) -> SubjectSize:
        """The outline of a subject of a single patch: where not even this fits, it is no subject's fault."""
        patch, channels = self._settings.patch_size, min(self._of.of_channels, default=self._of.channels)
        loaded = 4 * channels * prod(patch)
        return SubjectSize(patch, patch, (1.0, 1.0, 1.0), channels, 1, prod(patch), loaded, loaded, loaded)

    def of_one(self, one: SubjectSize) -> str | None:
        """Why a subject cannot be predicted even by itself, and what would help; None if it can.

        Args:
            one: The subject.

        Raises:
            OutputError: a product that the network's output does not have.
        """
        settings = self._settings
        alone = self.changed(extent([one]), settings)
        over = alone._over(alone._needs(settings)[2])
        if over is None:
            return None
        sizes = (" x ".join(f"{n:.5g}" for n in numbers) for numbers in (one.native, one.spacing, one.model))
        return "it does not fit {} {} The file has {} voxels of {} mm, model space {}.".format(
            over, alone._advice(settings), *sizes
        )

    def _advice(self, settings: RunSettings) -> str:
        ways = [said for said, changed in self._ways(settings) if self._fits(changed)]
        return f"It fits with {ways[0]}." if ways else "No single setting does it; use a larger machine or disk."

    def _over(self, required: Requirements) -> str | None:
        room, new = self._room, required.memory - self._settings.base
        if new * room.processes > room.memory:
            most = max((size, what) for what, size in required.host.items() if what != "process")
            several = f" for each of {room.processes} processes" if room.processes > 1 else ""
            return (
                f"the host's memory: it needs {_gib(new)} more{several}, of which {_gib(most[0])} "
                f"for {most[1]}, and {_gib(room.memory)} are available (limits of cgroups included)."
            )
        disk = required.disk + required.scratch * room.processes
        if disk > room.disk:
            beside = f", of which {_gib(required.scratch * room.processes)} for a while" if required.scratch else ""
            return f"the disk: it needs about {_gib(disk)}{beside}, and {_gib(room.disk)} are free."
        return None

    def _ways(self, settings: RunSettings) -> Iterator[tuple[str, RunSettings]]:
        """Changes, the least first: those that change no output, then those that do."""
        if settings.num_workers:
            yield "data.num_workers=0", replace(settings, num_workers=0)
        size = settings.batch_size
        while size > 1:
            size //= 2
            yield f"data.batch_size={size}", replace(settings, batch_size=size)
        for limit in (256, 0):
            if limit * MIB < settings.in_memory:
                yield f"callbacks.writer.in_memory={limit}", replace(settings, in_memory=limit * MIB)
        least = replace(settings, num_workers=0, batch_size=1)
        if settings.num_workers and settings.batch_size > 1:
            yield "data.num_workers=0 data.batch_size=1", least
        yield "stitch.products=null", replace(settings, stitch=replace(settings.stitch, products=None))
        for share in (4, 2):
            patch = [n - n * share // 8 for n in settings.patch_size]
            smaller = (patch[0] // 8 * 8 or 8, patch[1] // 8 * 8 or 8, patch[2] // 8 * 8 or 8)
            if prod(smaller) < prod(settings.patch_size):
                text = f"data.patch_size=[{','.join(map(str, smaller))}]"
                yield text, replace(settings, patch_size=smaller)
                yield f"{text} data.num_workers=0 data.batch_size=1", replace(least, patch_size=smaller)

    def _fits(self, settings: RunSettings) -> bool:
        with contextlib.suppress(VoxquiltError):
            return self._over(self._needs(settings)[2]) is None
        return False

    def _needs(self, settings: RunSettings) -> tuple[Probe, OutputPlan, Requirements]:
        passed = self._probe(settings.patch_size, settings.batch_size)
        stitch = settings.stitch
        if passed.guessed:  # of a guess it is not to be said that numbers and classes differ
            stitch = replace(stitch, label_values=None)
        become = forms(stitch, passed.outputs, settings.patch_size, self._layout)
        # A ring is as many planes as a patch has.
        ring = self._of.ring * max(settings.patch_size) // max(self._settings.patch_size)
        return passed, become, needs(replace(self._of, ring=ring), passed, become, settings)

    def _probe(self, patch_size: Triple, batch_size: int) -> Probe:
        key = self._of.channels, patch_size, batch_size
        if key not in self._passes:
            self._passes[key] = self._probed(*key)
        if key in self._guesses:
            self._note(self._guesses[key])
        return self._passes[key]

    def _probed(self, channels: int, patch_size: Triple, batch_size: int) -> Probe:
        problem = "it is not voxquilt's PatchPredictor"
        if isinstance(self._module, PatchPredictor):
            try:
                network: nn.Module = self._module.network
                return probe(network, channels, patch_size, batch_size, device=self._device, autocast=self._autocast)
            except Exception as error:
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

    def largest(self) -> int:
        """Patches of a batch that fit the host, doubled from one on."""

        def fits(size: int) -> bool:
            required = self._needs(replace(self._settings, batch_size=size))[2]
            new = (required.memory - self._settings.base) * self._room.processes
            return new <= _SHARE * self._room.memory

        size, voxels = 1, prod(self._settings.patch_size)
        while 2 * size <= MOST and 2 * size * voxels <= _CPU_VOXELS and fits(2 * size):
            size *= 2
        return size


def _autocast(precision: str) -> torch.dtype | None:
    return {"16": torch.float16, "bf16": torch.bfloat16}.get(precision.partition("-")[0])


def _gib(count: float) -> str:
    return f"{count / 2**30:.2f} GiB" if count >= 2**27 else f"{count / MIB:.1f} MiB"
