"""May a training write where it is told to, and does it go on as it began? Answered before torch is imported."""

import hashlib
import json
import logging
import os
from collections.abc import Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles, label_files
from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import LIGHTNING, kind_of
from voxquilt.models.weights.stored_settings import TRAINING, pickled
from voxquilt.old_names import NEW
from voxquilt.text import of_subjects
from voxquilt.training.splits import Split

log = logging.getLogger("voxquilt")

FORMAT = 1
"""Counted up when records can no longer be compared with earlier ones."""

# Every setting counts but these, which change neither what is trained nor on what: where and how fast it runs, when it
# ends, and how it is validated. Which files `inputs`, `images` and `labels` name is told by what is in them, so that
# data may move.
_FREE = {
    "data": {"inputs", "images", "labels", "num_workers", "cache", "inference_patch_size", "patch_overlap",
             "padding_mode"},
    "preprocess": set[str](),
    "model": {"pictures"},
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "max_epochs", "min_epochs",
                "max_steps", "min_steps", "max_time", "limit_val_batches", "check_val_every_n_epoch",
                "val_check_interval", "num_sanity_val_steps", "log_every_n_steps", "enable_progress_bar",
                "enable_model_summary", "benchmark", "deterministic", "profiler", "default_root_dir",
                "detect_anomaly"},
    "run": {"overwrite"},
}  # fmt: skip
_ALONG_AXES = ("data.patch_size", "data.divisible_by", "preprocess.spacing")

# Of a larger file so many pieces of so many bytes are read, also the first and the last: .gz ends with a checksum.
_WHOLE, _PIECES, _PIECE = 2**20, 16, 2**16


def record(plain: Mapping[str, Any], parts: Split) -> dict[str, Any]:
    """What a training's checkpoints say of how it was trained, to be compared with when it goes on; plain values."""
    labels = plain["data"]["labels"]

    def told(case: SubjectFiles) -> list[str]:
        return [_digest(case.images), _digest(label_files(case, labels))]

    with ThreadPoolExecutor(16) as pool:  # mostly waiting for a file system
        subjects = {
            what: dict(zip([case.subject for case in cases], pool.map(told, cases), strict=True))
            for what, cases in (("train", parts.training), ("validate", parts.validation))
        }
    sources = {key: plain["data"][key] for key in ("inputs", "images", "labels")}
    return {"format": FORMAT, "settings": _settings(plain), "subjects": subjects, "sources": sources}


def check_folder(plain: Mapping[str, Any]) -> list[Path]:
    """Checkpoints of another training that this one is to replace: none, unless run.overwrite is true.

    Raises:
        ConfigError: there are some, and neither does the training go on from one of them nor may it replace them.
    """
    folders = list(dict.fromkeys(_folders(plain)))
    found = sorted(path for folder in folders for path in folder.glob("*.ckpt"))
    start = plain["ckpt_path"]
    if not found or (start is not None and Path(str(start)).expanduser().parent.resolve() in folders):
        return []
    if plain["run"]["overwrite"]:
        return found
    last = next((path for path in found if path.stem == "last"), found[-1])
    names = ", ".join(str(_near(path)) for path in found[:3]) + ", ..." * (len(found) > 3)
    raise ConfigError(
        f"output_dir={plain['output_dir']} has another training's checkpoints ({names}), where this one's would be.\n"
        f"  Go on with that training by ckpt_path={_near(last)}, choose another output_dir, or set run.overwrite=true, "
        f"which removes them. Nothing was started."
    )


def check_start(plain: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to go on from ckpt_path with settings or data that would train something else, or with nothing left to do.

    Args:
        plain: The training's configuration.
        now: Its `record`.

    Raises:
        ConfigError: what was otherwise, by its key, with both values; or ckpt_path is no checkpoint to go on from.
    """
    path = plain["ckpt_path"]
    if path is None:
        return
    content = _checkpoint(path)
    before = content.get(TRAINING)
    if not isinstance(before, Mapping) or before.get("format") != FORMAT:
        log.warning("%s does not say how it was trained: whether it goes on alike cannot be checked.", path)
    else:
        changes = [*_changed_settings(before["settings"], now["settings"]), *_changed_data(before, now)]
        if changes:
            lines = "".join(f"\n  {change}" for change in changes[:20])
            raise ConfigError(
                f"{path} was trained otherwise:{lines}\n"
                f"  A training goes on with what it began with. Set these as they were, or begin another one, without "
                f"ckpt_path and in another output_dir. Nothing was started."
            )
    epochs, steps = _reached(content)
    for key, done, unit in (("max_epochs", epochs, "epochs"), ("max_steps", steps, "steps")):
        limit = plain["trainer"].get(key)
        if isinstance(limit, int) and 0 <= limit <= done:
            raise ConfigError(
                f"{path} has been trained for {done} {unit}, and trainer.{key}={limit} leaves nothing to do: set it to "
                f"more than {done}. Nothing was started."
            )


def _folders(plain: Mapping[str, Any]) -> Iterator[Path]:
    """Where checkpoints are written, as far as that is not a new folder each time."""
    for node in plain["callbacks"].values():
        if not isinstance(node, Mapping) or not ("dirpath" in node or "Checkpoint" in str(node.get("_target_"))):
            continue
        if node.get("dirpath") is not None:
            yield Path(str(node["dirpath"])).expanduser().resolve()
        elif not plain.get("logger"):
            yield Path(plain["trainer"].get("default_root_dir") or ".").expanduser().resolve() / "checkpoints"


def _near(path: Path) -> Path:
    """From the working folder, if it is in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _checkpoint(path: Any) -> Mapping[str, Any]:
    if not isinstance(path, str):
        raise ConfigError(f"ckpt_path is one checkpoint for a training to go on from; it is {path!r}.")
    file = Path(path).expanduser()
    kind = kind_of(file)
    content = pickled(file) if kind == LIGHTNING else None
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"ckpt_path={path} is no checkpoint of a training that could go on: it can be read as {kind}. Wanted is a "
            f"file such as outputs/checkpoints/last.ckpt."
        )
    if "optimizer_states" not in content or "loops" not in content:
        raise ConfigError(f"ckpt_path={path} holds weights alone; to go on, the optimizer's state is wanted as well.")
    return content


def _reached(content: Mapping[str, Any]) -> tuple[int, int]:
    """Epochs and steps that lie behind a checkpoint of Lightning's."""
    loop = content["loops"].get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if loop.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
        epochs = max(epochs, content.get("epoch", 0) + 1)
    return int(epochs), int(content.get("global_step", 0))


def _settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    found = {}
    for section, free in _FREE.items():
        found |= _flat({key: value for key, value in plain[section].items() if key not in free}, section)
    found["stitch.label_values"] = plain["stitch"].get("label_values")  # which numbers labels are read by
    for name, node in plain["callbacks"].items():
        # The one kind of callback that changes weights.
        if isinstance(node, Mapping) and str(node.get("_target_")).endswith("WeightAveraging"):
            found |= _flat(node, f"callbacks.{name}")
    return {key: _alike(key, value) for key, value in found.items()}


def _flat(node: Any, key: str) -> dict[str, Any]:
    """By full keys; in lists of callables by their number."""
    if isinstance(node, list) and any(isinstance(child, Mapping) for child in node):
        node = {str(n): child for n, child in enumerate(node)}
    if isinstance(node, Mapping):
        return {k: v for name, child in node.items() for k, v in _flat(child, f"{key}.{name}").items()}
    return {key: node}


def _alike(key: str, value: Any) -> Any:
    """One way of writing what means the same: [8, 8, 8] and 8 along three axes, 1 and 1.0."""
    if isinstance(value, list):
        values = [_alike(key, one) for one in value]
        return values[0] if key in _ALONG_AXES and len(values) == 3 and len(set(map(str, values))) == 1 else values
    if isinstance(value, str):
        return NEW.get(value, value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def _changed_settings(before: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    before = {key: _alike(key, value) for key, value in before.items()}
    keys = [key for key in {**before, **now} if before.get(key) != now.get(key)]
    return [f"{key} was {json.dumps(before.get(key))} and is {json.dumps(now.get(key))}" for key in keys]


def _changed_data(before: Mapping[str, Any], now: Mapping[str, Any]) -> Iterator[str]:
    were, are = before["subjects"], now["subjects"]
    moved = {
        key: f" was {json.dumps(before['sources'][key])} and is {json.dumps(now['sources'][key])}"
        for key in ("inputs", "labels")
        if before["sources"][key] != now["sources"][key]
    }
    for what in ("train", "validate"):
        for ids, how in ((were[what].keys() - are[what].keys(), "no longer"), (are[what].keys() - were[what], "newly")):
            if ids:
                yield f"data.inputs{moved.get('inputs', '')}: {_some(ids)} {how} among the subjects to {what} on"
    both = [(one, were[what][one], are[what][one]) for what in were for one in were[what].keys() & are[what].keys()]
    for n, (name, key) in enumerate((("images", "inputs"), ("labels", "labels"))):
        ids = [one for one, was, now_is in both if was[n] != now_is[n]]
        if ids:
            yield f"data.{key}{moved.get(key, '')}: other {name} of {_some(ids)}"


def _some(ids: Iterable[str]) -> str:
    ids = sorted(ids)
    return f"{of_subjects(len(ids))} ({', '.join(ids[:3])}{', ...' * (len(ids) > 3)})"


def _digest(files: Mapping[str, Path]) -> str:
    """Of what is in some files, and of their names; of large ones in parts."""
    found = hashlib.sha256(json.dumps(list(files)).encode())
    for path in files.values():
        pair = [path, *(path.with_suffix(end) for end in (".img",) if path.suffix == ".hdr")]
        for file in pair:
            for piece in _pieces(file):
                found.update(piece)
    return found.hexdigest()[:16]


def _pieces(path: Path) -> Sequence[bytes]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _WHOLE:
                return [file.read()]
            pieces = [str(size).encode()]
            for n in range(_PIECES):
                file.seek((size - _PIECE) * n // (_PIECES - 1))
                pieces.append(file.read(_PIECE))
            return pieces
    except OSError:
        return [b""]  # whoever reads the subject says so
