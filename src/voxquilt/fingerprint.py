"""What decides a subject's outputs? Its input files, the weights, and every setting that changes voxels."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voxquilt.cases import Case

FORMAT = 1
"""Counted up when a new version of voxquilt makes other voxels of the same inputs, weights and settings."""

# Settings that change outputs, by section of the configuration; the others say where, when and how fast.
_SECTIONS = {
    "data": {"inputs", "images", "batch_size", "num_workers", "labels"},
    "preprocess": set[str](),
    "model": {"ckpt_path", "trust_checkpoint", "offload", "compile", "channels_last"},
    "stitch": set[str](),
}
_SINGLE = (("trainer", "precision"), ("run", "seed"), ("callbacks", "writer", "compress"))
_SINGLE = (*_SINGLE, ("callbacks", "writer", "overlay"))

_ALONG_AXES = ("data.patch_size", "data.patch_overlap", "data.divisible_by", "preprocess.spacing")


def settings(plain: Mapping[str, Any], *, content: bool = False) -> dict[str, Any]:
    """The settings that change outputs, by their full keys, and the weights' checksums.

    Args:
        plain: The configuration.
        content: Whether `inputs` tells files by what is in them.
    """
    found: dict[str, Any] = {"format": FORMAT, "run.content_hash": content}
    for section, others in _SECTIONS.items():
        node = {key: value for key, value in (plain.get(section) or {}).items() if key not in others}
        found |= _flat(node, section)
    for path in _SINGLE:
        node: Any = plain
        for key in path:
            node = (node or {}).get(key)
        found[".".join(path)] = node
    images = (plain.get("data") or {}).get("images") or {}
    if len(images) > 1:
        found["data.images"] = list(images)  # the order of channels; which files they are is told by `inputs`
    if content and isinstance(found.get("data.skip"), str):
        found["data.skip"] = "a mask"  # wherever it lies
    paths = (plain.get("model") or {}).get("ckpt_path") or plain.get("ckpt_path")
    for n, path in enumerate(paths if isinstance(paths, list) else [paths] if paths else []):
        found[f"weights.{n}"] = checksum(Path(os.path.expanduser(str(path))))
    return {key: _alike(key, value) for key, value in found.items()}


def _alike(key: str, value: Any) -> Any:
    """One way of writing what means the same: 1.0 and 1, and along three axes [8, 8, 8] and 8."""
    if isinstance(value, list):
        values = [_alike(key, one) for one in value]
        same = key in _ALONG_AXES and len(values) == 3 and values[0] == values[1] == values[2]
        return values[0] if same else values
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(parts: Any) -> str:
    """16 hexadecimal digits that tell plain values apart."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def inputs(cases: Iterable[Case], mask: Any = None, *, content: bool = False) -> list[str]:
    """For each case a digest of its files: path, size and time of change; or, with `content`, of what is in them.

    Of several images their names and order count too: preprocessing may go by the name, channels go by the order.
    A file that cannot be looked at is told by its path: the run finds out what is wrong with it.

    Args:
        cases: The subjects.
        mask: data.skip; a path with {subject} is one of a subject's files.
        content: Read the files, which takes longer, and disregard where they are and when they were written.
    """
    pattern = mask if isinstance(mask, str) else None

    def of(case: Case) -> str:
        paths = [*case.images.values(), *([Path(pattern.replace("{subject}", case.subject))] if pattern else [])]
        names = list(case.images) if len(case.images) > 1 else []
        return digest([names, [_identity(file, content) for path in paths for file in _files(path)]])

    # Each look at a network's file system takes a millisecond, and most of it is waiting.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(of, cases))


def checksum(path: Path) -> str:
    """sha256 of a file."""
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _files(path: Path) -> list[Path]:
    """The path, and the .img of a .hdr or the other way round: they are one volume."""
    other = re.sub(r"\.(hdr|img)(?=(\.gz)?$)", lambda match: {"hdr": ".img", "img": ".hdr"}[match[1]], str(path))
    return [path, Path(other)] if other != str(path) else [path]


def _identity(path: Path, content: bool) -> list[Any]:
    try:
        if content and os.path.isfile(path):  # a pipe would be waited for
            return [checksum(path)]
        found = os.stat(path)
        return [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    except OSError:
        return [os.path.abspath(path)]


def _flat(node: Any, key: str) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {k: v for name, child in node.items() for k, v in _flat(child, f"{key}.{name}").items()}
    return {key: node}
