"""Tests fetching example files: pip really runs, on tiny wheels in a folder; the few real files needed are cached."""

import subprocess
import sys
import zipfile
from hashlib import sha256
from pathlib import Path

import numpy as np
import pytest

from voxquilt import example_files as fetching
from voxquilt.datasets import Colin27, head_mask
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.example_files import SOURCES, DebianPackage, FetchError, Source, Wheel, cache_dir, fetch

CONTENTS = {"one": b"first file", "two": b"second file"}


def write_tiny_wheel(folder: Path) -> Path:
    folder.mkdir(exist_ok=True)
    path = folder / "tiny-1.0-py3-none-any.whl"
    with zipfile.ZipFile(path, "w") as wheel:
        for name, content in CONTENTS.items():
            wheel.writestr(f"tiny/{name}.bin", content)
        wheel.writestr("tiny-1.0.dist-info/METADATA", "Metadata-Version: 2.1\nName: tiny\nVersion: 1.0\n")
        wheel.writestr("tiny-1.0.dist-info/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n")
        wheel.writestr("tiny-1.0.dist-info/RECORD", "")
    return path


def tiny_source(name: str, package: Wheel | DebianPackage, content: bytes | None = None) -> Source:
    return Source(f"{name}.bin", package, f"tiny/{name}.bin", sha256(content or CONTENTS[name]).hexdigest())


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty cache, and a pip without an index that finds only the wheels in tmp_path / 'wheels'."""
    (tmp_path / "wheels").mkdir()
    monkeypatch.setenv("VOXQUILT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "wheels"))
    for name in CONTENTS:
        monkeypatch.setitem(SOURCES, name, tiny_source(name, Wheel("tiny==1.0")))
    return tmp_path / "cache"


@pytest.fixture
def wheel(cache: Path) -> Path:
    """The tiny wheel, where pip finds it."""
    return write_tiny_wheel(cache.parent / "wheels")


def names_in(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir()) if folder.exists() else []


def test_a_file_is_fetched_once(cache: Path, wheel: Path) -> None:
    """The second call is answered from the cache that VOXQUILT_CACHE names, without the package."""
    first = fetch("one")
    wheel.unlink()
    assert first == fetch("one") == cache / "one.bin"
    assert first.read_bytes() == b"first file"


def test_one_download_caches_all_files_of_its_package(cache: Path, wheel: Path) -> None:
    """And nothing else: no wheel, no log, no temporary folder."""
    fetch("one")
    wheel.unlink()
    assert fetch("two").read_bytes() == b"second file"
    assert names_in(cache) == ["one.bin", "two.bin"]


@pytest.mark.usefixtures("wheel")
def test_a_file_with_a_wrong_checksum_is_never_cached(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """The error has both checksums."""
    monkeypatch.setitem(SOURCES, "one", tiny_source("one", Wheel("tiny==1.0"), b"other content"))
    with pytest.raises(FetchError, match="another checksum") as raised:
        fetch("one")
    assert sha256(b"first file").hexdigest() in str(raised.value)
    assert sha256(b"other content").hexdigest() in str(raised.value)
    assert "one.bin" not in names_in(cache)


@pytest.mark.usefixtures("wheel")
def test_a_corrupt_cached_file_is_fetched_again(cache: Path) -> None:
    """A cached file counts only with its checksum."""
    fetch("one").write_bytes(b"first fil")
    assert fetch("one").read_bytes() == b"first file"
    assert names_in(cache) == ["one.bin", "two.bin"]


@pytest.mark.usefixtures("wheel")
def test_valid_files_of_the_same_package_are_not_touched() -> None:
    """When one of them is fetched again."""
    other = fetch("two")
    before = other.stat()
    fetch("one").unlink()
    fetch("one")
    assert (other.stat().st_ino, other.stat().st_mtime_ns) == (before.st_ino, before.st_mtime_ns)


def test_a_member_that_the_package_lacks_is_an_error(wheel: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A package without the file is distinguished from one with another file."""
    monkeypatch.setitem(SOURCES, "three", tiny_source("three", Wheel("tiny==1.0"), b"third"))
    with pytest.raises(FetchError, match=r"tiny/three\.bin from the wheel tiny==1\.0 failed: .* \(no such file\)"):
        fetch("three")
    assert wheel.exists()


def test_without_network_and_cache_there_is_one_clear_message(cache: Path) -> None:
    """One line with the file, the package, pip's last line, the path in the cache and the checksum."""
    with pytest.raises(FetchError) as raised:
        fetch("brain_extraction")
    message = str(raised.value)
    assert isinstance(raised.value, VoxquiltError)
    assert message.startswith(f"brain_extraction: {cache / 'brain_extraction.pt'} is not there")
    assert "data/models/bbox_model.pt from the wheel deepbet==1.0.2" in message
    assert "pip says: ERROR: No matching distribution found for deepbet==1.0.2." in message
    assert SOURCES["brain_extraction"].sha256 in message
    assert "set VOXQUILT_CACHE" in message
    assert "\n" not in message
    assert names_in(cache) == []


def test_a_file_put_into_the_cache_by_hand_is_used(cache: Path) -> None:
    """The remedy of the message works: the right file at that path needs no package."""
    cache.mkdir()
    (cache / "one.bin").write_bytes(b"first file")
    assert fetch("one") == cache / "one.bin"


def test_a_wrong_file_put_into_the_cache_by_hand_is_named(cache: Path) -> None:
    """The message says that its checksum is wrong, and the file is kept."""
    cache.mkdir()
    (cache / "one.bin").write_bytes(b"something")
    with pytest.raises(FetchError, match=r"one\.bin is not the file that was wanted \(wrong checksum\)"):
        fetch("one")
    assert (cache / "one.bin").read_bytes() == b"something"


@pytest.mark.usefixtures("wheel")
def test_a_tool_that_takes_too_long_is_stopped(monkeypatch: pytest.MonkeyPatch) -> None:
    """A pip that hangs is an error after the timeout."""
    monkeypatch.setattr(fetching, "TIMEOUT", 0.01)
    with pytest.raises(FetchError, match=r"pip took longer than 0\.01 s"):
        fetch("one")


def test_a_cache_that_cannot_be_written_is_a_fetch_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A file in place of the folder is the same kind of error as a missing network."""
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("VOXQUILT_CACHE", str(tmp_path / "file"))
    with pytest.raises(FetchError, match="VOXQUILT_CACHE"):
        fetch("brain_extraction")


def test_a_system_without_apt_is_a_clear_error(cache: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """On systems other than Debian the message says what is missing."""
    monkeypatch.setenv("PATH", str(tmp_path))
    monkeypatch.setitem(SOURCES, "one", tiny_source("one", DebianPackage("tiny", root=tmp_path / "nowhere")))
    with pytest.raises(FetchError, match="from the Debian package tiny failed: apt-get is not on this system"):
        fetch("one")
    assert names_in(cache) == []


@pytest.mark.parametrize(("user", "calls"), [(0, "download update download"), (1000, "download")])
def test_package_lists_are_updated_once_and_only_by_root(
    user: int, calls: str, cache: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """An apt-get without lists gets one update if that is allowed; its last line is reported."""
    apt, log = cache.parent / "apt-get", cache.parent / "calls"
    apt.write_text(f'#!/bin/sh\necho $1 >> {log}\necho "E: Unable to locate" >&2\n[ $1 = update ]\n')
    apt.chmod(0o755)
    monkeypatch.setenv("PATH", str(apt.parent))
    monkeypatch.setattr("os.geteuid", lambda: user)
    monkeypatch.setitem(SOURCES, "one", tiny_source("one", DebianPackage("tiny", root=apt.parent)))
    with pytest.raises(FetchError, match="apt-get says: E: Unable to locate"):
        fetch("one")
    assert log.read_text().split() == calls.split()


def test_an_installed_debian_package_is_not_downloaded(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its files are copied from where they are installed."""
    root = cache.parent / "root"
    (root / "tiny").mkdir(parents=True)
    (root / "tiny" / "one.bin").write_bytes(b"first file")
    monkeypatch.setenv("PATH", str(root))
    monkeypatch.setitem(SOURCES, "one", tiny_source("one", DebianPackage("tiny", root=root)))
    assert fetch("one").read_bytes() == b"first file"
    assert (root / "tiny" / "one.bin").exists()


def test_two_processes_may_fetch_at_once(cache: Path, wheel: Path) -> None:
    """Both get the complete file, and no temporary file is left."""
    source = tiny_source("one", Wheel("tiny==1.0"))
    code = (
        "from voxquilt.example_files import SOURCES, Source, Wheel, fetch\n"
        f"SOURCES['one'] = Source({source.filename!r}, Wheel('tiny==1.0'), {source.member!r}, {source.sha256!r})\n"
        "print(fetch('one').read_text())"
    )
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    assert [process.communicate()[0] for process in both] == ["first file\n"] * 2
    assert names_in(cache) == ["one.bin"]
    assert wheel.exists()


def test_an_unknown_name_is_an_error_that_lists_the_known_ones() -> None:
    """All of them."""
    with pytest.raises(ConfigError, match=r"'colin'.*brain_extraction, mean_head, mni152_t1.*colin27_large"):
        fetch("colin")


def test_importing_example_files_needs_the_standard_library_only() -> None:
    """`import voxquilt.example_files` loads no other package."""
    code = (
        "import sys, voxquilt.example_files\n"
        "print([name for name in ('torch', 'nibabel', 'numpy', 'scipy', 'PIL') if name in sys.modules])"
    )
    answer = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert answer.stdout == "[]\n"


def test_the_cache_is_in_the_home_folder_by_default(monkeypatch: pytest.MonkeyPatch) -> None:
    """~/.cache/voxquilt, if VOXQUILT_CACHE is unset or empty."""
    monkeypatch.delenv("VOXQUILT_CACHE", raising=False)
    assert cache_dir() == Path.home() / ".cache" / "voxquilt"
    monkeypatch.setenv("VOXQUILT_CACHE", "")
    assert cache_dir() == Path.home() / ".cache" / "voxquilt"


def test_a_published_wheel_still_has_the_file() -> None:
    """A real download from PyPI has the checksum in the table."""
    path = fetch("mni152_wm")
    assert sha256(path.read_bytes()).hexdigest() == SOURCES["mni152_wm"].sha256
    assert path.parent == cache_dir()


def test_colin27_is_a_head_with_a_brain_in_it() -> None:
    """One grid for all, binary masks, at least 97 % of the brain within the head, and a plausible head volume."""
    subject = Colin27()
    head, brain = (subject[name].data for name in ("head", "brain"))
    assert repr(subject) == "Colin27(Keys: ('t1', 'head', 'brain'); images: 3)"
    assert {subject[name].shape for name in subject} == {(1, 181, 217, 181)}
    for name in subject:
        np.testing.assert_array_equal(subject[name].affine, subject["t1"].affine)
    assert head.unique().tolist() == brain.unique().tolist() == [0, 1]
    assert (head & brain).sum() >= 0.97 * brain.sum()
    assert int(brain.sum()) == 1_737_193  # mm3
    assert 4.0e6 < int(head.sum()) < 4.3e6  # mm3


def test_a_head_is_its_largest_part_without_holes() -> None:
    """Specks are removed and holes filled in each slice, also in the volume's last slice; a bay stays open."""
    t1 = np.zeros((9, 9, 4), dtype=np.uint8)
    t1[1:7, 1:7] = 50
    expected = (t1 > 0).astype(np.uint8)
    t1[3, 3, :] = 0  # a hole in every slice, open at both ends of the volume
    t1[8, 8, 0] = 90  # a speck
    t1[1:3, 5, :] = expected[1:3, 5, :] = 0  # a bay
    np.testing.assert_array_equal(head_mask(t1), expected)
    assert head_mask(t1).dtype == np.uint8


def test_an_empty_image_has_no_head() -> None:
    """If nothing is above 0 the mask is empty, not full."""
    assert not head_mask(np.zeros((3, 3, 3))).any()
