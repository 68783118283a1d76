"""Compares the records of two trainings and describes what differs."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from voxquilt.old_names import NEW
from voxquilt.text import of_subjects

_ALONG_AXES = ("data.patch_size", "data.divisible_by", "preprocess.spacing")


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs, then one for each difference in the data.

    Args:
        before, now: Records of `voxquilt.training.continuation.record`.
    """
    return [*_changed_settings(before["settings"], now["settings"]), *_changed_data(before, now)]


def flattened(node: Any, key: str) -> dict[str, Any]:
    """Settings by their full keys; callables in a list by their number."""
    if isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
        node = {str(n): child for n, child in enumerate(node)}
    if isinstance(node, Mapping):
        return {k: v for name, child in node.items() for k, v in flattened(child, f"{key}.{name}").items()}
    return {key: node}


def normalised(key: str, value: Any) -> Any:
    """One notation for values that mean the same: [8, 8, 8] and 8 along three axes, 1 and 1.0."""
    if isinstance(value, list):
        values = [normalised(key, entry) for entry in value]
        return values[0] if key in _ALONG_AXES and len(values) == 3 and len(set(map(str, values))) == 1 else values
    if isinstance(value, str):
        return NEW.get(value, value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = {key: normalised(key, value) for key, value in before.items()}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}" for key in keys]


def _changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    were, are = before["subjects"], now["subjects"]
    moved = {
        key: f" was {json.dumps(before['sources'][key])} and is {json.dumps(now['sources'][key])}"
        for key in ("inputs", "labels")
        if before["sources"][key] != now["sources"][key]
    }
    for purpose in ("train", "validate"):
        removed, added = were[purpose].keys() - are[purpose].keys(), are[purpose].keys() - were[purpose].keys()
        for ids, change in ((removed, "no longer"), (added, "newly")):
            if ids:
                yield f"data.inputs{moved.get('inputs', '')}: {_named(ids)} {change} among the subjects to {purpose} on"
    digests = [
        (subject, were[purpose][subject], are[purpose][subject])
        for purpose in were
        for subject in were[purpose].keys() & are[purpose].keys()
    ]
    for n, (name, key) in enumerate((("images", "inputs"), ("labels", "labels"))):
        ids = [subject for subject, digest, digest_now in digests if digest[n] != digest_now[n]]
        if ids:
            yield f"data.{key}{moved.get(key, '')}: other {name} of {_named(ids)}"


def _named(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return f"{of_subjects(len(ids))} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"
