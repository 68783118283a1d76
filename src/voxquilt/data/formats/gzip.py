"""How do bytes come out of files that may be packed by gzip? Checked to the end, and no further than its good end."""

import io
import zlib
from pathlib import Path
from typing import Any

import numpy as np
from isal import igzip, igzip_lib
from nibabel.arrayproxy import ArrayProxy
from nibabel.openers import ImageOpener

_PIECE = 2**20
_UNPACK_ERROR: Any = igzip_lib.IsalError  # isal's stub has an instance where the class is


def is_packed(path: Path) -> bool:
    """Whether a file's name says that it is packed by gzip."""
    return path.name.lower().endswith(".gz")


def first_bytes(path: Path, count: int) -> bytes:
    """Fewer where the file has fewer; what comes behind them is not looked at."""
    if not is_packed(path):
        with ImageOpener(str(path)) as file:
            return file.read(count)
    found = b""
    with _Unpacked(path) as file:
        while len(found) < count and (more := file.read(count - len(found))):
            found += more
    return found


def stored(path: Path, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """An array as a file has it; an unpacked file is mapped.

    Args:
        path: The file.
        shape, dtype: Of the array, whose first index changes fastest.
        offset: Bytes before it.

    Raises:
        OSError, EOFError, zlib.error: the file is damaged, or too short.
    """
    if not is_packed(path):
        return np.asarray(ArrayProxy(path, (shape, dtype, offset, 1, 0)).get_unscaled())
    try:
        with igzip.open(path) as file:
            return _to_the_end(file, shape, dtype, offset)
    except (OSError, EOFError, _UNPACK_ERROR):  # which is slower to say where a good end is
        with io.BufferedReader(_Unpacked(path)) as file:
            return _to_the_end(file, shape, dtype, offset)


def _to_the_end(file: Any, shape: tuple[int, ...], dtype: np.dtype, offset: int) -> np.ndarray:
    """Voxels of a packed file, which is read to its end, where gzip keeps a checksum."""
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
    """A gzip file up to its last good end, as gunzip and nibabel see it: bytes behind that are not its part are left.

    Each of its parts is checked against its checksum and has to be whole.

    Args:
        path: The file.
    """

    def __init__(self, path: Path) -> None:
        self._file = open(path, "rb")  # noqa: SIM115 (it is closed with this)
        self._unpack, self._packed = zlib.decompressobj(31), b""

    def readable(self) -> bool:
        return True

    def readinto(self, buffer: Any) -> int:
        while not (self._unpack.eof and self._is_last()):
            self._packed = self._packed or self._file.read(_PIECE)
            if not self._packed:
                raise EOFError("Compressed file ended before the end-of-stream marker was reached")
            unpacked = self._unpack.decompress(self._packed, len(buffer))
            self._packed = self._unpack.unused_data if self._unpack.eof else self._unpack.unconsumed_tail
            if unpacked:
                buffer[: len(unpacked)] = unpacked
                return len(unpacked)
        return 0

    def _is_last(self) -> bool:
        """Whether no other part follows; zeros may stand between two."""
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
