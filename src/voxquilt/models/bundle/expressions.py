"""Reads the few expressions of MONAI's bundles that need no evaluation."""

import ast
import re
from collections.abc import Callable
from typing import Any

NOT_READ = object()
"""What `read_expression` gives for all others."""

_TYPE = re.compile(r"\$\s*(?:torch|np|numpy)\.(float16|float32|float64|int16|int32|int64|uint8)")
_CHOICE = re.compile(r"\$\s*(.+?)\s+if\s+@((?:#|::)*[\w#:]+)\s+else\s+(.+)", re.DOTALL)
_REFERENCE = re.compile(r"@((?:#|::)*[\w#:]+)")
_LONGEST = 1000


def read_expression(text: str, value_of: Callable[[str], Any]) -> Any:
    """The value of a number type (its name, such as 'float32') or of `$X if @flag else Y`, where X and Y are literals.

    Args:
        text: The expression, from its `$` on.
        value_of: Gives the plain value of an id that the expression refers to.

    Raises:
        ConfigError: such an id has no plain value.
    """
    if len(text) > _LONGEST:
        return NOT_READ
    if number_type := _TYPE.fullmatch(text):
        return number_type[1]
    choice = _CHOICE.fullmatch(text)
    if choice is None:
        return NOT_READ
    flag = value_of(choice[2])
    if not isinstance(flag, bool):
        return NOT_READ
    chosen = (choice[1] if flag else choice[3]).strip()
    if reference := _REFERENCE.fullmatch(chosen):
        return value_of(reference[1])
    return _literal(chosen)


def _literal(text: str) -> Any:
    """A number, a text without interpolation, true, false, none, or a list of those."""
    try:
        value = ast.literal_eval(text)  # which takes literals only
    except (ValueError, SyntaxError, MemoryError, RecursionError, TypeError):
        return NOT_READ
    values = value if isinstance(value, list | tuple) else [value]
    plain = all(item is None or isinstance(item, bool | int | float) or _is_text(item) for item in values)
    if not plain:
        return NOT_READ
    return list(value) if isinstance(value, tuple) else value


def _is_text(value: object) -> bool:
    return isinstance(value, str) and not value.startswith(("$", "%", "@")) and "${" not in value
