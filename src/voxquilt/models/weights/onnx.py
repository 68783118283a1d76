"""Reads ONNX files.

torch and onnxruntime are imported where a file is read, so that one can be recognised before they have loaded.
"""

from pathlib import Path
from typing import Any

from voxquilt.models.weights.onnx_header import looks_like_onnx
from voxquilt.models.weights.registry import ReadOptions


class Onnx:
    """The format of ONNX: a graph of operators, with its tensors, which onnxruntime runs."""

    needs_network = False

    def recognises(self, path: Path) -> bool:
        """Whether the file begins as a model does."""
        try:
            with open(path, "rb") as file:
                return looks_like_onnx(file.read(3))
        except OSError:
            return False

    def read(self, path: Path, options: ReadOptions) -> Any:
        """The graph as a network.

        Raises:
            ConfigError: onnxruntime is missing, or the file is damaged, reads files outside its folder, has operators
                that onnxruntime lacks, or takes another input than patches.
        """
        from voxquilt.models.weights.onnx_network import OnnxNetwork

        return OnnxNetwork(path)
