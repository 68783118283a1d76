"""What may stand in a section of the configuration? Each function raises ConfigError, or another VoxquiltError.

A key that is not there is left to the constructor's default, or to the user's own class.
"""

from collections.abc import Iterable, Mapping
from typing import Any

from voxquilt.data.discovery import SubjectFiles
from voxquilt.distributed.environment import is_external, is_interactive, leave_slurm, not_the_tasks, slurm_tasks
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry.frame import Triple, parse_axcodes, to_spacing, to_triple
from voxquilt.geometry.grid import make_grid
from voxquilt.vocabulary import (
    ACTIVATIONS,
    AVERAGES,
    DISTRIBUTE,
    LOGS,
    NONFINITE,
    OFFLOAD,
    ON_ERROR,
    OUTPUTS,
    OVERLAP_MODES,
    PADDING_MODES,
    PRODUCTS,
    RESTORES,
    check_label_values,
    check_name,
)

KEYS = {
    "preprocess": {"orientation", "spacing", "intensity"},
    "stitch": {"overlap_mode", "products", "compare", "activation", "threshold", "restore", "fill", "class_names",
               "label_values", "postprocess"},
}  # fmt: skip
"""Of the sections that predicting and training share."""


def check_data(data: Mapping[str, Any]) -> None:
    """Grid and loader."""
    if "patch_size" in data:
        check_grid(to_triple(data["patch_size"], "data.patch_size", minimum=1), data.get("patch_overlap", 0))
    to_triple(data.get("divisible_by", 1), "data.divisible_by", minimum=1)
    if data.get("batch_size") != "auto":
        check_integer(data, "batch_size", 1, "data.batch_size")
    check_integer(data, "num_workers", 0, "data.num_workers")
    mode = data.get("padding_mode")
    if mode is not None and (isinstance(mode, bool) or not isinstance(mode, (int, float))):
        check_name(mode, PADDING_MODES, "data.padding_mode (null, a number, or a mode of numpy.pad)")
    check_labels(data.get("labels"))
    check_word(data, "nonfinite", NONFINITE, "data.nonfinite")
    skip = data.get("skip")
    if skip is not None and (isinstance(skip, bool) or not isinstance(skip, (int, float, str))):
        raise ConfigError(f"data.skip is null, a number, or a mask's path with {{subject}}; it is {skip!r}.")


def check_labels(labels: Any) -> None:
    """Patterns, or nothing."""
    patterns = list(labels.values()) if isinstance(labels, Mapping) else [labels]
    if labels is not None and not all(isinstance(text, str) and "{subject}" in text for text in patterns):
        raise ConfigError(
            f"data.labels is a path with {{subject}}, such as 'labels/{{subject}}.nii.gz', or one for each channel of "
            f"the labels; it is {labels!r}."
        )


def check_preprocess(preprocess: Mapping[str, Any]) -> None:
    """Model space and intensities."""
    if preprocess.get("orientation") is not None:
        parse_axcodes(preprocess["orientation"])
    to_spacing(preprocess.get("spacing"))
    intensity = preprocess.get("intensity") or []
    for name, nodes in intensity.items() if isinstance(intensity, Mapping) else [("", intensity)]:
        _check_callables(nodes, f"preprocess.intensity.{name}".rstrip("."))


def check_image_names(intensity: Any, cases: Iterable[SubjectFiles]) -> None:
    """Intensities by the image's name need images of that name."""
    names = {name for case in cases for name in case.images}
    unknown = sorted(set(intensity) - names) if isinstance(intensity, Mapping) else []
    if unknown:
        raise ConfigError(f"preprocess.intensity names {unknown}; the images are {sorted(names)}.")


def check_stitch(stitch: Mapping[str, Any]) -> None:
    """Blend and products."""
    check_word(stitch, "overlap_mode", OVERLAP_MODES, "stitch.overlap_mode")
    products = stitch.get("products")
    for names in products.values() if isinstance(products, Mapping) else [products]:
        check_list(names, "stitch.products", "labels")
        for name in names or ():
            check_name(name, PRODUCTS, "stitch.products")
    threshold = stitch.get("threshold")
    if threshold is not None and (isinstance(threshold, bool) or not isinstance(threshold, (int, float))):
        raise ConfigError(f"stitch.threshold must be a number or null; it is {threshold!r}.")
    check_list(stitch.get("compare"), "stitch.compare", "crop,hann")
    for mode in stitch.get("compare") or ():
        check_name(mode, OVERLAP_MODES, "stitch.compare")
    check_word(stitch, "restore", RESTORES, "stitch.restore")
    fill = stitch.get("fill")
    for value in fill if isinstance(fill, list) else [] if fill is None else [fill]:
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"stitch.fill is null, a number, or a number for each channel; it is {fill!r}.")
    check_list(stitch.get("class_names"), "stitch.class_names", "background,brain")
    check_label_values(stitch.get("label_values"), stitch.get("class_names"))
    _check_callables(stitch.get("postprocess") or [], "stitch.postprocess")


def check_model(model: Any) -> None:
    """The network's options."""
    if not isinstance(model, Mapping) or "_target_" not in model:
        raise ConfigError(f"model must be one with a _target_, such as model=torchscript; it is {model!r}.")
    if model.get("activation") is not None:
        check_name(model["activation"], ACTIVATIONS, "model.activation")
    check_word(model, "average", AVERAGES, "model.average")
    check_word(model, "output", OUTPUTS, "model.output")
    for key, words in {"compile": (), "channels_last": (), "offload": OFFLOAD}.items():
        if key in model and not isinstance(model[key], bool):
            check_name(model[key], ("true", "false", *words), f"model.{key}")
    check_list(model.get("flips"), "model.flips", "0,1")
    check_list(model.get("outputs"), "model.outputs", "seg,null")


def check_callbacks(callbacks: Any) -> None:
    """There must be a writer."""
    writer = callbacks.get("writer") if isinstance(callbacks, Mapping) else None
    if not isinstance(writer, Mapping) or "_target_" not in writer:
        raise ConfigError(f"callbacks.writer needs a _target_, or nothing would be written; it is {writer!r}.")
    limit = writer.get("in_memory")
    if limit is not None and (isinstance(limit, bool) or not isinstance(limit, (int, float)) or limit < 0):
        raise ConfigError(f"callbacks.writer.in_memory must be null or a number of MiB; it is {limit!r}.")


def check_shard(shard: Mapping[str, Any]) -> dict[str, int]:
    """Integers, also of an environment variable's text."""
    values: dict[str, int] = {}
    for key in ("index", "count"):
        value = shard.get(key)
        if isinstance(value, bool) or not str(value).isdecimal():
            raise ConfigError(f"shard.{key} must be an integer; it is {value!r}.")
        values[key] = int(str(value))
    if not values["index"] < values["count"]:
        raise ConfigError(
            f"shard.index={values['index']} is not below shard.count={values['count']}: shards are counted from 0, so "
            f"a SLURM array of 4 is --array=0-3."
        )
    return values


def check_run(run: Mapping[str, Any]) -> None:
    """How a run behaves."""
    check_word(run, "on_error", ON_ERROR, "run.on_error")
    check_word(run, "distribute", DISTRIBUTE, "run.distribute")
    check_word(run, "log", LOGS, "run.log")
    tolerance = run.get("surface_tolerance", 1.0)
    if isinstance(tolerance, bool) or not isinstance(tolerance, (int, float)) or not 0 <= tolerance < float("inf"):
        raise ConfigError(f"run.surface_tolerance must be a number of mm from 0; it is {tolerance!r}.")
    if not isinstance(run.get("dry_run"), bool) and run.get("dry_run") != "time":
        raise ConfigError(f"run.dry_run must be true, false or time; it is {run.get('dry_run')!r}.")
    for key in ("resume", "overwrite", "content_hash", "status"):
        if not isinstance(run.get(key), bool):
            raise ConfigError(f"run.{key} must be true or false; it is {run.get(key)!r}.")


def check_trainer(trainer: Mapping[str, Any], shards: int, *, multirun: bool) -> None:
    """Processes that belong together, as far as can be seen before torch is imported.

    With several shards, SLURM's tasks may be runs of their own; from here on they are.

    Args:
        trainer: Its arguments.
        shards: How many.
        multirun: Whether Hydra runs a sweep.
    """
    devices, strategy = trainer.get("devices", 1), str(trainer.get("strategy", "auto"))
    per_node = _per_node(devices)
    if strategy.startswith(("fsdp", "deepspeed", "model_parallel")):
        raise ConfigError(
            f"trainer.strategy={strategy} divides the network between processes, so that none may predict more patches "
            f"than another; use ddp or ddp_spawn."
        )
    if multirun and per_node != 1 and not is_external() and not strategy.startswith(("ddp_", "single")):
        raise ConfigError(
            f"--multirun with trainer.devices={devices}: each process of ddp would begin the whole sweep again. Use "
            f"trainer.strategy=ddp_spawn, or a launcher that starts the processes (hydra/launcher=submitit_slurm)."
        )
    nodes = str(trainer.get("num_nodes", 1))
    if not nodes.isdecimal():
        raise ConfigError(f"trainer.num_nodes must be an integer; it is {nodes!r}.")
    world = None if per_node is None else per_node * int(nodes)
    if slurm_tasks() not in (1, world):
        if shards > 1:
            leave_slurm()
        elif world is not None:
            raise ConfigError(not_the_tasks(world))
    if is_interactive() and "SLURMEnvironment" in str(trainer.get("plugins")):
        raise ConfigError(
            "this SLURM job has the name of an interactive shell, where its tasks are not taken for the processes of a "
            "run: give it another, such as salloc --job-name=predict, or use trainer=gpu."
        )


def _per_node(devices: Any) -> int | None:
    """Processes on each node; None where Lightning finds out."""
    # As Lightning reads them: 4, '4', [0, 2], '0,2', '0,'.
    text = str(devices).strip()
    if text.isdecimal():
        return int(text)
    ids = devices if isinstance(devices, list) else [part for part in text.split(",") if part.strip()]
    return len(ids) if all(str(part).strip().isdecimal() for part in ids) else None


def check_grid(patch_size: Triple, patch_overlap: Any) -> None:
    """A patch and an overlap of it that make a grid."""
    try:
        make_grid(patch_size, patch_size, patch_overlap)
    except VoxquiltError as error:
        raise ConfigError(f"data.patch_size={list(patch_size)}, data.patch_overlap={patch_overlap}: {error}") from error


def _check_callables(nodes: Any, key: str) -> None:
    if not isinstance(nodes, list) or not all(isinstance(node, Mapping) and "_target_" in node for node in nodes):
        raise ConfigError(f"{key} must be a list of callables, each with its _target_; it is {nodes!r}.")


def check_integer(section: Mapping[str, Any], key: str, least: int, full_key: str) -> None:
    """An integer of at least so much, where the key is there."""
    value = section.get(key, least)
    if not isinstance(value, int) or isinstance(value, bool) or value < least:
        raise ConfigError(f"{full_key} must be an integer of at least {least}; it is {value!r}.")


def check_list(value: Any, key: str, example: str) -> None:
    """A list or nothing."""
    if value is not None and not isinstance(value, list):
        raise ConfigError(f"{key} is a list, such as '[{example}]'; it is {value!r}.")


def check_word(section: Mapping[str, Any], key: str, allowed: Iterable[str], full_key: str) -> None:
    """One of the allowed words, where the key is there."""
    if key in section:
        check_name(section[key], allowed, full_key)
