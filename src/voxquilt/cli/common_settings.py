"""Finds the settings that the files of an ensemble have in common, and what they contradict each other in."""

import json
import logging
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import kind_of
from voxquilt.models.weights.onnx_check import check_header
from voxquilt.models.weights.onnx_header import fixed_patch, read_header
from voxquilt.models.weights.registry import WEIGHTS
from voxquilt.models.weights.stored_settings import carried, with_meant
from voxquilt.old_names import NEW
from voxquilt.vocabulary import flattened, normalised

log = logging.getLogger("voxquilt")

_SHOWN = 5


def common_settings(
    paths: Sequence[Path], is_chosen: Callable[[str], bool]
) -> tuple[Path, dict[str, Any]] | tuple[None, None]:
    """The settings of the files of an ensemble, and a file that carries them; None if no file carries any.

    Files that are networks by themselves have nothing to say of `model.net`, which builds the others. A file without
    settings takes those of the others.

    Args:
        paths: The files.
        is_chosen: Whether the user has chosen the value of a full key, of which files may then say different things.

    Raises:
        ConfigError: files contradict each other; the keys are named with both values.
    """
    stored = {path: settings for path in paths if (settings := carried(path)) is not None}
    if not stored:
        return None, None
    first, *others = stored
    builds = [path for path in stored if WEIGHTS.load(kind_of(path))().needs_network]
    for path in others:
        _check_alike(first, path, stored, builds, is_chosen)
    for path in builds[1:]:
        _check_alike(builds[0], path, stored, builds, is_chosen)
    if len(stored) < len(paths):
        bare = ", ".join(path.name for path in paths if path not in stored)
        log.warning("%s carries no settings: it predicts with those of %s, as one ensemble.", bare, first.name)
    settings = stored[first]
    if builds:
        settings["model"] = {**settings["model"], **_only_net(stored[builds[0]])}
    return first, settings


def check_usable(paths: Sequence[Path]) -> None:
    """Refuse files that no settings can make usable, before settings are asked for.

    Raises:
        ConfigError: an ONNX file takes several inputs, say; what other formats hold is known once torch has loaded.
    """
    for path in paths:
        if kind_of(path) == "onnx":
            check_header(path, read_header(path))


def common_patch(paths: Sequence[Path]) -> tuple[int, ...] | None:
    """The patch size that ONNX files were exported for, as far as it is fixed.

    Raises:
        ConfigError: two files have different ones.
    """
    sizes = {path: size for path in paths if kind_of(path) == "onnx" and (size := fixed_patch(path)) is not None}
    for path in sizes:
        if sizes[path] != sizes[first := next(iter(sizes))]:
            raise ConfigError(
                f"{first} was exported for patches of {list(sizes[first])} voxels and {path} for {list(sizes[path])}: "
                f"files of one ensemble take the same patches. {_in_parts(first, path)}"
            )
    return next(iter(sizes.values()), None)


def _check_alike(
    one: Path,
    other: Path,
    stored: Mapping[Path, Mapping[str, Any]],
    builds: Sequence[Path],
    is_chosen: Callable[[str], bool],
) -> None:
    with_net = one in builds and other in builds
    a, b = (_by_key(stored[path], with_net) for path in (one, other))
    keys = [key for key in {**a, **b} if a.get(key) != b.get(key) and not is_chosen(key)]
    if not keys:
        return
    lines = [f"\n  {key} is {json.dumps(a.get(key))} and {json.dumps(b.get(key))}" for key in keys[:_SHOWN]]
    more = f"\n  ... ({len(keys)} in all)" if len(keys) > _SHOWN else ""
    own = [key for key in keys if key != "images" and not key.startswith("model.net")]
    set_it = f"Set {', '.join(own[:_SHOWN])} yourself if one value is right for both. " if own == keys else ""
    raise ConfigError(
        f"{one} and {other} are not an ensemble, since their settings contradict each other:{''.join(lines)}{more}\n"
        f"  {set_it}{_in_parts(one, other)}"
    )


def _in_parts(one: Path, other: Path) -> str:
    parts = f"[{{ckpt_path: {one}}}, {{ckpt_path: {other}}}]"
    return (
        f"Models of different settings are averaged by model=nnunet model.parts='{parts}' stitch.combine=mean, without "
        f"ckpt_path."
    )


def _by_key(settings: Mapping[str, Any], with_net: bool) -> dict[str, Any]:
    full = with_meant(settings)
    model = {key: value for key, value in full["model"].items() if with_net or key != "net"}
    node = {**full, "model": model}
    values: dict[str, Any] = {}
    for section, value in node.items():
        values |= flattened(value, section, numbered=True)
    return {key: normalised(key, value, NEW) for key, value in values.items() if key != "format"}


def _only_net(settings: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in settings["model"].items() if key == "net"}
