"""Lists the keys of every section of a configuration, each with the check of its value.

These tables are the only list of keys beside the files of conf/, and tests hold the two equal: from them come the keys
that are allowed, the checks, and what is suggested for a key that does not exist.
"""

from voxquilt.cli.sections import Section
from voxquilt.cli.value_checks import (
    along_axes,
    anything,
    by_name,
    callables,
    check_classes,
    check_grid,
    check_margin,
    check_shard,
    check_time,
    first_of,
    flag,
    flag_or,
    flag_or_time,
    integer,
    label_patterns,
    labels_by_image,
    list_of,
    mask_path,
    name_or_number,
    number,
    number_or_numbers,
    objective,
    or_null,
    padding_mode,
    shard_number,
    split,
    threshold_or_mask,
    word,
    word_or_node,
    zero_or_one,
)
from voxquilt.geometry.frame import parse_axcodes, to_axis_order, to_spacing
from voxquilt.geometry.model_grids import GRIDS
from voxquilt.geometry.placement import PLACEMENTS
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.products.registry import PRODUCTS
from voxquilt.vocabulary import (
    ACTIVATIONS,
    AVERAGES,
    CHECKPOINT,
    COMBINE,
    CROPS,
    DEVICES,
    DISTRIBUTE,
    DTYPES,
    FILES,
    LOGS,
    NONFINITE,
    OFFLOAD,
    ON_ERROR,
    OUTPUTS,
    RESTORES,
    TASKS,
    TIMES,
    check_label_interpolation,
    check_order,
    check_per_slice,
    check_positive,
)

PREPROCESS = Section(
    {
        "orientation": or_null(lambda value, _: parse_axcodes(value)),
        "transpose": lambda value, _: to_axis_order(value),
        "spacing": lambda value, _: to_spacing(value),
        "grid": word(GRIDS),
        "crop": or_null(word(CROPS)),
        "interpolation": check_order,
        "per_slice": check_per_slice,
        "intensity": by_name(callables, name_in_key=True),
        "intensity_first": flag,
        "one_hot": or_null(labels_by_image),
        "one_hot_interpolation": check_label_interpolation,
        "device": word(DEVICES),
    }
)
STITCH = Section(
    {
        "overlap_mode": word_or_node(BLENDS),
        "products": by_name(list_of("labels", word_or_node(PRODUCTS))),
        "compare": list_of("crop,hann", word(BLENDS)),
        "activation": anything,  # follows from model.activation and model.average
        "threshold": or_null(number("must be a number or null")),
        "restore": word(RESTORES),
        "order": check_order,
        "per_slice": check_per_slice,
        "fill": or_null(number_or_numbers),
        "class_names": list_of("background,brain"),
        "label_values": anything,  # checked beside class_names
        "regions": anything,  # checked beside label_values
        "classes": list_of("liver,spleen", name_or_number),
        "combine": or_null(word(COMBINE)),
        "dtype": word(DTYPES),
        "files": word(FILES),
        "temperature": check_positive,
        "postprocess": callables,
    },
    together=(check_classes,),
)

PREDICT = {
    "data": Section(
        {
            "inputs": anything,  # both are checked as the subjects are looked for
            "images": anything,
            "suffixes": anything,
            "extra_images": anything,
            "patch_size": along_axes,
            "patch_overlap": anything,  # checked beside patch_size
            "padding_mode": padding_mode,
            "divisible_by": along_axes,
            "placement": word(PLACEMENTS),
            "step": anything,  # checked beside patch_size
            "batch_size": first_of(lambda value: value == "auto", integer(1)),
            "num_workers": integer(0),
            "skip": or_null(threshold_or_mask),
            "within": or_null(mask_path),
            "margin": number("must be a number of mm from 0", lambda mm: 0 <= mm < float("inf")),
            "labels": or_null(label_patterns),
            "nonfinite": word(NONFINITE),
            "time": word(TIMES),
        },
        together=(check_grid, check_time, check_margin),
    ),
    "preprocess": PREPROCESS,
    "stitch": STITCH,
    "run": Section(
        {
            "on_error": word(ON_ERROR),
            "resume": flag,
            "overwrite": flag,
            "content_hash": flag,
            "distribute": word(DISTRIBUTE),
            "seed": anything,  # checked by Lightning's seed_everything
            "surface_tolerance": number("must be a number of mm from 0", lambda mm: 0 <= mm < float("inf")),
            "dry_run": flag_or_time,
            "selfcheck": flag,
            "log": word(LOGS),
            "status": flag,
            "checkpoint_targets": list_of("voxquilt.*,monai.networks.*"),
            "allowed_targets": list_of("voxquilt.*,lightning.*,monai.*"),
        },
        is_complete=True,
    ),
    "shard": Section({"index": shard_number, "count": shard_number}, together=(check_shard,), is_complete=True),
    "model": Section(
        {
            "outputs": list_of("seg,null"),
            "flips": first_of(lambda value: value == CHECKPOINT, list_of("0,1")),
            "average": word(AVERAGES),
            "activation": or_null(word(ACTIVATIONS)),
            "squeeze_axis": anything,
            "output": word(OUTPUTS),
            "offload": flag_or(OFFLOAD),
            "compile": flag_or(),
            "channels_last": flag_or(),
        },
        is_open=True,
    ),
    "callbacks.writer": Section(
        {
            "output_dir": anything,
            "on_error": word(ON_ERROR),
            "log": word(LOGS),
            "tensorboard": anything,
            "report": flag,
            "statistics": flag,
            "overlay": anything,
            "compress": anything,
            "in_memory": or_null(number("must be null or a number of MiB", lambda size: size >= 0)),
        },
        is_open=True,
    ),
}
"""The sections of predict.py."""

TRAIN = {
    "data": Section(
        {
            "inputs": anything,
            "labels": or_null(label_patterns),
            "images": anything,
            "suffixes": anything,
            "task": word(TASKS),
            "patch_size": along_axes,
            "batch_size": integer(1),
            "num_workers": integer(0),
            "patches_per_volume": integer(1),
            "label_interpolation": zero_or_one,
            "balanced": number("is a share, 0 to 1", lambda share: 0 <= share <= 1),
            "augment": anything,
            "cache": anything,
            "folds": or_null(lambda value, key: integer(2)(value, f"{key} (null: no validation)")),
            "fold": integer(0),
            "split": split,
            "seed": anything,
            "inference_patch_size": along_axes,
            "patch_overlap": anything,
            "padding_mode": padding_mode,
            "divisible_by": along_axes,
            "placement": word(PLACEMENTS),
            "step": anything,  # checked beside patch_size
        },
        together=(lambda data: check_grid(data, "inference_patch_size"),),
        is_complete=True,
    ),
    "preprocess": PREPROCESS,
    "stitch": STITCH,
    "run": Section({"seed": integer(0), "overwrite": flag, "objective": objective}, is_complete=True),
}
"""The sections of train.py."""

TOP = {
    *(name for name in PREDICT if "." not in name),
    "callbacks",
    "logger",
    "trainer",
    "ckpt_path",
    "output_dir",
    "experiment",
    "task",
}
"""Keys beside which there are only the user's own, for interpolations."""

HINTS = {
    "ckpt_path": "the file that holds the network's weights; null for a network as it is built",
    "model.net": "the network: model/net=unet, or model.net._target_=monai.networks.nets.UNet and its arguments",
    "model.module_class": "the LightningModule's class, such as my_package.MyModule",
    "data.inputs": "a NIfTI file, a folder, a glob, a list of those, or a .csv",
    "data.patch_size": "voxels in model space, an integer or three, such as 96 or [128,128,64]",
}
"""What belongs into the keys that need a value."""
