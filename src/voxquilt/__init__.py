"""voxquilt: patch-wise prediction on 3D medical volumes."""

from importlib import import_module
from typing import TYPE_CHECKING, Any

from voxquilt import old_names as _old_names  # noqa: F401  (finds modules by the names they had)

__version__ = "0.1.0"

if TYPE_CHECKING:
    from torch.utils.data import DataLoader as SubjectsLoader

    from voxquilt import data, datasets, inference
    from voxquilt.data.grid_sampler import GridSampler
    from voxquilt.data.normalisation import (
        CTNormalization,
        RescaleTo01Normalization,
        RGBTo01Normalization,
        ZScoreNormalization,
    )
    from voxquilt.data.preprocess import Preprocess
    from voxquilt.data.subject import (
        AFFINE,
        CHANNELS_DIMENSION,
        DATA,
        INTENSITY,
        LABEL,
        LOCATION,
        PATH,
        STEM,
        TYPE,
        Image,
        LabelMap,
        ScalarImage,
        Subject,
    )
    from voxquilt.errors import VoxquiltError
    from voxquilt.models.bundle.trusted import BundleTransform, bundle_network
    from voxquilt.models.factory import (
        predictor_from_exported,
        predictor_from_file,
        predictor_from_lightning,
        predictor_from_onnx,
        predictor_from_state_dict,
        predictor_from_torchscript,
    )
    from voxquilt.models.nnunet.networks import PlannedUNet
    from voxquilt.models.nnunet.predictor import predictor_from_nnunet
    from voxquilt.models.predictor import PatchPredictor
    from voxquilt.models.several_predictors import SeveralPredictors
    from voxquilt.predict import predict_volume
    from voxquilt.prediction.datamodule import GridDataModule
    from voxquilt.prediction.writer_callback import VolumeWriter
    from voxquilt.stitching.aggregator import GridAggregator
    from voxquilt.stitching.blend import MonaiGaussian
    from voxquilt.stitching.largest_component import KeepLargest
    from voxquilt.stitching.stitch import Stitch
    from voxquilt.training.datamodule import TrainingDataModule
    from voxquilt.training.module import PatchTrainer
    from voxquilt.training.schedules import polynomial, warmup_cosine
    from voxquilt.training.tensorboard import TensorBoardImages

# Imported at their first use, so that a wrong command line is answered before torch has loaded.
_HOMES = {
    "voxquilt.data.grid_sampler": ["GridSampler"],
    "voxquilt.data.normalisation": [
        "CTNormalization", "RescaleTo01Normalization", "RGBTo01Normalization", "ZScoreNormalization",
    ],
    "voxquilt.data.preprocess": ["Preprocess"],
    "voxquilt.data.subject": [
        "AFFINE", "CHANNELS_DIMENSION", "DATA", "INTENSITY", "LABEL", "LOCATION", "PATH", "STEM", "TYPE",
        "Image", "LabelMap", "ScalarImage", "Subject",
    ],
    "voxquilt.errors": ["VoxquiltError"],
    "voxquilt.models.bundle.trusted": ["BundleTransform", "bundle_network"],
    "voxquilt.models.factory": [
        "predictor_from_exported", "predictor_from_file", "predictor_from_lightning", "predictor_from_onnx",
        "predictor_from_state_dict", "predictor_from_torchscript",
    ],
    "voxquilt.models.nnunet.networks": ["PlannedUNet"],
    "voxquilt.models.nnunet.predictor": ["predictor_from_nnunet"],
    "voxquilt.models.predictor": ["PatchPredictor"],
    "voxquilt.models.several_predictors": ["SeveralPredictors"],
    "voxquilt.predict": ["predict_volume"],
    "voxquilt.prediction.datamodule": ["GridDataModule"],
    "voxquilt.prediction.writer_callback": ["VolumeWriter"],
    "voxquilt.stitching.aggregator": ["GridAggregator"],
    "voxquilt.stitching.blend": ["MonaiGaussian"],
    "voxquilt.stitching.largest_component": ["KeepLargest"],
    "voxquilt.stitching.stitch": ["Stitch"],
    "voxquilt.training.datamodule": ["TrainingDataModule"],
    "voxquilt.training.module": ["PatchTrainer"],
    "voxquilt.training.schedules": ["polynomial", "warmup_cosine"],
    "voxquilt.training.tensorboard": ["TensorBoardImages"],
}  # fmt: skip
_MODULE_OF = {name: module for module, names in _HOMES.items() for name in names}
# TorchIO's names: its loader does what torch's does with our patches.
_MODULES = ("data", "datasets", "inference")

__all__ = [
    "AFFINE", "CHANNELS_DIMENSION", "DATA", "INTENSITY", "LABEL", "LOCATION", "PATH", "STEM", "TYPE",
    "BundleTransform", "CTNormalization", "GridAggregator", "GridDataModule", "GridSampler", "Image", "KeepLargest",
    "LabelMap", "MonaiGaussian", "PatchPredictor", "PatchTrainer", "PlannedUNet", "Preprocess",
    "RGBTo01Normalization", "RescaleTo01Normalization", "ScalarImage", "SeveralPredictors", "Stitch", "Subject",
    "SubjectsLoader", "TensorBoardImages", "TrainingDataModule", "VolumeWriter", "VoxquiltError", "ZScoreNormalization",
    "bundle_network", "data", "datasets", "inference", "polynomial", "predict_volume", "predictor_from_exported",
    "predictor_from_file", "predictor_from_lightning", "predictor_from_nnunet", "predictor_from_onnx",
    "predictor_from_state_dict", "predictor_from_torchscript", "warmup_cosine",
]  # fmt: skip


def __getattr__(name: str) -> Any:
    if name in _MODULE_OF:
        return getattr(import_module(_MODULE_OF[name]), name)
    if name in _MODULES:
        return import_module(f"voxquilt.{name}")
    if name == "SubjectsLoader":
        return import_module("torch.utils.data").DataLoader
    raise AttributeError(f"module 'voxquilt' has no attribute {name!r}")
