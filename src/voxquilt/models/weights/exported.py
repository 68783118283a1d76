"""Reads exported programs, as `torch.export.save` writes them (.pt2).

torch is imported where a program is read, so that one can be recognised before torch has loaded.
"""

import warnings
from pathlib import Path
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import zip_names
from voxquilt.models.weights.registry import ReadOptions
from voxquilt.text import first_line


class Exported:
    """The format of torch.export: a program of torch's operators, with its tensors."""

    needs_network = False

    def recognises(self, path: Path) -> bool:
        """Whether the archive holds a program."""
        return any("/models/" in name or "serialized_exported_program" in name for name in zip_names(path))

    def read(self, path: Path, options: ReadOptions) -> Any:
        """The program as a network; with `options.trust` the file as it is, which can run its code.

        Raises:
            ConfigError: the file is not such an archive, or one that holds more than is loaded without trust.
        """
        import torch

        from voxquilt.models.weights.exported_archive import copy_allowed
        from voxquilt.models.weights.exported_network import ExportedNetwork

        try:
            content = path if options.trust else copy_allowed(path)
        except OSError as error:
            raise ConfigError(f"{path} cannot be read: {error.strerror}.") from error
        except ValueError as error:
            raise ConfigError(
                f"{path} was not loaded as an exported program, since {error}. If it is one and you know where it "
                f"comes from, set model.trust_checkpoint=true; use model=torchscript or model=state_dict for other "
                f"weights."
            ) from error
        try:
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")
                return ExportedNetwork(torch.export.load(content))
        except Exception as error:  # torch raises of any kind where a program does not fit this version
            raise ConfigError(f"{path} cannot be used as an exported program: {first_line(error)}.") from error
