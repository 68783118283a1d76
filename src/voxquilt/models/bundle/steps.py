"""Takes the options of a bundle's transforms one by one; what is left in the end is refused by name."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from typing import Any

from voxquilt.errors import ConfigError
from voxquilt.models.bundle.config import SEPARATOR, TRUST, BundleConfig

UNKNOWN = "this is not among the transforms that voxquilt reads."
_FIX = "Change it in a copy of the bundle, or predict with MONAI itself."
# Options that change no number.
_OF_ALL = ("allow_missing_keys", "lazy", "device", "meta_keys", "meta_key_postfix", "orig_meta_keys", "to_tensor")
_SPECIAL = ("_target_", "_disabled_", "_desc_", "_requires_", "_mode_")


@dataclass
class Step:
    """An object of a configuration: its class, and the options that have not been taken yet.

    Args:
        config: The configuration.
        key: The object's id.
        target: Its `_target_`.
        options: Names of its options.
    """

    config: BundleConfig
    key: str
    target: str
    options: set[str] = field(default_factory=set)

    def name_in(self, *packages: str) -> str | None:
        """The class's name, if it is a bare one or stands in one of the packages; None for any other."""
        package, _, name = self.target.rpartition(".")
        known = not package or any(package == p or package.startswith(f"{p}.") for p in packages)
        return name if known and name.isidentifier() else None

    def take(self, option: str, default: Any = None) -> Any:
        """The plain value of an option.

        Raises:
            ConfigError: it is not plain.
        """
        if option not in self.options:
            return default
        self.options.discard(option)
        return self.config.value(self.place(option))

    def take_one(self, option: str, default: Any = None) -> Any:
        """An option that may be a list with a value for each key, of which there is one."""
        value = self.take(option, default)
        return value[0] if isinstance(value, list) and len(value) == 1 else value

    def expect(self, option: str, *allowed: Any) -> None:
        """Refuse an option whose value is not one of these; the first is its default."""
        value = self.take_one(option, allowed[0])
        if not any(type(value) is type(other) and value == other for other in allowed):
            shown = ", ".join(
                "null" if a is None else str(a).lower() if isinstance(a, bool) else str(a) for a in allowed
            )
            raise self.refusal(option, f"voxquilt reads {shown}.")

    def keys(self) -> list[str]:
        """The names of what the transform changes."""
        value = self.take("keys", [])
        return [value] if isinstance(value, str) else [str(key) for key in value]

    def ignore(self, *options: str) -> None:
        """Leave options unread, which change no number."""
        self.options.difference_update(options)

    def finish(self) -> None:
        """Refuse what has not been taken.

        Raises:
            ConfigError: there is an option that is not known.
        """
        self.ignore(*_OF_ALL)
        for option in sorted(self.options):
            raise self.refusal(option, f"voxquilt does not know this option of {self.target}.")

    def place(self, option: str) -> str:
        """The id of an option."""
        return f"{self.key}{SEPARATOR}{option}"

    def refusal(self, option: str | None, why: str, advice: str = _FIX) -> ConfigError:
        """An error about an option, or about the whole step."""
        return self.config.refusal(self.key if option is None else self.place(option), why, advice)

    def unknown(self) -> ConfigError:
        """An error about a class that is not read."""
        return self.config.refusal(self.place("_target_"), UNKNOWN, TRUST)


def read_step(config: BundleConfig, key: str) -> Step:
    """The object at an id.

    Raises:
        ConfigError: there is none.
    """
    key, node = config.raw(key)
    if not isinstance(node, dict) or "_target_" not in node:
        raise config.refusal(key, "wanted is an object with a _target_.")
    target = config.value(f"{key}{SEPARATOR}_target_")
    if not isinstance(target, str):
        raise config.refusal(f"{key}{SEPARATOR}_target_", "wanted is the name of a class.")
    return Step(config, key, target, {name for name in node if name not in _SPECIAL})


def read_steps(config: BundleConfig, key: str) -> Iterator[Step]:
    """The transforms of a Compose, without those that are disabled.

    Raises:
        ConfigError: it is something else.
    """
    compose = read_step(config, key)
    if compose.name_in("monai.transforms") != "Compose":
        raise compose.refusal("_target_", "wanted is Compose.")
    at, transforms = config.raw(compose.place("transforms"))
    overrides = compose.take("overrides")
    if overrides:  # of how lazy transforms resample
        raise compose.refusal("overrides", "wanted are these options in the transforms themselves.")
    compose.ignore("transforms", "map_items", "unpack_items", "log_stats", "lazy")
    compose.finish()
    if not isinstance(transforms, list):
        raise config.refusal(at, "wanted is a list of transforms.")
    for n in range(len(transforms)):
        place, node = config.raw(f"{at}{SEPARATOR}{n}")
        disabled = isinstance(node, dict) and "_disabled_" in node and config.value(f"{place}{SEPARATOR}_disabled_")
        if not (disabled.strip().lower() == "true" if isinstance(disabled, str) else disabled):
            yield read_step(config, place)


def transform_name(step: Step) -> str | None:
    """The name of a transform of MONAI, with 'd' at the end for its three names of dictionary transforms."""
    name = step.name_in("monai.transforms")
    return None if name is None else re.sub(r"(?:D|Dict)$", "d", name)


def is_numbers(value: object, count: int | None = None) -> bool:
    """Whether a value is a list of numbers."""
    return (
        isinstance(value, Sequence)
        and not isinstance(value, str)
        and (count is None or len(value) == count)
        and all(isinstance(item, int | float) and not isinstance(item, bool) for item in value)
    )
