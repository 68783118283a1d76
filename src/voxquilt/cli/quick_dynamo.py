"""Leaves torch's compiler out until something is compiled; Lightning and every optimizer import it, for a second.

All that they want of it is to keep functions out of compiled code and to recognise a compiled network.
"""

from collections.abc import Callable
from functools import partial, wraps
from types import FunctionType
from typing import Any

from voxquilt.cli.late_module import import_late, is_loaded, load

_NAME = "torch._dynamo"


def import_dynamo_late() -> None:
    """Have torch._dynamo imported when it is used, however it is imported; nothing changes where it is already."""
    import_late(_NAME, lambda: {"disable": _disable, "graph_break": _graph_break, "OptimizedModule": _OptimizedModule})


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """What torch._dynamo.disable does: functions that it returns are not compiled. Until it is loaded, nothing is."""
    if function is None:
        return partial(_disable, recursive=recursive, **options)
    if is_loaded(_NAME) or not isinstance(function, FunctionType):
        return load(_NAME).disable(function, recursive, **options)
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            if not is_loaded(_NAME):
                return function(*args, **kwargs)
            disabled.append(load(_NAME).disable(function, recursive, **options))
        return disabled[0](*args, **kwargs)

    return call


def _graph_break(*_: Any) -> None:
    """Does nothing outside of compiled code, as torch's own."""


class _OfCompiled(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return is_loaded(_NAME) and isinstance(instance, load(_NAME).OptimizedModule)


class _OptimizedModule(metaclass=_OfCompiled):
    """Stands for the class of compiled networks: there are none before torch._dynamo is loaded."""
