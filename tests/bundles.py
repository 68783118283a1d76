"""Makes small bundles of MONAI in the style of its zoo, and predicts with them by MONAI itself."""

import json
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch
from monai.bundle.config_parser import ConfigParser
from monai.data.utils import list_data_collate
from monai.networks.nets import UNet
from nnunet_folders import edited

IMAGE = {"keys": "image"}
NETWORK = {
    "_target_": "UNet", "spatial_dims": 3, "in_channels": 1, "out_channels": 3, "channels": [4, 8], "strides": [2],
    "num_res_units": 1, "norm": "batch",
}  # fmt: skip
LOAD = [
    {"_target_": "LoadImaged", **IMAGE},
    {"_target_": "EnsureChannelFirstd", **IMAGE},
]
ORIENT = {"_target_": "Orientationd", **IMAGE, "axcodes": "RAS"}
SPACE = {"_target_": "Spacingd", **IMAGE, "pixdim": [1.5, 1.5, 2.0], "mode": "bilinear"}
SCALE = {
    "_target_": "ScaleIntensityRanged", **IMAGE, "a_min": 0, "a_max": 100, "b_min": -1.0, "b_max": 1.0, "clip": True,
}  # fmt: skip
TYPED = {"_target_": "EnsureTyped", **IMAGE}
SOFTMAX = {"_target_": "Activationsd", "keys": "pred", "softmax": True}
INVERT = {
    "_target_": "Invertd", "keys": "pred", "transform": "@preprocessing", "orig_keys": "image",
    "meta_key_postfix": "meta_dict", "nearest_interp": False, "to_tensor": True,
}  # fmt: skip
ARGMAX = {"_target_": "AsDiscreted", "keys": "pred", "argmax": True}
SAVE = {"_target_": "SaveImaged", "keys": "pred", "output_dir": "@output_dir", "resample": False}
CONFIG = {
    "imports": ["$import glob"],
    "bundle_root": ".",
    "output_dir": "$@bundle_root + '/eval'",
    "dataset_dir": "/data",
    "datalist": "$list(sorted(glob.glob(@dataset_dir + '/*.nii.gz')))",
    "device": "$torch.device('cuda:0' if torch.cuda.is_available() else 'cpu')",
    "network_def": NETWORK,
    "network": "$@network_def.to(@device)",
    "preprocessing": {"_target_": "Compose", "transforms": [*LOAD, ORIENT, SPACE, SCALE, TYPED]},
    "inferer": {
        "_target_": "SlidingWindowInferer", "roi_size": [16, 16, 16], "sw_batch_size": 4, "overlap": 0.5,
    },
    "postprocessing": {"_target_": "Compose", "transforms": [SOFTMAX, INVERT, ARGMAX, SAVE]},
}  # fmt: skip
METADATA = {
    "version": "0.1.0",
    "network_data_format": {
        "inputs": {"image": {"type": "image", "num_channels": 1, "channel_def": {"0": "image"}}},
        "outputs": {"pred": {"num_channels": 3, "channel_def": {"0": "background", "1": "organ", "2": "lesion"}}},
    },
}


def transforms(section: str, *steps: Mapping[str, Any]) -> dict[str, Any]:
    """A change of the configuration, for `make_bundle`."""
    return {section: {"_target_": "Compose", "transforms": list(steps)}}


def make_bundle(folder: Path, changes: Mapping[str, Any] | None = None, weights: Any = None) -> Path:
    """A bundle with changes of its configuration, each at a path such as 'inferer.overlap'."""
    (folder / "configs").mkdir(parents=True)
    (folder / "models").mkdir()
    config = edited(CONFIG, changes or {})
    (folder / "configs/inference.json").write_text(json.dumps(config))
    (folder / "configs/metadata.json").write_text(json.dumps(METADATA))
    torch.save(state() if weights is None else weights, folder / "models/model.pt")
    return folder


def state(**options: Any) -> dict[str, torch.Tensor]:
    """Weights of the network, whose labels change every few voxels."""
    torch.manual_seed(1)
    network = UNet(**{name: value for name, value in {**NETWORK, **options}.items() if name != "_target_"})
    return network.state_dict()


def make_image(path: Path, spacing: tuple[float, ...] = (1, 1, 1), seed: int = 0, **options: Any) -> Path:
    """A smooth image whose axes may be turned (`codes`) and oblique (`angle`)."""
    shape = options.get("shape", (29, 26, 23))
    voxels = np.random.default_rng(seed).normal(50, 60, [-(-n // 3) + 1 for n in shape])
    voxels = np.kron(voxels, np.ones((3, 3, 3)))[tuple(slice(n) for n in shape)]
    voxels += np.random.default_rng(seed + 1).normal(0, 10, shape)
    angle = options.get("angle", 0.0)
    turn = np.eye(4)
    turn[:2, :2] = [[np.cos(angle), -np.sin(angle)], [np.sin(angle), np.cos(angle)]]
    image = nib.Nifti1Image(voxels.astype(np.float32), turn @ np.diag([*spacing, 1.0]))
    ends = nib.orientations.axcodes2ornt(options.get("codes", "RAS"))
    image = image.as_reoriented(nib.orientations.ornt_transform(nib.orientations.axcodes2ornt("RAS"), ends))
    image.affine[:3, 3] = [-7, 12, 31]
    path.parent.mkdir(parents=True, exist_ok=True)
    nib.save(nib.Nifti1Image(np.asarray(image.dataobj), image.affine), path)
    return path


def labels_by_monai(bundle: Path, image: Path | list[Path]) -> np.ndarray:
    """What the bundle's own parts make of an image: those that MONAI's workflow runs, without the workflow."""
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/inference.json"))
    parser["bundle_root"] = str(bundle)
    for n, step in enumerate(parser["postprocessing"]["transforms"]):
        parser[f"postprocessing#transforms#{n}#_disabled_"] = step["_target_"] == "SaveImaged"
    network = parser.get_parsed_content("network_def").eval()
    weights = torch.load(bundle / "models/model.pt", weights_only=True)
    network.load_state_dict(weights.get("model", weights))
    files = [str(path) for path in image] if isinstance(image, list) else str(image)
    item = parser.get_parsed_content("preprocessing")({"image": files})
    batch = list_data_collate([item])
    with torch.no_grad():
        pred = parser.get_parsed_content("inferer")(batch["image"], network)
    result = parser.get_parsed_content("postprocessing")({**item, "pred": pred[0]})
    return np.asarray(result["pred"])


def zipped(folder: Path, file: Path, top: str = "", extra: Mapping[str, bytes] | None = None) -> Path:
    """A zip of a bundle."""
    with zipfile.ZipFile(file, "w") as archive:
        for path in sorted(folder.rglob("*")):
            if path.is_file():
                archive.write(path, f"{top}{path.relative_to(folder)}")
        for name, content in (extra or {}).items():
            archive.writestr(name, content)
    return file
