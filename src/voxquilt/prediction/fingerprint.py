"""What decides a subject's outputs? Its input files, the weights, and every setting that changes voxels."""

import hashlib
import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles
from voxquilt.filesystem import checksum
from voxquilt.old_names import OLD

FORMAT = 2
"""Counted up when a new version of voxquilt makes other voxels of the same inputs, weights and settings."""

# Every setting counts, those of later versions and of users' own classes too, but these, which say where, when and how
# fast. A key stands for all that is below it.
NO_VOXELS = frozenset(
    {
        "output_dir", "shard", "logger",
        "ckpt_path", "model.ckpt_path",  # told by what is in the files
        "data.inputs", "data.images",  # told by `inputs`, and by the names of the images
        "data.batch_size", "data.num_workers", "data.labels",
        "model.trust_checkpoint", "model.offload", "model.compile", "model.channels_last",
        "callbacks.writer.output_dir", "callbacks.writer.on_error", "callbacks.writer.log",
        "callbacks.writer.tensorboard", "callbacks.writer.in_memory",
        "run.on_error", "run.resume", "run.overwrite", "run.distribute", "run.surface_tolerance", "run.dry_run",
        "run.log", "run.status", "run.checkpoint_targets", "run.allowed_targets",
        "trainer._target_",
        *(f"trainer.{name}" for name in (
            "accelerator", "strategy", "devices", "num_nodes", "logger", "callbacks", "fast_dev_run", "max_epochs",
            "min_epochs", "max_steps", "min_steps", "max_time", "limit_train_batches", "limit_val_batches",
            "limit_test_batches", "limit_predict_batches", "overfit_batches", "val_check_interval",
            "check_val_every_n_epoch", "num_sanity_val_steps", "log_every_n_steps", "enable_checkpointing",
            "enable_progress_bar", "enable_model_summary", "enable_autolog_hparams", "accumulate_grad_batches",
            "gradient_clip_val", "gradient_clip_algorithm", "deterministic", "benchmark", "inference_mode",
            "use_distributed_sampler", "profiler", "detect_anomaly", "barebones", "sync_batchnorm",
            "reload_dataloaders_every_n_epochs", "default_root_dir", "model_registry",
        )),
    }
)  # fmt: skip

# Other keys at the top are the user's, for interpolations: they count where they lead.
_SECTIONS = ("data", "preprocess", "model", "stitch", "callbacks", "trainer", "run")

_ALONG_AXES = ("data.patch_size", "data.patch_overlap", "data.divisible_by", "preprocess.spacing")


def settings(plain: Mapping[str, Any], *, content: bool = False) -> dict[str, Any]:
    """The settings that change outputs, by their full keys, and the weights' checksums; none that are null.

    Args:
        plain: The configuration.
        content: Whether `inputs` tells files by what is in them.
    """
    found: dict[str, Any] = {}
    for section in _SECTIONS:
        found |= _flat(_counted(plain.get(section) or {}, section), section)
    images = (plain.get("data") or {}).get("images") or {}
    if len(images) > 1:
        found["data.images"] = list(images)  # the order of channels; which files they are is told by `inputs`
    if content and isinstance(found.get("data.skip"), str):
        found["data.skip"] = "a mask"  # wherever it lies
    paths = (plain.get("model") or {}).get("ckpt_path") or plain.get("ckpt_path")
    for n, path in enumerate(paths if isinstance(paths, list) else [paths] if paths else []):
        found[f"weights.{n}"] = checksum(Path(os.path.expanduser(str(path))))
    found |= {"format": FORMAT, "run.content_hash": content}
    # Without nulls a setting that a later version adds, and that is null there, leaves what was made before as it is.
    return {key: _alike(key, value) for key, value in found.items() if value is not None}


def _counted(node: Mapping[str, Any], section: str) -> dict[str, Any]:
    if section == "callbacks":  # of others than the writer, only their code could change outputs
        return {"writer": _counted(node.get("writer") or {}, "callbacks.writer")}
    counted = {key: value for key, value in node.items() if f"{section}.{key}" not in NO_VOXELS}
    if section == "trainer" and isinstance(node.get("plugins"), list):
        # The cluster that a run is on; others compute.
        counted["plugins"] = [one for one in node["plugins"] if ".environments." not in str(one)] or None
    return counted


def _alike(key: str, value: Any) -> Any:
    """One way of writing what means the same: 1.0 and 1, along three axes [8, 8, 8] and 8, a class's first name."""
    if isinstance(value, list):
        values = [_alike(key, one) for one in value]
        same = key in _ALONG_AXES and len(values) == 3 and values[0] == values[1] == values[2]
        return values[0] if same else values
    if isinstance(value, str):
        return OLD.get(value, value)
    return int(value) if isinstance(value, float) and value.is_integer() else value


def digest(parts: Any) -> str:
    """16 hexadecimal digits that tell plain values apart."""
    return hashlib.sha256(json.dumps(parts, sort_keys=True, default=str).encode()).hexdigest()[:16]


def inputs(cases: Iterable[SubjectFiles], mask: Any = None, *, content: bool = False) -> list[str]:
    """For each case a digest of its files: path, size and time of change; or, with `content`, of what is in them.

    Of several images their names and order count too: preprocessing may go by the name, channels go by the order.
    A file that cannot be looked at is told by its path: the run finds out what is wrong with it.

    Args:
        cases: The subjects.
        mask: data.skip; a path with {subject} is one of a subject's files.
        content: Read the files, which takes longer, and disregard where they are and when they were written.
    """
    pattern = mask if isinstance(mask, str) else None

    def of(case: SubjectFiles) -> str:
        paths = [*case.images.values(), *([Path(pattern.replace("{subject}", case.subject))] if pattern else [])]
        names = list(case.images) if len(case.images) > 1 else []
        return digest([names, [_identity(file, content) for path in paths for file in _files(path)]])

    # Each look at a network's file system takes a millisecond, and most of it is waiting.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(of, cases))


def _files(path: Path) -> list[Path]:
    """The path, and the .img of a .hdr or the other way round: they are one volume."""
    other = re.sub(r"\.(hdr|img)(?=(\.gz)?$)", lambda match: {"hdr": ".img", "img": ".hdr"}[match[1]], str(path))
    return [path, Path(other)] if other != str(path) else [path]


def _identity(path: Path, content: bool) -> list[Any]:
    try:
        if content and os.path.isfile(path):  # a pipe would be waited for
            return [checksum(path)]
        found = os.stat(path)
        return [os.path.abspath(path), found.st_size, found.st_mtime_ns]
    except OSError:
        return [os.path.abspath(path)]


def _flat(node: Any, key: str) -> dict[str, Any]:
    if isinstance(node, Mapping):
        return {k: v for name, child in node.items() for k, v in _flat(child, f"{key}.{name}").items()}
    return {key: node}
