"""Reads what a checkpoint of nnU-Net says about itself, without torch; nothing pickled in it is run."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.architecture import Architecture, with_batch_norm
from voxquilt.models.nnunet.json_values import USE_NNUNET, is_list_of_integers
from voxquilt.models.weights.stored_settings import pickled

_BATCH_NORM_TRAINER = "nnUNetTrainerBN"


@dataclass(frozen=True)
class CheckpointRecord:
    """What nnU-Net's training/nnUNetTrainer/nnUNetTrainer.py stores beside the weights.

    Args:
        configuration: The configuration that was trained.
        trainer: Name of the trainer's class.
        mirror_axes: Axes of a patch along which it may be mirrored in prediction.
        has_batch_norm: Whether the weights are of a network with batch normalisation.
    """

    configuration: str
    trainer: str
    mirror_axes: tuple[int, ...]
    has_batch_norm: bool

    def trained(self, planned: Architecture) -> Architecture:
        """The architecture that was trained: trainers like nnUNetTrainerBN put batch norm into the planned one.

        Plans that have batch norm themselves say with which options; only nnUNetTrainerBN itself replaces these.
        """
        is_planned = planned.norm is not None and planned.norm.name.startswith("Batch")
        replaces = self.has_batch_norm and (not is_planned or self.trainer == _BATCH_NORM_TRAINER)
        return with_batch_norm(planned) if replaces else planned


def read_record(file: Path) -> CheckpointRecord:
    """Read what a checkpoint says about itself.

    Raises:
        ConfigError: it is damaged, not nnU-Net's, or of a network that is not supported.
    """
    stored = pickled(file)
    if not isinstance(stored, Mapping) or not isinstance(stored.get("network_weights"), Mapping):
        raise ConfigError(
            f"{file} is not a checkpoint of nnU-Net, or is damaged: it holds no network_weights. Copy it again from "
            f"where the model was trained."
        )
    arguments = stored.get("init_args")
    configuration = arguments.get("configuration") if isinstance(arguments, Mapping) else None
    trainer, axes = stored.get("trainer_name"), stored.get("inference_allowed_mirroring_axes")
    for key, value in (("init_args.configuration", configuration), ("trainer_name", trainer)):
        if not isinstance(value, str):
            raise _refusal(file, key, value, "a text")
    if axes is not None and (not is_list_of_integers(axes) or not set(axes) <= {0, 1, 2} or len(set(axes)) < len(axes)):
        raise _refusal(file, "inference_allowed_mirroring_axes", axes, "different axes out of 0, 1, 2, or None")
    if "primus" in str(trainer).lower():
        raise ConfigError(f"{file} was trained by {trainer}, whose network is Primus; wanted is a U-Net.{USE_NNUNET}")
    has_batch_norm = any(str(key).endswith("running_mean") for key in stored["network_weights"])
    return CheckpointRecord(str(configuration), str(trainer), tuple(axes or ()), has_batch_norm)


def _refusal(file: Path, key: str, value: object, wanted: str) -> ConfigError:
    came = "missing or not a plain value" if isinstance(value, dict) or value is None else repr(value)
    return ConfigError(f"{file}: {key} is {came}; wanted is {wanted}. Is it a checkpoint that nnU-Net v2 wrote?")
