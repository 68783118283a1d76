"""Recognises the format of a weights file, and files that are something else, without torch."""

import json
import zipfile
import zlib
from collections.abc import Iterable
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.weights.registry import LIGHTNING, STATE_DICT, WEIGHTS

_START_BYTES = 4096
_SAFETENSORS = "safetensors under another name: give it the suffix .safetensors"
# torch.save's magic number, in files of its old format, which are several pickles and no zip archive.
_MAGIC = bytes.fromhex("6cfc9c46f9206aa85019")
# Members of the archives that torch wrote before it had that format.
_TAR_MEMBERS = (b"sys_info", b"pickle", b"storages", b"tensors")
_STARTS = {
    b"version https://git-lfs": "a pointer of git-LFS and not the file itself: run 'git lfs pull' where it was cloned",
    b"/annex/objects/": "a pointer of git-annex and not the file itself: run 'git annex get'",
    b"\x89HDF\r\n": "an HDF5 file, such as Keras writes: export its weights to torch",
    b"%PDF": "a PDF document",
    b"\x89PNG": "a PNG picture",
    b"7z\xbc\xaf": "a 7z archive: unpack it",
    b"\x93NUMPY": "a NumPy array",
}


def check_is_weights(path: Path) -> None:
    """Raises ConfigError of a file that is known to be something else, such as a page that was downloaded instead."""
    what = not_weights(path)
    if what and kind_of(path) == STATE_DICT:  # another package's format may be one that ours are not
        raise ConfigError(f"{path} is not a file of weights: it is {what}.")


def not_weights(path: Path) -> str:
    """What a file is if it is not weights, and what to do; '' where it may be weights, or cannot be read."""
    try:
        with open(path, "rb") as file:
            start = file.read(_START_BYTES)
        # The length with which safetensors begin may be another format's first bytes.
        by_magic = "" if _is_safetensors(start) else _by_magic(start)
        return by_magic or _by_archive(path, start) or _by_text(start)
    except (OSError, zipfile.BadZipFile, ValueError, NotImplementedError):
        return ""


def _by_magic(start: bytes) -> str:
    if not start:
        return "empty: copying or downloading it was broken off"
    for magic, what in _STARTS.items():
        if start.startswith(magic):
            return what
    if start[:2] == b"\x1f\x8b":
        return f"{'a NIfTI volume, ' if _is_nifti(_unpack(start)) else ''}packed by gzip, which weights never are"
    if _is_nifti(start):
        return "a NIfTI volume"
    if start[128:132] == b"DICM":
        return "a DICOM file"
    if start[257:262] == b"ustar":
        if start[:100].rstrip(b"\0") in _TAR_MEMBERS:
            return (
                "the tar archive that torch wrote before version 0.1.10, which cannot be read without running what is "
                "in it: if you trust it, torch.load it with weights_only=False, and torch.save its state dict"
            )
        return "a tar archive: unpack it"
    is_pickle = start[:1] == b"\x80" and start[1:2] in (b"\x02", b"\x03", b"\x04", b"\x05") and start[2:3] != b"\0"
    if is_pickle and not is_old_format(start):
        return "a pickle that torch.save did not write: load it where it was made, and torch.save its state dict"
    return ""


def _by_archive(path: Path, start: bytes) -> str:
    if path.suffix == ".safetensors":
        return "torch's own format: give it the suffix .pt" if start[:2] == b"PK" else ""
    if _is_safetensors(start):
        return _SAFETENSORS
    if start[:4] != b"PK\x03\x04":
        return ""
    with zipfile.ZipFile(path) as archive:
        names = archive.namelist()
    # torch.save, torch.jit.save and torch.export.save; Lightning's are torch.save's.
    if any(name.endswith(("data.pkl", "constants.pkl", "archive_format")) or "serialized_" in name for name in names):
        return ""
    shown = ", ".join(names[:3]) + ", ..." * (len(names) > 3)
    arrays = all(name.endswith(".npy") for name in names)
    return f"{'NumPy arrays (.npz)' if arrays else 'a zip archive, not of torch: unpack it'} ({shown})"


def is_old_format(start: bytes) -> bool:
    """Whether a file that begins so is of torch.save's old format, its only one before version 1.6."""
    return start[:1] == b"\x80" and _MAGIC in start[:64]


def _is_safetensors(start: bytes) -> bool:
    return start[8:9] == b"{" and int.from_bytes(start[:8], "little") < 2**32


def _by_text(start: bytes) -> str:
    text = start.decode("utf-8", errors="ignore").strip()
    printable = sum(letter.isprintable() or letter.isspace() for letter in text)
    if len(text.encode()) < 0.9 * len(start.strip()) or printable < len(text) or not text:
        return ""
    if text[:200].lower().startswith(("<!doctype html", "<html", "<?xml", "<head")):
        return "an HTML page, such as a login or an error that was downloaded in its place"
    beginning = " ".join(text.split())[:60]
    return f"{'JSON' if _is_json(text) else 'text'} that begins with {beginning!r}"


def _is_json(text: str) -> bool:
    try:
        json.loads(text)
    except ValueError:
        return text.startswith(('{"', '[{"'))  # the beginning of a long one
    return True


def _is_nifti(start: bytes) -> bool:
    return start[344:347] in (b"n+1", b"ni1") or start[4:7] in (b"n+2", b"ni2")


def _unpack(start: bytes) -> bytes:
    try:
        return zlib.decompressobj(zlib.MAX_WBITS | 16).decompress(start, _START_BYTES)
    except zlib.error:
        return b""


def zip_names(path: Path) -> list[str]:
    """Names in a zip archive; empty if the file is not one, or cannot be read."""
    try:
        with zipfile.ZipFile(path) as archive:
            return archive.namelist()
    except (OSError, zipfile.BadZipFile):
        return []


def kind_of(path: Path) -> str:
    """The name of a file's format; that of state dicts if no format recognises the file.

    Raises:
        ConfigError: another package's format cannot be imported, or fails as it looks at the file.
    """
    names = [name for name in WEIGHTS if name != STATE_DICT]
    return next((name for name in names if _recognises(name, path)), STATE_DICT)


def check_has_network(paths: Iterable[Path]) -> None:
    """Raises ConfigError of a file of tensors alone, for which the user must name the network."""
    for path in paths:
        kind = kind_of(path)
        if WEIGHTS.load(kind)().needs_network:
            what = (
                "a Lightning checkpoint without settings of voxquilt"
                if kind == LIGHTNING
                else "weights without a network"
            )
            raise ConfigError(
                f"{path} is {what}: say which network they are for, by model.net._target_=my_package.MyNet and its "
                f"arguments (model.prefix=net. for a LightningModule's self.net), or by model=lightning "
                f"model.module_class=my_package.MyModule."
            )


def _recognises(name: str, path: Path) -> bool:
    recognises = WEIGHTS.load(name)().recognises
    try:
        return bool(recognises(path))
    except Exception as error:
        raise ConfigError(
            f"{path}: the weights format {name!r} failed as it looked at the file: {type(error).__name__}: {error}"
        ) from error
