"""Computes fingerprints of subjects from all that determines their outputs: files, weights and settings."""

import json
import os
import re
from collections.abc import Iterable, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles
from voxquilt.filesystem import checksum
from voxquilt.models.weights.onnx_header import external_files
from voxquilt.old_names import OLD
from voxquilt.text import digest as digest_text
from voxquilt.vocabulary import ADDED_SETTINGS, flattened, normalised

FORMAT = 2
"""Raised when a new version of voxquilt makes other voxels of the same inputs, weights and settings."""

# All settings count, including those of later versions and of users' own classes, except these, which only decide
# where, when and how fast. A key stands for all keys below it.
NO_VOXELS = frozenset(
    {
        "output_dir", "shard", "logger",
        "ckpt_path", "model.ckpt_path",  # the files' checksums count
        # The files count, see `inputs`, and the images' names.
        "data.inputs", "data.images", "data.suffixes", "data.extra_images",
        "data.batch_size", "data.num_workers", "data.labels",
        "preprocess.device",
        "model.folder", "model.folds", "model.checkpoint",  # the weights count, and the settings that come with them
        "model.trust_checkpoint", "model.offload", "model.compile", "model.channels_last",
        "callbacks.writer.output_dir", "callbacks.writer.on_error", "callbacks.writer.log",
        "callbacks.writer.tensorboard", "callbacks.writer.report", "callbacks.writer.statistics",
        "callbacks.writer.in_memory",
        "run.on_error", "run.resume", "run.overwrite", "run.distribute", "run.surface_tolerance", "run.dry_run",
        "run.selfcheck", "run.log", "run.status", "run.checkpoint_targets", "run.allowed_targets",
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

# Other keys at the top are the user's own, for interpolations: they count in the settings that refer to them.
_SECTIONS = ("data", "preprocess", "model", "stitch", "callbacks", "trainer", "run")


def settings(plain: Mapping[str, Any], *, content: bool = False) -> dict[str, Any]:
    """The settings that change outputs, by their full keys, and the weights' checksums; without those that are null.

    Args:
        plain: The configuration.
        content: Whether `inputs` compares files by their contents.
    """
    counted: dict[str, Any] = {}
    for section in _SECTIONS:
        counted |= flattened(_select_counted(plain.get(section) or {}, section), section)
    for n, part in enumerate(counted.pop("model.parts", None) or ()):
        for section in _SECTIONS:
            counted |= flattened(_select_counted(part.get(section) or {}, section), f"part{n}.{section}")
        counted[f"part{n}.numbers"] = part.get("numbers")
    data = plain.get("data") or {}
    images = [*(data.get("images") or data.get("suffixes") or {}), *(data.get("extra_images") or {})]
    if len(images) > 1:
        counted["data.images"] = images  # the order of channels; the files count in `inputs`
    for key in ("data.skip", "data.within"):
        if content and isinstance(counted.get(key), str):
            counted[key] = "a mask"  # wherever the file is
    paths = (plain.get("model") or {}).get("ckpt_path") or plain.get("ckpt_path")
    for n, path in enumerate(paths if isinstance(paths, list) else [paths] if paths else []):
        file = Path(os.path.expanduser(str(path)))
        counted[f"weights.{n}"] = checksum(file)
        counted |= {f"weights.{n}.{other.name}": checksum(other) for other in external_files(file) if other.is_file()}
    counted |= {"format": FORMAT, "run.content_hash": content}
    # Without nulls, since a setting that a later version adds as null must not change fingerprints.
    return {
        key: normalised(key, value, OLD)
        for key, value in counted.items()
        if value is not None and (key not in ADDED_SETTINGS or value != ADDED_SETTINGS[key])
    }


def _select_counted(node: Mapping[str, Any], section: str) -> dict[str, Any]:
    if section == "callbacks":  # other callbacks than the writer change no outputs by their settings
        return {"writer": _select_counted(node.get("writer") or {}, "callbacks.writer")}
    counted = {key: value for key, value in node.items() if f"{section}.{key}" not in NO_VOXELS}
    if section == "trainer" and isinstance(node.get("plugins"), list):
        # The cluster that a run is on changes no voxels; other plugins may.
        counted["plugins"] = [plugin for plugin in node["plugins"] if ".environments." not in str(plugin)] or None
    return counted


def digest(parts: Any) -> str:
    """A digest of plain values, of 16 hexadecimal digits."""
    return digest_text(json.dumps(parts, sort_keys=True, default=str), 16)


def inputs(cases: Iterable[SubjectFiles], masks: Iterable[Any] = (), *, content: bool = False) -> list[str]:
    """A digest of each subject's files: of their paths, sizes and times of change, or with `content` of their contents.

    The names and the order of several images count too, since preprocessing may depend on the names and channels on the
    order. A file that cannot be read counts by its path: its error is reported during the run.

    Args:
        cases: The subjects.
        masks: Values of data.skip and data.within; a path with {subject} is one of a subject's files.
        content: Read the files, which takes longer, and ignore their paths and times.
    """
    patterns = [mask for mask in masks if isinstance(mask, str)]

    def digest_files(case: SubjectFiles) -> str:
        paths = [*case.images.values(), *(Path(pattern.replace("{subject}", case.subject)) for pattern in patterns)]
        names = list(case.images) if len(case.images) > 1 else []
        return digest([names, [_identity(file, content) for path in paths for file in _files(path)]])

    # Each access to a network file system takes about a millisecond, most of it waiting.
    with ThreadPoolExecutor(16) as pool:
        return list(pool.map(digest_files, cases))


def _files(path: Path) -> list[Path]:
    """The path, and the .img of a .hdr or the other way round, since they are one volume."""
    other = re.sub(r"\.(hdr|img)(?=(\.gz)?$)", lambda match: {"hdr": ".img", "img": ".hdr"}[match[1]], str(path))
    return [path, Path(other)] if other != str(path) else [path]


def _identity(path: Path, content: bool) -> list[Any]:
    try:
        if content and os.path.isfile(path):  # reading a pipe would block
            return [checksum(path)]
        stat = os.stat(path)
        return [os.path.abspath(path), stat.st_size, stat.st_mtime_ns]
    except OSError:
        return [os.path.abspath(path)]
