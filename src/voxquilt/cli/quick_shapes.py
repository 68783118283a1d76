"""Leaves SymPy out until a shape holds a symbol; torch imports it to compare shapes and types on its device `meta`.

That takes 0.2 s in the check of memory before a run.
"""

import importlib
import sys
from collections.abc import Callable, Mapping
from typing import Any

from voxquilt.cli.late_module import import_late, load

_NAME = "torch.fx.experimental.symbolic_shapes"
# Functions that answer what they are asked about, unless that is symbolic.
_SAME = ("expect_true", "guard_or_true", "guard_or_false", "guard_size_oblivious", "statically_known_true")


def import_symbols_late() -> None:
    """Have SymPy, and torch's module of symbolic shapes, imported when they are used; nothing changes where they are.

    Of Python's own numbers the stand-ins answer what torch's functions do; all else they leave to these.
    """
    import_late(_NAME, _stand_ins)
    import_late("sympy", lambda: {"Basic": _Basic}, "torch._prims_common")


class _Basic:
    """Stands for the class of symbols, of which there are none before SymPy is imported."""


def _stand_ins() -> Mapping[str, Callable[..., Any]]:
    importlib.import_module("torch.fx.experimental._config")  # as torch's module does; others count on it
    return {
        **{name: _of((bool,), name, lambda value: value) for name in _SAME},
        "guarding_hint_or_throw": _of((bool, int), "guarding_hint_or_throw", lambda value: value),
        "has_guarding_hint": _of((bool, int, float), "has_guarding_hint", lambda value: True),
        "is_nested_int": _of((bool, int, float), "is_nested_int", lambda value: False),
        "sym_and": _of((bool,), "sym_and", lambda *values: all(values), most=sys.maxsize),
        "sym_or": _of((bool,), "sym_or", lambda *values: any(values), most=sys.maxsize),
        "sym_eq": _equal,
    }


def _of(kinds: tuple[type, ...], name: str, answer: Callable[..., Any], most: int = 1) -> Callable[..., Any]:
    """A function that answers of so many values of these types, and asks torch's own, of that name, about others."""

    def call(*values: Any, **options: Any) -> Any:
        if 1 <= len(values) <= most and not options and all(type(value) in kinds for value in values):
            return answer(*values)
        return getattr(load(_NAME), name)(*values, **options)

    return call


def _equal(x: Any, y: Any) -> Any:
    """Whether two numbers, or the numbers of two tuples or lists, are equal."""
    if _are_numbers(x) and _are_numbers(y):
        return tuple(x) == tuple(y)
    if type(x) is int and type(y) is int:
        return x == y
    return load(_NAME).sym_eq(x, y)


def _are_numbers(values: Any) -> bool:
    return isinstance(values, tuple | list) and all(type(value) is int for value in values)
