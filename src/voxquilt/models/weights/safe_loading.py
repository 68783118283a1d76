"""Loads tensors and plain values from a checkpoint; code that is pickled in it runs only if the user trusts it."""

import pickle
import re
import warnings
import zipfile
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file

from voxquilt.errors import ConfigError
from voxquilt.text import first_line, plain_text


def load_safely(path: Path, *, trust: bool, mmap: bool = False) -> Any:
    """What torch.save or safetensors put into a file.

    Args:
        path: The file.
        trust: Unpickle anything that the file holds, which can run its code.
        mmap: Leave tensors in the file until they are used. Files of torch's old format are read as a whole.

    Raises:
        ConfigError: the file is damaged, or holds more than tensors and plain values.
    """
    try:
        if path.suffix == ".safetensors":
            return load_file(path)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # torch warns of TorchScript archives before it refuses them
            mapped = mmap and zipfile.is_zipfile(path)
            return torch.load(path, map_location="cpu", weights_only=not trust, mmap=mapped)
    except pickle.UnpicklingError as error:
        raise ConfigError(_refusal(path, plain_text(error))) from error
    except Exception as error:
        raise ConfigError(
            f"{path} cannot be read as weights: {first_line(error)}. Is it damaged, or was copying it broken off? "
            f"Copy it again."
        ) from error


def _refusal(path: Path, text: str) -> str:
    """The type that torch's restricted unpickler refused, from a text that is mostly about how to do without it."""
    named = re.search(r"GLOBAL (\S+) (?:was not|whose module)", text)
    other = re.search(r"(?:WeightsUnpickler error:|^)\s*((?:Unsupported|Trying|Can only)[^\n]*)", text, re.MULTILINE)
    if named is None and (other is None or "operand" in other[1]):
        return (
            f"{path} cannot be read as weights: it is damaged, or not of a format that torch reads without running "
            f"what is in it. If you know where it comes from, try model.trust_checkpoint=true."
        )
    refused = named[1] if named else other[1].split(". ")[0] if other else ""
    is_network = named and not named[1].startswith(("numpy.", "collections.", "pathlib.", "argparse.", "omegaconf."))
    advice = (
        " If the whole network was saved, torch.save(network.state_dict(), ...) makes a file that needs no trust."
        if is_network
        else ""
    )
    return (
        f"{path} holds more than tensors and plain values: {refused}. It was not unpickled, since that can run code. "
        f"If you know where the file comes from, set model.trust_checkpoint=true.{advice}"
    )
