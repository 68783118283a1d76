"""Checks, before torch is imported, that a training overwrites no other and resumes with its own settings and data."""

import logging
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from voxquilt.data.discovery import SubjectFiles, label_files
from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import LIGHTNING, kind_of
from voxquilt.models.weights.stored_settings import TRAINING, pickled
from voxquilt.old_names import NEW
from voxquilt.training.file_digest import digest_of
from voxquilt.training.record_changes import changes
from voxquilt.training.splits import Split
from voxquilt.vocabulary import ADDED_SETTINGS, flattened, normalised

log = logging.getLogger("voxquilt")

FORMAT = 1
"""The version of records, raised when they can no longer be compared with earlier ones."""

# All settings are compared but these, which change neither what is trained nor on what: where and how fast the training
# runs, when it ends, and how it is validated. The files of `inputs`, `images` and `labels` are compared by their
# contents, so that data may move.
_NOT_COMPARED = {
    "data": {"inputs", "images", "suffixes", "labels", "num_workers", "cache", "inference_patch_size", "patch_overlap",
             "padding_mode", "placement", "step"},
    "preprocess": {"device"},
    "model": {"pictures"},
    "trainer": {"accelerator", "devices", "num_nodes", "strategy", "plugins", "precision", "max_epochs", "min_epochs",
                "max_steps", "min_steps", "max_time", "limit_val_batches", "check_val_every_n_epoch",
                "val_check_interval", "num_sanity_val_steps", "log_every_n_steps", "enable_progress_bar",
                "enable_model_summary", "benchmark", "deterministic", "profiler", "default_root_dir",
                "detect_anomaly"},
    "run": {"overwrite", "objective"},
}  # fmt: skip


def record(plain: Mapping[str, Any], parts: Split) -> dict[str, Any]:
    """What checkpoints keep of how a network is trained, for comparison when it is resumed; plain values."""
    labels = plain["data"]["labels"]

    def digests(case: SubjectFiles) -> list[str]:
        return [digest_of(case.images), digest_of(label_files(case, labels))]

    with ThreadPoolExecutor(16) as pool:  # mostly waiting for a file system
        subjects = {
            purpose: dict(zip([case.subject for case in cases], pool.map(digests, cases), strict=True))
            for purpose, cases in (("train", parts.training), ("validate", parts.validation))
        }
    sources = {key: plain["data"][key] for key in ("inputs", "images", "labels")}
    return {"format": FORMAT, "settings": _settings(plain), "subjects": subjects, "sources": sources}


def check_folder(plain: Mapping[str, Any]) -> list[Path]:
    """The checkpoints of another training that this one replaces: none, unless run.overwrite is true.

    Raises:
        ConfigError: there are some, which the training neither resumes from nor may replace.
    """
    folders = list(dict.fromkeys(_checkpoint_folders(plain)))
    checkpoints = sorted(path for folder in folders for path in folder.glob("*.ckpt"))
    start = plain["ckpt_path"]
    if not checkpoints or (start is not None and Path(str(start)).expanduser().parent.resolve() in folders):
        return []
    if plain["run"]["overwrite"]:
        return checkpoints
    last = next((path for path in checkpoints if path.stem == "last"), checkpoints[-1])
    names = ", ".join(str(_shortened(path)) for path in checkpoints[:3]) + ", ..." * (len(checkpoints) > 3)
    raise ConfigError(
        f"output_dir={plain['output_dir']} has another training's checkpoints ({names}), which this one's would "
        f"replace.\n  Resume that training with ckpt_path={_shortened(last)}, choose another output_dir, or set "
        f"run.overwrite=true, which removes them. Nothing was started."
    )


def check_start(plain: Mapping[str, Any], now: Mapping[str, Any]) -> None:
    """Refuse to resume from ckpt_path with other settings or data, or with nothing left to do.

    Args:
        plain: The training's configuration.
        now: Its `record`.

    Raises:
        ConfigError: settings or data differ, which are named by their keys with both values; or ckpt_path is not a
            checkpoint to resume from.
    """
    path = plain["ckpt_path"]
    if path is None:
        return
    content = _checkpoint(path)
    before = content.get(TRAINING)
    if not isinstance(before, Mapping) or before.get("format") != FORMAT:
        log.warning("%s has no record of how it was trained: settings and data cannot be compared.", path)
    elif differences := changes(before, now):
        lines = "".join(f"\n  {difference}" for difference in differences[:20])
        raise ConfigError(
            f"{path} was trained with other settings or data:{lines}\n"
            f"  A training resumes with the settings and data that it began with. Set these as they were, or begin "
            f"another training, without ckpt_path and in another output_dir. Nothing was started."
        )
    epochs, steps = _reached(content)
    for key, done, unit in (("max_epochs", epochs, "epochs"), ("max_steps", steps, "steps")):
        limit = plain["trainer"].get(key)
        if isinstance(limit, int) and 0 <= limit <= done:
            raise ConfigError(
                f"{path} has been trained for {done} {unit}, and trainer.{key}={limit} leaves nothing to do: set it to "
                f"more than {done}. Nothing was started."
            )


def _checkpoint_folders(plain: Mapping[str, Any]) -> Iterator[Path]:
    """The folders that checkpoints are written to, without those that are new in each training."""
    for node in plain["callbacks"].values():
        if not isinstance(node, Mapping) or not ("dirpath" in node or "Checkpoint" in str(node.get("_target_"))):
            continue
        if node.get("dirpath") is not None:
            yield Path(str(node["dirpath"])).expanduser().resolve()
        elif not plain.get("logger"):
            yield Path(plain["trainer"].get("default_root_dir") or ".").expanduser().resolve() / "checkpoints"


def _shortened(path: Path) -> Path:
    """A path relative to the working folder, if it lies in there."""
    return path.relative_to(Path.cwd()) if path.is_relative_to(Path.cwd()) else path


def _checkpoint(path: Any) -> Mapping[str, Any]:
    if not isinstance(path, str):
        raise ConfigError(f"ckpt_path must be one checkpoint to resume from; it is {path!r}.")
    file = Path(path).expanduser()
    kind = kind_of(file)
    content = pickled(file) if kind == LIGHTNING else None
    if not isinstance(content, Mapping):
        raise ConfigError(
            f"ckpt_path={path} is not a checkpoint that a training can resume from: its format is {kind}. Set it to a "
            f"file such as outputs/checkpoints/last.ckpt."
        )
    if "optimizer_states" not in content or "loops" not in content:
        raise ConfigError(f"ckpt_path={path} holds only weights; resuming needs the optimizer's state as well.")
    return content


def _reached(content: Mapping[str, Any]) -> tuple[int, int]:
    """Epochs and steps that a checkpoint has been trained for."""
    loop = content["loops"].get("fit_loop", {})
    epochs = loop.get("epoch_progress", {}).get("current", {}).get("processed", 0)
    if loop.get("epoch_loop.batch_progress", {}).get("is_last_batch"):
        epochs = max(epochs, content.get("epoch", 0) + 1)
    return int(epochs), int(content.get("global_step", 0))


def _settings(plain: Mapping[str, Any]) -> dict[str, Any]:
    settings = {}
    for section, ignored in _NOT_COMPARED.items():
        compared = {key: value for key, value in plain[section].items() if key not in ignored}
        settings |= flattened(compared, section, numbered=True)
    settings["stitch.label_values"] = plain["stitch"].get("label_values")  # the numbers that labels are read by
    for name, node in plain["callbacks"].items():
        # The only kind of callback that changes weights.
        if isinstance(node, Mapping) and str(node.get("_target_")).endswith("WeightAveraging"):
            settings |= flattened(node, f"callbacks.{name}", numbered=True)
    # What later versions have added was not there when earlier trainings began.
    settings = {k: v for k, v in settings.items() if k not in ADDED_SETTINGS or v != ADDED_SETTINGS[k]}
    return {key: normalised(key, value, NEW) for key, value in settings.items()}
