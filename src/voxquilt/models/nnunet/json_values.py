"""Reads JSON files of a model folder, and checks each value as it is taken out."""

import json
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeGuard

from voxquilt.errors import ConfigError
from voxquilt.text import question

USE_NNUNET = " voxquilt does not support this; predict this model with nnU-Net itself."
_COPY_AGAIN = " Is it the file that nnU-Net wrote? Copy it again from where the model was trained."


@dataclass(frozen=True)
class Node:
    """An object of a JSON file.

    Args:
        file: The file, for messages.
        values: The object's values.
        place: Where in the file the object stands, such as 'configurations.2d.', for messages.
    """

    file: Path
    values: Mapping[str, Any]
    place: str = ""

    def refusal(self, key: str, wanted: str, advice: str = _COPY_AGAIN) -> ConfigError:
        """An error that says which file and key, what came, what was wanted and what to do."""
        came = _shown(self.values[key]) if key in self.values else "missing"
        return ConfigError(f"{self.file}: {self.place}{key} is {came}; wanted is {wanted}.{advice}")

    def child(self, key: str) -> "Node":
        """An object inside this one.

        Raises:
            ConfigError: it is missing or not an object.
        """
        value = self.values.get(key)
        if not isinstance(value, dict):
            raise self.refusal(key, "an object")
        return Node(self.file, value, f"{self.place}{key}.")

    def text(self, key: str) -> str:
        """A text that is not empty.

        Raises:
            ConfigError: it is missing or something else.
        """
        value = self.values.get(key)
        if not isinstance(value, str) or not value:
            raise self.refusal(key, "a text")
        return value

    def choice(self, key: str, known: Collection[str], *, default: str | None = None) -> str:
        """One of several names.

        Raises:
            ConfigError: another one came.
        """
        value = self.values.get(key, default)
        if not isinstance(value, str) or value not in known:
            near = question(value, known) if isinstance(value, str) else ""
            raise self.refusal(key, " or ".join(known), near or (USE_NNUNET if key in self.values else _COPY_AGAIN))
        return value

    def flag(self, key: str, default: bool) -> bool:
        """True or false.

        Raises:
            ConfigError: something else came.
        """
        value = self.values.get(key, default)
        if not isinstance(value, bool):
            raise self.refusal(key, "true or false")
        return value

    def number(self, key: str) -> float:
        """A finite number.

        Raises:
            ConfigError: it is missing or something else.
        """
        value = self.values.get(key)
        if not is_number(value):
            raise self.refusal(key, "a number")
        return float(value)

    def integers(self, key: str, *, least: int = 1) -> tuple[int, ...]:
        """A list of integers.

        Raises:
            ConfigError: something else came, or a number below `least`.
        """
        value = self.values.get(key)
        if not is_list_of_integers(value) or min(value, default=least) < least:
            raise self.refusal(key, f"a list of integers of at least {least}")
        return tuple(value)

    def numbers(self, key: str) -> tuple[float, ...]:
        """A list of finite numbers above 0.

        Raises:
            ConfigError: something else came.
        """
        value = self.values.get(key)
        if not isinstance(value, list) or not all(is_number(item) and item > 0 for item in value):
            raise self.refusal(key, "a list of numbers above 0")
        return tuple(map(float, value))


def read_object(file: Path) -> Node:
    """The object that a JSON file holds.

    Raises:
        ConfigError: the file cannot be read, is not JSON, or holds something else.
    """
    try:
        values = json.loads(file.read_text("utf-8"))
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not JSON: {error}.{_COPY_AGAIN}") from error
    if not isinstance(values, dict):
        raise ConfigError(f"{file} holds {_shown(values)}; wanted is a JSON object.{_COPY_AGAIN}")
    return Node(file, values)


def is_integer(value: object) -> TypeGuard[int]:
    """Whether a value of JSON is an integer; true and false are none."""
    return type(value) is int


def is_list_of_integers(value: object) -> TypeGuard[Sequence[int]]:
    """Whether a value of JSON is a list of integers."""
    return isinstance(value, list | tuple) and all(map(is_integer, value))


def is_number(value: object) -> TypeGuard[float]:
    """Whether a value of JSON is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) < 1e300


def _shown(value: object) -> str:
    text = repr(value)
    return text if len(text) <= 80 else f"{text[:77]}..."
