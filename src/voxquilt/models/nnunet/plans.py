"""Reads plans.json of a model folder: everything that one configuration says about predicting."""

from dataclasses import dataclass
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.architecture import Architecture, read_architecture
from voxquilt.models.nnunet.json_values import USE_NNUNET, Node, read_object
from voxquilt.models.nnunet.resampling import NONE, Resampling, read_resampling
from voxquilt.text import question

READERS = ("SimpleITKIO", "NibabelIO", "NibabelIOWithReorient", "SimpleITKIOWithReorient")
CT = "CTNormalization"
SCHEMES = (CT, "ZScoreNormalization", "NoNormalization", "RescaleTo01Normalization", "RGBTo01Normalization")
_PROPERTIES = "foreground_intensity_properties_per_channel"
_OLD_PROPERTIES = "foreground_intensity_properties_by_modality"


@dataclass(frozen=True)
class Intensities:
    """The intensities of the foreground in the training's images: where to cut off, and what to scale by."""

    lower: float
    upper: float
    mean: float
    std: float


@dataclass(frozen=True)
class Normalisation:
    """How one channel is normalised; see `voxquilt.data.normalisation`.

    Args:
        scheme: Name of nnU-Net's class.
        use_mask: Whether only voxels inside the mask of nonzero voxels count.
        intensities: For CTNormalization only.
    """

    scheme: str
    use_mask: bool
    intensities: Intensities | None


@dataclass(frozen=True)
class Plan:
    """What plans.json says about one configuration.

    Args:
        configuration: Its name, such as '3d_fullres'.
        reader: Name of the class with which nnU-Net reads images; it decides about their axes.
        transpose_forward: The reader's axes in the order of the model's axes.
        transpose_backward: The inverse.
        patch_size: Voxels of a patch along the model's axes; the last two of them for a 2-D network.
        spacing: Voxel size in mm, as `patch_size`.
        normalisations: One per channel.
        resample_data: How images are resampled to `spacing`.
        resample_seg: How labels of the stage before are.
        resample_probabilities: How the network's output is resampled to the image's grid.
        previous_stage: The configuration whose labels this one needs as input, if any.
        architecture: The network.
    """

    configuration: str
    reader: str
    transpose_forward: tuple[int, ...]
    transpose_backward: tuple[int, ...]
    patch_size: tuple[int, ...]
    spacing: tuple[float, ...]
    normalisations: tuple[Normalisation, ...]
    resample_data: Resampling
    resample_seg: Resampling
    resample_probabilities: Resampling
    previous_stage: str | None
    architecture: Architecture


def read_plan(file: Path, name: str, channels: int) -> Plan:
    """Read a configuration from plans.json.

    Args:
        file: plans.json.
        name: The configuration.
        channels: Number of images per subject.

    Raises:
        ConfigError: a value is missing, wrong or not supported.
    """
    plans = read_object(file)
    node = resolve_configuration(plans, name)
    plans.choice("label_manager", ("LabelManager",), default="LabelManager")
    node.choice("preprocessor_name", ("DefaultPreprocessor",))
    patch_size, spacing = node.integers("patch_size"), node.numbers("spacing")
    if len(patch_size) not in (2, 3):
        raise node.refusal("patch_size", "2 or 3 integers")
    if len(spacing) != len(patch_size):
        raise node.refusal("spacing", f"{len(patch_size)} numbers, as patch_size has")
    architecture = read_architecture(node, len(patch_size))
    if any(size % step for size, step in zip(patch_size, architecture.reduction, strict=True)):
        raise node.refusal("patch_size", f"multiples of {list(architecture.reduction)}, which the strides ask for")
    previous = node.values.get("previous_stage")
    forward, backward = _transposes(plans)
    data, seg, probabilities = (read_resampling(node, kind) for kind in ("data", "seg", "probabilities"))
    if previous is not None:
        _check_labels(node, seg, data)
    return Plan(
        name,
        plans.choice("image_reader_writer", READERS),
        forward,
        backward,
        patch_size,
        spacing,
        _normalisations(plans, node, channels),
        data,
        seg,
        probabilities,
        None if previous is None else node.text("previous_stage"),
        architecture,
    )


def _check_labels(node: Node, seg: Resampling, data: Resampling) -> None:
    """Refuse labels of a stage before that are resampled as the network's input here is not."""
    if seg.order == 3:
        raise Node(node.file, {"order": 3}, f"{node.place}resampling_fn_seg_kwargs.").refusal(
            "order", "0 or 1 where a network takes labels", USE_NNUNET
        )
    if seg.per_slice != data.per_slice or (seg.function == NONE) != (data.function == NONE):
        raise node.refusal(
            "resampling_fn_seg_kwargs" if seg.function == data.function else "resampling_fn_seg",
            "what resampling_fn_data has, where a network takes labels", USE_NNUNET,
        )  # fmt: skip


def resolve_configuration(plans: Node, name: str) -> Node:
    """A configuration with what it inherits, as nnU-Net's plans_handler.py resolves it.

    Raises:
        ConfigError: there is none of that name, or configurations inherit from each other in a circle.
    """
    configurations = plans.child("configurations")
    chain: list[str] = []
    values: dict[str, object] = {}
    parent: object = name
    while parent is not None:
        if not isinstance(parent, str) or parent not in configurations.values:
            known = ", ".join(configurations.values)
            wanted = f"inherits_from of {chain[-1]!r}" if chain else "the checkpoint's configuration"
            raise ConfigError(
                f"{plans.file} has no configuration {parent!r}, which is {wanted}; it has {known}."
                f"{question(str(parent), configurations.values)} Do the file and the checkpoints belong together?"
            )
        if parent in chain:
            circle = " -> ".join([*chain, parent])
            raise ConfigError(f"{plans.file}: configurations inherit in a circle: {circle}. Correct inherits_from.")
        chain.append(parent)
        own = configurations.child(parent).values
        values = {**own, **values}
        parent = own.get("inherits_from")
    return Node(plans.file, values, f"configurations.{name}.")


def _transposes(plans: Node) -> tuple[tuple[int, ...], tuple[int, ...]]:
    forward, backward = (plans.integers(f"transpose_{way}", least=0) for way in ("forward", "backward"))
    if sorted(forward) != [0, 1, 2]:
        raise plans.refusal("transpose_forward", "0, 1 and 2 in any order")
    inverse = tuple(forward.index(axis) for axis in range(3))
    if backward != inverse:
        raise plans.refusal("transpose_backward", f"{list(inverse)}, the inverse of {list(forward)}")
    return forward, backward


def _normalisations(plans: Node, node: Node, channels: int) -> tuple[Normalisation, ...]:
    schemes, masks = (node.values.get(key) for key in ("normalization_schemes", "use_mask_for_norm"))
    for key, value in (("normalization_schemes", schemes), ("use_mask_for_norm", masks)):
        if not isinstance(value, list) or len(value) != channels:
            raise node.refusal(key, f"a list of {channels}, as dataset.json names {channels} channels")
    result: list[Normalisation] = []
    for channel, (scheme, mask) in enumerate(zip(schemes or (), masks or (), strict=True)):
        if scheme not in SCHEMES:
            raise node.refusal("normalization_schemes", f"some of {', '.join(SCHEMES)}", USE_NNUNET)
        if mask not in (None, True, False):
            raise node.refusal("use_mask_for_norm", "a list of true or false")
        result.append(Normalisation(scheme, bool(mask), _intensities(plans, channel) if scheme == CT else None))
    return tuple(result)


def _intensities(plans: Node, channel: int) -> Intensities:
    key = _OLD_PROPERTIES if _PROPERTIES not in plans.values and _OLD_PROPERTIES in plans.values else _PROPERTIES
    properties = plans.child(key).child(str(channel))
    return Intensities(*map(properties.number, ("percentile_00_5", "percentile_99_5", "mean", "std")))
