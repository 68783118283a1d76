"""Reads how a model folder's volumes are resampled."""

import json
from dataclasses import dataclass
from typing import Any

from voxquilt.models.nnunet.json_values import USE_NNUNET, Node, is_number

SCIPY, TORCH, NONE = "scipy", "torch", "none"
_FUNCTIONS = {
    "resample_data_or_seg_to_shape": SCIPY,
    "resample_torch_fornnunet": TORCH,
    "no_resampling_hack": NONE,
}


@dataclass(frozen=True)
class Resampling:
    """How volumes are resampled.

    Args:
        function: 'scipy' for nnU-Net's resample_data_or_seg_to_shape, 'torch' for resample_torch_fornnunet, 'none' for
            no_resampling_hack.
        order: Order of the splines, in the plane where axes are resampled separately; 1 with 'torch'.
        order_z: Order along the axis that is resampled separately; with 'torch' its nearest neighbour.
        force_separate_z: Whether one axis is resampled separately; None decides by the spacings.
        separate_z_anisotropy_threshold: The ratio of spacings above which None does so.
    """

    function: str
    order: int
    order_z: int
    force_separate_z: bool | None
    separate_z_anisotropy_threshold: float

    @property
    def per_slice(self) -> float | bool | None:
        """The ratio of voxel sizes above which slices are resampled each by itself; True always does so, None never."""
        if self.force_separate_z is None:
            return None if self.function == NONE else self.separate_z_anisotropy_threshold
        return True if self.force_separate_z else None


# Defaults of the functions in preprocessing/resampling/, by function.
_DEFAULTS: dict[str, dict[str, Any]] = {
    SCIPY: {"order": 3, "order_z": 0, "force_separate_z": False},
    TORCH: {"force_separate_z": None, "num_threads": 4, "memefficient_seg_resampling": False}
    | {"mode": "linear", "aniso_axis_mode": "nearest-exact"},
    NONE: {},
}


def read_resampling(configuration: Node, kind: str) -> Resampling:
    """Read how data, seg or probabilities are resampled.

    Raises:
        ConfigError: a function, an argument or a value that is not supported.
    """
    key = f"resampling_fn_{kind}"
    function = _FUNCTIONS[configuration.choice(key, tuple(_FUNCTIONS))]
    node = configuration.child(f"{key}_kwargs")
    defaults = _DEFAULTS[function]
    if function != NONE:
        defaults = {"is_seg": False, "separate_z_anisotropy_threshold": 3, **defaults}
    values = {**defaults, **node.values}
    supported: dict[str, tuple[Any, ...]] = {
        "is_seg": (kind == "seg",),
        "order": (0, 1, 3),
        "order_z": (0,),
        "force_separate_z": (None, True, False),
        # Another value changes how labels are chosen.
        "memefficient_seg_resampling": (False,) if kind == "seg" else (True, False),
        "mode": ("linear",),
        "aniso_axis_mode": ("nearest-exact",),
    }
    for name, value in values.items():
        if name not in defaults:
            raise node.refusal(name, f"no such argument of {configuration.values[key]}", USE_NNUNET)
        if name in supported and not any(value is known or _equal(value, known) for known in supported[name]):
            raise Node(node.file, values, node.place).refusal(
                name, " or ".join(map(json.dumps, supported[name])), USE_NNUNET
            )
    threshold = values.get("separate_z_anisotropy_threshold", 3)
    if not is_number(threshold):
        raise node.refusal("separate_z_anisotropy_threshold", "a number")
    return Resampling(
        function, values.get("order", 1), values.get("order_z", 0), values.get("force_separate_z"), float(threshold)
    )


def _equal(value: object, known: object) -> bool:
    return type(value) is type(known) and value == known  # since 0 == False
