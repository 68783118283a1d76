"""Reads and writes the fields of protobuf messages, of which an ONNX file is one, without loading its weights."""

import mmap
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import TypeVar

from voxquilt.errors import ConfigError

T = TypeVar("T")
Message = memoryview

_INTEGER, _EIGHT, _BYTES, _FOUR = 0, 1, 2, 5


def read_mapped(path: Path, read: Callable[[Message], T]) -> T:
    """What a function reads from a file, which is mapped into memory and not loaded.

    Raises:
        ConfigError: the file cannot be read, or is not one message.
    """
    try:
        with open(path, "rb") as file:
            return read(memoryview(mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)))
    except OSError as error:
        raise ConfigError(f"{path} cannot be read: {error.strerror or error}.") from error
    except (ValueError, TypeError, RecursionError) as error:
        raise ConfigError(
            f"{path} is not a whole ONNX file: it is damaged, or copying it was broken off ({error})."
        ) from error


def fields(message: Message) -> Iterator[tuple[int, int | Message]]:
    """The fields of a message: number, and value. What has bytes is a view of them.

    Raises:
        ValueError: it is not a message.
    """
    position, size = 0, len(message)
    while position < size:
        tag, position = _integer(message, position)
        number, kind = tag >> 3, tag & 7
        value: int | Message = 0
        if kind == _INTEGER:
            value, position = _integer(message, position)
        elif kind in (_EIGHT, _FOUR):
            position += 8 if kind == _EIGHT else 4
        elif kind == _BYTES:
            length, start = _integer(message, position)
            position = start + length
            value = message[start:position]
        else:
            raise ValueError(f"field {number} is of an unknown kind")
        if position > size:
            raise ValueError(f"field {number} ends behind the end")
        yield number, value


def messages(message: Message, first: int, *rest: int) -> Iterator[Message]:
    """The messages at a path of field numbers.

    Raises:
        ValueError: it is not a message, or a field is a number.
    """
    for number, value in fields(message):
        if number == first:
            if isinstance(value, int):
                raise ValueError(f"field {number} is a number")
            yield from messages(value, *rest) if rest else (value,)


def texts(message: Message, first: int, *rest: int) -> list[str]:
    """The texts at a path of field numbers."""
    return [bytes(value).decode() for value in messages(message, first, *rest)]


def text(message: Message, number: int) -> str:
    """The text of a field; '' where it is missing."""
    return next(iter(texts(message, number)), "")


def integers(message: Message, number: int) -> list[int]:
    """The integers of a field, one by one or packed into bytes."""
    found: list[int] = []
    for other, value in fields(message):
        if other == number and isinstance(value, int):
            found.append(value)
        elif other == number and not isinstance(value, int):
            position = 0
            while position < len(value):
                integer, position = _integer(value, position)
                found.append(integer)
    return found


def encode(number: int, value: int | str | bytes | Message) -> bytes:
    """A field of a message."""
    if isinstance(value, int):
        return _varint(number << 3 | _INTEGER) + _varint(value)
    content = value.encode() if isinstance(value, str) else bytes(value)
    return _varint(number << 3 | _BYTES) + _varint(len(content)) + content


def _integer(message: Message, position: int) -> tuple[int, int]:
    value = shift = 0
    while position < len(message) and shift < 70:
        byte = message[position]
        position += 1
        value |= (byte & 127) << shift
        if byte < 128:
            return value, position
        shift += 7
    raise ValueError("a number ends behind the end")


def _varint(value: int) -> bytes:
    content = bytearray()
    while value > 127:
        content.append(value & 127 | 128)
        value >>= 7
    content.append(value)
    return bytes(content)
