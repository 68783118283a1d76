"""Lists the file formats that images are read from by the suffixes of their files, without importing anything heavy."""

from functools import cache
from pathlib import Path

from voxquilt.vocabulary import Registry

NIFTI_SUFFIXES = ("nii.gz", "nii", "hdr.gz", "img.gz", "hdr", "img")
FORMATS = Registry(
    "file format", dict.fromkeys(NIFTI_SUFFIXES, "voxquilt.data.formats.nifti:NIFTI"), "voxquilt.formats"
)
"""A `voxquilt.data.formats.image_file.FileFormat` by suffix; docs/extending.md shows how a package adds one."""


@cache
def _names() -> dict[str, str]:
    """Names of entries by the suffix with its dot, the longest suffix first."""
    names = {f".{name.lower().removeprefix('.')}": name for name in FORMATS}
    return dict(sorted(names.items(), key=lambda item: -len(item[0])))


@cache
def suffixes() -> tuple[str, ...]:
    """The suffixes of image files in lower case, such as '.nii.gz', those of installed packages last."""
    return tuple(f".{name.lower().removeprefix('.')}" for name in FORMATS)


def suffix_of(name: str) -> str:
    """The suffix of an image file's name, in lower case; '' if no format has it.

    >>> suffix_of("scans/Ch2.NII.gz")
    '.nii.gz'
    """
    return next((suffix for suffix in _names() if name.lower().endswith(suffix)), "")


def entry_of(name: str) -> str:
    """The entry of FORMATS that reads a file; NIfTI's where no format has the suffix, since it also knows contents."""
    return _names().get(suffix_of(name), NIFTI_SUFFIXES[0])


def stem(path: Path | str) -> str:
    """A subject's id: the name of a file without its suffix.

    >>> stem("scans/ch2.nii.gz")
    'ch2'
    """
    name = Path(path).name
    return name[: len(name) - len(suffix_of(name))]
