"""Is the configuration right? Answered before torch or anything else heavy is imported, one message per problem."""

import os
from collections.abc import Iterator, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

from hydra.core.hydra_config import HydraConfig
from hydra.types import RunMode
from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cli.instantiate import matches
from voxquilt.cli.schema import (
    KEYS,
    check_callbacks,
    check_data,
    check_image_names,
    check_list,
    check_model,
    check_preprocess,
    check_run,
    check_shard,
    check_stitch,
    check_trainer,
)
from voxquilt.data.discovery import find_cases, label_files
from voxquilt.data.listing import meant
from voxquilt.distributed.environment import is_external, is_first
from voxquilt.errors import ConfigError
from voxquilt.models.weights.detect import check_is_weights
from voxquilt.old_names import with_new_targets
from voxquilt.text import question

_HINTS = {
    "ckpt_path": "the file that holds the network's weights; null for a network as it is built",
    "model.net": "the network: model/net=unet, or model.net._target_=monai.networks.nets.UNet and its arguments",
    "model.module_class": "the LightningModule's class, such as my_package.MyModule",
    "data.inputs": "a NIfTI file, a folder, a glob, a list of those, or a .csv",
    "data.patch_size": "voxels in model space, an integer or three, such as 96 or [128,128,64]",
}
# A section that `+` must not add keys to: what nobody reads would be a typo that nobody sees.
_KEYS = KEYS | {
    "data": {"inputs", "images", "patch_size", "patch_overlap", "padding_mode", "divisible_by", "batch_size",
             "num_workers", "nonfinite", "skip", "labels"},
    "run": {"on_error", "seed", "allowed_targets", "checkpoint_targets", "status", "distribute", "resume", "overwrite",
            "content_hash", "dry_run", "log", "surface_tolerance"},
    "shard": {"index", "count"},
}  # fmt: skip
_SECTIONS = (*_KEYS, "model", "callbacks", "logger", "trainer", "ckpt_path", "output_dir", "experiment")


def check_predict(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, once it is complete and right.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    plain = to_plain(cfg)
    check_keys(plain, _KEYS)
    check_data(plain["data"])
    check_preprocess(plain["preprocess"])
    check_stitch(plain["stitch"])
    check_run(plain["run"])
    plain["shard"] = check_shard(plain["shard"])
    check_model(plain["model"])
    check_callbacks(plain["callbacks"])
    multirun = HydraConfig.initialized() and HydraConfig.get().mode == RunMode.MULTIRUN
    check_trainer(plain["trainer"], plain["shard"]["count"], multirun=multirun)
    check_weights(plain)
    check_output(plain)
    if is_first() and not is_external():
        _check_cases(plain)
    _check_targets(plain, _allowed(plain["run"].get("allowed_targets")))
    return plain


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Plain dictionaries and lists, everything resolved.

    Raises:
        ConfigError: a value that is still ???, or an interpolation that leads nowhere.
    """
    if OmegaConf.is_missing(cfg.get("data") or {}, "inputs") and cfg.data.get("images"):
        cfg.data.inputs = None  # data.images finds the subjects by itself
    # Not OmegaConf.missing_keys, which follows interpolations and then names neither key.
    missing = sorted(_missing(OmegaConf.to_container(cfg, resolve=False)))
    if missing:
        if "ckpt_path" not in missing:
            with suppress(OmegaConfBaseException):
                # A checkpoint that is not where it was said to be would have brought what is missing.
                check_weights(cfg)
        lines = "".join(f"\n  {key}: {_HINTS.get(key, 'needs a value')}" for key in missing)
        raise ConfigError(f"these keys need a value:{lines}")
    try:
        plain = with_new_targets(OmegaConf.to_container(cfg, resolve=True))
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).split("\n")[0]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _missing(node: Any, key: str = "") -> Iterator[str]:
    if node == "???":
        yield key
    children = node.items() if isinstance(node, dict) else enumerate(node) if isinstance(node, list) else ()
    for name, child in children:
        yield from _missing(child, f"{key}.{name}".lstrip("."))


def check_keys(plain: Mapping[str, Any], sections: Mapping[str, set[str]]) -> None:
    """No key that nobody reads, since a typo would pass unseen.

    Args:
        plain: The configuration.
        sections: The keys of each.

    Raises:
        ConfigError: a key that is not there; the nearest one is suggested.
    """
    for key in plain:
        # Other names are the user's, for interpolations; only what looks like a slip is refused.
        near = question(key, _SECTIONS, cutoff=0.8)
        if near and key not in _SECTIONS:
            raise ConfigError(f"there is no key {key}.{near}")
    for section, known in sections.items():
        if not isinstance(plain.get(section), Mapping):
            raise ConfigError(f"{section} must hold keys ({', '.join(sorted(known))}); it is {plain.get(section)!r}.")
        target = plain[section].get("_target_", "voxquilt.")
        if not str(target).startswith("voxquilt."):
            continue  # the user's own class has its own arguments
        for key in plain[section]:
            if key not in known and key != "_target_":
                hint = question(key, known, prefix=f"{section}.") or f" There are {', '.join(sorted(known))}."
                raise ConfigError(f"there is no key {section}.{key}.{hint}")


def _check_cases(plain: Mapping[str, Any]) -> None:
    """Not in every process of a run: the others take rank 0's word, or each would look through a large folder. Where a
    launcher started them all, rank 0 looks when it can tell the others what is wrong, or they would wait for it."""
    cases = find_cases(plain["data"].get("inputs"), plain["data"].get("images"), output_dir=plain["output_dir"])
    check_image_names(plain["preprocess"].get("intensity"), cases)
    skip = plain["data"].get("skip")
    if isinstance(skip, str) and not any(os.path.isfile(skip.replace("{subject}", case.subject)) for case in cases):
        raise ConfigError(f"data.skip={skip}: no subject has such a mask (looked from {Path.cwd()}).")
    labels, products = plain["data"].get("labels"), plain["stitch"].get("products")
    named = [
        name for names in (products.values() if isinstance(products, Mapping) else [products]) for name in names or ()
    ]
    if labels is not None and named and "labels" not in named:
        raise ConfigError(f"data.labels={labels} is compared with labels; add them to stitch.products={products}.")
    files = (path for case in cases if labels is not None for path in label_files(case, labels).values())
    if labels is not None and not any(map(os.path.isfile, files)):
        raise ConfigError(f"data.labels={labels}: no subject has such a file (looked from {Path.cwd()}).")


def check_weights(plain: Mapping[Any, Any]) -> None:
    """Raises ConfigError where ckpt_path names no file, or one that is something else than weights."""
    paths = plain["ckpt_path"]
    for path in paths if isinstance(paths, list | ListConfig) else [paths]:
        if path is not None and not os.path.isfile(os.path.expanduser(str(path))):
            raise ConfigError(
                f"ckpt_path: there is no file {path} (looked from {Path.cwd()}).{meant(Path(os.path.expanduser(path)))}"
            )
        if path is not None:
            check_is_weights(Path(os.path.expanduser(str(path))))


def _allowed(patterns: Any) -> Any:
    check_list(patterns, "run.allowed_targets", "voxquilt.*,lightning.*,monai.*")
    return patterns


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


def check_output(plain: Mapping[str, Any]) -> None:
    """Raises ConfigError where output_dir cannot be written."""
    name = plain["output_dir"]
    if not isinstance(name, str) or not name.strip():
        raise ConfigError(f"output_dir must be a folder's name, a number in quotes ('\"12\"'); it is {name!r}.")
    try:
        folder = Path(os.path.expanduser(name)).resolve()
    except (OSError, RuntimeError) as error:  # a link to itself, by older and newer Pythons
        raise ConfigError(f"output_dir={name} cannot be written: {error}.") from error
    # Nothing is made yet, since building may still fail.
    existing = next(path for path in (folder, *folder.parents) if os.path.exists(path))
    if not existing.is_dir() or not os.access(existing, os.W_OK | os.X_OK):
        problem = "may not be written" if existing.is_dir() else "is not a folder"
        raise ConfigError(f"output_dir={name} cannot be written: {existing} {problem}.")
