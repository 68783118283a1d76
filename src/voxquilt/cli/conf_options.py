"""Lists the options and keys of a folder of configurations, and the script that each option is for."""

import re
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import yaml

SCRIPTS = ("predict", "train")
# Groups whose options set keys of others.
_KEYLESS = (".", "experiment", "task", "hparams", "hydra/help")


def options_of(conf: Path, group: str, script: str) -> list[str]:
    """Names of a group's options that a script has."""
    paths = (conf / group).glob("*.yaml")
    options = [path for path in paths if not path.stem.startswith("_")]
    return sorted(path.stem.removesuffix(f"_{script}") for path in options if script_of(path, conf) in (None, script))


def of_script(arguments: Sequence[str], script: str, conf: Path) -> list[str]:
    """Arguments in which an option that both scripts have by one name is the script's own.

    So `model=nnunet` is nnunet.yaml of conf/model for predict.py, and nnunet_train.yaml for train.py.
    """
    return [f"{text}_{script}" if _has_own(text, script, conf) else text for text in arguments]


def _has_own(text: str, script: str, conf: Path) -> bool:
    option = re.fullmatch(r"([a-z_/]+)=([a-z_0-9]+)", text)
    return option is not None and (conf / option[1] / f"{option[2]}_{script}.yaml").is_file()


def script_of(path: Path, conf: Path) -> str | None:
    """The script that an option is for, or None for both."""
    if path.parent.name == "experiment":
        return _content_of(path).get("script")
    if not path.is_relative_to(conf):
        return None  # the user's own
    owners = [script for script in SCRIPTS if _is_for(path.relative_to(conf), script)]
    return owners[0] if len(owners) == 1 else None


def other_script(script: str) -> str:
    """'train' for 'predict', and the other way round."""
    return "train" if script == "predict" else "predict"


def keys_of(conf: Path, script: str) -> Iterator[str]:
    """Keys of the primary configuration, and of every option of its groups."""
    yield from primary_keys(conf, script)
    yield from ("experiment", *(("task", "hparams") if script == "train" else ()))
    for _, keys in keys_by_option(conf, script):
        yield from keys


def primary_keys(conf: Path, script: str) -> Iterator[str]:
    """Keys that stand in the primary configuration itself."""
    return _full_keys(_settings_of(conf / f"{script}.yaml"), "")


def keys_by_option(conf: Path, script: str) -> Iterator[tuple[str, list[str]]]:
    """Every option of a script's groups as it is typed, with the group's key and the option's keys."""
    for path in conf.rglob("*.yaml"):
        group = path.parent.relative_to(conf).as_posix()
        if group not in _KEYLESS and _is_for(path.relative_to(conf), script):
            key = group.replace("/", ".")
            yield f"{group}={path.stem.removesuffix(f'_{script}')}", [key, *_full_keys(_settings_of(path), key)]


def _is_for(path: Path, script: str) -> bool:
    """Whether an option, by its path in conf/, is for a script; it may be for both."""
    if path.stem in ("_predict", "_train"):
        return path.stem == f"_{script}"
    if path.parts[0] in ("task", "hparams"):
        return script == "train"
    if path.parts[0] not in ("data", "model", "callbacks") or path.parent.name == "net":
        return True
    of_train = path.stem.endswith("train") or path.stem in ("ema", "early_stopping")
    of_train = of_train or path.parent.name in ("loss", "augment")
    return of_train == (script == "train")


def _full_keys(node: Any, key: str) -> Iterator[str]:
    for name, child in node.items() if isinstance(node, dict) else ():
        full = f"{key}.{name}".lstrip(".")
        yield full
        yield from _full_keys(child, full)


@cache
def _settings_of(path: Path) -> dict[str, Any]:
    return {key: value for key, value in _content_of(path).items() if key not in ("defaults", "hydra")}


def _content_of(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}
