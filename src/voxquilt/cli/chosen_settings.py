"""Puts settings that a file brings into a configuration, where the user chose none.

A value is the user's if the command line names its key, or if it differs from the default of conf/.
"""

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf

log = logging.getLogger("voxquilt")

# Mappings of which the user's replaces the file's; of others single values do.
_WHOLE = ("data.suffixes",)


@dataclass(frozen=True)
class Choice:
    """Which settings are the checkpoint's, and which the user's.

    Args:
        typed: Keys and groups of the command line.
        used: Values that are taken from the checkpoint, by full key.
        kept: Other values that the user has, as text.
        named: Full keys whose class the user names as well.
    """

    typed: Sequence[str]
    used: dict[str, Any]
    kept: list[str]
    named: set[str]

    def choose(self, full: str, own: Any, default: Any, value: Any) -> None:
        """Put the checkpoint's value among those that are used, or the user's among those that are kept.

        Args:
            full: The full key.
            own: The value in the composed configuration.
            default: The value in conf/.
            value: The value in the checkpoint.
        """
        if (
            full not in _WHOLE
            and isinstance(own, Mapping)
            and isinstance(value, Mapping)
            and own.get("_target_") in (None, value.get("_target_"))
        ):
            self.named.update({full} if "_target_" in own else ())
            self.used[full] = OmegaConf.to_container(OmegaConf.merge(value, own))  # such as model.net.dropout=0
        elif is_users(full, own, default, self.typed):
            self.kept.extend([f"{full}={own}"] if own != value else [])
        else:
            self.used[full] = value

    def by_section(self) -> dict[str, Any]:
        """The values that are used, as nodes of the configuration."""
        nodes: dict[str, Any] = {}
        for full, value in self.used.items():
            section, _, key = full.partition(".")
            # A class that the user names as well does not rest on the file alone.
            nodes.setdefault(section, {})[key] = {**value, "_target_": None} if full in self.named else value
        return nodes


def is_users(full: str, own: Any, default: Any, typed: Sequence[str]) -> bool:
    """Whether a value is the user's.

    Args:
        full: The full key.
        own: The value in the composed configuration.
        default: The value in conf/.
        typed: Keys and groups of the command line.
    """
    return own != default or any(_covers(name, full) for name in typed if name != "model")


def fill_section(
    cfg: DictConfig, section: str, settings: Mapping[str, Any], defaults: Mapping[str, Any], choice: Choice
) -> None:
    """Put the settings of a file into a section of the configuration, where the user chose none.

    Args:
        cfg: The composed configuration; changed in place.
        section: The section.
        settings: The file's values by key.
        defaults: The values in conf/ by key.
        choice: Remembers which are taken.
    """
    own = plain_of(cfg[section])
    for key, value in settings.items():
        full = f"{section}.{key}"
        choice.choose(full, own.get(key), defaults.get(key), value)
        if full in choice.used:
            OmegaConf.update(cfg, full, choice.used[full], merge=False)


def log_choice(path: Path, choice: Choice) -> None:
    """Say which settings are the file's, and which the user's."""
    shown = {key: value for key, value in choice.used.items() if value is not None and not key.endswith("._target_")}
    used = ", ".join(f"{key}={_short(value)}" for key, value in shown.items())
    log.info("from %s: %s%s", path.name, used, f"; yours: {', '.join(choice.kept)}" if choice.kept else "")


def defaults_of(conf: Path, section: str, names: Sequence[str] = ("default",)) -> dict[str, Any]:
    """The values of a section in files of conf/, later ones over earlier ones."""
    nodes = [plain_of(OmegaConf.load(conf / section / f"{name}.yaml")) for name in names]
    return {key: value for node in nodes for key, value in node.items() if key != "defaults"}


def _covers(typed: str, full: str) -> bool:
    return typed == full or full.startswith(f"{typed}.")


def plain_of(node: Any) -> dict[str, Any]:
    """A node as plain values, nothing resolved; empty for what is none."""
    return OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}  # type: ignore[return-value]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, list) and any(isinstance(child, Mapping) for child in value):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
