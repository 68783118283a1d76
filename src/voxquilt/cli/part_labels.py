"""Numbers the labels of several models in the map that they make together."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

from omegaconf import DictConfig, ListConfig

from voxquilt.errors import ConfigError
from voxquilt.text import question


@dataclass(frozen=True)
class Part:
    """A model's whole configuration, what of it its files brought, its labels as the user has them, and as numbers."""

    plain: dict[str, Any]
    inherited: dict[str, Any]
    labels: Mapping[Any, int] | None
    numbers: list[int] | None = None

    @property
    def names(self) -> dict[int, str]:
        """Names of the part's labels by their numbers in the part."""
        stitch = self.plain["stitch"]
        names = stitch.get("class_names") or []
        numbers = stitch.get("label_values") or stitch.get("regions")
        if numbers is None:  # a single name is that of what is above a threshold
            numbers = [1] if len(names) == 1 else range(len(names))
        return {int(number): str(name) for number, name in zip(numbers, names, strict=False)}


def number_labels(cfg: DictConfig, parts: Sequence[Part]) -> list[Part]:
    """The parts with the numbers that their labels become, without those of which no label is wanted.

    Args:
        cfg: The composed configuration, which gets the names and numbers of the whole.
        parts: The models.

    Raises:
        ConfigError: a label that a model does not have, or none that is to be written.
    """
    names: dict[int, str] = {0: "background"}
    numbers: list[dict[int, int]] = []
    for n, part in enumerate(parts):
        table = _given(part, n) if part.labels is not None else _counted(part, n, names)
        for own, number in table.items():
            if number:
                names.setdefault(number, part.names.get(own, str(number)))
        numbers.append(table)
    kept = _kept(cfg.stitch.get("classes"), names)
    cfg.stitch.classes = None
    cfg.stitch.label_values = sorted(kept | {0})
    if cfg.stitch.get("class_names") is None:
        cfg.stitch.class_names = [names[number] for number in sorted(kept | {0})]
    numbered = []
    for part, table in zip(parts, numbers, strict=True):
        wanted = [table.get(n, 0) if table.get(n, 0) in kept else 0 for n in range(max([*table, *part.names, 0]) + 1)]
        if any(wanted):
            numbered.append(replace(part, numbers=wanted))
    if not numbered:
        raise ConfigError(
            "no model has a label that is to be written: see stitch.classes, and the labels of model.parts."
        )
    return numbered


def _given(part: Part, n: int) -> dict[int, int]:
    """The numbers that the user gave a part's labels, by number or by name."""
    assert part.labels is not None
    by_name = {name: number for number, name in part.names.items()}
    table: dict[int, int] = {}
    for label, number in part.labels.items():
        own = label if isinstance(label, int) else by_name.get(str(label))
        if own is None or (part.names and own not in part.names):
            raise ConfigError(
                f"model.parts[{n}].labels names {label!r}; its labels are {part.names}."
                f"{question(str(label), list(by_name))}"
            )
        table[int(own)] = number
    return table


def _counted(part: Part, n: int, names: Mapping[int, str]) -> dict[int, int]:
    """Numbers for a part's labels: that of an earlier label of the same name, or the next."""
    if not part.names:
        raise ConfigError(f"model.parts[{n}] has no names of classes: give labels, such as {{1: 5}}.")
    by_name = {name: number for number, name in names.items()}
    for own, name in part.names.items():
        if own and name not in by_name:
            by_name[name] = max(by_name.values()) + 1
    return {own: by_name[name] for own, name in part.names.items() if own}


def _kept(classes: Any, names: Mapping[int, str]) -> set[int]:
    if classes is None:
        return set(names)
    if not isinstance(classes, ListConfig):
        raise ConfigError(f"stitch.classes is a list, such as '[liver,spleen]'; it is {classes!r}.")
    by_name = {name: number for number, name in names.items()}
    kept = set()
    for wanted in classes:
        number = by_name.get(wanted) if isinstance(wanted, str) else wanted
        if number not in names:
            raise ConfigError(
                f"stitch.classes names {wanted!r}; the labels are {', '.join(by_name)}."
                f"{question(str(wanted), list(by_name))}"
            )
        kept.add(number)
    return kept
