"""Keeps names of earlier versions working: imports warn of the new name, configurations are translated."""

import sys
import warnings
from collections.abc import Sequence
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

# Modules that the documents of earlier versions import from.
_MODULES = {
    "aggregator": "stitching.aggregator",
    "app": "cli.main",
    "blend": "stitching.blend",
    "build": "cli.instantiate",
    "datamodule": "prediction.datamodule",
    "fetch": "example_files",
    "grid": "geometry.grid",
    "image": "data.image",
    "module": "models.predictor",
    "nifti": "data.formats.nifti",
    "preprocess": "data.preprocess",
    "resolvers": "cli.resolvers",
    "sampler": "data.grid_sampler",
    "stitch": "stitching.stitch",
    "subject": "data.subject",
    "traindata": "training.datamodule",
    "writer": "prediction.writer_callback",
}
# Values of _target_ in configurations and checkpoints of earlier versions.
_TARGETS = {
    "board.Board": "TensorBoardImages",
    "datamodule.GridDataModule": "GridDataModule",
    "module.PatchPredictor": "PatchPredictor",
    **{
        f"module.from_{source}": f"predictor_from_{source}"
        for source in ("exported", "file", "lightning", "state_dict", "torchscript")
    },
    "preprocess.Preprocess": "Preprocess",
    "stitch.Stitch": "Stitch",
    "traindata.TrainingDataModule": "TrainingDataModule",
    "training.PatchTrainer": "PatchTrainer",
    "training.polynomial": "polynomial",
    "training.warmup_cosine": "warmup_cosine",
    "writer.VolumeWriter": "VolumeWriter",
}
_RENAMED = {old.rpartition(".")[2]: new for old, new in _TARGETS.items()}
_PREFIX = "voxquilt."
NEW = {f"{_PREFIX}{old}": f"{_PREFIX}{new}" for old, new in _TARGETS.items()}
"""Targets by their earlier name."""
OLD = {new: old for old, new in NEW.items()}
"""Earlier names by target. Fingerprints use them, so that what was predicted before stays done."""


def with_new_targets(node: Any) -> Any:
    """A copy of plain settings in which every `_target_` has its new name."""
    if isinstance(node, dict):
        return {
            key: NEW.get(value, value) if key == "_target_" and isinstance(value, str) else with_new_targets(value)
            for key, value in node.items()
        }
    return [with_new_targets(value) for value in node] if isinstance(node, list) else node


class _OldModules:
    """Finds the modules of earlier versions, as modules that look their names up where these are now.

    It has no class of importlib.abc, whose import would be half of the time until a command listens to Ctrl-C.
    """

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        old = fullname.removeprefix(_PREFIX)
        if not fullname.startswith(_PREFIX) or old not in _MODULES:
            return None
        return ModuleSpec(fullname, self)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> None:
        """Have Python make the module."""

    def exec_module(self, module: ModuleType) -> None:
        new = f"{_PREFIX}{_MODULES[module.__name__.removeprefix(_PREFIX)]}"

        def look_up(name: str) -> Any:
            if name.startswith("__"):
                raise AttributeError(name)
            public, package = _RENAMED.get(name, name), import_module("voxquilt")
            is_public = public in package.__all__
            value = getattr(package, public) if is_public else getattr(import_module(new), name)
            there = f"voxquilt.{public}" if is_public else f"{new}.{name}"
            warnings.warn(f"{module.__name__}.{name} is now {there}.", FutureWarning, stacklevel=2)
            return value

        module.__getattr__ = look_up  # type: ignore[method-assign]


sys.meta_path.append(_OldModules())
