"""Packs files by gzip, and unpacks them: checked to their end, without bytes after the last valid member."""

import io
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, igzip_lib, igzip_threaded
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener

from voxquilt.data.spare_cores import spare_threads

MAGIC = b"\x1f\x8b"
"""The first bytes of a file that gzip has packed."""

_PIECE = 2**20
_UNPACK_ERROR: Any = igzip_lib.IsalError  # isal's stub has an instance where the class is


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is packed by gzip."""
    return path.name.lower().endswith(".gz")


@contextmanager
def packing(file: io.BufferedWriter) -> Iterator[Any]:
    """A file to write to from beginning to end; its bytes are packed into another, with neither a name nor a time."""
    threads = spare_threads()
    level = 1  # labels compress well anyhow
    if threads > 1:
        with igzip_threaded.open(file, "wb", level, threads=threads) as packed:
            yield _Forward(packed)
    else:
        with igzip.IGzipFile(filename="", fileobj=file, mode="wb", compresslevel=level, mtime=0) as packed:
            yield packed


class _Forward(io.RawIOBase):
    """Lets nibabel move forward in a file that is only written."""

    def __init__(self, file: Any) -> None:
        self._file, self._position = file, 0

    def write(self, data: Any, /) -> int:
        self._position += len(data)
        return self._file.write(data)

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = 0, /) -> int:
        if whence or offset < self._position:
            raise OSError("this file is written from beginning to end")
        self.write(bytes(offset - self._position))
        return offset


def first_bytes(path: Path, count: int) -> bytes:
    """The first bytes of the unpacked file, or all of a shorter one; bytes after them are not checked."""
    if not is_packed(path):
        with ImageOpener(str(path)) as file:
            return file.read(count)
    content = b""
    with _Unpacked(path) as file:
        while len(content) < count and (more := file.read(count - len(content))):
            content += more
    return content


def stored(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """An array as a file stores it; an unpacked file is mapped into memory.

    Args:
        path: The file.
        shape, dtype: Shape and type of the array, whose first index changes fastest.
        offset: Bytes before the array.

    Raises:
        OSError, EOFError, zlib.error: the file is damaged, or too short.
    """
    if not is_packed(path):
        return np.asarray(ArrayProxy(path, (shape, dtype, offset, 1, 0)).get_unscaled())
    try:
        with igzip.open(path) as file:
            return _read_to_end(file, shape, dtype, offset)
    except (OSError, EOFError, _UNPACK_ERROR):  # slower, but knows where the last valid member ends
        with io.BufferedReader(_Unpacked(path)) as file:
            return _read_to_end(file, shape, dtype, offset)


def _read_to_end(file: Any, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """The array in a packed file, which is read to its end, where gzip keeps a checksum."""
    array = np.empty(shape, dtype, order="F")
    left = array.reshape(-1, order="F").view(np.uint8).data
    skipped = len(file.read(offset))
    while skipped == offset and len(left):
        count = file.readinto(left[:_PIECE])
        if not count:
            raise EOFError(f"its voxels end {len(left)} bytes too early")
        left = left[count:]
    while file.read(_PIECE):
        pass
    return array


class _Unpacked(io.RawIOBase):
    """A gzip file up to its last valid member, as gunzip and nibabel read it: bytes after that are ignored.

    Each member must be complete and is checked against its checksum.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (`close` closes it)
        self._unpack, self._packed = zlib.decompressobj(31), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (self._unpack.eof and self._is_last_member()):
            self._packed = self._packed or self._file.read(_PIECE)
            if not self._packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            unpacked = self._unpack.decompress(self._packed, len(buffer))
            self._packed = self._unpack.unused_data if self._unpack.eof else self._unpack.unconsumed_tail
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)
        return 0

    def _is_last_member(self) -> bool:
        """Whether no other member follows; zeros are allowed between members."""
        self._packed = self._packed.lstrip(b"\0")
        while len(self._packed) < 2 and (more := self._file.read(_PIECE)):
            self._packed = (self._packed + more).lstrip(b"\0")
        if not self._packed.startswith(b"\x1f\x8b"):
            return True
        self._unpack = zlib.decompressobj(31)
        return False

    def close(self) -> None:
        self._file.close()
        super().close()
