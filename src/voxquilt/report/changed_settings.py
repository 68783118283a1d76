"""Tells which settings of a run differ from the defaults in conf/, and which differ between runs."""

from collections.abc import Mapping, Sequence
from typing import Any

from voxquilt.filesystem import conf_dir
from voxquilt.vocabulary import flattened

# The file of conf/ that has the defaults of each section. A key stands for all keys below it.
_FILES = {
    "": ("predict",), "data": ("data/default",), "preprocess": ("preprocess/default",), "stitch": ("stitch/default",),
    "model": ("model/_options", "model/auto"), "trainer": ("trainer/_predict", "trainer/default"),
    "callbacks": ("callbacks/predict",),
}  # fmt: skip
_LEFT_OUT = ("defaults", "hydra", "shard")


def defaults() -> dict[str, Any]:
    """The default of each setting by its full key, without those that follow from others or that the user must set."""
    import yaml  # here, since no other part of a start needs it

    found: dict[str, Any] = {}
    for section, names in _FILES.items():
        for name in names:
            content = yaml.safe_load((conf_dir() / f"{name}.yaml").read_text("utf-8"))
            content = {key: value for key, value in content.items() if key not in _LEFT_OUT}
            for key, value in content.items():
                full = f"{section}.{key}".lstrip(".")
                found |= flattened(value, full)
    return {key: value for key, value in found.items() if not _follows(value)}


def _follows(value: Any) -> bool:
    return isinstance(value, str) and value.startswith(("${", "???"))


def changed_settings(configuration: Mapping[str, Any]) -> list[tuple[str, Any, Any]]:
    """The settings of a run that are not the defaults: key, value, default (None where there is none).

    Settings that only repeat another one, such as the writer's folder, are left out.
    """
    usual = defaults()
    given = _flat(configuration)
    derived = {"callbacks.writer.output_dir", "callbacks.writer.on_error", "callbacks.writer.log", "model.ckpt_path"}
    changed = [
        (key, value, usual.get(key))
        for key, value in given.items()
        if key not in derived and value != usual.get(key) and not (value in (None, [], {}) and key not in usual)
    ]
    return [entry for entry in changed if not (entry[0].endswith("activation") and entry[1] is None)]


def differing_settings(configurations: Sequence[Mapping[str, Any]]) -> list[tuple[str, list[Any]]]:
    """The settings that are not the same in all runs, with their value in each; None where a run lacks one."""
    flat = [_flat(configuration) for configuration in configurations]
    ignored = ("output_dir", "callbacks.writer.output_dir", "model.ckpt_path")
    keys = dict.fromkeys(key for settings in flat for key in settings if key not in ignored)
    rows = [(key, [settings.get(key) for settings in flat]) for key in keys]
    return [(key, values) for key, values in rows if any(value != values[0] for value in values)]


def _flat(configuration: Mapping[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for key, value in configuration.items():
        if key not in _LEFT_OUT:
            found |= flattened(value, key)
    return found
