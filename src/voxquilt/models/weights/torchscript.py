"""Reads TorchScript archives, as `torch.jit.save` writes them.

torch is imported where an archive is read, so that one can be recognised before torch has loaded.
"""

import io
import warnings
from pathlib import Path
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import zip_names
from voxquilt.models.weights.registry import ReadOptions
from voxquilt.text import first_line


class TorchScript:
    """The format of TorchScript: a program with its tensors."""

    needs_network = False

    def recognises(self, path: Path) -> bool:
        """Whether the archive holds code."""
        return any("/code/" in name or name.endswith("/constants.pkl") for name in zip_names(path))

    def read(self, path: Path, options: ReadOptions) -> Any:
        """The program, in eval mode.

        Raises:
            ConfigError: the file is not such an archive, or its program takes several inputs.
        """
        import torch

        _let_it_be_pickled()
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore", DeprecationWarning)  # torch.export cannot read what jit saved
                program = torch.jit.load(path, map_location="cpu").eval()
        except (RuntimeError, ValueError) as error:
            raise ConfigError(
                f"{path} is not a TorchScript archive ({first_line(error)}); use model=state_dict or model=lightning "
                f"for other weights."
            ) from error
        _check_inputs(path, program)
        return program


def _check_inputs(path: Path, program: Any) -> None:
    """Raises ConfigError of a program that is not called with patches alone."""
    try:
        arguments = program.forward.schema.arguments[1:]
    except (AttributeError, RuntimeError):  # no forward, which the check of the network says
        return
    needed = [argument.name for argument in arguments if not argument.has_default_value()]
    if not arguments or len(needed) > 1:
        names = ", ".join(needed) or "none"
        raise ConfigError(f"{path} cannot be used: its inputs are {names}; wanted is one, the patches.")


def _let_it_be_pickled() -> None:
    """Let programs be pickled, which torch refuses: ddp_spawn hands the network to its processes so."""
    import copyreg

    import torch

    copyreg.pickle(torch.jit.RecursiveScriptModule, _to_bytes)  # type: ignore[reportPrivateImportUsage]


def _to_bytes(module: Any) -> tuple[Any, tuple[bytes]]:
    import torch

    buffer = io.BytesIO()
    torch.jit.save(module, buffer)
    return _from_bytes, (buffer.getvalue(),)


def _from_bytes(content: bytes) -> Any:
    import torch

    return torch.jit.load(io.BytesIO(content), map_location="cpu").eval()
