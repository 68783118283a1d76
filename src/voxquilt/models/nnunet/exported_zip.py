"""Unpacks models out of zips of nnUNetv2_export_model_to_zip, once, into a folder of the user's cache."""

import os
import shutil
import stat
import zipfile
from collections.abc import Sequence
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

from voxquilt.errors import ConfigError
from voxquilt.example_files import cache_dir
from voxquilt.filesystem import checksum
from voxquilt.text import first_line, gib, question

MOST_BYTES = 64 * 2**30
"""Largest size of a model's files. Five folds of the largest networks that nnU-Net plans have about 8 GiB."""
_MOST_RATIO = 200
_TEXTS = ("plans.json", "dataset.json", "postprocessing.json", "postprocessing.pkl")
_MOST_TEXT = 256 * 2**20


def is_export(file: Path) -> bool:
    """Whether a file is a zip with a model folder in it."""
    try:
        with zipfile.ZipFile(file) as archive:
            return bool(_models(archive))
    except (OSError, zipfile.BadZipFile, NotImplementedError):
        return False


def unpack_model(file: Path, wanted: str | None) -> Path:
    """The folder of a zip's model in the cache, unpacked there if it has not been.

    Only a model's settings and checkpoints are unpacked.

    Args:
        file: The zip.
        wanted: The model's folder in the zip; may be left out if there is one.

    Raises:
        ConfigError: there are several models, a member has an unsafe name, kind or size, or the zip is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                _check_member(file, member)
            model = _choose(file, _models(archive), wanted)
            members = [member for member in archive.infolist() if _is_needed(member, model)]
            _check_sizes(file, members)
            target = cache_dir() / "nnunet" / checksum(file) / model
            if not target.is_dir():
                _unpack(archive, members, model, target)
            return target
    except ConfigError:
        raise
    except Exception as error:  # zipfile lets those of zlib and of other packers pass
        problem = f"{file} cannot be unpacked: {first_line(error)}."
        raise ConfigError(f"{problem} Is it complete, and is there room for it in {cache_dir()}?") from error


def _models(archive: zipfile.ZipFile) -> list[str]:
    names = set(archive.namelist())
    folders = {str(PurePosixPath(name).parent) for name in names if PurePosixPath(name).name == "plans.json"}
    return sorted(folder for folder in folders if str(PurePosixPath(folder, "dataset.json")) in names)


def _choose(file: Path, models: Sequence[str], wanted: str | None) -> str:
    if wanted in models:
        return str(wanted)
    if wanted is None and len(models) == 1:
        return models[0]
    lines = "".join(f"\n  model.folder={file}/{model}" for model in models)
    if wanted is None:
        raise ConfigError(f"{file} holds {len(models)} models; choose one:{lines}")
    raise ConfigError(f"{file} holds no model {wanted}.{question(wanted, models)} Its models are:{lines}")


def _check_member(file: Path, member: zipfile.ZipInfo) -> None:
    """Members that are not needed are checked, too: with one of these, the zip is not what nnU-Net exports."""
    name = member.filename
    windows = PureWindowsPath(name)
    is_outside = ".." in windows.parts or windows.drive or windows.root or "\\" in name
    kind = stat.S_IFMT(member.external_attr >> 16)
    if is_outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a name that leads out of the zip's folder" if is_outside else "a link or a device"
        raise ConfigError(
            f"{file}: its member {name!r} is {what}; wanted are plain files and folders, as nnU-Net exports them. "
            f"Nothing was unpacked; ask for the zip where it comes from."
        )


def _check_sizes(file: Path, members: Sequence[zipfile.ZipInfo]) -> None:
    # A member is never read further than to the size that its header says.
    for member in members:
        is_text = PurePosixPath(member.filename).name in _TEXTS
        is_packed = member.file_size > 2**20 and member.file_size > _MOST_RATIO * member.compress_size
        if is_packed or (is_text and member.file_size > _MOST_TEXT):
            raise ConfigError(
                f"{file}: its member {member.filename!r} has {member.file_size} bytes, packed into "
                f"{member.compress_size}; no file of nnU-Net is like that. Nothing was unpacked."
            )
    total = sum(member.file_size for member in members)
    if total > MOST_BYTES:
        raise ConfigError(
            f"{file} would unpack to {gib(total)}; wanted are at most {gib(MOST_BYTES, 0)}. Unpack it yourself, and "
            f"name the folder, if that is right."
        )


def _is_needed(member: zipfile.ZipInfo, model: str) -> bool:
    path = PurePosixPath(member.filename)
    return path.is_relative_to(model) and not member.is_dir() and (path.name in _TEXTS or path.suffix == ".pth")


def _unpack(archive: zipfile.ZipFile, members: Sequence[zipfile.ZipInfo], model: str, target: Path) -> None:
    """Unpack beside the target, and move the folder there in one step."""
    target.parent.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(prefix=".unpack-", dir=target.parent) as name:
        folder = Path(name) / "model"
        for member in members:
            path = folder / PurePosixPath(member.filename).relative_to(model)
            path.parent.mkdir(parents=True, exist_ok=True)
            with archive.open(member) as source, open(path, "wb") as copy:
                shutil.copyfileobj(source, copy, 2**20)
        try:
            os.rename(folder, target)
        except OSError:
            if not target.is_dir():  # else another process was faster
                raise
