"""Checks the configuration of predict.py before torch or anything else heavy is imported."""

import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from omegaconf import DictConfig

from voxquilt.cli.inherited_settings import AUTO
from voxquilt.cli.instantiate import matches
from voxquilt.cli.loggers import check_loggers
from voxquilt.cli.plain_config import check_image_names, check_output, check_weights, is_sweep, to_plain
from voxquilt.cli.process_check import check_trainer
from voxquilt.cli.schema import PREDICT, TOP
from voxquilt.cli.sections import check_sections
from voxquilt.data.discovery import SubjectFiles, find_cases, label_files
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_has_network
from voxquilt.prediction.runs_before import failures_before
from voxquilt.stitching.products.registry import PRODUCTS
from voxquilt.vocabulary import SLAB, SUBJECT


def check_predict(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, once it is complete and right.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    plain = to_plain(cfg)
    _check_model_and_writer(plain)
    check_sections(plain, PREDICT, TOP)
    check_loggers(plain.get("logger"))
    plain["shard"] = {key: int(value) for key, value in plain["shard"].items()}
    check_trainer(plain["trainer"], plain["shard"]["count"], multirun=is_sweep())
    check_weights(plain)
    _check_network(plain)
    check_output(plain)
    _check_slabs(plain)
    _check_targets(plain, plain["run"]["allowed_targets"])
    return plain


def _check_model_and_writer(plain: Mapping[str, Any]) -> None:
    model, callbacks = plain.get("model"), plain.get("callbacks")
    if not isinstance(model, Mapping) or "_target_" not in model:
        raise ConfigError(f"model must be one with a _target_, such as model=torchscript; it is {model!r}.")
    writer = callbacks.get("writer") if isinstance(callbacks, Mapping) else None
    if not isinstance(writer, Mapping) or "_target_" not in writer:
        raise ConfigError(f"callbacks.writer needs a _target_, or nothing would be written; it is {writer!r}.")


def _check_network(plain: Mapping[str, Any]) -> None:
    """Refuse weights that bring no network where none is named, with model=auto."""
    model, paths = plain["model"], plain["ckpt_path"]
    if model["_target_"] == AUTO and model.get("net") is None and paths:
        check_has_network(Path(os.path.expanduser(path)) for path in (paths if isinstance(paths, list) else [paths]))


def _check_slabs(plain: Mapping[str, Any]) -> None:
    """Refuse slabs whose scores a cubic spline takes back to native space; `auto` then deals whole subjects."""
    stitches = [plain["stitch"], *(part["stitch"] for part in plain["model"].get("parts") or ())]
    if not any(stitch.get("order") == 3 for stitch in stitches):
        return
    if plain["run"]["distribute"] == SLAB:
        raise ConfigError(
            "stitch.order=3 goes with run.distribute=subject: a cubic spline of scores needs more planes of a "
            "neighbour's slab than processes exchange. Or set stitch.order=1."
        )
    plain["run"]["distribute"] = SUBJECT


def find_subjects(plain: Mapping[str, Any]) -> list[SubjectFiles] | None:
    """The subjects of a checked configuration; None in a process that is told of them by another.

    Raises:
        ConfigError: no subject, or masks, labels and intensities that belong to none of them.
    """
    # Processes that a launcher started wait for rank 0, which looks when it can tell them what is wrong; those that
    # rank 0 starts come when it has been through this. Each of them would look through a folder that may be large.
    if is_external() or not is_first():
        return None
    data = plain["data"]
    cases = find_cases(
        data.get("inputs"), data.get("images"), output_dir=plain["output_dir"],
        suffixes=data.get("suffixes"), extra=data.get("extra_images"),
    )  # fmt: skip
    check_image_names(plain["preprocess"].get("intensity"), cases)
    one_hot = set(plain["preprocess"].get("one_hot") or ())
    missing = sorted(one_hot - {name for case in cases for name in case.images})
    if missing and not plain["run"]["dry_run"]:
        raise ConfigError(
            f"preprocess.one_hot names {missing}, and no subject has such an image: add it by data.images, or by "
            f"data.extra_images='{{{missing[0]}: \"labels/{{subject}}.nii.gz\"}}'."
        )
    for key in ("skip", "within"):
        mask = data.get(key)
        if (
            isinstance(mask, str)
            and not any(os.path.isfile(mask.replace("{subject}", case.subject)) for case in cases)
            and not failures_before(cases, [mask])  # of which each subject's row says why it has none
        ):
            raise ConfigError(f"data.{key}={mask}: no subject has such a mask (relative to {Path.cwd()}).")
    if data.get("labels") is not None:
        _check_labels(data["labels"], plain["stitch"].get("products"), cases)
    return cases


def _check_labels(labels: Any, products: Any, cases: list[SubjectFiles]) -> None:
    lists = products.values() if isinstance(products, Mapping) else [products]
    names = [name for names in lists for name in names or ()]
    # Products of others may be labels too.
    if names and "labels" not in names and all(name in PRODUCTS.own for name in names):
        raise ConfigError(f"data.labels={labels} is compared with labels; add them to stitch.products={products}.")
    files = (path for case in cases for path in label_files(case, labels).values())
    if not any(map(os.path.isfile, files)):
        raise ConfigError(f"data.labels={labels}: no subject has such a file (relative to {Path.cwd()}).")


def _check_targets(node: Any, allowed: Any, key: str = "") -> None:
    """With `run.allowed_targets`, every _target_ must match one of its patterns; null trusts what the user names."""
    if allowed is None:
        return
    if isinstance(node, Mapping):
        for name in ("_target_", "module_class"):  # both are imported
            target = node.get(name)
            if target is not None and not matches(str(target), allowed):
                raise ConfigError(
                    f"{key}.{name}={target} is not among run.allowed_targets={allowed}; add it, or 'package.*'."
                )
        for name, value in node.items():
            _check_targets(value, allowed, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for n, value in enumerate(node):
            _check_targets(value, allowed, f"{key}[{n}]")
