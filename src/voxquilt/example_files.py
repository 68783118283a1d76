"""Fetches example images and weights from published packages, and keeps them in a cache.

None of the packages is installed: files are taken out of each and the rest is thrown away. Only the standard library is
imported, so that asking for a path does not start torch.

pooch would not do: it downloads a URL, while pip knows the user's index, mirror and proxy, and what is wanted is a
file inside a wheel. Its checksum and rename are the few lines of `_fill_cache`.
"""

import os
import shutil
import subprocess
import sys
import zipfile
import zlib
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Protocol, runtime_checkable

from voxquilt.errors import ConfigError, FetchError
from voxquilt.filesystem import checksum

TIMEOUT = 300.0  # seconds that one call of pip or apt-get may take


class _ToolError(Exception):
    """pip, apt-get or dpkg-deb failed; the message is one line."""


@runtime_checkable
class Package(Protocol):
    """A published archive of files."""

    def unpack(self, members: Iterable[str], folder: Path) -> None:
        """Write those of `members` that the package has to their own paths below `folder`."""
        ...


@dataclass(frozen=True)
class Wheel:
    """A wheel on PyPI, pinned: 'nilearn==0.14.1'."""

    requirement: str

    def __str__(self) -> str:
        return f"the wheel {self.requirement}"

    def unpack(self, members: Iterable[str], folder: Path) -> None:
        # Only data is wanted, so nothing is built, nothing else is resolved, and any Python will do.
        options = ["--no-deps", "--only-binary=:all:", "--ignore-requires-python", "--no-input", "--quiet"]
        # -P: a random.py in the user's working directory must not be imported by pip.
        pip = [sys.executable, "-P", "-m", "pip", "download", "--disable-pip-version-check", *options]
        _run_tool([*pip, "--dest", str(folder), self.requirement], folder)
        for path in folder.glob("*.whl"):
            with zipfile.ZipFile(path) as wheel:
                for member in set(members).intersection(wheel.namelist()):
                    wheel.extract(member, folder)


@dataclass(frozen=True)
class DebianPackage:
    """A package of Debian or Ubuntu, taken from under `root` where it is installed, else downloaded."""

    name: str
    root: Path = Path("/")

    def __str__(self) -> str:
        return f"the Debian package {self.name}"

    def unpack(self, members: Iterable[str], folder: Path) -> None:
        members = list(members)
        if all((self.root / member).is_file() for member in members):
            for member in members:
                (folder / member).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.root / member, folder / member)
            return
        self._download(folder)
        for path in folder.glob("*.deb"):
            _run_tool(["dpkg-deb", "-x", path.name, "."], folder, cwd=folder)

    def _download(self, folder: Path) -> None:
        try:
            _run_tool(["apt-get", "download", self.name], folder, cwd=folder)
        except _ToolError:
            # A fresh container has no package lists, and only root can get them.
            if shutil.which("apt-get") is None or os.geteuid() != 0:
                raise
            _run_tool(["apt-get", "update"], folder)
            _run_tool(["apt-get", "download", self.name], folder, cwd=folder)


@dataclass(frozen=True)
class Source:
    """One file: its name in the cache, the package it comes from, its path in there, and its own SHA-256 in hex."""

    filename: str
    package: Package
    member: str
    sha256: str


_NILEARN = Wheel("nilearn==0.14.1")
_MRICRON = DebianPackage("mricron-data")
_MNI = "mni_icbm152_{}_tal_nlin_sym_09a_converted.nii.gz"


def _mni(tissue: str, sha256: str) -> Source:
    filename = _MNI.format(tissue)
    return Source(filename, _NILEARN, f"nilearn/datasets/data/{filename}", sha256)


def _colin(filename: str, sha256: str) -> Source:
    return Source(filename, _MRICRON, f"usr/share/mricron/templates/{filename}", sha256)


SOURCES = {
    "brain_extraction": Source(
        "brain_extraction.pt",
        Wheel("deepbet==1.0.2"),
        "data/models/bbox_model.pt",
        "39a7b2b5f799faa1391ea97bfcdc0b9299f20d84f2316a4ff8918dc4685e40aa",
    ),
    "mean_head": Source(
        "mean_head.nii.gz",
        Wheel("pydeface==2.1.0"),
        "pydeface/data/mean_reg2mean.nii.gz",
        "fdc13571d66293f9919648cd8de9a7b3491b12175e09336353d2c9ce0466ecb6",
    ),
    "mni152_t1": _mni("t1", "421a10e872fd6cadae7f61d358dffbcc1795a497d61ee76c5dda2503e1a1e9e6"),
    "mni152_gm": _mni("gm", "97a5ca69bd24db37a9cb7b32525e1733a209af904129bf1cd36da06d24243bed"),
    "mni152_wm": _mni("wm", "382d92812de4744f9c86c7a0e4f680dc317a0a50e4da1f0153618a6798c7b7db"),
    "colin27_t1": _colin("ch2.nii.gz", "a009051127f64dc3dd554d5f5b589870ea72106d9642c21b4e7093e478cfc309"),
    "colin27_brain": _colin("ch2bet.nii.gz", "592a2d20abdf36eefcb540ca8958428040edffc1bc1a18ba1dcfbabac77c5dd1"),
    "colin27_large": _colin("ch2better.nii.gz", "a094f3ccf383c495c9569625bd0c06993fd4b02d2a8d9966da5fea7d7e530e8d"),
}


def cache_dir() -> Path:
    """The folder of fetched files: the environment's VOXQUILT_CACHE, else ~/.cache/voxquilt. It may not exist yet."""
    return Path(os.environ.get("VOXQUILT_CACHE") or "~/.cache/voxquilt").expanduser().absolute()


def fetch(name: str) -> Path:
    """The cached file of that name, fetched first if it is missing or its checksum is wrong.

    Two processes may fetch the same file at once: each works in a folder of its own and moves whole files into place.

    Raises:
        ConfigError: a name that is not in `SOURCES`.
        FetchError: the file is not in the cache and could not be fetched.
    """
    if name not in SOURCES:
        raise ConfigError(f"there is no example file called {name!r}; the known names are {', '.join(SOURCES)}.")
    source = SOURCES[name]
    target = cache_dir() / source.filename
    try:
        if not _is_good(target, source):
            _fill_cache(source, target.parent)
    except (_ToolError, OSError, zipfile.BadZipFile, zlib.error) as error:
        # os.path.exists, since Path.exists raises where the folder may not be read.
        problem = "is not the file that was wanted (wrong checksum)" if os.path.exists(target) else "is not there"
        raise FetchError(
            f"{name}: {target} {problem}, and getting {source.member} from {source.package} failed: {error}. Check the "
            f"network and try again; or get that file elsewhere and put it at {target} (its sha256 must be "
            f"{source.sha256}); or set VOXQUILT_CACHE to a folder that has it as {target.name}."
        ) from error
    return target


def _fill_cache(source: Source, cache: Path) -> None:
    """Put `source` into the cache and, from the same download, every other file of its package that is lacking."""
    siblings = [s for s in SOURCES.values() if s.package == source.package]
    lacking = [s for s in siblings if s == source or not _is_good(cache / s.filename, s)]
    cache.mkdir(parents=True, exist_ok=True)
    # Inside the cache, for a move within one file system is atomic.
    with TemporaryDirectory(prefix=".fetch-", dir=cache) as name:
        folder = Path(name)
        source.package.unpack([s.member for s in lacking], folder)
        for s in lacking:
            if _is_good(folder / s.member, s):
                os.replace(folder / s.member, cache / s.filename)
            elif s == source:
                came = checksum(folder / s.member) if (folder / s.member).is_file() else "no such file"
                raise _ToolError(f"the package came, but its file has another checksum ({came})")


def _is_good(path: Path, source: Source) -> bool:
    return path.is_file() and checksum(path) == source.sha256


def _run_tool(command: list[str], folder: Path, *, cwd: Path | None = None) -> None:
    """Run a tool, its stderr going into a file in `folder`.

    Raises:
        _ToolError: it is not there, took longer than `TIMEOUT`, or failed; then with the last line of its stderr.
    """
    log = folder / "stderr.txt"
    tool = "pip" if command[0] == sys.executable else command[0]
    # Into a file: with a pipe, a helper that outlives the killed tool would keep us waiting past the timeout.
    with log.open("wb") as stderr:
        silent = {"stdin": subprocess.DEVNULL, "stdout": subprocess.DEVNULL, "stderr": stderr}
        try:
            status = subprocess.run(command, cwd=cwd, timeout=TIMEOUT, **silent).returncode
        except FileNotFoundError as error:
            raise _ToolError(f"{tool} is not on this system") from error
        except subprocess.TimeoutExpired as error:
            raise _ToolError(f"{tool} took longer than {TIMEOUT:g} s") from error
    if status:
        lines = log.read_text(errors="replace").strip().splitlines() or [f"exit status {status}"]
        raise _ToolError(f"{tool} says: {lines[-1].strip().rstrip('.')}")
