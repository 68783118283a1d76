"""Makes small model folders of nnU-Net, with everything in them that nnU-Net writes."""

import json
import zipfile
from collections import OrderedDict
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from scipy import ndimage
from torch import Tensor, nn

from voxquilt.models.nnunet.folder import read_folder
from voxquilt.models.nnunet.networks import build_network

NAME = "nnUNetTrainer__nnUNetPlans__3d_fullres"
RESAMPLING = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
PLAIN = {
    "network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet",
    "arch_kwargs": {
        "n_stages": 3,
        "features_per_stage": [2, 4, 5],
        "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
        "strides": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        "n_conv_per_stage": [1, 2, 1],
        "n_conv_per_stage_decoder": [2, 1],
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d",
        "norm_op_kwargs": {"eps": 1e-05, "affine": True},
        "dropout_op": None,
        "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU",
        "nonlin_kwargs": {"inplace": True},
    },
    "_kw_requires_import": ["conv_op", "norm_op", "dropout_op", "nonlin"],
}
PLANS = {
    "dataset_name": "Dataset001_Test",
    "plans_name": "nnUNetPlans",
    "image_reader_writer": "SimpleITKIO",
    "transpose_forward": [2, 0, 1],
    "transpose_backward": [1, 2, 0],
    "label_manager": "LabelManager",
    "foreground_intensity_properties_per_channel": {
        "0": {"mean": 100.5, "std": 50.25, "percentile_00_5": -20.0, "percentile_99_5": 300.0, "max": 400.0},
    },
    "configurations": {
        "3d_fullres": {
            "preprocessor_name": "DefaultPreprocessor",
            "patch_size": [4, 8, 8],
            "spacing": [3.0, 1.0, 1.5],
            "normalization_schemes": ["CTNormalization", "ZScoreNormalization"],
            "use_mask_for_norm": [False, True],
            "resampling_fn_data": "resample_data_or_seg_to_shape",
            "resampling_fn_data_kwargs": {**RESAMPLING, "order": 3},
            "resampling_fn_seg": "resample_data_or_seg_to_shape",
            "resampling_fn_seg_kwargs": {**RESAMPLING, "is_seg": True},
            "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
            "resampling_fn_probabilities_kwargs": RESAMPLING,
            "architecture": PLAIN,
        },
    },
}
DATASET = {
    "channel_names": {"0": "CT", "1": "T2"},
    "labels": {"background": 0, "organ": 1, "lesion": 2},
    "file_ending": ".nii.gz",
}
MAIN = "configurations.3d_fullres."
OPTIONS = f"{MAIN}architecture.arch_kwargs."
MISSING = object()
"""As a value in `edited`: takes the key out."""

RESIDUAL_OPTIONS = {
    f"{MAIN}architecture.network_class_name": "dynamic_network_architectures.architectures.unet.ResidualEncoderUNet",
    f"{OPTIONS}features_per_stage": [3, 4, 4],
    f"{OPTIONS}n_conv_per_stage": MISSING,
    f"{OPTIONS}n_blocks_per_stage": [1, 2, 1],
    f"{OPTIONS}n_conv_per_stage_decoder": [1, 1],
}
FLAT_OPTIONS = {
    f"{MAIN}patch_size": [4, 6],
    f"{MAIN}spacing": [1.0, 1.5],
    f"{OPTIONS}n_stages": 2,
    f"{OPTIONS}features_per_stage": [2, 4],
    f"{OPTIONS}conv_op": "torch.nn.modules.conv.Conv2d",
    f"{OPTIONS}kernel_sizes": [[3, 3], [3, 3]],
    f"{OPTIONS}strides": [[1, 1], [2, 2]],
    f"{OPTIONS}n_conv_per_stage": [1, 1],
    f"{OPTIONS}n_conv_per_stage_decoder": [1],
    f"{OPTIONS}norm_op": "torch.nn.modules.instancenorm.InstanceNorm2d",
}
OLD_PLANS = {
    f"{MAIN}architecture": MISSING,
    f"{MAIN}UNet_class_name": "PlainConvUNet",
    f"{MAIN}UNet_base_num_features": 2,
    f"{MAIN}unet_max_num_features": 5,
    f"{MAIN}conv_kernel_sizes": PLAIN["arch_kwargs"]["kernel_sizes"],
    f"{MAIN}pool_op_kernel_sizes": PLAIN["arch_kwargs"]["strides"],
    f"{MAIN}n_conv_per_stage_encoder": [1, 2, 1],
    f"{MAIN}n_conv_per_stage_decoder": [2, 1],
}
"""The same network as plans before 2.2 describe it."""


def edited(content: Mapping[str, Any], changes: Mapping[str, Any]) -> dict[str, Any]:
    """A copy of a JSON object with other values, each at a path such as 'configurations.2d.spacing'."""
    result: dict[str, Any] = deepcopy(dict(content))
    for path, value in changes.items():
        *parents, key = path.split(".")
        node = result
        for parent in parents:
            node = node.setdefault(parent, {})
        if value is MISSING:
            node.pop(key, None)
        else:
            node[key] = deepcopy(value)
    return result


def write_settings(
    folder: Path, plans: Mapping[str, Any] | None = None, dataset: Mapping[str, Any] | None = None
) -> Path:
    """Write plans.json and dataset.json with changes."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "plans.json").write_text(json.dumps(edited(PLANS, plans or {})))
    (folder / "dataset.json").write_text(json.dumps(edited(DATASET, dataset or {})))
    return folder


def stored(weights: Mapping[str, Any], **changes: Any) -> dict[str, Any]:
    """What nnU-Net puts into a checkpoint, with NumPy's scalars in it."""
    return {
        "network_weights": OrderedDict(weights),
        "optimizer_state": {"state": {0: {"momentum_buffer": torch.ones(3)}}, "param_groups": [{"lr": 0.01}]},
        "grad_scaler_state": None,
        "logging": {"train_losses": [np.float32(0.5), np.float64(0.25)], "lrs": [0.01]},
        "_best_ema": np.float64(0.75),
        "current_epoch": 1000,
        "init_args": {"plans": PLANS, "configuration": "3d_fullres", "fold": 0, "device": torch.device("cpu")},
        "trainer_name": "nnUNetTrainer",
        "inference_allowed_mirroring_axes": (0, 1, 2),
        **changes,
    }


def write_checkpoint(folder: Path, fold: int | str, content: Any, name: str = "checkpoint_final.pth") -> Path:
    """Write a fold's checkpoint."""
    path = folder / f"fold_{fold}" / name
    path.parent.mkdir(parents=True, exist_ok=True)
    torch.save(content, path)
    return path


def make_model(
    folder: Path,
    plans: Mapping[str, Any] | None = None,
    dataset: Mapping[str, Any] | None = None,
    *,
    folds: Sequence[int | str] = (0,),
    fill: Callable[[nn.Module, int], nn.Module] | None = None,
    **changes: Any,
) -> Path:
    """A whole model folder. The weights of each fold are `filled` from another number, or by a function of it."""
    write_settings(folder, plans, dataset)
    weights: Mapping[str, Any] = changes.pop("weights", {})
    for fold in folds:
        write_checkpoint(folder, fold, stored(weights, **changes))
    if not weights:
        for n, fold in enumerate(folds):
            network = build_network(read_folder(folder, folds=[fold]))
            network = filled(network, offset=n) if fill is None else fill(network, n)
            write_checkpoint(folder, fold, stored(with_duplicates(network.state_dict()), **changes))
    return folder


def filled(network: nn.Module, offset: float = 0.0) -> nn.Module:
    """A network with weights that depend on their names' order only."""
    for n, (name, tensor) in enumerate(sorted(network.state_dict().items())):
        if tensor.is_floating_point():
            steps = torch.arange(tensor.numel(), dtype=torch.float64).mul(0.7).add(n + offset)
            values = steps.cos().mul(0.5).reshape(tensor.shape)
            tensor.copy_(values.abs() + 0.5 if name.endswith("running_var") else values)
    return network


def balanced(network: nn.Module, seed: int) -> nn.Module:
    """A network with random weights whose classes all occur, and whose scores differ from voxel to voxel."""
    random = torch.Generator().manual_seed(seed)
    state = network.state_dict()
    for name, tensor in sorted(state.items()):
        if tensor.ndim > 1:
            fan = tensor[0].numel()
            tensor.copy_(torch.randn(tensor.shape, generator=random) * (2 / fan) ** 0.5)
        elif name.endswith("weight"):
            tensor.copy_(1 + 0.2 * torch.randn(tensor.shape, generator=random))
        elif tensor.is_floating_point() and not name.endswith(("running_mean", "running_var")):
            tensor.copy_(0.1 * torch.randn(tensor.shape, generator=random))
    first = next(t for name, t in state.items() if name.endswith("conv.weight"))
    last = max(name for name in state if "seg_layers" in name and name.endswith("weight")).removesuffix("weight")
    noise = torch.randn(1, first.shape[1], *[16] * (first.ndim - 2), generator=random)
    with torch.no_grad():
        state[f"{last}weight"].mul_(3)
        scores = network.eval()(noise)[0].flatten(1)
        state[f"{last}bias"].sub_(scores.median(1).values)
    return network


def with_duplicates(weights: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The names that nnU-Net's modules have for the same weights."""
    result: dict[str, Tensor] = {}
    for name, tensor in weights.items():
        result[name] = tensor
        for number, layer in enumerate(("conv", "norm")):
            block, found, leaf = name.rpartition(f".{layer}.")
            if found:
                result[f"{block}.all_modules.{number}.{leaf}"] = tensor
    encoder = {f"decoder.{name}": tensor for name, tensor in result.items() if name.startswith("encoder.")}
    return {**result, **encoder}


def patch(*shape: int) -> Tensor:
    """A batch whose values are the sines of steps."""
    count = int(np.prod(shape))
    return torch.arange(count, dtype=torch.float64).mul(0.37).sin().reshape(shape).float()


def export(path: Path, folder: Path, inside: str) -> Path:
    """A zip with a folder's files, as nnU-Net exports them."""
    with zipfile.ZipFile(path, "a", zipfile.ZIP_DEFLATED) as archive:
        for file in sorted(folder.rglob("*")):
            if file.is_file():
                archive.write(file, f"{inside}/{file.relative_to(folder).as_posix()}")
    return path


def write_case(
    folder: Path,
    name: str,
    shape: tuple[int, int, int],
    affine: np.ndarray,
    channels: int = 1,
    *,
    seed: int = 0,
    ending: str = ".nii.gz",
) -> list[Path]:
    """The images of a subject: smooth, with margins of 0 and, where there is room, a hole."""
    random = np.random.default_rng(seed)
    inside = np.zeros(shape, bool)
    inside[tuple(slice(n // 6, n - n // 7) for n in shape)] = True
    if min(shape) >= 6:
        inside[tuple(slice(n // 2, n // 2 + 1) for n in shape)] = False
    paths = []
    for channel in range(channels):
        values = ndimage.gaussian_filter(random.normal(size=shape), 0.8)
        values = values / values.std() * 90 + 60 + 50 * channel
        image = nib.Nifti1Image(np.where(inside, values, 0).astype(np.float32), affine)
        folder.mkdir(parents=True, exist_ok=True)
        paths.append(folder / f"{name}_{channel:04d}{ending}")
        nib.save(image, paths[-1])
    return paths
