"""Is the configuration right? Answered before torch or anything else heavy is imported, one message per problem."""

import os
from collections.abc import Mapping
from difflib import get_close_matches
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cases import find_cases
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry import parse_axcodes, to_spacing, to_triple
from voxquilt.grid import make_grid
from voxquilt.names import (
    ACTIVATIONS,
    AVERAGES,
    NONFINITE,
    ON_ERROR,
    OVERLAP_MODES,
    PADDING_MODES,
    PRODUCTS,
    check_name,
)

_HINTS = {
    "ckpt_path": "the file that holds the network's weights; null for a network as it is built",
    "model": "model=torchscript, model=state_dict or model=lightning",
    "data.labels": "the label map of each subject, such as labels/{subject}.nii.gz",
    "model.net": "the network: model/net=unet, or model.net._target_=monai.networks.nets.UNet and its arguments",
    "model.module_class": "the LightningModule's class, such as my_package.MyModule",
    "data.inputs": "a NIfTI file, a folder, a glob, a list of those, or a .csv",
    "data.patch_size": "voxels in model space, an integer or three, such as 96 or [128,128,64]",
}
# A section that `+` must not add keys to: what nobody reads would be a typo that nobody sees.
_KEYS = {
    "data": {"inputs", "images", "patch_size", "patch_overlap", "padding_mode", "divisible_by", "batch_size",
             "num_workers", "nonfinite"},
    "preprocess": {"orientation", "spacing", "intensity"},
    "stitch": {"overlap_mode", "products", "activation", "threshold", "class_names", "postprocess"},
    "run": {"on_error", "seed", "allowed_targets"},
}  # fmt: skip


def check_predict(cfg: DictConfig) -> dict[str, Any]:
    """The configuration as plain values, once it is complete and right.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    plain = to_plain(cfg)
    _check_keys(plain)
    _check_data(plain["data"])
    _check_preprocess(plain["preprocess"])
    _check_stitch(plain["stitch"])
    check_name(plain["run"]["on_error"], ON_ERROR, "run.on_error")
    _check_model(plain["model"])
    _check_files(plain)
    _check_trainer(plain["trainer"])
    _check_targets(plain, plain["run"].get("allowed_targets"))
    _check_output(plain)
    return plain


def check_train(cfg: DictConfig) -> dict[str, Any]:
    """The configuration of a training as plain values, once it is complete and its files are there.

    Raises:
        ConfigError: (or another VoxquiltError) what is wrong, by its key, and what would be right.
    """
    plain = to_plain(cfg)
    to_triple(plain["data"]["patch_size"], "data.patch_size", minimum=1)
    _check_preprocess(plain["preprocess"])
    if "{subject}" not in str(plain["data"]["labels"]):
        raise ConfigError(f"data.labels needs {{subject}} in its path; it is {plain['data']['labels']!r}.")
    _check_files(plain)
    return plain


def to_plain(cfg: DictConfig) -> dict[str, Any]:
    """Plain dictionaries and lists, everything resolved.

    Raises:
        ConfigError: a value that is still ???, or an interpolation that leads nowhere.
    """
    try:
        missing = sorted(OmegaConf.missing_keys(cfg))
        if missing:
            lines = "".join(f"\n  {key}: {_HINTS.get(key, 'needs a value')}" for key in missing)
            raise ConfigError(f"these keys need a value:{lines}")
        plain = OmegaConf.to_container(cfg, resolve=True)
    except OmegaConfBaseException as error:
        raise ConfigError(str(error).split("\n")[0]) from error
    assert isinstance(plain, dict)
    return {str(key): value for key, value in plain.items()}


def _check_keys(plain: Mapping[str, Any]) -> None:
    for section, known in _KEYS.items():
        if not isinstance(plain.get(section), Mapping):
            raise ConfigError(f"{section} must hold keys ({', '.join(sorted(known))}); it is {plain.get(section)!r}.")
        target = plain[section].get("_target_", "voxquilt.")
        if not str(target).startswith("voxquilt."):
            continue  # the user's own class has its own arguments
        for key in plain[section]:
            if key not in known and key != "_target_":
                near = get_close_matches(key, known, 1)
                hint = f" Did you mean {section}.{near[0]}?" if near else f" There are {', '.join(sorted(known))}."
                raise ConfigError(f"there is no key {section}.{key}.{hint}")


def _check_data(data: Mapping[str, Any]) -> None:
    patch = data["patch_size"]
    try:
        make_grid(patch if isinstance(patch, list) else [patch] * 3, patch, data["patch_overlap"])
    except VoxquiltError as error:
        raise ConfigError(f"data.patch_size={patch}, data.patch_overlap={data['patch_overlap']}: {error}") from error
    for key, least in (("batch_size", 1), ("num_workers", 0)):
        value = data[key]
        if not isinstance(value, int) or isinstance(value, bool) or value < least:
            raise ConfigError(f"data.{key} must be an integer of at least {least}; it is {value!r}.")
    mode = data["padding_mode"]
    if mode is not None and (isinstance(mode, bool) or not isinstance(mode, (int, float))):
        check_name(mode, PADDING_MODES, "data.padding_mode (null, a number, or a mode of numpy.pad)")
    check_name(data["nonfinite"], NONFINITE, "data.nonfinite")


def _check_preprocess(preprocess: Mapping[str, Any]) -> None:
    if preprocess.get("orientation") is not None:
        parse_axcodes(preprocess["orientation"])
    to_spacing(preprocess.get("spacing"))


def _check_stitch(stitch: Mapping[str, Any]) -> None:
    check_name(stitch["overlap_mode"], OVERLAP_MODES, "stitch.overlap_mode")
    products = stitch["products"]
    for names in products.values() if isinstance(products, Mapping) else [products]:
        if names is not None and not isinstance(names, list):
            raise ConfigError(f"stitch.products is a list, such as '[labels]'; it is {names!r}.")
        for name in names or ():
            check_name(name, PRODUCTS, "stitch.products")
    threshold = stitch["threshold"]
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise ConfigError(f"stitch.threshold must be a number or null; it is {threshold!r}.")


def _check_model(model: Any) -> None:
    if not isinstance(model, Mapping) or "_target_" not in model:
        raise ConfigError(f"model needs a configuration with a _target_: {_HINTS['model']}; it is {model!r}.")
    if model.get("activation") is not None:
        check_name(model["activation"], ACTIVATIONS, "model.activation")
    if "average" in model:
        check_name(model["average"], AVERAGES, "model.average")


def _check_files(plain: Mapping[str, Any]) -> None:
    find_cases(plain["data"]["inputs"], plain["data"]["images"])
    paths = plain["ckpt_path"]
    for path in paths if isinstance(paths, list) else [paths]:
        if path is not None and not Path(str(path)).expanduser().is_file():
            raise ConfigError(f"ckpt_path: there is no file {path} (looked from {Path.cwd()}).")


def _check_trainer(trainer: Mapping[str, Any]) -> None:
    devices, nodes = trainer.get("devices", 1), trainer.get("num_nodes", 1)
    one = devices in (1, "1") or (isinstance(devices, list) and len(devices) == 1)
    if not one or nodes != 1:
        raise ConfigError(
            f"trainer.devices={devices}, trainer.num_nodes={nodes}: this version of voxquilt predicts in one process; "
            f"start one per device, each with its own data.inputs and output_dir."
        )


def _check_targets(node: Any, allowed: Any, key: str = "") -> None:
    """With `run.allowed_targets`, every _target_ must match one of its patterns; null trusts what the user names."""
    if allowed is None:
        return
    if isinstance(node, Mapping):
        target = node.get("_target_")
        if target is not None and not any(_matches(str(target), str(pattern)) for pattern in allowed):
            raise ConfigError(
                f"{key}._target_={target} is not among run.allowed_targets={list(allowed)}; add it, or 'package.*'."
            )
        for name, value in node.items():
            _check_targets(value, allowed, f"{key}.{name}".lstrip("."))
    elif isinstance(node, list):
        for n, value in enumerate(node):
            _check_targets(value, allowed, f"{key}[{n}]")


def _matches(target: str, pattern: str) -> bool:
    return target == pattern or (pattern.endswith(".*") and target.startswith(pattern[:-1]))


def _check_output(plain: Mapping[str, Any]) -> None:
    folder = Path(str(plain["output_dir"])).expanduser().resolve()
    inputs = plain["data"]["inputs"]
    for entry in inputs if isinstance(inputs, list) else [inputs]:
        path = Path(str(entry)).expanduser()
        if entry is not None and not plain["data"]["images"] and path.is_dir() and path.resolve() == folder:
            raise ConfigError(
                f"output_dir={plain['output_dir']} is the folder of data.inputs: outputs would be inputs of the next "
                f"run. Choose another output_dir."
            )
    probe = folder / f".voxquilt-{os.getpid()}.tmp"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        probe.touch()
        probe.unlink()
    except OSError as error:
        raise ConfigError(f"output_dir={plain['output_dir']} cannot be written: {error.strerror or error}.") from error
