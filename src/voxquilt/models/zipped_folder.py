"""Unpacks the folder of a model out of a zip, once, into the user's cache, if nothing about the zip is suspicious."""

import os
import shutil
import stat
import zipfile
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from pathlib import Path, PurePosixPath, PureWindowsPath
from tempfile import TemporaryDirectory

from voxquilt.errors import ConfigError
from voxquilt.example_files import cache_dir
from voxquilt.filesystem import checksum
from voxquilt.text import first_line, gib, question

MOST_BYTES = 64 * 2**30
"""Largest size of a model's files. Five folds of the largest networks that nnU-Net plans have about 8 GiB."""
_MOST_RATIO = 200
_MOST_TEXT = 256 * 2**20


@dataclass(frozen=True)
class ZipFormat:
    """What the zips of a project look like.

    Args:
        maker: The project, for messages.
        folder: Name of the folder in the cache.
        find: Gives the folders of models, sorted, from the names of all members.
        is_needed: Whether a file, by its path within the model's folder, is unpacked.
        is_text: Whether a file is text, which is never very large.
    """

    maker: str
    folder: str
    find: Callable[[Collection[str]], list[str]]
    is_needed: Callable[[PurePosixPath], bool]
    is_text: Callable[[PurePosixPath], bool]

    def recognises(self, file: Path) -> bool:
        """Whether a file is a zip with a model in it."""
        try:
            with zipfile.ZipFile(file) as archive:
                return bool(self.find(archive.namelist()))
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            return False

    def describe_other(self, file: Path) -> str:
        """What is wrong with a .zip that is not recognised; empty for other files."""
        if file.suffix.lower() != ".zip":
            return ""
        try:
            with zipfile.ZipFile(file):
                return " It is a zip without such a folder in it."
        except (OSError, zipfile.BadZipFile, NotImplementedError):
            return " It cannot be read as a zip: was it copied or downloaded completely?"


def unpack_model(file: Path, wanted: str | None, kind: ZipFormat) -> Path:
    """The folder of a zip's model in the cache, unpacked there if it has not been.

    Only a model's settings and weights are unpacked.

    Args:
        file: The zip.
        wanted: The model's folder in the zip; may be left out if there is one.
        kind: What the zip looks like.

    Raises:
        ConfigError: there are several models, a member has an unsafe name, kind or size, or the zip is damaged.
    """
    try:
        with zipfile.ZipFile(file) as archive:
            for member in archive.infolist():
                _check_member(file, member, kind.maker)
            model = _choose(file, kind.find(archive.namelist()), wanted)
            members = [member for member in archive.infolist() if _is_needed(member, model, kind)]
            _check_sizes(file, members, kind)
            target = cache_dir() / kind.folder / checksum(file) / model
            if not target.is_dir():
                _unpack(archive, members, model, target)
            return target
    except ConfigError:
        raise
    except Exception as error:  # zipfile lets those of zlib and of other packers pass
        problem = f"{file} cannot be unpacked: {first_line(error)}."
        raise ConfigError(f"{problem} Is it complete, and is there room for it in {cache_dir()}?") from error


def _choose(file: Path, models: Sequence[str], wanted: str | None) -> str:
    if wanted in models:
        return str(wanted)
    if wanted is None and len(models) == 1:
        return models[0]
    lines = "".join(f"\n  model.folder={file}/{model}" for model in models)
    if wanted is None:
        raise ConfigError(f"{file} holds {len(models)} models; choose one:{lines}")
    raise ConfigError(f"{file} holds no model {wanted}.{question(wanted, models)} Its models are:{lines}")


def _check_member(file: Path, member: zipfile.ZipInfo, maker: str) -> None:
    """Members that are not needed are checked, too: with one of these, the zip is not what the project makes."""
    name = member.filename
    windows = PureWindowsPath(name)
    is_outside = ".." in windows.parts or windows.drive or windows.root or "\\" in name
    kind = stat.S_IFMT(member.external_attr >> 16)
    if is_outside or kind not in (0, stat.S_IFREG, stat.S_IFDIR):
        what = "a name that leads out of the zip's folder" if is_outside else "a link or a device"
        raise ConfigError(
            f"{file}: its member {name!r} is {what}; wanted are plain files and folders, as {maker} exports them. "
            f"Nothing was unpacked; ask for the zip where it comes from."
        )


def _check_sizes(file: Path, members: Sequence[zipfile.ZipInfo], kind: ZipFormat) -> None:
    # A member is never read further than to the size that its header says.
    for member in members:
        is_text = kind.is_text(PurePosixPath(member.filename))
        is_packed = member.file_size > 2**20 and member.file_size > _MOST_RATIO * member.compress_size
        if is_packed or (is_text and member.file_size > _MOST_TEXT):
            raise ConfigError(
                f"{file}: its member {member.filename!r} has {member.file_size} bytes, packed into "
                f"{member.compress_size}; no file of {kind.maker} is like that. Nothing was unpacked."
            )
    total = sum(member.file_size for member in members)
    if total > MOST_BYTES:
        raise ConfigError(
            f"{file} would unpack to {gib(total)}; wanted are at most {gib(MOST_BYTES, 0)}. Unpack it yourself, and "
            f"name the folder, if that is right."
        )


def _is_needed(member: zipfile.ZipInfo, model: str, kind: ZipFormat) -> bool:
    path = PurePosixPath(member.filename)
    return not member.is_dir() and path.is_relative_to(model) and kind.is_needed(path.relative_to(model))


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
