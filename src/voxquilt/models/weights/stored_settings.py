"""Reads the settings that a file of weights carries, without torch.

Nothing that is pickled is run or imported: what is not a plain value becomes an inert stand-in.
"""

import json
import pickle
import zipfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, BinaryIO

from safetensors import safe_open

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import is_old_format
from voxquilt.models.weights.onnx_header import looks_like_onnx, read_metadata
from voxquilt.old_names import with_new_targets

KEY = "voxquilt"
"""The key of the settings in a checkpoint."""
TRAINING = "voxquilt_training"
"""The key of the record of how it was trained, which predicting does not read."""
FORMAT = 1
# Pickles before the content in torch.save's old format: the magic number, the protocol, and about the machine.
_OLD_PREAMBLE = 3

# What predicting needs of a training's configuration, by section. A file may not carry other keys, of which one would
# say that the file is trusted.
_SECTIONS = {
    "data": ("patch_size", "patch_overlap", "padding_mode", "divisible_by", "placement", "step", "suffixes"),
    "preprocess": (
        "_target_", "orientation", "spacing", "intensity",
        "transpose", "grid", "crop", "interpolation", "per_slice", "intensity_first", "one_hot",
        "one_hot_interpolation",
    ),
    "model": ("net", "squeeze_axis", "activation"),
    "stitch": ("overlap_mode", "products", "threshold", "class_names", "label_values", "order", "per_slice"),
}  # fmt: skip
# Values that are not carried, since a file without the key means them: files from before the key go on forming
# ensembles with new ones, and other voxquilts go on reading these.
_MEANT = {
    "data": {"placement": "regular", "step": None, "suffixes": None},
    "preprocess": {
        "transpose": None, "grid": "centre", "crop": None, "interpolation": 1, "per_slice": None,
        "intensity_first": False, "one_hot": None, "one_hot_interpolation": 1,
    },
    "stitch": {"order": 1, "per_slice": None},
}  # fmt: skip


def to_carry(plain: Mapping[str, Any], images: Sequence[str]) -> dict[str, Any]:
    """The settings that a training puts into its checkpoints: plain values.

    Args:
        plain: The training's configuration.
        images: Names of the images, in the order of the network's channels.
    """
    settings: dict[str, Any] = {"format": FORMAT, "images": list(images)}
    for section, keys in _SECTIONS.items():
        node = plain.get(section) or {}
        meant = _MEANT.get(section, {})
        settings[section] = {
            key: node[key] for key in keys if key in node and not (key in meant and node[key] == meant[key])
        }
    settings["data"]["patch_size"] = plain["data"].get("inference_patch_size") or plain["data"]["patch_size"]
    # Where predict.py has it, since flips and ensembles may be averaged as probabilities.
    settings["model"]["activation"] = plain["stitch"].get("activation")
    return settings


def carried(path: Path) -> dict[str, Any] | None:
    """The settings that a checkpoint carries, or None.

    Raises:
        ConfigError: settings of a newer version than this, with keys that no checkpoint may bring, or with values that
            are not plain.
    """
    text = _stored_text(path)
    content = pickled(path) if text is None else _parsed(text)
    settings = content.get(KEY) if isinstance(content, Mapping) else None
    if settings is None:
        return None
    if not isinstance(settings, Mapping) or not _is_plain(settings):
        raise ConfigError(f"{path}: its settings are not plain values; choose model=state_dict, and set them yourself.")
    if settings.get("format") != FORMAT:
        raise ConfigError(f"{path}: its settings have format {settings.get('format')!r}; this voxquilt reads {FORMAT}.")
    for section, keys in _SECTIONS.items():
        node = settings.get(section, {})
        unknown = sorted(set(node) - set(keys), key=str) if isinstance(node, Mapping) else [section]
        if unknown:
            raise ConfigError(f"{path}: its settings have {section}.{unknown[0]}, which no checkpoint may bring.")
    return {section: {} for section in _SECTIONS} | with_new_targets(dict(settings))


def with_meant(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Settings with the values that a file without the key means, so that they can be compared with others."""
    return {
        section: {**_MEANT.get(section, {}), **value} if section in _SECTIONS else value
        for section, value in settings.items()
    }


def pickled(path: Path) -> Any:
    """What torch.save put into a file, tensors and objects left out; None for anything else."""
    try:
        with open(path, "rb") as file:
            if is_old_format(file.peek(64)[:64]):
                for _ in range(_OLD_PREAMBLE):
                    _Plain(file).load()
                return _Plain(file).load()
        with zipfile.ZipFile(path) as archive:
            name = next((name for name in archive.namelist() if name.endswith("/data.pkl")), None)
            if name is None or "/" in name.removesuffix("/data.pkl"):
                return None
            with archive.open(name) as file:
                return _Plain(file).load()
    except Exception:  # whatever is wrong with the file is reported when its weights are loaded
        return None


def _stored_text(path: Path) -> str | None:
    """The settings as text, of formats that keep them so; None where there are none."""
    try:
        if path.suffix == ".safetensors":
            with safe_open(path, framework="np") as file:  # NumPy's, which does not import torch
                return (file.metadata() or {}).get(KEY)
        with open(path, "rb") as file:
            if looks_like_onnx(file.read(3)):
                return read_metadata(path, KEY)
        with zipfile.ZipFile(path) as archive:  # an extra file of torch.jit.save or torch.export.save
            name = next(name for name in archive.namelist() if name.partition("/")[2] == f"extra/{KEY}")
            return archive.read(name).decode()
    except Exception:  # as in `pickled`
        return None


def _parsed(text: str) -> Any:
    try:
        return {KEY: json.loads(text, object_pairs_hook=_with_numbers)}
    except (ValueError, RecursionError):
        return None


def _with_numbers(pairs: list[tuple[str, Any]]) -> dict[str | int, Any]:
    """Numbers of channels, in preprocess.intensity, which JSON writes as texts."""
    return {int(key) if key.isdecimal() and key.isascii() else key: value for key, value in pairs}


class _StandIn(dict[Any, Any]):
    """Takes the place of any class or function that a pickle names, and of what it would make."""

    def __new__(cls, *_: Any, **__: Any) -> "_StandIn":
        return super().__new__(cls)

    def __init__(self, *_: Any, **__: Any) -> None:
        super().__init__()

    def __setstate__(self, _: Any) -> None:
        pass

    def append(self, _: Any) -> None:
        pass

    def extend(self, _: Any) -> None:
        pass

    def add(self, _: Any) -> None:
        pass


class _Plain(pickle.Unpickler):
    """Imports nothing and calls nothing but the stand-in."""

    def __init__(self, file: BinaryIO | Any) -> None:
        super().__init__(file)

    def find_class(self, module_name: str, global_name: str) -> Any:
        return _StandIn

    def persistent_load(self, pid: Any) -> Any:
        return None


def _is_plain(value: Any) -> bool:
    if type(value) is dict:
        return all(type(key) in (str, int) and _is_plain(child) for key, child in value.items())
    if type(value) is list:
        return all(map(_is_plain, value))
    if type(value) is str:
        return "${" not in value  # an interpolation would read the environment of the user who predicts
    return value is None or type(value) in (bool, int, float)
