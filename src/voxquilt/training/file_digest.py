"""Computes digests of image files, by which a resumed training knows whether its data is the same."""

import hashlib
import json
import os
from collections.abc import Iterator, Mapping
from pathlib import Path

# Files larger than this are read in so many pieces of so many bytes, among them the first and the last: .gz ends with a
# checksum.
_READ_COMPLETELY, _PIECES, _PIECE = 2**20, 16, 2**16


def digest_of(files: Mapping[str, Path]) -> str:
    """A digest of the contents and names of some files, but not of the paths; of large files only pieces are read."""
    digest = hashlib.sha256(json.dumps(list(files)).encode())
    for path in files.values():
        pair = [path, path.with_suffix(".img")] if path.suffix == ".hdr" else [path]
        for file in pair:
            for piece in _pieces(file):
                digest.update(piece)
    return digest.hexdigest()[:16]


def _pieces(path: Path) -> Iterator[bytes]:
    try:
        with open(path, "rb") as file:
            size = os.fstat(file.fileno()).st_size
            if size <= _READ_COMPLETELY:
                yield file.read()
                return
            yield str(size).encode()
            for n in range(_PIECES):
                file.seek((size - _PIECE) * n // (_PIECES - 1))
                yield file.read(_PIECE)
    except OSError:
        yield b""  # the check of headers reports the file
