"""Runs the user's network on a patch on the host in float32, and says what another device or precision may change."""

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from math import sqrt
from typing import Any

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from voxquilt.data.batch import PatchBatch, named_outputs
from voxquilt.models.predictor import PatchPredictor

# The error is allowed to be three bits larger than that of the perturbed network: rounding of inputs, of weights and of
# every layer's output are three sources of equal size, and the largest of millions of values is compared.
_MARGIN = 8
# A network whose weights cannot be read is taken for one of so many layers, each of which rounds its input.
_LAYERS = 64
# What several threads may change in the largest output when they add numbers in another order.
_REPEATS = 1e-3


@dataclass(frozen=True)
class Trial:
    """A (1, C, I, J, K) patch of a real subject, and the (1, C', ...) outputs of the user's network for it by name."""

    patch: Tensor
    outputs: Mapping[str, Tensor]


def outputs_on_host(predictor: LightningModule, patch: Tensor) -> dict[str, Tensor]:
    """Outputs by name, on the host and in float32.

    Raises:
        Exception: whatever the network raises.
    """
    predictor = predictor.float().eval()
    if isinstance(predictor, PatchPredictor):
        for member in predictor.network.networks:
            opened = getattr(member, "open_session", None)
            if opened is not None:
                opened(torch.device("cpu"))
    batch = PatchBatch(patch, [])
    with torch.no_grad():
        outputs = predictor.predict_step(batch, 0)
    return {name: output.float().clone() for name, output in batch.named(outputs).items()}


def compare_outputs(outputs: Any, reference: Mapping[str, Tensor], count: int) -> dict[str, Any]:
    """The largest difference of `count` equal rows from a reference of one, and where, as plain values."""
    if isinstance(outputs, Exception):
        return {"failed": f"{type(outputs).__name__}: {outputs}"}
    found = named_outputs(outputs, count)
    if found.keys() != reference.keys():
        return {"failed": f"it gave the outputs {list(found)}, and {list(reference)} on the host"}
    worst: dict[str, Any] = {"error": 0.0, "where": [], "output": "", "value": 0.0, "wanted": 0.0}
    for name, wanted in reference.items():
        for row in found[name]:
            given = row.float().cpu()
            if given.shape != wanted[0].shape:
                return {"failed": f"output {name!r} has {tuple(given.shape)}, and {tuple(wanted[0].shape)} on the host"}
            error = (given - wanted[0]).abs().nan_to_num(nan=float("inf"))
            if float(error.max()) > worst["error"]:
                where = torch.unravel_index(error.argmax(), error.shape)
                worst = {
                    "error": float(error.max()), "where": [int(n) for n in where], "output": name,
                    "value": float(given[where]), "wanted": float(wanted[0][where]),
                }  # fmt: skip
    return worst


def allowed_error(predictor: LightningModule, trial: Trial, precision: str, *, on_cuda: bool) -> float | None:
    """The largest difference that the precision of a run explains; None for a network that draws random numbers.

    The network is run on the host in float32 once more, with inputs, weights and the output of each layer changed as
    much as that precision rounds them; what this changes in its outputs is the error to be expected.

    Args:
        predictor: A new predictor, whose weights are changed.
        trial: The patch, and what the unchanged network gives.
        precision: The trainer's, such as 'bf16-mixed'.
        on_cuda: Whether convolutions may be computed by TensorFloat-32.
    """
    unit = unit_roundoff(precision, on_cuda=on_cuda)
    again = outputs_on_host(predictor, trial.patch)
    if any(
        float((again[name] - wanted).abs().max()) > _REPEATS * _size(wanted) for name, wanted in trial.outputs.items()
    ):
        return None
    weights = list(predictor.parameters())
    fan_in = max((weight.numel() // max(1, weight.shape[0]) for weight in weights if weight.ndim > 1), default=1)
    # Sums of many products are rounded in float32 in another order on another device: a random walk of as many steps.
    unit = max(unit, float(torch.finfo(torch.float32).eps) * sqrt(fan_in))
    draw = torch.Generator().manual_seed(0)

    def perturbed(values: Tensor, unit: float = unit) -> Tensor:
        if not values.is_floating_point():
            return values
        return values * (1 + unit * (2 * torch.rand(values.shape, generator=draw).to(values) - 1))

    with torch.no_grad():
        for weight in weights:
            weight.copy_(perturbed(weight))
    with _after_each_layer(predictor, perturbed):
        patch = perturbed(trial.patch, unit if weights else unit * sqrt(_LAYERS))
        outputs = outputs_on_host(predictor, patch)
    differences = [(outputs[name] - wanted).abs().max() for name, wanted in trial.outputs.items()]
    return _MARGIN * max(map(float, differences), default=0.0)


def _size(values: Tensor) -> float:
    return float(values.abs().max())


def unit_roundoff(precision: str, *, on_cuda: bool) -> float:
    """The largest relative error by which a number is rounded in a precision of Lightning's."""
    if precision.startswith("bf16"):
        return 2.0**-9
    if precision.startswith(("16", "transformer-engine-float16")):
        return 2.0**-11
    if precision.startswith("64") or not on_cuda:
        return 2.0**-24
    # What torch does unless it is told otherwise: convolutions of float32 by TensorFloat-32, of 11 bits.
    uses_tf32 = torch.backends.cudnn.allow_tf32 or torch.get_float32_matmul_precision() != "highest"
    return 2.0**-11 if uses_tf32 else 2.0**-24


@contextmanager
def _after_each_layer(predictor: nn.Module, change: Any) -> Iterator[None]:
    """Have every layer's output changed; layers of TorchScript take no hooks, and are left to their weights."""

    def hook(module: nn.Module, inputs: Any, output: Any) -> Any:
        return change(output) if isinstance(output, Tensor) else output

    handles = [
        module.register_forward_hook(hook)
        for module in predictor.modules()
        if not list(module.children()) and not isinstance(module, torch.jit.ScriptModule)
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
