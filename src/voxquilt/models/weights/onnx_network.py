"""Makes a network of an ONNX file: for any number of patches, on the host or on a CUDA device."""

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Shaped
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor

from voxquilt.errors import ConfigError
from voxquilt.models.chunking import check_sizes, in_chunks
from voxquilt.models.weights.onnx_allocation import allocate
from voxquilt.models.weights.onnx_check import check_header
from voxquilt.models.weights.onnx_header import read_header
from voxquilt.models.weights.onnx_session import UNKNOWN, Form, Session, infer_forms

_FLOATS = (torch.float16, torch.float32, torch.float64)


class NamedByFile(dict[str, Tensor]):
    """Outputs by names that whatever wrote the file may have made up, unlike those of a network of the user's."""


class OnnxNetwork(nn.Module):
    """Runs an ONNX file on batches of any size, in chunks of the size that it was exported for.

    It can be pickled and copied: it holds the file's path, and each process opens the file when it first runs it.

    Args:
        path: A file with one input (B, C, I, J, K), or (B, C, I, J) for a 2-D network.

    Raises:
        ConfigError: onnxruntime is missing, or the file is damaged, reads files outside its folder, has operators that
            onnxruntime lacks, or takes another input than patches.
    """

    def __init__(self, path: Path) -> None:
        super().__init__()
        self.path = Path(os.path.abspath(path))
        header = read_header(path)
        self._patches, external = check_header(path, header)
        self.weight_bytes = sum(file.stat().st_size for file in (path, *external))
        self._operators = header.operators
        self._outputs = [output.name for output in header.outputs]
        forms = infer_forms(path, self._patches.sizes)
        self._type = _check_types(path, self._patches.name, forms)
        self._forms: dict[tuple[int, ...], dict[str, Form]] = {}
        self._sessions: dict[tuple[int, torch.device], Session] = {}

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Sizes of the input, (B, C, I, J, K); None where any size will do."""
        return self._patches.sizes

    def forward(self, patches: Shaped[Tensor, "b c *spatial"]) -> Any:
        """The output, or several by name.

        Raises:
            OutputError: the file was exported for patches of another size, or with other channels.
        """
        check_sizes(self.path.name, self.sizes, patches.shape)
        run = self._allocate if patches.is_meta or isinstance(patches, FakeTensor) else self._compute
        batch = self.sizes[0]
        outputs = in_chunks(run, patches, most=batch or 2**31, least=batch)
        return NamedByFile(outputs) if isinstance(outputs, dict) else outputs

    def open_session(self, device: torch.device) -> Session:
        """The file, ready to run on a device in this process.

        Raises:
            ConfigError: onnxruntime cannot run on this device, or cannot load the file.
        """
        key = os.getpid(), device  # threads of a session do not survive in a forked process
        if key not in self._sessions:
            self._sessions.clear()
            self._sessions[key] = Session(self.path, device)
        return self._sessions[key]

    def __reduce__(self) -> tuple[Any, tuple[Path]]:
        return OnnxNetwork, (self.path,)

    def _compute(self, patches: Tensor) -> Any:
        forms = self._known_forms(tuple(patches.shape))
        wanted = {name: forms.get(name, UNKNOWN) for name in self._outputs}
        session = self.open_session(patches.device)
        return self._named(session.run(self._patches.name, patches.to(self._type), wanted))

    def _allocate(self, patches: Tensor) -> Any:
        """The outputs without values, while memory is allocated as in a run."""
        forms = self._known_forms(tuple(patches.shape))
        missing = [name for name in self._outputs if name not in forms or forms[name].shape is None]
        if missing:  # the file is run on zeros
            session = self.open_session(torch.device("cpu"))
            shapes = session.shapes(self._patches.name, patches.shape, self._type)
            forms |= {name: Form(torch.float32, shapes[name]) for name in missing}
        batch = patches.to(self._type)
        return self._named(allocate(self._operators, forms, self._patches.name, batch, self._outputs))

    def _known_forms(self, sizes: tuple[int, ...]) -> dict[str, Form]:
        if sizes not in self._forms:
            self._forms[sizes] = infer_forms(self.path, sizes)
        return self._forms[sizes]

    def _named(self, outputs: Mapping[str, Tensor]) -> Tensor | dict[str, Tensor]:
        """Outputs in float32, by names that can be part of a file's; the only one by itself."""
        tensors = [output.float() if output.is_floating_point() else output for output in outputs.values()]
        if len(tensors) == 1:
            return tensors[0]
        names = [re.sub(r"[^\w-]+", "_", name) for name in outputs]
        names = names if len(set(names)) == len(names) else [f"out{n}" for n in range(len(names))]
        return dict(zip(names, tensors, strict=True))


def _check_types(path: Path, patches: str, forms: Mapping[str, Form]) -> torch.dtype:
    """The type of the input.

    Raises:
        ConfigError: it is not one of float16, float32 and float64.
    """
    found = forms[patches].type
    if found not in _FLOATS:
        raise ConfigError(f"{path} cannot be used: its input {patches} is {found}; wanted are floating-point numbers.")
    return found
