"""Reads what an ONNX file says about itself, without onnxruntime and without its weights."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.weights.onnx_message import (
    Message,
    encode,
    fields,
    integers,
    messages,
    read_mapped,
    text,
    texts,
)

# The first two fields of a model: its version, and any other that belongs there.
_VERSION, _SECOND = 0x08, b"\x12\x1a\x22\x28\x32\x3a\x42\x72"
# Numbers of fields, of a model, a graph, an operator, its attributes, and a tensor.
_GRAPH, _METADATA, _FUNCTIONS, _FUNCTION_NODE = 7, 14, 25, 7
_NODE, _WEIGHT, _INPUT, _OUTPUT, _VALUE, _SPARSE = 1, 5, 11, 12, 13, 15
_NODE_INPUT, _NODE_OUTPUT, _NODE_KIND, _ATTRIBUTE = 1, 2, 4, 5
_TENSORS, _GRAPHS, _SPARSES = (5, 10), (6, 11), (22, 23)
_DIMS, _TYPE, _NAME, _EXTERNAL, _LOCATION = 1, 2, 8, 13, 14
# Types of values: sequences, mappings, opaque ones, sparse tensors and optional ones.
_NO_TENSOR = (4, 5, 7, 8, 9)
# Constants up to so many bytes say how tensors are reshaped or cut, and are kept; larger ones are weights.
_KEPT_BYTES = 1024


@dataclass(frozen=True)
class Value:
    """An input or an output of the graph.

    Args:
        name: Its name.
        type: The number of its type in ONNX, such as 1 for float32; 0 if it is not a tensor, but a sequence, say.
        sizes: Sizes along its axes, None where the file leaves one free.
    """

    name: str
    type: int
    sizes: tuple[int | None, ...]


@dataclass(frozen=True)
class Operator:
    """An operator of the graph: its kind, and the names of what it reads and writes."""

    kind: str
    inputs: tuple[str, ...]
    outputs: tuple[str, ...]


@dataclass(frozen=True)
class Header:
    """What an ONNX file says about itself.

    Args:
        inputs: Inputs of the graph that are not weights.
        outputs: Outputs of the graph.
        operators: Operators of the graph, in the order in which they run.
        external: Names of other files with its weights, as the file has them, and the bytes that each must have.
    """

    inputs: tuple[Value, ...]
    outputs: tuple[Value, ...]
    operators: tuple[Operator, ...]
    external: dict[str, int]


def looks_like_onnx(start: bytes) -> bool:
    """Whether a file that begins so may be an ONNX model."""
    return len(start) > 2 and start[0] == _VERSION and start[1] < 32 and start[2] in _SECOND


def read_header(path: Path) -> Header:
    """What a file says about itself.

    Raises:
        ConfigError: the file cannot be read, or is damaged.
    """
    return read_mapped(path, _header)


def external_files(path: Path) -> list[Path]:
    """Other files that have the weights of a file; none if it is not a whole ONNX file."""
    try:
        with open(path, "rb") as file:
            names = read_header(path).external if looks_like_onnx(file.read(3)) else ()
    except (OSError, ConfigError):
        return []
    return [path.parent / name for name in names]


def read_metadata(path: Path, key: str) -> str | None:
    """A text of the file's metadata; None if it has none by this key, or is not a whole ONNX file."""
    try:
        pairs = read_mapped(path, lambda model: [(text(m, 1), text(m, 2)) for m in messages(model, _METADATA)])
    except ConfigError:
        return None
    return dict(pairs).get(key)


def fixed_patch(path: Path) -> tuple[int, ...] | None:
    """The only patch size that a file takes, of three axes or of two; None where it leaves one free.

    Raises:
        ConfigError: the file cannot be read, or is damaged.
    """
    patches, *others = read_header(path).inputs or [Value("", 0, ())]
    sizes = [size for size in patches.sizes[2:] if size is not None]
    return tuple(sizes) if not others and sizes and len(sizes) == len(patches.sizes) - 2 else None


def without_weights(path: Path, sizes: Sequence[int | None]) -> bytes:
    """A model with the file's operators and an input of certain sizes, of which every intermediate value is an output.

    The file's weights are inputs of it, so that onnxruntime infers the shapes of all values without reading any weight.

    Raises:
        ConfigError: the file cannot be read, or is damaged.
    """
    return read_mapped(path, lambda model: _without_weights(model, sizes))


def _header(model: Message) -> Header:
    (graph,) = messages(model, _GRAPH)
    weights = set(texts(graph, _WEIGHT, _NAME))
    external: dict[str, int] = {}
    for tensor in _tensors(graph, _NODE):
        _add_external(tensor, external)
    for function in messages(model, _FUNCTIONS):
        for tensor in _tensors(function, _FUNCTION_NODE):
            _add_external(tensor, external)
    return Header(
        tuple(value for value in map(_value, messages(graph, _INPUT)) if value.name not in weights),
        tuple(map(_value, messages(graph, _OUTPUT))),
        tuple(_operators(graph)),
        external,
    )


def _operators(graph: Message) -> Iterator[Operator]:
    for node in messages(graph, _NODE):
        yield Operator(text(node, _NODE_KIND), tuple(texts(node, _NODE_INPUT)), tuple(texts(node, _NODE_OUTPUT)))


def _value(value: Message) -> Value:
    (type_of_value,) = messages(value, 2)
    if any(number in _NO_TENSOR for number, _ in fields(type_of_value)):
        return Value(text(value, 1), 0, ())
    (kind,) = messages(type_of_value, 1)
    sizes = tuple(next(iter(integers(axis, 1)), None) for axis in messages(kind, 2, 1))
    (type_number,) = integers(kind, 1)
    return Value(text(value, 1), type_number, tuple(size if size and size < 2**31 else None for size in sizes))


def _tensors(graph: Message, node_number: int) -> Iterator[Message]:
    """All tensors in a graph or a function, also in the attributes of its operators and in graphs inside of them."""
    if node_number == _NODE:
        yield from messages(graph, _WEIGHT)
        for part in (1, 2):
            yield from messages(graph, _SPARSE, part)
    for attribute in messages(graph, node_number, _ATTRIBUTE):
        for number in _TENSORS:
            yield from messages(attribute, number)
        for number in _SPARSES:
            for part in (1, 2):
                yield from messages(attribute, number, part)
        for number in _GRAPHS:
            for inner in messages(attribute, number):
                yield from _tensors(inner, _NODE)


def _add_external(tensor: Message, external: dict[str, int]) -> None:
    entries = {text(entry, 1): text(entry, 2) for entry in messages(tensor, _EXTERNAL)}
    if entries or integers(tensor, _LOCATION) == [1]:
        name = entries.get("location", "")
        end = int(entries.get("offset", 0)) + int(entries.get("length", 0))
        external[name] = max(external.get(name, 0), end)


def _without_weights(model: Message, sizes: Sequence[int | None]) -> bytes:
    (graph,) = messages(model, _GRAPH)
    header = _header(model)
    (patches,) = header.inputs
    parts = [encode(_INPUT, _value_info(patches.name, patches.type, sizes))]
    for number, value in fields(graph):
        if isinstance(value, int):
            continue
        if number == _WEIGHT and not _is_kept(value):
            type_number = next(iter(integers(value, _TYPE)), 0)
            parts.append(encode(_INPUT, _value_info(text(value, _NAME), type_number, integers(value, _DIMS))))
        elif number not in (_INPUT, _OUTPUT, _VALUE):
            parts.append(encode(number, value))
    made = [name for operator in header.operators for name in operator.outputs if name]
    parts += [encode(_OUTPUT, encode(1, name)) for name in dict.fromkeys(made)]
    rest = [encode(number, value) for number, value in fields(model) if number not in (_GRAPH, _METADATA)]
    return b"".join([*rest, encode(_GRAPH, b"".join(parts))])


def _is_kept(weight: Message) -> bool:
    return len(weight) <= _KEPT_BYTES and not any(True for _ in messages(weight, _EXTERNAL))


def _value_info(name: str, type_number: int, sizes: Sequence[int | None]) -> bytes:
    shape = b"".join(encode(1, b"" if size is None else encode(1, size)) for size in sizes)
    return encode(1, name) + encode(2, encode(1, encode(1, type_number) + encode(2, shape)))
