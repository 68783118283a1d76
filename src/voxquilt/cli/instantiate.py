"""Builds the objects that a configuration describes; the one place that calls Hydra's instantiate."""

import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

from hydra.errors import InstantiationException
from hydra.utils import get_object, instantiate
from omegaconf import OmegaConf

from voxquilt.cli.suggestions import no_argument
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.old_names import OLD
from voxquilt.text import plain_text


def build(node: Mapping[str, Any], key: str, **objects: Any) -> Any:
    """The object that a configuration node describes.

    Args:
        node: A constructor call; nodes inside with a _target_ are built first.
        key: Its key, for messages.
        objects: Further arguments that are objects already.

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
            f"{no_argument(node, key, cause)}\n  (set HYDRA_FULL_ERROR=1 for the traceback)"
        ) from error


def check_classes(node: Any, allowed: Sequence[str], advice: str | None = None) -> None:
    """Refuse what a file names as a _target_, unless it is a class of an allowed package.

    Args:
        node: Settings out of the file.
        allowed: Full names of classes, or 'package.*'.
        advice: What a user who trusts another class does, where that is not what predict.py takes.

    Raises:
        ConfigError: another _target_, or one that is not a class. The module in which a class is defined counts, not
            the one by which it is named.
    """
    if isinstance(node, list):
        for value in node:
            check_classes(value, allowed, advice)
    if not isinstance(node, Mapping):
        return
    target = node.get("_target_")
    if target is not None:
        cls = _import_target(str(target)) if matches(str(target), allowed) else None
        if not isinstance(cls, type) or not (
            str(target) in OLD or matches(f"{cls.__module__}.{cls.__qualname__}", allowed)
        ):
            ways = advice or (
                f"add its package ('run.checkpoint_targets=[my_package.*,...]'), or name it yourself, by "
                f"model.net._target_={target} and its arguments"
            )
            raise ConfigError(
                f"the checkpoint names {target}, which is not a class of run.checkpoint_targets={list(allowed)}. If "
                f"you trust it, {ways}."
            )
    for value in node.values():
        check_classes(value, allowed, advice)


def _import_target(target: str) -> object:
    try:
        return get_object(target)
    except Exception:  # whatever importing it raises
        return None


def _causes(error: BaseException | None) -> Iterator[BaseException]:
    while error is not None:
        yield error
        error = error.__cause__


def matches(target: str, patterns: Iterable[str]) -> bool:
    """Whether a full name, or the name of its target in earlier versions, is among patterns such as 'package.*'."""
    names = (target, OLD.get(target, target))
    return any(
        name == pattern or (pattern.endswith(".*") and name.startswith(pattern[:-1]))
        for pattern in map(str, patterns)
        for name in names
    )
