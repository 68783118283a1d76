"""Fills in the settings that a checkpoint carries, where the user chose none."""

import logging
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cli.bundle_folder import has_bundle, take_bundle
from voxquilt.cli.chosen_settings import Choice, defaults_of, fill_section, is_users, log_choice, plain_of
from voxquilt.cli.common_settings import check_usable, common_patch, common_settings
from voxquilt.cli.model_folder import NNUNET, has_model_folder, take_model_folder
from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError
from voxquilt.old_names import NEW

log = logging.getLogger("voxquilt")

AUTO = "voxquilt.predictor_from_file"
"""The model of `model=auto`, which asks the file what it is."""
_AUTO_DEFAULTS = ("_options", "auto")


def inherit(cfg: DictConfig, overrides: Iterable[str], conf: Path) -> dict[str, Any]:
    """Fill in the settings that the checkpoints carry.

    A value is the user's if the command line names its key, or if it differs from the default of conf/.

    Args:
        cfg: The composed configuration; changed in place.
        overrides: Overrides of the command line, as Hydra has them.
        conf: The folder of the defaults.

    Returns:
        The settings that are taken from the checkpoints, by section, and the names of the images; empty if they carry
        none. A class that the user names as well is left out.

    Raises:
        ConfigError: checkpoints of an ensemble whose settings contradict each other.
    """
    paths: list[Path] = []
    trusted = False
    if has_model_folder(cfg):
        OmegaConf.set_struct(cfg, False)
        source, settings = take_model_folder(cfg)
        model_defaults: tuple[str, ...] = ("nnunet",)
    elif has_bundle(cfg):
        OmegaConf.set_struct(cfg, False)
        trusted = cfg.model.trust_bundle is True
        source, settings = take_bundle(cfg)
        model_defaults = ("_options", "bundle")
    else:
        paths = _checkpoint_files(cfg)
        check_usable(paths)
        model_defaults = _AUTO_DEFAULTS
        source, settings = common_settings(paths, lambda key: _is_chosen(cfg, key, _typed(overrides), conf))
        if source is None or settings is None:
            _fill_fixed_patch(cfg, paths)
            return {}
        # One takes the place of the other, where the user has chosen it.
        for own, other in (("step", "patch_overlap"), ("patch_overlap", "step")):
            if cfg.data.get(own):
                settings["data"] = {key: value for key, value in settings["data"].items() if key != other}
    choice = Choice(_typed(overrides), {}, [], set())
    OmegaConf.set_struct(cfg, False)
    for section in ("data", "preprocess", "model", "stitch"):
        target = cfg.model.get("_target_")
        reads_file = NEW.get(target, target) in (AUTO, NNUNET)
        if section == "model" and not reads_file and "net" in settings[section]:
            continue  # the user says how to read the file
        defaults = defaults_of(conf, section, model_defaults if section == "model" else ("default",))
        fill_section(cfg, section, settings[section], defaults, choice)
    if paths and "net" in settings["model"] and cfg.model.get("prefix") is None:
        cfg.model.prefix = "net."  # of a training's module
    _fill_fixed_patch(cfg, paths)
    log_choice(source, choice)
    named = {} if trusted else choice.by_section()  # classes of a bundle that is trusted are not checked
    return {"images": settings.get("images", [])} | named


def _fill_fixed_patch(cfg: DictConfig, paths: Sequence[Path]) -> None:
    """Without data.patch_size, take the one that an ONNX file was exported for."""
    if not OmegaConf.is_missing(cfg.data, "patch_size"):
        return
    sizes = common_patch(paths)
    axis = cfg.model.get("squeeze_axis")
    if sizes is not None and len(sizes) == 2 and axis in (0, 1, 2):
        sizes = (*sizes[:axis], 1, *sizes[axis:])
    if sizes is not None and len(sizes) == 3:
        cfg.data.patch_size = list(sizes)
        log.info("from %s: data.patch_size=%s", paths[0].name, list(sizes))


def _typed(overrides: Iterable[str]) -> list[str]:
    """Keys and groups of the command line."""
    return [text.lstrip("+~").partition("=")[0] for text in overrides]


def _is_chosen(cfg: DictConfig, full: str, typed: Sequence[str], conf: Path) -> bool:
    """Whether the user has chosen the value of a full key, by the rule of `Choice`."""
    section, _, rest = full.partition(".")
    if full.startswith("model.net."):  # what the user says of it is merged with what the files say
        return is_users(full, None, None, typed)
    name = rest.partition(".")[0]
    defaults = defaults_of(conf, section, _AUTO_DEFAULTS if section == "model" else ("default",)) if name else {}
    own = plain_of(cfg.get(section)).get(name)
    return bool(name) and is_users(f"{section}.{name}", own, defaults.get(name), typed)


def check_images(wanted: Sequence[str], cases: Iterable[SubjectFiles]) -> None:
    """Refuse subjects whose images are not those that the network was trained on, in their order.

    Raises:
        ConfigError: a subject has other images. The name of a single image does not count.
    """
    for case in cases:
        if wanted and list(case.images) != list(wanted) and not len(case.images) == len(wanted) == 1:
            patterns = ", ".join(f'{name}: "{{subject}}/{name}.nii.gz"' for name in wanted)
            raise ConfigError(
                f"{case.subject} has the image{'s' * (len(case.images) > 1)} {', '.join(case.images)}; the checkpoint "
                f"was trained on {', '.join(wanted)}, in this order. Name them by data.images='{{{patterns}}}', or by "
                f"the columns of a .csv."
            )


def default_targets(conf: Path) -> list[str]:
    """Classes that a checkpoint may name if the user says nothing: run.checkpoint_targets of conf/."""
    return list(OmegaConf.load(conf / "predict.yaml").run.checkpoint_targets)


def _checkpoint_files(cfg: DictConfig) -> list[Path]:
    try:
        value = cfg.ckpt_path
    except OmegaConfBaseException:
        return []  # ??? or an interpolation that leads nowhere, which the check of the configuration reports
    paths = [Path(str(path)).expanduser() for path in (value if isinstance(value, ListConfig) else [value]) if path]
    return paths if all(path.is_file() for path in paths) else []
