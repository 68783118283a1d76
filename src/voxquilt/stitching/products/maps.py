"""Provides the products that are scores themselves: probabilities, logits and images."""

from voxquilt.errors import OutputError
from voxquilt.stitching.products.base import ACTIVATIONS, Activated
from voxquilt.stitching.products.spec import NetworkOutput, ProductSpec
from voxquilt.vocabulary import IMAGE

# Expected size of packed probabilities, as a share of their voxels; see docs/memory.md.
_PACKED = 0.75


def make_probabilities(output: NetworkOutput) -> ProductSpec:
    """The activated scores, one channel per class."""
    output.check_distribution("probabilities")
    return ProductSpec(Activated(output.activate_restored), packed=_PACKED, interpolated=output.interpolated, most=1.0)


def make_logits(output: NetworkOutput) -> ProductSpec:
    """The scores as the network gives them.

    Raises:
        OutputError: scores were turned into probabilities before they were averaged.
    """
    output.check_distribution("logits")
    if output.is_applied:
        raise OutputError("there are no logits when model.average=probabilities; ask for probabilities.")
    return ProductSpec(Activated(ACTIVATIONS["none"]))


def make_image(_: NetworkOutput) -> ProductSpec:
    """The scores as intensities, such as those of a denoised image."""
    return ProductSpec(Activated(ACTIVATIONS["none"], IMAGE))
