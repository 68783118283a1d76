"""Imports torch and Lightning in half of the time, by leaving out what no run needs."""

import gc
import importlib
import sys
from collections.abc import Collection, Iterator
from contextlib import contextmanager
from typing import Any

from voxquilt.cli.collector import paused_collector
from voxquilt.cli.quick_dynamo import import_dynamo_late
from voxquilt.cli.quick_monai import import_monai_quickly
from voxquilt.cli.quick_shapes import import_symbols_late
from voxquilt.cli.quick_summary import import_flop_counter_late

# torchmetrics, which Lightning imports, imports these wherever they are installed: SciPy to give an old name to one of
# its functions, Matplotlib for plots of metrics. Together they take as long as torch.
_OPTIONAL = frozenset({"scipy", "matplotlib"})


@contextmanager
def quick_imports() -> Iterator[None]:
    """Import Lightning, and then what the block imports, without what takes time and is of no use.

    The garbage collector does not look at the modules later either.
    """
    if "lightning" in sys.modules:  # by the user's code, or an earlier job of a sweep
        yield
        return
    with paused_collector():
        import_dynamo_late()
        import_symbols_late()
        import_flop_counter_late()
        with _found_missing(_OPTIONAL):
            importlib.import_module("lightning.pytorch")
        _plot_when_asked()
        import_monai_quickly()
        yield
        gc.freeze()


@contextmanager
def _found_missing(packages: Collection[str]) -> Iterator[None]:
    """Have torchmetrics find packages missing while it is imported; it does not remember the answers.

    It asks lightning_utilities, by `package_available` and by `RequirementCache`, which keeps an answer that it has
    given itself. What is imported later, and metrics that are computed, find the packages.
    """
    imports: Any = importlib.import_module("lightning_utilities.core.imports")
    cache, is_met, is_available = imports.RequirementCache, imports.RequirementCache.__bool__, imports.package_available

    def named(requirement: str) -> str:
        return imports.Requirement(requirement).name

    cache.__bool__ = lambda self: not (self.requirement and named(self.requirement) in packages) and is_met(self)
    imports.package_available = lambda name: name not in packages and is_available(name)
    try:
        yield
    finally:
        cache.__bool__, imports.package_available = is_met, is_available


def _plot_when_asked() -> None:
    """Give Matplotlib back to torchmetrics' plots; it is imported when the first is drawn."""
    plot = sys.modules.get("torchmetrics.utilities.plot")
    if plot is not None and not hasattr(plot, "plt"):
        vars(plot)["plt"] = _Pyplot()


class _Pyplot:
    """Stands for matplotlib.pyplot until it is used."""

    def __getattr__(self, name: str) -> Any:
        return getattr(importlib.import_module("matplotlib.pyplot"), name)
