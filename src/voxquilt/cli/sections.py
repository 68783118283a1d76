"""Checks a configuration by tables of its sections, their keys, and what the values must be."""

from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass
from typing import Any

from voxquilt.cli.value_checks import Check
from voxquilt.errors import ConfigError
from voxquilt.text import question


@dataclass(frozen=True)
class Section:
    """The keys of a section.

    Args:
        keys: The check of each value.
        together: Checks of several values beside each other.
        is_open: Other keys are allowed, since it depends on the chosen class which there are.
        is_complete: Every key must be there, since no class has a default for it.
    """

    keys: Mapping[str, Check]
    together: tuple[Callable[[Mapping[str, Any]], object], ...] = ()
    is_open: bool = False
    is_complete: bool = False


def check_sections(plain: Mapping[str, Any], sections: Mapping[str, Section], names: Collection[str]) -> None:
    """Check the keys of all sections, and then their values.

    Args:
        plain: The configuration.
        sections: By their full key.
        names: The keys of the top that there are, beside the user's own.

    Raises:
        ConfigError: (or another VoxquiltError) a key that does not exist, of which a typo would pass unseen, with the
            nearest one that does; or a wrong value.
    """
    for key in plain:
        # Other names are the user's, for interpolations; only what looks like a slip is refused.
        near = question(key, names, cutoff=0.8)
        if near and key not in names:
            raise ConfigError(f"there is no key {key}.{near}")
    for name, section in sections.items():
        _check_keys(_node_of(plain, name), name, section)
    for name, section in sections.items():
        _check_values(_node_of(plain, name), name, section)


def _node_of(plain: Mapping[str, Any], name: str) -> Any:
    node: Any = plain
    for key in name.split("."):
        node = node.get(key) if isinstance(node, Mapping) else None
    return node


def _check_keys(node: Any, name: str, section: Section) -> None:
    known = sorted(section.keys)
    if not isinstance(node, Mapping):
        raise ConfigError(f"{name} must hold keys ({', '.join(known)}); it is {node!r}.")
    if section.is_open or not str(node.get("_target_", "voxquilt.")).startswith("voxquilt."):
        return  # the user's own class has its own arguments
    for key in node:
        if key not in known and key != "_target_":
            hint = question(key, known, prefix=f"{name}.") or f" There are {', '.join(known)}."
            raise ConfigError(f"there is no key {name}.{key}.{hint}")
    missing = [key for key in known if key not in node]
    if section.is_complete and missing:
        raise ConfigError(f"{name}.{missing[0]} is needed; the command line took it out with ~{name}.{missing[0]}.")


def _check_values(node: Mapping[str, Any], name: str, section: Section) -> None:
    """Check the values of a section; a key that is not there is left to the default of the section's class."""
    for key, check in section.keys.items():
        if key in node:
            check(node[key], f"{name}.{key}")
    for check_together in section.together:
        check_together(node)
