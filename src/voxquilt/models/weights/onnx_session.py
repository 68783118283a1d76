"""Opens ONNX files with onnxruntime, of which no other module knows anything but what is here."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy
import torch
from torch import Tensor

from voxquilt.errors import ConfigError
from voxquilt.models.weights.onnx_header import without_weights
from voxquilt.text import first_line

_TYPES = {
    "tensor(float)": torch.float32,
    "tensor(float16)": torch.float16,
    "tensor(double)": torch.float64,
    "tensor(bool)": torch.bool,
    "tensor(int8)": torch.int8,
    "tensor(uint8)": torch.uint8,
    "tensor(int32)": torch.int32,
    "tensor(int64)": torch.int64,
}
_CUDA = "CUDAExecutionProvider"


@dataclass(frozen=True)
class Form:
    """What a tensor of the graph is.

    Args:
        type: Its type; None for one that torch lacks.
        shape: Its shape; None where it is not known.
    """

    type: torch.dtype | None
    shape: tuple[int, ...] | None


UNKNOWN = Form(None, None)


def infer_forms(path: Path, sizes: Sequence[int | None]) -> dict[str, Form]:
    """The form of every value of the graph by its name, for an input of certain sizes; nothing is computed.

    Raises:
        ConfigError: onnxruntime is missing, it lacks an operator of the file, or the operators do not fit each other.
    """
    runtime = _runtime()
    options = _options(runtime)
    options.graph_optimization_level = runtime.GraphOptimizationLevel.ORT_ENABLE_BASIC
    try:
        session = runtime.InferenceSession(without_weights(path, sizes), options, providers=["CPUExecutionProvider"])
    except Exception as error:  # onnxruntime's errors have no class in common
        raise _refusal(path, error) from error
    return {node.name: _form(node) for node in (*session.get_inputs(), *session.get_outputs())}


class Session:
    """A file that is ready to run, on one device.

    Args:
        path: The file.
        device: Where it runs: on the host, or on a CUDA device.

    Raises:
        ConfigError: onnxruntime is missing or cannot run on this device, or it cannot load the file.
    """

    def __init__(self, path: Path, device: torch.device) -> None:
        runtime = _runtime()
        self._device = device
        providers: list[Any] = ["CPUExecutionProvider"]
        if device.type != "cpu":
            _check_device(runtime, device)
            # Its memory is not doubled at each growth, since torch needs the rest.
            choices = {"device_id": device.index or 0, "arena_extend_strategy": "kSameAsRequested"}
            providers.insert(0, (_CUDA, choices))
        options = _options(runtime)
        options.intra_op_num_threads = torch.get_num_threads()
        try:
            self._session = runtime.InferenceSession(str(path), options, providers=providers)
        except Exception as error:
            raise _refusal(path, error) from error
        if device.type != "cpu" and _CUDA not in self._session.get_providers():
            raise ConfigError(
                f"onnxruntime could not use {device} for {path}, and would run on the CPU: do its version and those of "
                f"CUDA and cuDNN fit each other? trainer=cpu runs there on purpose."
            )

    def run(self, name: str, patches: Tensor, outputs: Mapping[str, Form]) -> dict[str, Tensor]:
        """The outputs for a batch that is on the session's device, in the types of the file.

        Args:
            name: Name of the input.
            patches: The batch, in the input's type.
            outputs: Forms of the outputs by name; those whose shape is not known are copied from onnxruntime's memory.
        """
        patches = patches.contiguous()
        place = self._device.type, self._device.index or 0
        binding = self._session.io_binding()
        binding.bind_input(name, *place, _numpy(patches.dtype), tuple(patches.shape), patches.data_ptr())
        made: dict[str, Tensor] = {}
        for output, form in outputs.items():
            if form.shape is None or form.type is None:
                binding.bind_output(output, "cpu")
                continue
            made[output] = torch.empty(form.shape, dtype=form.type, device=self._device)
            binding.bind_output(output, *place, _numpy(form.type), form.shape, made[output].data_ptr())
        if self._device.type == "cuda":  # onnxruntime has a stream of its own
            torch.cuda.current_stream(self._device).synchronize()
        try:
            self._session.run_with_iobinding(binding)
            binding.synchronize_outputs()
        except Exception as error:
            if self._device.type == "cuda" and "alloc" in str(error).lower():  # so that smaller batches are tried
                raise torch.OutOfMemoryError(first_line(error)) from error
            raise
        others = zip(outputs, binding.get_outputs(), strict=True)
        made |= {
            output: torch.from_numpy(value.numpy()).to(self._device) for output, value in others if output not in made
        }
        return {output: made[output] for output in outputs}

    def shapes(self, name: str, sizes: Sequence[int], type: torch.dtype) -> dict[str, tuple[int, ...]]:
        """Shapes of the outputs for an input of zeros, which is run."""
        outputs = self._session.run(None, {name: numpy.zeros(sizes, _numpy(type))})
        names = [output.name for output in self._session.get_outputs()]
        return {output: value.shape for output, value in zip(names, outputs, strict=True)}


@cache
def _runtime() -> ModuleType:
    try:
        import onnxruntime  # an optional dependency
    except ImportError as error:
        raise ConfigError(
            f"ONNX files need onnxruntime, which cannot be imported ({error}): pip install 'voxquilt[onnx]'; for a GPU "
            f"pip install onnxruntime-gpu in its place."
        ) from error
    onnxruntime.set_default_logger_severity(4)  # errors are raised as well
    return onnxruntime


def _options(runtime: ModuleType) -> Any:
    options = runtime.SessionOptions()
    options.log_severity_level = 4
    options.inter_op_num_threads = options.intra_op_num_threads = 1
    # Threads that wait for the next patch by looking for it would take the cores of those that read and write.
    options.add_session_config_entry("session.intra_op.allow_spinning", "0")
    # Its plan of memory, made for the first batch, takes twice what a batch takes, and saves no time that was measured.
    options.enable_mem_pattern = False
    return options


def _check_device(runtime: ModuleType, device: torch.device) -> None:
    if device.type != "cuda" or _CUDA not in runtime.get_available_providers():
        raise ConfigError(
            f"the network is to run on {device}, and onnxruntime {runtime.__version__} has no provider for it (it has "
            f"{', '.join(runtime.get_available_providers())}): pip install onnxruntime-gpu in place of onnxruntime for "
            f"CUDA, or set trainer=cpu."
        )


def _refusal(path: Path, error: Exception) -> ConfigError:
    return ConfigError(f"{path} cannot be used by onnxruntime: {first_line(error)}")


def _form(node: Any) -> Form:
    is_known = isinstance(node.shape, list) and all(isinstance(size, int) for size in node.shape)
    return Form(_TYPES.get(node.type), tuple(node.shape) if is_known else None)


def _numpy(type: torch.dtype) -> Any:
    return numpy.dtype(str(type).removeprefix("torch.")).type
