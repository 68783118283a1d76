"""Answers a slip on the command line with one message and the nearest name that exists.

The nearest name is `voxquilt.text.nearest` everywhere, in these messages and in those of wrong values.
"""

import inspect
import re
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, get_args

from hydra.utils import get_object

from voxquilt.cli.conf_options import (
    SCRIPTS,
    keys_by_option,
    keys_of,
    options_of,
    other_script,
    primary_keys,
    script_of,
)
from voxquilt.errors import ConfigError
from voxquilt.text import nearest, plain_text, question

# The extras that bring options of Hydra's own groups.
_EXTRAS = {
    "hydra/sweeper=optuna": "optuna",
    "hydra/launcher=submitit_local": "slurm",
    "hydra/launcher=submitit_slurm": "slurm",
}


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
        return _no_option(group, name, options_of(conf, group, script))
    swapped = re.search(r"In '(.+?)': Could not override '(.+?)'\. No match in the defaults list", text)
    if swapped:
        return _not_together(swapped[1], swapped[2], script)
    unknown = re.search(r"Could not override '(.+?)'", text)
    if unknown:
        return no_key(unknown[1], script, conf)
    return " ".join(line.strip() for line in text.splitlines() if not line.strip().startswith("object_type="))


def check_typed(arguments: Iterable[str], script: str, *folders: Path) -> None:
    """Refuse options and experiments of the other script, before anything is composed of them.

    Args:
        arguments: Arguments of the command line.
        script: 'predict' or 'train'.
        folders: Folders of configurations: conf/, and then the user's own.

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
                check_script(script_of(path, folders[0]), script, f"{group}={name}", folders[0])


def check_script(declared: Any, script: str, typed: str, conf: Path) -> None:
    """Refuse an experiment or an option that is for the other script.

    Args:
        declared: 'predict' or 'train'; None for both.
        script: The one that runs.
        typed: The experiment or option as it was typed.
        conf: The folder of configurations.

    Raises:
        ConfigError: it is for the other script, or for one that does not exist.
    """
    if declared in (None, script):
        return
    if declared not in SCRIPTS:
        raise ConfigError(f"{typed}: its script is predict or train (or left out, for both); it is {declared!r}.")
    group = typed.partition("=")[0]
    options = ", ".join(options_of(conf, group, script)) if (conf / group).is_dir() else ""
    use = f": python {declared}.py {typed} ..." if group == "experiment" else ""
    raise ConfigError(f"{typed} is for {declared}.py{use}{f'; {script}.py has {options}' if options else ''}.")


def no_key(key: str, script: str, conf: Path) -> str:
    """The message for a key that a script does not have: where it is, or what may be meant."""
    key = key.replace("/", ".")
    known = sorted(set(keys_of(conf, script)))
    elsewhere = _where_key_is(key, conf, script)
    if elsewhere:
        return f"there is no key {key} {elsewhere}"
    section, last = key.partition(".")[0], key.rpartition(".")[2]
    # The right name further in or in another section is more likely meant than a similar one.
    same_name = [other for other in known if other.rpartition(".")[2] == last and other != key]
    same_name.sort(key=lambda other: (not other.startswith(f"{section}."), other.count(".")))
    near = same_name[0] if same_name else nearest(key, known, cutoff=0.7)
    if near:
        return f"there is no key {key}. Did you mean {near}?"
    inside = [other for other in known if other.startswith(f"{section}.") and other.count(".") == 1]
    if inside:
        names = (other.partition(".")[2] for other in inside)
        return f"there is no key {key}; {section} has {', '.join(name for name in names if name != '_target_')}."
    return f"there is no key {key}: see python {script}.py --help, or +{key}=... for a key that only you know."


def no_argument(node: Mapping[str, Any], key: str, error: BaseException) -> str:
    """The message for an argument that a target does not take: its key, the nearest one, and all; or ''.

    Args:
        node: A constructor call with others inside.
        key: Its key.
        error: What the call raised.
    """
    match = re.search(r"unexpected keyword argument '(\w+)'", str(error))
    if match is None:
        return ""
    for where, target, given in _calls(node, key):
        taken = arguments_of(target)
        if match[1] in given and taken and match[1] not in taken:
            near = question(match[1], [name for name in taken if name not in given], prefix=f"{where}.")
            return f"\n  There is no {where}.{match[1]}.{near} {target} takes {', '.join(taken)}."
    return ""


def _no_option(group: str, name: str, options: Iterable[str]) -> str:
    if (extra := _EXTRAS.get(f"{group}={name}")) is not None:
        return f"{group}={name} is not installed: pip install 'voxquilt[{extra}]'."
    options = sorted(options)
    hint = question(name, options, prefix=f"{group}=")
    return f"there is no {group}={name}; there are {', '.join(options)}.{hint}"


def _not_together(option: str, wanted: str, script: str) -> str:
    group, _, name = option.rpartition("/")
    what = "an experiment" if group == "experiment" else "what was chosen"
    return (
        f"{group}={name} does not go with the rest: there is no {wanted} in {script}.py, or not beside {what}. "
        f"Is it for {other_script(script)}.py?"
    )


def _where_key_is(key: str, conf: Path, script: str) -> str:
    """Where a key is that was not composed: with another option of its group, or in the other script."""
    for name in (script, other_script(script)):
        options = sorted(option for option, keys in keys_by_option(conf, name) if key in keys)
        if options and name == script:
            return f"as things are: it comes with {' or '.join(options)}."
        if options or key in primary_keys(conf, name):
            return f"in {script}.py: it is one of {name}.py's."
    return ""


def _calls(node: Any, key: str) -> Iterator[tuple[str, str, list[str]]]:
    """Every constructor call in a node: its key, target, and names of arguments."""
    children = node.items() if isinstance(node, Mapping) else enumerate(node) if isinstance(node, list) else ()
    if isinstance(node, Mapping) and "_target_" in node:
        yield key, str(node["_target_"]), [str(name) for name in node]
    for name, child in children:
        yield from _calls(child, f"{key}.{name}" if isinstance(node, Mapping) else f"{key}[{name}]")


def arguments_of(target: str) -> list[str]:
    """Names of a target's arguments, those of `**options: Unpack[...]` too; empty where they cannot be known."""
    try:
        parameters = inspect.signature(get_object(target)).parameters.values()
    except Exception:  # whatever importing it raises
        return []
    names = [p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
    unpacked = [get_args(p.annotation) for p in parameters if p.kind is p.VAR_KEYWORD]
    return names + [name for types in unpacked for options in types for name in getattr(options, "__annotations__", ())]
