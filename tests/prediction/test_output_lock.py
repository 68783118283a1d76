"""Tests the output lock: one run per folder, or the shards of one run; a lock ends with its process."""

import contextlib
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from forks import Run, Server
from synthetic import noise, read, save

import voxquilt.prediction.output_lock
from voxquilt.errors import ConfigError, OutputError
from voxquilt.filesystem import replacing
from voxquilt.prediction.output_lock import locked

pytestmark = pytest.mark.skipif(sys.platform == "win32", reason="no flock")

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Slow",
    "ckpt_path=null", "data.patch_size=8", "data.patch_overlap=4",
)  # fmt: skip
LOCK = ".voxquilt.lock"


def hidden(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir() if path.name.startswith(".")}


@contextlib.contextmanager
def forked(body: Callable[[], None]) -> Iterator[int]:
    """A process that runs the body and ends with 0, or with 2 for a ConfigError."""
    pid = os.fork()
    if not pid:
        status = 70
        with contextlib.suppress(BaseException):
            try:
                body()
                status = 0
            except ConfigError:
                status = 2
        os._exit(status)
    try:
        yield pid
    finally:
        with contextlib.suppress(ProcessLookupError, ChildProcessError):
            os.kill(pid, signal.SIGKILL)
            os.waitpid(pid, 0)


@contextlib.contextmanager
def holder(folder: Path, shard: tuple[int, int] = (0, 1)) -> Iterator[int]:
    """A process that holds the folder's lock until it is killed."""
    ready = folder.with_name(f"ready_{shard[0]}_{shard[1]}")
    ready.unlink(missing_ok=True)

    def hold() -> None:
        with locked(folder, shard):
            ready.touch()
            time.sleep(60)

    with forked(hold) as pid:
        end = time.monotonic() + 20
        while not ready.exists():
            assert time.monotonic() < end
            time.sleep(0.005)
        yield pid


def statuses(bodies: list[Callable[[], None]]) -> list[int]:
    """Exit statuses of processes that are started at the same time."""
    with contextlib.ExitStack() as stack:
        pids = [stack.enter_context(forked(body)) for body in bodies]
        return [os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]) for pid in pids]


def kill(pid: int) -> None:
    os.kill(pid, signal.SIGKILL)
    os.waitpid(pid, 0)


# Runs


@pytest.fixture
def running(tmp_path: Path, forks: Server) -> Iterator[Run]:
    """A run at its first subject."""
    save(tmp_path / "in/a.nii.gz", noise((16, 9, 9)))
    job = forks.start(*JOB, cwd=tmp_path, env={"SLOW": "0.1"})
    job.until(tmp_path / "outputs/manifest.csv")
    yield job
    for pid in job.orphans():
        os.kill(pid, signal.SIGKILL)


def test_a_second_run_in_the_folder_is_refused_and_the_first_unharmed(
    running: Run, tmp_path: Path, forks: Server
) -> None:
    """Status 2 and one message that names the other run; also for torchrun's processes."""
    os.kill(running.pids[0], signal.SIGSTOP)
    for ranks, job in [(ranks, forks.start(*JOB, cwd=tmp_path, ranks=ranks)) for ranks in (1, 2)]:
        assert job.wait() == [2] * ranks, job.text
        assert job.text.count("another run is writing to ") == 1, job.text
        assert f"(process {running.pids[0]} on {socket.gethostname()})" in job.text
        assert "Traceback" not in job.text
    os.kill(running.pids[0], signal.SIGCONT)
    assert running.wait() == [0], running.text
    assert {path.name for path in (tmp_path / "outputs").iterdir()} == {
        "a_labels.nii.gz", "labels.ctbl", "labels.txt", "manifest.csv", "report", "report.html", "run.json",
        "statistics.csv", "tensorboard",
    }  # fmt: skip
    np.testing.assert_array_equal(
        read(tmp_path / "outputs/a_labels.nii.gz"), read(tmp_path / "in/a.nii.gz") > 50
    )  # fmt: skip


def test_the_lock_of_a_killed_run_is_free(running: Run, tmp_path: Path, forks: Server) -> None:
    """Its file stays without effect; the next run removes it and half-written files."""
    half = tmp_path / f"outputs/.a_labels.nii.gz.{socket.gethostname()}.{running.pids[0]}.voxquilt"
    half.write_bytes(b"half")
    os.kill(running.pids[0], signal.SIGKILL)
    assert running.wait() == [-signal.SIGKILL]
    assert hidden(tmp_path / "outputs") == {LOCK, half.name}
    job = forks.start(*JOB, cwd=tmp_path)
    assert job.wait() == [0], job.text
    assert hidden(tmp_path / "outputs") == set()


def test_printing_the_status_needs_no_lock(running: Run, tmp_path: Path, forks: Server) -> None:
    """It writes nothing."""
    os.kill(running.pids[0], signal.SIGSTOP)
    job = forks.start(*JOB, "run.status=true", cwd=tmp_path)
    assert job.wait() == [1]
    assert "0 of 1 subjects done" in job.text


# Which runs may share a folder


def test_a_lock_dies_with_its_process_and_leaves_no_file(tmp_path: Path) -> None:
    """While another process holds it it is refused; after SIGKILL it is free."""
    for shard in ((0, 1), (3, 4)):
        with holder(tmp_path / "out", shard) as pid:
            with pytest.raises(ConfigError, match=r"another run is writing to .*out \((process \d+ on|shards of 4)"):
                locked(tmp_path / "out").__enter__()
            assert LOCK in hidden(tmp_path / "out")
            kill(pid)
            with locked(tmp_path / "out"):
                assert (tmp_path / "out" / LOCK).read_text() == f"process {os.getpid()} on {socket.gethostname()}\n"
        assert hidden(tmp_path / "out") - {".voxquilt_3_of_4.lock"} == set()


def test_shards_of_one_count_share_a_folder(tmp_path: Path) -> None:
    """They may come and go in any order; the last one removes the lock file."""
    out = tmp_path / "out"
    with locked(out, (0, 3)):
        with locked(out, (1, 3)), locked(out, (2, 3)):
            assert hidden(out) == {LOCK, *(f".voxquilt_{index}_of_3.lock" for index in range(3))}
        assert hidden(out) == {LOCK, ".voxquilt_0_of_3.lock"}
        with locked(out, (2, 3)):
            assert (out / LOCK).read_text() == "shards of 3\n"
    assert hidden(out) == set()
    with locked(out, (0, 2)):
        assert (out / LOCK).read_text() == "shards of 2\n"


def test_a_shard_beside_an_unsharded_run_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """After the time that another shard may take to begin or to end."""
    monkeypatch.setattr(voxquilt.prediction.output_lock, "_PATIENCE", 0.3)
    with holder(tmp_path / "out") as pid:
        began = time.monotonic()
        with pytest.raises(ConfigError, match=rf"\(process {pid} on "):
            locked(tmp_path / "out", (0, 2)).__enter__()
        assert 0.3 < time.monotonic() - began < 2


def test_the_first_shard_may_end_first(tmp_path: Path) -> None:
    """The lock of the others stays valid."""
    first, second = locked(tmp_path, (0, 2)), locked(tmp_path, (1, 2))
    first.__enter__()
    second.__enter__()
    first.__exit__(None, None, None)
    with pytest.raises(ConfigError, match="shards of 2"):
        locked(tmp_path).__enter__()
    second.__exit__(None, None, None)
    assert hidden(tmp_path) == set()


@pytest.mark.parametrize(
    ("shard", "said"), [((0, 3), "shards of 2"), ((0, 1), "shards of 2"), ((1, 2), r"process \d+ on")]
)
def test_only_other_shards_of_the_same_count_may_join_a_shard(
    shard: tuple[int, int], said: str, tmp_path: Path
) -> None:
    """Another count, an unsharded run and the same shard again are refused, without harm to the first."""
    with holder(tmp_path / "out", (1, 2)):
        with pytest.raises(ConfigError, match=said):
            locked(tmp_path / "out", shard).__enter__()
        with locked(tmp_path / "out", (0, 2)):
            pass
        with pytest.raises(ConfigError, match=said):
            locked(tmp_path / "out", shard).__enter__()


def test_simultaneous_shards_never_refuse_each_other(tmp_path: Path) -> None:
    """Eight processes, many times, each with its lock for a moment; then no file is left."""

    def shard(index: int) -> Callable[[], None]:
        def body() -> None:
            for _ in range(6):
                with locked(tmp_path / "out", (index, 8)):
                    time.sleep(0.001 * (index % 3))

        return body

    for _ in range(8):
        assert statuses([shard(index) for index in range(8)]) == [0] * 8
        assert hidden(tmp_path / "out") == set()


def test_of_many_simultaneous_runs_only_one_holds_the_folder(tmp_path: Path) -> None:
    """Each notes when it begins and ends; no two overlap."""
    notes = tmp_path / "notes"

    def body() -> None:
        with locked(tmp_path / "out"):
            for word in (b"in ", b"out "):
                with open(notes, "ab", buffering=0) as file:
                    file.write(word)
                time.sleep(0.01)

    for _ in range(10):
        found = statuses([body] * 6)
        assert set(found) <= {0, 2}
        assert 0 in found
    words = notes.read_text().split()
    assert words == ["in", "out"] * (len(words) // 2)
    assert hidden(tmp_path / "out") == set()


@pytest.mark.parametrize("shard", [(0, 1), (0, 2)])
def test_a_lock_file_removed_by_its_holder_is_created_again(
    shard: tuple[int, int], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A lock on a file that was unlinked would exclude nobody."""
    locks, calls = voxquilt.prediction.output_lock._try_lock, []

    def late(descriptor: int, kind: int) -> bool:
        calls.append(kind)
        if len(calls) == 1:  # opened, and not yet locked
            (tmp_path / LOCK).unlink()
        return locks(descriptor, kind)

    monkeypatch.setattr(voxquilt.prediction.output_lock, "_try_lock", late)
    with locked(tmp_path, shard):
        assert LOCK in hidden(tmp_path)
    assert hidden(tmp_path) == set()


def test_an_error_of_the_run_passes_through_the_lock_unchanged(tmp_path: Path) -> None:
    """The lock is free afterwards."""

    def broken() -> None:
        with locked(tmp_path):
            raise PermissionError(13, "of the run")

    with pytest.raises(PermissionError, match="of the run"):
        broken()
    assert hidden(tmp_path) == set()


def test_a_folder_that_cannot_be_created_is_an_error_that_names_it(tmp_path: Path) -> None:
    """Here a file is in the way."""
    (tmp_path / "file").touch()
    with pytest.raises(ConfigError, match=r"output_dir=.*file/out cannot be written: Not a directory"):
        locked(tmp_path / "file/out").__enter__()


# Files of dead processes


@pytest.fixture
def dead() -> int:
    """The number of a process that has ended."""
    process = subprocess.Popen(["true"])
    process.wait()
    return process.pid


@pytest.mark.parametrize("host", ["node7", "node7.cluster.example.org"])
def test_beside_other_shards_only_files_of_dead_local_processes_are_removed(
    host: str, dead: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another shard may be writing, here or on another machine, whose processes cannot be queried."""
    monkeypatch.setattr(socket, "gethostname", lambda: host)
    living = os.getppid()
    names = {f".x_labels.nii.gz.{where}.{pid}.voxquilt" for where in (host, "node8") for pid in (dead, living)}
    for name in names:
        (tmp_path / name).touch()
    with locked(tmp_path, (0, 2)):
        assert hidden(tmp_path) & names == names - {f".x_labels.nii.gz.{host}.{dead}.voxquilt"}
    with locked(tmp_path):  # nobody else is there
        assert hidden(tmp_path) == {LOCK}


def test_files_with_similar_names_are_not_removed(dead: int, tmp_path: Path) -> None:
    """They belong to users or other programs."""
    host = socket.gethostname()
    names = {
        f"x_labels.nii.gz.{host}.{dead}.voxquilt", f".x.{host}.{dead}.voxquilt.txt", f".x.{host}.pid.voxquilt",
        ".voxquilt", ".12.voxquilt", f".x.{host}.voxquilt", f".x.{host}.{dead}", "manifest.csv", ".nii.gz",
    }  # fmt: skip
    for name in names:
        (tmp_path / name).touch()
    (tmp_path / f".folder.{host}.{dead}.voxquilt").mkdir()
    (tmp_path / f".huge.{host}.{10**30}.voxquilt").touch()
    for shard in ((0, 2), (0, 1)):
        with locked(tmp_path, shard):
            pass
    assert {path.name for path in tmp_path.iterdir()} == names | {f".folder.{host}.{dead}.voxquilt"}


def test_a_file_that_is_being_written_survives_the_start_of_another_shard(tmp_path: Path) -> None:
    """And appears complete."""
    with locked(tmp_path, (0, 2)), replacing(tmp_path / "x_labels.nii.gz") as file:
        file.write(b"half")
        assert statuses([lambda: locked(tmp_path, (1, 2)).__enter__()]) == [0]
        file.write(b" and half")
    assert (tmp_path / "x_labels.nii.gz").read_bytes() == b"half and half"


def test_a_file_appears_complete_or_not_at_all(tmp_path: Path) -> None:
    """After an error of the disk or the writer, the previous file is there and nothing else."""
    path = tmp_path / "x.nii"
    path.write_bytes(b"before")
    for error, kind in (
        (OSError(28, "No space left on device"), OutputError),
        (KeyboardInterrupt(), KeyboardInterrupt),
    ):
        with pytest.raises(kind), replacing(path) as file:  # noqa: PT012
            file.write(b"after")
            raise error
        assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.nii": b"before"}
    with replacing(path) as file:
        file.write(b"after")
        assert path.read_bytes() == b"before"
    assert {p.name: p.read_bytes() for p in tmp_path.iterdir()} == {"x.nii": b"after"}
