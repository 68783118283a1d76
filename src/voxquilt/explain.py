"""What does a user need to know of an error that Hydra found? One message, with the nearest name that there is."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from voxquilt.errors import plain_text
from voxquilt.names import nearest, question


def explain(error: BaseException, script: str, conf: Path) -> str:
    """Hydra's message without what only its developers need.

    Args:
        error: What composing the configuration raised.
        script: 'predict' or 'train'.
        conf: The folder of configurations.
    """
    text = plain_text(error)
    missing = re.search(r"Could not (?:find|load) '(.+?)'", text)
    if missing:
        group, _, name = missing[1].rpartition("/")
        return _no_option(group, name, _options(conf, group, script))
    swapped = re.search(r"In '(.+?)': Could not override '(.+?)'\. No match in the defaults list", text)
    if swapped:
        return _not_for(swapped[1], swapped[2], script, conf)
    unknown = re.search(r"Could not override '(.+?)'", text)
    if unknown:
        return _no_key(unknown[1], script, conf)
    return " ".join(line.strip() for line in text.splitlines() if not line.strip().startswith("object_type="))


def _no_option(group: str, name: str, options: Iterable[str]) -> str:
    options = sorted(options)
    hint = question(name, options, prefix=f"{group}=")
    return f"there is no {group}={name}; there are {', '.join(options)}.{hint}"


def _options(conf: Path, group: str, script: str) -> list[str]:
    paths = (conf / group).glob("*.yaml")
    return [path.stem for path in paths if not path.stem.startswith("_") and _is_for(path.relative_to(conf), script)]


def _is_for(path: Path, script: str) -> bool:
    """Whether an option is one of this script's, of a group that both have."""
    if path.parts[0] not in ("data", "model", "callbacks", "trainer") or path.parent.name == "net":
        return True
    of_train = path.stem in ("train", "ema", "early_stopping") or path.parent.name in ("loss", "augment")
    return of_train == (script == "train")


def _not_for(where: str, wanted: str, script: str, conf: Path) -> str:
    other = "train" if script == "predict" else "predict"
    group, _, name = where.rpartition("/")
    if group == "experiment" or wanted.startswith(("model/loss", "data/augment")):
        return (
            f"an experiment is for one script: {', '.join(_experiments(conf, script))} for {script}.py, "
            f"{', '.join(_experiments(conf, other))} for {other}.py."
        )
    return f"{group}={name} does not go with {script}.py: it has no {wanted}."


def _experiments(conf: Path, script: str) -> list[str]:
    return sorted(
        path.stem
        for path in (conf / "experiment").glob("*.yaml")
        if ("train.py" in path.read_text()) == (script == "train")
    )


def _no_key(key: str, script: str, conf: Path) -> str:
    key = key.replace("/", ".")
    known = sorted(set(_keys(conf, script)))
    elsewhere = _where(key, conf, script)
    if elsewhere:
        return f"there is no key {key} {elsewhere}"
    section, last = key.partition(".")[0], key.rpartition(".")[2]
    # The right name further in or in another section is more likely meant than a similar one.
    same = [one for one in known if one.rpartition(".")[2] == last and one != key]
    same.sort(key=lambda one: (not one.startswith(f"{section}."), one.count(".")))
    near = same[0] if same else nearest(key, known, cutoff=0.7)
    if near:
        return f"there is no key {key}. Did you mean {near}?"
    inside = [one for one in known if one.startswith(f"{section}.") and one.count(".") == 1]
    if inside:
        names = (one.partition(".")[2] for one in inside)
        return f"there is no key {key}; {section} has {', '.join(name for name in names if name != '_target_')}."
    return f"there is no key {key}: see python {script}.py --help, or +{key}=... for a key that only you know."


def _where(key: str, conf: Path, script: str) -> str:
    """Where a key is that is not in what was composed: with another option of its group, or in the other script."""
    for one in (script, "train" if script == "predict" else "predict"):
        options = sorted(name for name, keys in _groups(conf, one) if key in keys)
        if options and one == script:
            return f"as things are: it comes with {' or '.join(options)}."
        if options or key in _flat(_read(conf / f"{one}.yaml"), ""):
            return f"in {script}.py: it is one of {one}.py's."
    return ""


def _keys(conf: Path, script: str) -> Iterator[str]:
    """Keys of the primary configuration, and of every option of its groups."""
    yield from _flat(_read(conf / f"{script}.yaml"), "")
    yield from ("experiment", *(("task",) if script == "train" else ()))
    for _, keys in _groups(conf, script):
        yield from keys


def _groups(conf: Path, script: str) -> Iterator[tuple[str, list[str]]]:
    """Every option of a script's groups, as it is typed, with its group's key and its own."""
    for path in conf.rglob("*.yaml"):
        group = path.parent.relative_to(conf).as_posix()
        if group not in (".", "experiment", "task", "hydra/help") and _is_for(path.relative_to(conf), script):
            key = group.replace("/", ".")
            yield f"{group}={path.stem}", [key, *_flat(_read(path), key)]


def _flat(node: Any, key: str) -> Iterator[str]:
    for name, child in node.items() if isinstance(node, dict) else ():
        full = f"{key}.{name}".lstrip(".")
        yield full
        yield from _flat(child, full)


@cache
def _read(path: Path) -> Any:
    content = yaml.safe_load(path.read_text("utf-8"))
    return {key: value for key, value in content.items() if key not in ("defaults", "hydra")} if content else {}
