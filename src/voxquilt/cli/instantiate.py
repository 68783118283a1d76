"""How does a configuration become objects? The one place that calls Hydra's instantiate."""

import inspect
import os
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.text import plain_text, question


def build(node: Mapping[str, Any], key: str, **objects: Any) -> Any:
    """The object that a configuration node describes.

    Args:
        node: A constructor call; nodes inside with a _target_ are built first.
        key: Where it stands, for messages.
        objects: Further arguments, built before.

    Raises:
        ConfigError: a target that cannot be imported or called so; HYDRA_FULL_ERROR=1 shows the whole traceback.
    """
    try:
        return instantiate(OmegaConf.create(dict(node)), _convert_="all", _partial_=True)(**objects)
    except Exception as error:
        if os.environ.get("HYDRA_FULL_ERROR") == "1":
            raise
        causes = list(_causes(error))
        ours = next((cause for cause in causes if isinstance(cause, VoxquiltError)), None)
        if ours is not None:
            raise ConfigError(str(ours)) from error
        # Hydra's own words say less than what it wraps: what the class raised, or what could not be imported.
        cause = next((cause for cause in causes if not isinstance(cause, InstantiationException)), error)
        raise ConfigError(
            f"{key} cannot be built from {node.get('_target_')}: {type(cause).__name__}: {plain_text(cause)}"
            f"{_unknown(node, key, cause)}\n  (set HYDRA_FULL_ERROR=1 for the traceback)"
        ) from error


def _unknown(node: Any, key: str, error: BaseException) -> str:
    """Of an argument that a target does not take: where it stands, what is nearest, and what there is."""
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return ""
    for where, target, given in _calls(node, key):
        taken = _arguments(target)
        if match[1] in given and taken and match[1] not in taken:
            near = question(match[1], [name for name in taken if name not in given], prefix=f"{where}.")
            return f"\n  There is no {where}.{match[1]}.{near} {target} takes {', '.join(taken)}."
    return ""


def _calls(node: Any, key: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every constructor call in a node: its key, target, and names of arguments."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield key, str(node["_target_"]), [str(name) for name in node]
    for name, child in children:
        yield from _calls(child, f"{key}.{name}" if isinstance(node, Mapping) else f"{key}[{name}]")


def _arguments(target: str) -> list[str]:
    """Names of a target's arguments; none where they cannot be known."""
    try:
        parameters = inspect.signature(_located(target)).parameters.values()  # type: ignore[arg-type]
    except (TypeError, ValueError):
        return []
    return [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]


def check_classes(node: Any, allowed: Sequence[str]) -> None:
    """Refuse what a file names as a _target_, unless it is a class of an allowed package.

    Args:
        node: Settings out of the file.
        allowed: Full names of classes, or 'package.*'.

    Raises:
        ConfigError: another _target_, or one that is no class (a class's own module counts, not the way to it).
    """
    if isinstance(node, list):
        for value in node:
            check_classes(value, allowed)
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    if target is not None:
        found = _located(str(target)) if matches(str(target), allowed) else None
        if not isinstance(found, type) or not matches(f"{found.__module__}.{found.__qualname__}", allowed):
            raise ConfigError(
                f"the checkpoint names {target}, which is no class of run.checkpoint_targets={list(allowed)}. If you "
                f"trust it, add its package ('run.checkpoint_targets=[my_package.*,...]'), or name it yourself, by "
                f"model.net._target_={target} and its arguments."
            )
    for value in node.values():
        check_classes(value, allowed)


def _located(target: str) -> object:
    try:
        return get_object(target)
    except Exception:  # whatever importing it raises
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def matches(target: str, patterns: Iterable[str]) -> bool:
    """Whether a full name is one of the patterns, or in a package 'package.*'."""
    return any(target == one or (one.endswith(".*") and target.startswith(one[:-1])) for one in map(str, patterns))
