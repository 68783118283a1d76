"""How well do labels agree with others? Per class, of one volume."""

from jaxtyping import Float, Integer
from torch import Tensor
from torchmetrics.functional.classification import multiclass_confusion_matrix


def class_dice(
    labels: Integer[Tensor, "*volume"], truth: Integer[Tensor, "*volume"], classes: int
) -> Float[Tensor, " n"]:
    """Dice's coefficient 2 |A and B| / (|A| + |B|) of each class; NaN where both are empty.

    Args:
        labels, truth: Classes 0, 1, ... in any shape, the same for both.
        classes: How many there are.
    """
    counts = multiclass_confusion_matrix(labels.flatten(), truth.flatten(), classes).double()
    return 2 * counts.diagonal() / (counts.sum(0) + counts.sum(1))
