"""What does a user need to know of an error that Hydra found? One message, with the nearest name that there is."""

import re
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path
from typing import Any

import yaml

from voxquilt.errors import ConfigError
from voxquilt.text import nearest, plain_text, question


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
        return _not_for(swapped[1], swapped[2], script)
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
    named = [path for path in paths if not path.stem.startswith("_")]
    return sorted(path.stem for path in named if _declared(path, conf) in (None, script))


def check_typed(arguments: Iterable[str], script: str, *folders: Path) -> None:
    """Refuse options and experiments of the other script, before anything is composed of them.

    Args:
        arguments: Of the command line.
        script: 'predict' or 'train'.
        folders: Of configurations; the first is conf/, others are the user's.

    Raises:
        ConfigError: what belongs to the other script, and which that is.
    """
    for argument in arguments:
        group, _, value = argument.lstrip("+").partition("=")
        if not re.fullmatch(r"[a-z_/]*[a-z_]", group):
            continue
        for name in re.findall(r"\w+", value):
            path = next((path for f in folders if (path := f / group / f"{name}.yaml").is_file()), None)
            if path is not None:
                check_script(_declared(path, folders[0]), script, f"{group}={name}", folders[0])


def check_script(declared: Any, script: str, what: str, conf: Path) -> None:
    """Refuse an experiment or an option that says that it is the other script's.

    Args:
        declared: 'predict' or 'train'; None for both.
        script: The one that runs.
        what: As it was typed.
        conf: The folder of configurations.

    Raises:
        ConfigError: see above, or it says something else.
    """
    if declared in (None, script):
        return
    if declared not in ("predict", "train"):
        raise ConfigError(f"{what}: its script is predict or train (or left out, for both); it is {declared!r}.")
    group = what.partition("=")[0]
    options = ", ".join(_options(conf, group, script)) if (conf / group).is_dir() else ""
    use = f": python {declared}.py {what} ..." if group == "experiment" else ""
    raise ConfigError(f"{what} is for {declared}.py{use}{f'; {script}.py has {options}' if options else ''}.")


def _declared(path: Path, conf: Path) -> str | None:
    """The script that an option is for, or None for both."""
    if path.parent.name == "experiment":
        return _all_of(path).get("script")
    if not path.is_relative_to(conf):
        return None  # the user's own
    return next((one for one in ("predict", "train") if not _is_for(path.relative_to(conf), _other(one))), None)


def _other(script: str) -> str:
    return "train" if script == "predict" else "predict"


def _is_for(path: Path, script: str) -> bool:
    """Whether an option is one of this script's, of a group that both have."""
    if path.stem in ("_predict", "_train"):
        return path.stem == f"_{script}"
    if path.parts[0] == "task":
        return script == "train"
    if path.parts[0] not in ("data", "model", "callbacks") or path.parent.name == "net":
        return True
    of_train = path.stem in ("train", "ema", "early_stopping") or path.parent.name in ("loss", "augment")
    return of_train == (script == "train")


def _not_for(where: str, wanted: str, script: str) -> str:
    group, _, name = where.rpartition("/")
    what = "an experiment" if group == "experiment" else "what was chosen"
    return (
        f"{group}={name} does not go with the rest: there is no {wanted} in {script}.py, or not beside {what}. "
        f"Is it for {_other(script)}.py?"
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
    return {key: value for key, value in _all_of(path).items() if key not in ("defaults", "hydra")}


def _all_of(path: Path) -> dict[str, Any]:
    content = yaml.safe_load(path.read_text("utf-8"))
    return content if isinstance(content, dict) else {}
