"""Expands `model.parts`, several models that predict each subject in turn, into the settings of each."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from omegaconf import DictConfig, ListConfig, OmegaConf

from voxquilt.cli.chosen_settings import defaults_of
from voxquilt.cli.inherited_settings import inherit
from voxquilt.cli.model_folder import has_model_folder
from voxquilt.cli.part_labels import Part, number_labels
from voxquilt.cli.plain_config import to_plain
from voxquilt.cli.schema import PREDICT, TOP
from voxquilt.cli.sections import check_sections
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.text import question
from voxquilt.vocabulary import MEAN, ORDERED

log = logging.getLogger("voxquilt")

PARTS = "voxquilt.SeveralPredictors"
"""The model of a configuration whose `model.parts` are expanded."""
_SECTIONS = ("model", "data", "preprocess", "stitch")
# Where the keys of a model are listed, by the key that says where it is.
_KINDS = {"folder": ("nnunet",), "bundle": ("_options", "bundle"), "ckpt_path": ("_options", "auto")}
# Keys of the run's model that are not meant for all models: `checkpoint` is that of each fold.
_OF_FOLDERS = ("folder", "parts", "checkpoint")
# Products that need scores, or each patch's.
_NOT_OF_MEANS = ("logits", "disagreement")
# Settings of what is written, which are those of the whole.
_NOT_OF_PARTS = (
    "class_names", "label_values", "regions", "classes", "threshold", "postprocess", "compare", "dtype", "files",
)  # fmt: skip
# What a part's grids are made of; the rest of `data` is the run's.
_OF_GRIDS = ("patch_size", "patch_overlap", "padding_mode", "divisible_by", "placement", "step")


def has_parts(cfg: DictConfig) -> bool:
    """Whether the model is several models."""
    return isinstance(cfg.get("model"), DictConfig) and cfg.model.get("parts") is not None


def take_parts(cfg: DictConfig, overrides: Sequence[str], conf: Path) -> dict[str, Any]:
    """Replace `model.parts` by the settings of each model, and fill in the run's.

    Args:
        cfg: The composed configuration; changed in place.
        overrides: Overrides of the command line, as Hydra has them.
        conf: The folder of the defaults.

    Returns:
        The settings that come from the models' files, which may name no classes but those that are allowed.

    Raises:
        ConfigError: a part is wrong; the message has its number.
    """
    OmegaConf.set_struct(cfg, False)
    entries = cfg.model.parts
    if not isinstance(entries, ListConfig) or not len(entries) or not all(isinstance(e, DictConfig) for e in entries):
        raise ConfigError(
            "model.parts is a list of models, each with its folder, bundle or ckpt_path, such as '[{folder: a}, "
            "{bundle: b}]'."
        )
    if not OmegaConf.is_missing(cfg.model, "folder") and cfg.model.get("folder") is not None:
        raise ConfigError(f"model.folder={cfg.model.folder}: the folders of several models are those in model.parts.")
    combine = cfg.stitch.get("combine") or ORDERED
    cfg.stitch.combine = combine
    wanted = cfg.stitch.get("products")
    if combine == ORDERED and wanted is not None and list(wanted) != ["labels"]:
        raise ConfigError(f"stitch.combine={ORDERED} makes labels; stitch.products is {list(wanted)}.")
    if combine == MEAN and (impossible := [name for name in wanted or () if name in _NOT_OF_MEANS]):
        raise ConfigError(f"stitch.combine={MEAN} averages probabilities, of which {impossible[0]} cannot be made.")
    parts = []
    for n, entry in enumerate(entries):
        try:
            parts.append(_expanded(cfg, entry, overrides, conf, "labels" if combine == ORDERED else "probabilities"))
        except VoxquiltError as error:
            raise ConfigError(f"model.parts[{n}]: {error}") from error
    _check_images(parts)
    if combine == ORDERED:
        parts = number_labels(cfg, parts)
    else:
        _check_alike(parts)
        if cfg.stitch.get("class_names") is None:
            cfg.stitch.class_names = parts[0].plain["stitch"].get("class_names")
    _fill_run(cfg, parts)
    return {"parts": [part.inherited for part in parts]}


def _expanded(cfg: DictConfig, entry: DictConfig, overrides: Sequence[str], conf: Path, product: str) -> Part:
    own = OmegaConf.to_container(entry, resolve=True)
    assert isinstance(own, dict)
    labels = own.pop("labels", None)
    if labels is not None and not (
        isinstance(labels, dict) and all(type(v) is int and v >= 0 for v in labels.values())
    ):
        raise ConfigError(
            f"labels is a mapping from labels or their names to numbers, such as {{1: 5}}; it is {labels!r}."
        )
    kind = _kind_of(own)
    part = OmegaConf.create(OmegaConf.to_container(cfg, resolve=False))
    assert isinstance(part, DictConfig)
    defaults = defaults_of(conf, "model", _KINDS[kind])
    run: Any = OmegaConf.to_container(cfg.model, resolve=False)
    of_run = defaults_of(conf, "model", _KINDS["folder" if has_model_folder(cfg) else "ckpt_path"])
    # What the user said of all models.
    apart = _OF_FOLDERS if kind == "bundle" else ("folder", "parts")
    shared = {k: v for k, v in run.items() if k in defaults and v != of_run.get(k) and k not in apart}
    settings = {str(k): v for k, v in own.items() if k not in ("bundle", "ckpt_path", "step")}
    if kind == "bundle":
        settings["folder"] = own["bundle"]
    unknown = [key for key in settings if key not in defaults]
    if unknown:
        keys = [*defaults, "labels", "step"]
        raise ConfigError(f"a model has no key {unknown[0]}.{question(unknown[0], keys)}")
    part.model = {**defaults, **shared, **settings}
    part.model.pop("parts", None)
    part.ckpt_path = own.get("ckpt_path") if "ckpt_path" in own else "???"
    for key, value in defaults_of(conf, "stitch").items():
        if key in _NOT_OF_PARTS:
            part.stitch[key] = value
    part.stitch.products = [product]
    if "step" in own:
        part.data.step = own["step"]
    part.data.inputs = part.data.inputs if not OmegaConf.is_missing(part.data, "inputs") else "."
    if not OmegaConf.is_missing(part.data, "patch_size") and "data.patch_size" not in _typed(overrides):
        part.data.patch_size = "???"
    inherited = inherit(part, overrides, conf)
    if part.preprocess.get("one_hot"):
        raise ConfigError("a stage of a cascade cannot be one of several models.")
    _check_output(part, product)
    plain = to_plain(part)
    check_sections(plain, PREDICT, TOP)
    return Part(plain, inherited, labels)


def _kind_of(own: Mapping[Any, Any]) -> str:
    """The key that says where a model is."""
    given = [key for key in _KINDS if key in own]
    if len(given) != 1:
        raise ConfigError(
            f"a model has a folder (of nnU-Net), a bundle (of MONAI) or a ckpt_path; this one has "
            f"{sorted(map(str, own))}."
        )
    place = own[given[0]]
    if given[0] == "folder" and isinstance(place, str) and (Path(place).expanduser() / "configs").is_dir():
        raise ConfigError(f"{place} is a bundle of MONAI: say {{bundle: {place}}}.")
    return given[0]


def _check_output(part: DictConfig, product: str) -> None:
    """Refuse a model that makes of its scores what the models together are not made of.

    Raises:
        ConfigError: it makes several masks where labels are wanted, or labels where probabilities are.
    """
    channels = OmegaConf.select(part, "model.net.out_channels")
    masks = part.model.get("activation") == "sigmoid" and part.stitch.get("regions") is None
    if product == "labels" and masks and isinstance(channels, int) and channels > 1:
        raise ConfigError(
            f"its {channels} outputs are masks that may overlap (sigmoid), and stitch.combine={ORDERED} takes one "
            f"label per voxel. Predict it by itself."
        )
    if product == "probabilities" and part.stitch.get("restore") == "labels":
        raise ConfigError(
            f"it brings labels to the file's grid (stitch.restore=labels), and stitch.combine={MEAN} averages "
            f"probabilities there. Set stitch.restore=scores."
        )


def _typed(overrides: Sequence[str]) -> set[str]:
    return {text.lstrip("+~").partition("=")[0] for text in overrides}


def _check_images(parts: Sequence[Part]) -> None:
    """Refuse models of which the files say that they take other numbers of images.

    Raises:
        ConfigError: so they say; each subject has the same images for all of them.
    """
    known = {n: list(names) for n, part in enumerate(parts) if (names := part.plain["data"].get("suffixes"))}
    first = next(iter(known), 0)
    for n, names in known.items():
        if len(names) != len(known[first]):
            own, others = (f"{len(known[m])} ({', '.join(known[m])})" for m in (n, first))
            raise ConfigError(
                f"images per subject: model.parts[{n}] takes {own}, and model.parts[{first}] takes {others}. Models of "
                f"one run take the same images: predict these in runs of their own."
            )


def _check_alike(parts: Sequence[Part]) -> None:
    """Refuse to average models of which the files say that they have other numbers of classes.

    Raises:
        ConfigError: so they say, or a part has labels of its own.
    """
    known = {n: list(names) for n, part in enumerate(parts) if (names := part.plain["stitch"].get("class_names"))}
    first = next(iter(known), 0)
    for n, part in enumerate(parts):
        if part.labels is not None:
            raise ConfigError(f"model.parts[{n}].labels goes with stitch.combine={ORDERED}; {MEAN} numbers no labels.")
        if n not in known or known[n] == known[first]:
            continue
        own, others = (", ".join(map(str, known[m])) for m in (n, first))
        text = f"stitch.combine={MEAN}: model.parts[{n}] has the classes {own}, and model.parts[{first}] {others}"
        if len(known[n]) != len(known[first]):
            raise ConfigError(f"{text}. Averaged are probabilities of the same classes.")
        log.warning("%s, whose names are kept.", text)


def _fill_run(cfg: DictConfig, parts: Sequence[Part]) -> None:
    first = parts[0].plain
    for section in ("data", "preprocess"):
        for key, value in first[section].items():
            if key not in ("inputs", "images"):
                OmegaConf.update(cfg, f"{section}.{key}", value, merge=False)
    if not cfg.data.get("suffixes") and not cfg.data.get("images"):
        # Any of them may know how the images of a subject are called.
        known = (part.plain["data"].get("suffixes") for part in parts)
        OmegaConf.update(cfg, "data.suffixes", next(filter(None, known), None), merge=False)
    for key in ("activation", "regions", "threshold"):
        if cfg.stitch.get("combine") == MEAN and OmegaConf.select(cfg, f"stitch.{key}", throw_on_missing=False) is None:
            OmegaConf.update(cfg, f"stitch.{key}", first["stitch"].get(key), merge=False)
    weights = []
    for part in parts:
        paths = part.plain["ckpt_path"]
        weights += paths if isinstance(paths, list) else [paths]
    nodes = []
    for part in parts:
        node = {section: part.plain[section] for section in _SECTIONS}
        node["data"] = {key: node["data"][key] for key in _OF_GRIDS if key in node["data"]}
        nodes.append(node | {"numbers": part.numbers})
    OmegaConf.update(cfg, "model", {"_target_": PARTS, "parts": nodes}, merge=False)
    OmegaConf.update(cfg, "ckpt_path", weights, merge=False)
