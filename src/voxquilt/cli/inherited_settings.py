"""Which settings does predicting take from its checkpoint? Those that the user did not choose."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError
from voxquilt.models.weights.stored_settings import carried
from voxquilt.old_names import NEW

log = logging.getLogger("voxquilt")

AUTO = "voxquilt.predictor_from_file"
"""The model of `model=auto`, which asks the file what it is."""


def inherit(cfg: DictConfig, overrides: Iterable[str], conf: Path) -> dict[str, Any]:
    """Fill in what the checkpoints carry.

    A value is the user's if the command line names its key, or if it is another than the default of conf/.

    Args:
        cfg: The composed configuration; changed in place.
        overrides: Of the command line, as Hydra has them.
        conf: The folder of the defaults.

    Returns:
        The settings that are in use, by section, and the names of the images; empty without any. A class that the user
        names as well is left out.

    Raises:
        ConfigError: checkpoints of an ensemble that carry different settings.
    """
    paths = _files(cfg)
    settings = _agreed(paths)
    if not settings:
        return {}
    given = [text.lstrip("+~").partition("=")[0] for text in overrides]
    found = _Found(given, {}, [], set())
    OmegaConf.set_struct(cfg, False)
    for section in ("data", "preprocess", "model", "stitch"):
        if section == "model" and NEW.get(cfg.model.get("_target_"), cfg.model.get("_target_")) != AUTO:
            continue  # the user says how to read the file
        own = _plain(cfg[section])
        for key, value in settings[section].items():
            full = f"{section}.{key}"
            found.look(full, own.get(key), _defaults(conf, section), value)
            if full in found.used:
                OmegaConf.update(cfg, full, found.used[full], merge=False)
        if section == "model" and own.get("prefix") is None:
            cfg.model.prefix = "net."
    shown = {key: value for key, value in found.used.items() if value is not None and not key.endswith("._target_")}
    lines = [f"{key}={_short(value)}" for key, value in shown.items()]
    yours = f"; yours: {', '.join(found.kept)}" if found.kept else ""
    log.info("from %s: %s%s", paths[0].name, ", ".join(lines), yours)
    nodes: dict[str, Any] = {"images": settings.get("images", [])}
    for full, value in found.used.items():
        section, _, key = full.partition(".")
        # A class that the user names as well is not by the file's word alone.
        nodes.setdefault(section, {})[key] = {**value, "_target_": None} if full in found.named else value
    return nodes


@dataclass(frozen=True)
class _Found:
    """Whose word counts, key by key.

    Args:
        given: Keys and groups of the command line.
        used: What is taken from the checkpoint, by full key.
        kept: What the user has otherwise, as text.
        named: Keys whose class the user names as well.
    """

    given: Sequence[str]
    used: dict[str, Any]
    kept: list[str]
    named: set[str]

    def look(self, full: str, mine: Any, defaults: Mapping[str, Any], value: Any) -> None:
        """Put the checkpoint's value among those that are used, or the user's among those that are kept."""
        key = full.partition(".")[2]
        alike = isinstance(mine, Mapping) and isinstance(value, Mapping)
        if alike and mine.get("_target_") in (None, value.get("_target_")):
            self.named.update({full} if "_target_" in mine else ())
            value = OmegaConf.to_container(OmegaConf.merge(value, mine))  # such as model.net.dropout=0
        elif (mine != defaults[key] if key in defaults else mine is not None) or any(
            _covers(name, full) for name in self.given if name != "model"
        ):
            self.kept.extend([f"{full}={mine}"] if mine != value else [])
            return
        self.used[full] = value


def _defaults(conf: Path, section: str) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for name in ("_options", "auto") if section == "model" else ("default",):
        found |= _plain(OmegaConf.load(conf / section / f"{name}.yaml"))
    return found


def check_images(wanted: Sequence[str], cases: Iterable[SubjectFiles]) -> None:
    """Refuse subjects whose images are not those that the network was trained on, in their order.

    Raises:
        ConfigError: other images; of a single one the name does not count.
    """
    for case in cases:
        if wanted and list(case.images) != list(wanted) and not len(case.images) == len(wanted) == 1:
            patterns = ", ".join(f'{name}: "{{subject}}/{name}.nii.gz"' for name in wanted)
            raise ConfigError(
                f"{case.subject} has the image{'s' * (len(case.images) > 1)} {', '.join(case.images)}; the checkpoint "
                f"was trained on {', '.join(wanted)}, in this order. Name them by data.images='{{{patterns}}}', or by "
                f"the columns of a .csv."
            )


def _files(cfg: DictConfig) -> list[Path]:
    try:
        value = cfg.ckpt_path
    except OmegaConfBaseException:
        return []  # ??? or an interpolation that leads nowhere: whoever checks the configuration says so
    paths = [Path(str(path)).expanduser() for path in (value if isinstance(value, ListConfig) else [value]) if path]
    return paths if all(path.is_file() for path in paths) else []


def _agreed(paths: Sequence[Path]) -> dict[str, Any]:
    found = [carried(path) for path in paths]
    if not found or found[0] is None:
        return {}
    for path, settings in zip(paths, found, strict=True):
        if settings != found[0]:
            other = settings or {}
            keys = [key for key in found[0] if other.get(key) != found[0][key]]
            raise ConfigError(
                f"{paths[0]} and {path} carry different settings ({', '.join(keys)}): they are no ensemble. Predict "
                f"with each by itself, or choose model=state_dict and say the settings."
            )
    return found[0]


def _covers(given: str, full: str) -> bool:
    return given == full or full.startswith(f"{given}.")


def _plain(node: Any) -> dict[str, Any]:
    return OmegaConf.to_container(node, resolve=False) if isinstance(node, DictConfig) else {}  # type: ignore[return-value]


def _short(value: Any) -> str:
    if isinstance(value, Mapping) and "_target_" in value:
        return str(value["_target_"]).rpartition(".")[2]
    if isinstance(value, list) and any(isinstance(one, Mapping) for one in value):
        return f"[{', '.join(map(_short, value))}]"
    return str(value)
