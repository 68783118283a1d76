"""Says what the zips of nnUNetv2_export_model_to_zip look like."""

from collections.abc import Collection
from pathlib import PurePosixPath

from voxquilt.models.zipped_folder import ZipFormat

_TEXTS = ("plans.json", "dataset.json", "postprocessing.json", "postprocessing.pkl")


def _models(names: Collection[str]) -> list[str]:
    known = set(names)
    folders = {str(PurePosixPath(name).parent) for name in known if PurePosixPath(name).name == "plans.json"}
    return sorted(folder for folder in folders if str(PurePosixPath(folder, "dataset.json")) in known)


EXPORTED_ZIP = ZipFormat(
    maker="nnU-Net",
    folder="nnunet",
    find=_models,
    is_needed=lambda path: path.name in _TEXTS or path.suffix == ".pth",
    is_text=lambda path: path.name in _TEXTS,
)
