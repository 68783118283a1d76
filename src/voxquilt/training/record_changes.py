"""Compares the records of two trainings and describes what differs."""

import json
from collections.abc import Iterable, Iterator, Mapping
from typing import Any

from voxquilt.old_names import NEW
from voxquilt.text import of_subjects
from voxquilt.vocabulary import normalised


def changes(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """One line for each setting that differs, then one for each difference in the data.

    Args:
        before, now: Records of `voxquilt.training.continuation.record`.
    """
    return [*_changed_settings(before["settings"], now["settings"]), *_changed_data(before, now)]


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = {key: normalised(key, value, NEW) for key, value in before.items()}
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
