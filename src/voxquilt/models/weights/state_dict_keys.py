"""Finds a network's state dict in a checkpoint, and lists the keys that do not fit."""

import re
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.text import question

WRAPPERS = ("state_dict", "model_state_dict", "model", "network_weights")
State = dict[str, Tensor]
# Put into the names of modules by torch.compile and DistributedDataParallel, wherever they wrap one.
_WRAPPING = re.compile(r"(?:(?<=^)|(?<=\.))(?:_orig_mod|module)\.")


def state_of(path: Path, loaded: Any, wanted: Mapping[str, Tensor], prefix: str | None) -> State:
    """The state dict in a loaded file, with the keys of a network where they differ only by a wrapping.

    Args:
        path: The file, for messages.
        loaded: A module, or a mapping that is a state dict or holds one, at any depth.
        wanted: The network's own state dict.
        prefix: The beginning of the keys that are used, or the key of the mapping that holds them; None finds it.

    Raises:
        ConfigError: there is no state dict, several may be meant, or no key begins with the prefix.
    """
    if isinstance(loaded, nn.Module):
        loaded = loaded.state_dict()
    states = dict(_states(loaded)) if isinstance(loaded, Mapping) else {}
    if not states:
        keys = f"; its keys are {shorten(loaded)}" if isinstance(loaded, Mapping) and loaded else ""
        raise ConfigError(f"{path} holds no state dict, neither by itself nor as one of {', '.join(WRAPPERS)}{keys}.")
    if prefix:
        return rename_keys(_select_prefix(path, states, prefix), wanted)
    named = next((name for name in WRAPPERS if name in states), None)
    fitting = [name for name, state in states.items() if _fits(rename_keys(state, wanted), wanted)]
    if named is None and len(states) > 1 and len(fitting) != 1:
        which = f"{len(fitting)} of them fit the network" if fitting else "none of them fits the network"
        lines = "".join(f"\n  model.prefix={name}.  ({len(state)} tensors)" for name, state in states.items())
        raise ConfigError(f"{path} holds several state dicts, and {which}; choose one:{lines}")
    return rename_keys(states[named or (fitting[0] if len(fitting) == 1 else next(iter(states)))], wanted)


def rename_keys(state: State, wanted: Mapping[str, Any]) -> State:
    """The same tensors, by the network's keys where these differ only by `module.` and `_orig_mod.`."""
    plain = {_WRAPPING.sub("", key): key for key in wanted}
    renamed = {plain.get(_WRAPPING.sub("", key), key): value for key, value in state.items()}
    is_better = sum(key in wanted for key in renamed) > sum(key in wanted for key in state)
    return renamed if is_better and len(renamed) == len(state) else state


def check_keys(
    path: Path, wanted: Mapping[str, Tensor], state: Mapping[str, Tensor], *, strict: bool, hint: str | None = None
) -> None:
    """Raises ConfigError where keys or shapes do not fit; they are listed, with `hint` in place of a prefix to try."""
    missing = [key for key in wanted if key not in state]
    unexpected = [key for key in state if key not in wanted]
    shapes = [
        f"{key} {tuple(state[key].shape)} for {tuple(wanted[key].shape)}"
        for key in wanted
        if key in state and state[key].shape != wanted[key].shape
    ]
    strict = strict or len(missing) == len(wanted)  # or nothing at all might be loaded
    problems = {"missing": missing * strict, "unexpected": unexpected * strict, "of another shape": shapes}
    if not any(problems.values()):
        return
    lines = "".join(f"\n  {len(keys)} {what}: {shorten(keys)}" for what, keys in problems.items() if keys)
    hint = _suggest_prefix(wanted, unexpected) if hint is None else hint
    raise ConfigError(f"{path} does not fit the network:{lines}{hint}")


def shorten(keys: Sequence[str] | Mapping[str, Any]) -> str:
    """The first eight keys, and the number of all."""
    keys = list(map(str, keys))
    return ", ".join(keys[:8]) + (f", ... ({len(keys)} in all)" if len(keys) > 8 else "")


def _states(node: Mapping[Any, Any], name: str = "", depth: int = 0) -> Iterator[tuple[str, State]]:
    """State dicts by their place: mappings from names to tensors, beside which there may be plain values."""
    # The keys of an optimizer's state are numbers.
    if not all(isinstance(key, str) for key in node) or depth > 8:
        return
    inner = {key: value for key, value in node.items() if isinstance(value, Mapping)}
    tensors = {key: value for key, value in node.items() if isinstance(value, Tensor)}
    if tensors and (not inner or any("." in key for key in tensors)):
        yield name, tensors
        return
    for key, value in inner.items():
        if not key.startswith(("optim", "lr_sched", "scheduler", "scaler", "loops", "callbacks")):
            yield from _states(value, f"{name}.{key}".lstrip("."), depth + 1)


def _select_prefix(path: Path, states: Mapping[str, State], prefix: str) -> State:
    """The state dict whose place is the prefix, or the keys that begin with it, in the usual place or in another."""
    at_prefix = states.get(prefix.rstrip("."))
    if at_prefix is not None:
        return at_prefix
    order = sorted(states, key=lambda name: WRAPPERS.index(name) if name in WRAPPERS else len(WRAPPERS))
    for name in order:
        for keys in (states[name], {f"{name}.{key}": value for key, value in states[name].items()}):
            for cleaned in (keys, {_WRAPPING.sub("", key): value for key, value in keys.items()}):
                state = {key.removeprefix(prefix): v for key, v in cleaned.items() if key.startswith(prefix)}
                if state:
                    return state
    first = states[order[0]]
    starts = {f"{key.partition('.')[0]}." for key in first if "." in key} | {f"{name}." for name in states if name}
    raise ConfigError(
        f"{path}: no key begins with model.prefix={prefix!r}; keys are {shorten(first)}.{question(prefix, starts)}"
    )


def _fits(state: State, wanted: Mapping[str, Tensor]) -> bool:
    return state.keys() == wanted.keys() and all(state[key].shape == wanted[key].shape for key in wanted)


def _suggest_prefix(wanted: Mapping[str, Tensor], unexpected: Sequence[str]) -> str:
    for key in wanted:
        prefixes = {other.removesuffix(key) for other in unexpected if other.endswith("." + key)}
        if prefixes:
            return f"\n  The keys fit behind a prefix: try model.prefix={min(prefixes, key=len)}"
    return ""
