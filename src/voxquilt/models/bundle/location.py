"""Finds the folder and the files of a bundle, out of a zip where it is one."""

import os
from collections.abc import Collection
from pathlib import Path, PurePosixPath

from voxquilt.errors import ConfigError
from voxquilt.models.zipped_folder import ZipFormat, unpack_model
from voxquilt.text import question

CONFIGS = ("inference.json", "inference.yaml", "inference.yml")
_FOLDERS = {"configs": (".json", ".yaml", ".yml"), "models": (".pt", ".pth", ".ts"), "scripts": (".py",)}


def _bundles(names: Collection[str]) -> list[str]:
    paths = [PurePosixPath(name) for name in names]
    return sorted({str(path.parents[1]) for path in paths if path.parent.name == "configs" and path.name in CONFIGS})


def _is_needed(path: PurePosixPath) -> bool:
    return path.suffix in _FOLDERS.get(path.parts[0], ()) or path.name == "__init__.py"


BUNDLE_ZIP = ZipFormat(
    maker="MONAI",
    folder="bundles",
    find=_bundles,
    is_needed=_is_needed,
    is_text=lambda path: path.suffix in (".json", ".yaml", ".yml", ".py"),
)


def locate_bundle(path: Path) -> Path:
    """The folder of a bundle: the path itself, or unpacked out of a zip.

    Raises:
        ConfigError: it is not there, or is something else.
    """
    file = next((place for place in (path, *path.parents) if os.path.isfile(place)), None)
    if file is not None and BUNDLE_ZIP.recognises(file):
        return unpack_model(file, path.relative_to(file).as_posix() if path != file else None, BUNDLE_ZIP)
    if file is not None:
        other = BUNDLE_ZIP.describe_other(file)
        raise ConfigError(f"{file} is a file; wanted is the folder of a MONAI bundle, or its zip.{other}")
    if not path.is_dir():
        siblings = [entry.name for entry in path.parent.iterdir()] if path.parent.is_dir() else []
        near = question(path.name, siblings, prefix=f"{path.parent}{os.sep}")
        raise ConfigError(f"{path} is not there; wanted is the folder of a MONAI bundle.{near}")
    if not (path / "configs").is_dir():
        hint = f" Did you mean {path.parent}?" if path.name in _FOLDERS else ""
        raise ConfigError(f"{path} is not a MONAI bundle: it has no folder configs.{hint}")
    return path


def find_config(folder: Path, name: str | None) -> Path:
    """The configuration of a bundle's inference.

    Args:
        folder: The bundle.
        name: The file's name in its folder `configs`; None takes inference.json, else inference.yaml.

    Raises:
        ConfigError: it is not there.
    """
    return _choose(folder / "configs", CONFIGS if name is None else (name,), "model.config")


def find_weights(folder: Path, name: str | None, *, program: bool) -> Path:
    """The weights of a bundle.

    Args:
        folder: The bundle.
        name: The file's name in its folder `models`; None takes model.pt.
        program: Whether TorchScript is wanted, model.ts.

    Raises:
        ConfigError: the file is not there.
    """
    return _choose(folder / "models", ("model.ts" if program else "model.pt",) if name is None else (name,), _WEIGHTS)


_WEIGHTS = "model.checkpoint"


def _choose(folder: Path, names: Collection[str], key: str) -> Path:
    for name in names:
        if Path(name).name == name and (folder / name).is_file():
            return folder / name
    there = sorted(path.name for path in folder.iterdir() if path.is_file()) if folder.is_dir() else []
    shown = f"; there are {', '.join(there[:8])}" if there else ""
    raise ConfigError(f"{folder} has no {' or '.join(names)}{shown}. Choose by {key}, the name of a file there.")
