"""Writes ONNX files, also such as no exporter would write."""

import warnings
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import torch
from onnx import TensorProto, helper, numpy_helper
from torch import nn


def export(
    path: Path,
    network: nn.Module,
    shape: Sequence[int],
    free: Sequence[int] = (),
    names: Sequence[str] = ("scores",),
    dtype: torch.dtype = torch.float32,
) -> Path:
    """A network as torch's older exporter writes it, which is quick: some axes free, the others of one size."""
    axes = {axis: f"axis{axis}" for axis in free}
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(), (torch.zeros(*shape, dtype=dtype),), str(path), dynamo=False, input_names=["patches"],
            output_names=list(names), dynamic_axes={name: axes for name in ("patches", *names)} if axes else None,
        )  # fmt: skip
    return path


def export_anew(path: Path, network: nn.Module, shape: Sequence[int]) -> Path:
    """A network as torch's exporter writes it, for batches of any size, with its weights in a second file."""
    batch = torch.zeros(2, *shape[1:])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            network.eval(), (batch,), str(path), dynamo=True, verbose=False,
            dynamic_shapes=({0: torch.export.Dim("batch")},), external_data=True,
        )  # fmt: skip
    return path


def graph(
    path: Path,
    nodes: Sequence[tuple[Any, ...]],
    *,
    inputs: Mapping[str, Sequence[Any]] | None = None,
    outputs: Mapping[str, Sequence[Any]] | None = None,
    weights: Mapping[str, np.ndarray] | None = None,
    type: int = TensorProto.FLOAT,
    **options: Any,
) -> Path:
    """A graph of single operators: (kind, inputs, outputs, attributes) each."""
    shape = [1, 1, 4, 4, 4]
    made = helper.make_graph(
        [helper.make_node(kind, *ends, **(rest[0] if rest else {})) for kind, *ends, rest in map(_split, nodes)],
        "graph",
        [helper.make_tensor_value_info(n, type, s) for n, s in (inputs or {"x": shape}).items()],
        [helper.make_tensor_value_info(n, type, s) for n, s in (outputs or {"y": shape}).items()],
        [numpy_helper.from_array(array, name) for name, array in (weights or {}).items()],
    )
    opset = [helper.make_opsetid("", 20), helper.make_opsetid("custom.domain", 1)]
    path.write_bytes(helper.make_model(made, opset_imports=opset, ir_version=10, **options).SerializeToString())
    return path


def _split(node: tuple[Any, ...]) -> tuple[Any, ...]:
    return (*node[:3], node[3:])


def with_external(path: Path, location: str, content: bytes | None = None, length: int = 64 * 4) -> Path:
    """An addition whose weights are said to be in another file, which is written beside it if there is content."""
    graph(path, [("Add", ["x", "w"], ["y"])], weights={"w": np.zeros((1, 1, 4, 4, 4), np.float32)})
    model = onnx.load(path)
    (weight,) = model.graph.initializer
    weight.ClearField("raw_data")
    weight.data_location = TensorProto.EXTERNAL
    for key, value in (("location", location), ("offset", "0"), ("length", str(length))):
        weight.external_data.add(key=key, value=value)
    path.write_bytes(model.SerializeToString())
    if content is not None:
        (path.parent / location).write_bytes(content)
    return path


def with_settings(path: Path, key: str, text: str) -> Path:
    """The same file with a text in its metadata."""
    model = onnx.load(path, load_external_data=False)
    model.metadata_props.add(key=key, value=text)
    path.write_bytes(model.SerializeToString())
    return path
