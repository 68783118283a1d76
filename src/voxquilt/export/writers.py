"""Writes networks as files that need no Python class, one function per format, with settings inside."""

import io
import logging
import warnings
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from voxquilt.errors import ConfigError
from voxquilt.models.weights.stored_settings import KEY
from voxquilt.text import first_line

# One protobuf message, and so one ONNX file, has at most 2 GiB; beside weights there are the operators.
ONE_FILE = 2**31 - 2**26


def write_torchscript(path: Path, network: nn.Module, batch: Tensor, settings: str) -> None:
    """TorchScript, traced with a batch.

    Raises:
        ConfigError: the network cannot be traced.
    """
    with _quiet(), _reported("traced for TorchScript"), torch.no_grad():
        script: Any = torch.jit.trace(network, batch, check_trace=False, strict=False)
        torch.jit.save(script, path, _extra_files={KEY: settings})


def to_program(network: nn.Module, batch: Tensor, *, is_free: bool) -> ExportedProgram:
    """The network as a program of torch's operators for patches of one size.

    Args:
        network: The network.
        batch: A batch of patches of this size.
        is_free: Whether it takes batches of any size, or only of this one.

    Raises:
        ConfigError: the network cannot be exported.
    """
    with _quiet(), _reported("exported by torch.export"):
        return torch.export.export(network, (batch,), dynamic_shapes=({0: Dim("batch", min=1)},) if is_free else None)


def write_program(path: Path, program: ExportedProgram, settings: str) -> None:
    """A .pt2 archive."""
    with _quiet():
        torch.export.save(program, path, extra_files={KEY: settings})


def write_onnx(path: Path, program: ExportedProgram, names: Sequence[str], settings: str) -> None:
    """An ONNX file, with its weights in it if they are smaller than 2 GiB, else in another file beside it.

    Args:
        path: The file.
        program: The network.
        names: Names of the outputs.
        settings: What is stored as metadata.

    Raises:
        ConfigError: packages are missing, or ONNX lacks an operator.
    """
    try:
        import onnxscript  # noqa: F401  (what torch.onnx needs: an optional dependency)
    except ImportError as error:
        raise ConfigError(
            f"writing ONNX needs onnx and onnxscript ({error}): pip install 'voxquilt[onnx-export]'"
        ) from error
    with _quiet(), _reported("written as ONNX"):
        made: Any = torch.onnx.export(
            program, dynamo=True, verbose=False, input_names=["patches"], output_names=list(names)
        )
        made.model.metadata_props[KEY] = settings
        for node in made.model.graph.all_nodes():
            node.metadata_props.clear()  # where the network's code lies on this machine
        weights = sum(tensor.nbytes for tensor in {**program.state_dict, **program.constants}.values())
        made.save(path, external_data=weights > ONE_FILE)


@contextmanager
def _reported(what: str) -> Iterator[None]:
    """Turn what torch raises for a network that it cannot export into one message."""
    try:
        yield
    except Exception as error:  # of any kind
        raise ConfigError(f"the network cannot be {what}: {type(error).__name__}: {first_line(error)}") from error


@contextmanager
def _quiet() -> Iterator[None]:
    """Without what exporters print, log and warn of."""
    loggers = [logging.getLogger(name) for name in ("torch.onnx", "torch.export", "onnxscript", "onnx_ir")]
    levels = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.CRITICAL)
    try:
        with warnings.catch_warnings(), redirect_stdout(io.StringIO()):
            warnings.simplefilter("ignore")
            yield
    finally:
        for logger, level in zip(loggers, levels, strict=True):
            logger.setLevel(level)
