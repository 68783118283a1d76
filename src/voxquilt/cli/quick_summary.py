"""Leaves Triton out until something uses it; Lightning's table of a network's layers imports it to count operations."""

from collections.abc import Callable, Mapping
from typing import Any

from voxquilt.cli.late_module import import_late, load

_NAME = "torch.utils.flop_counter"


def import_flop_counter_late() -> None:
    """Have torch's counter of operations, which imports Triton, imported when one is made for that table."""
    import_late(_NAME, _stand_ins, "lightning.pytorch.utilities.model_summary.model_summary")


def _stand_ins() -> Mapping[str, Callable[..., Any]]:
    return {"FlopCounterMode": lambda *args, **options: load(_NAME).FlopCounterMode(*args, **options)}
