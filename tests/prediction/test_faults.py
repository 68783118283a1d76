r"""Tests survival: after any fault no file is lost or wrong, no process is left, and the same command completes the
run.

Each test does the damage for real. VOXQUILT_FAULTS=<file> collects the rows of the table in docs/reliability.md.
"""

import contextlib
import csv
import json
import os
import random
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import psutil
import pytest
from forks import MARK, ROOT, Run, Server, alive
from synthetic import has_tmpfs, noise, read, save

SUBJECTS = [f"s{n:02}" for n in range(10)]
JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Slow",
    "ckpt_path=null", "data.patch_size=8", "data.patch_overlap=4", "data.batch_size=3",
    "callbacks.writer.tensorboard=false", "callbacks.writer.report=false",  # a tenth of a second for each subject
)  # fmt: skip
OF_RUN = {"labels.ctbl", "labels.txt", "manifest.csv", "run.json", "statistics.csv"}
"""What is in the folder of a run beside its volumes."""
FAULT = "+callbacks.fault._target_=synthetic.Fault"


def label(name: str) -> str:
    return f"{name}_labels.nii.gz"


def rows(out: Path) -> dict[str, dict[str, str]]:
    """Rows of the manifest by subject; each subject has one."""
    with open(out / "manifest.csv", newline="", encoding="utf-8") as file:
        found = list(csv.DictReader(file))
    assert len({row["subject"] for row in found}) == len(found)
    return {row["subject"]: row for row in found}


class Place:
    """A cohort and its expected labels."""

    def __init__(self, folder: Path, names: list[str]) -> None:
        self.folder, self.out = folder, folder / "outputs"
        self.volumes = {
            name: save(folder / f"in/{name}.nii.gz", noise((16, 12, 12), n)) for n, name in enumerate(names)
        }

    def lost(self) -> list[str]:
        """Subjects that are reported done but have no file."""
        return [
            name for name, row in rows(self.out).items()
            if row["status"] in ("done", "skipped") and not (self.out / label(name)).exists()
        ]  # fmt: skip

    def wrong(self) -> list[str]:
        """Files under final names with wrong content."""
        found = []
        for path in self.out.glob("*.nii.gz"):
            try:
                right = np.array_equal(read(path), self.volumes[path.name.removesuffix("_labels.nii.gz")] > 50)
            except Exception:
                right = False
            found += [] if right else [path.name]
        return found

    def check(self, fault: str, job: Run, statuses: list[int]) -> None:
        """Assert that no file is lost or wrong and no process is left; adds a row to the table."""
        end = time.monotonic() + 10
        while (orphans := job.orphans()) and time.monotonic() < end:
            time.sleep(0.1)
        lost, wrong = self.lost(), self.wrong()
        if os.environ.get("VOXQUILT_FAULTS"):
            with open(os.environ["VOXQUILT_FAULTS"], "a") as file:
                told = [fault, statuses, len(lost), len(wrong), len(orphans), round(job.seconds, 1)]
                file.write(json.dumps(told) + "\n")
        assert (lost, wrong, orphans) == ([], [], []), job.text

    def goes_on(self, forks: Server, *options: str) -> None:
        """Assert that the same command does the rest and repeats nothing."""
        before = {path.name: path.stat().st_mtime_ns for path in self.out.glob("*.nii.gz")}
        known = {name for name, row in rows(self.out).items() if row["status"] in ("done", "skipped")}
        job = forks.start(*JOB, *options, cwd=self.folder, env={"SLOW": "0"})
        assert job.wait() == [0], job.text
        found = rows(self.out)
        assert {name: row["status"] for name, row in found.items()} == {
            name: "skipped" if name in known else "done" for name in self.volumes
        }
        assert {name for name in known if (self.out / label(name)).stat().st_mtime_ns != before[label(name)]} == set()
        assert self.wrong() == []
        assert {path.name for path in self.out.glob("*")} == {*map(label, self.volumes), *OF_RUN}


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Place:
    monkeypatch.setenv("SLOW", "0.02")
    return Place(tmp_path, SUBJECTS)


def fault(action: str, rank: int = 0, batch: int = 12) -> tuple[str, ...]:
    return (
        FAULT,
        f"+callbacks.fault.action={action}",
        f"+callbacks.fault.rank={rank}",
        f"+callbacks.fault.batch={batch}",
    )


@contextlib.contextmanager
def started_by_lightning(place: Place, *options: str) -> Iterator[tuple[subprocess.Popen[bytes], Run]]:
    """A real `python predict.py trainer.devices=2`, whose second process Lightning starts."""
    mark, log = "popen" + place.folder.name, place.folder / "log.txt"
    path = os.environ | {"PYTHONPATH": str(ROOT / "tests"), MARK: mark}
    command = [sys.executable, str(ROOT / "predict.py"), *JOB, "trainer.devices=2", "trainer.accelerator=cpu", *options]
    with (
        open(log, "wb") as file,
        subprocess.Popen(
            command, cwd=place.folder, env=path, stdout=file, stderr=file, start_new_session=True
        ) as process,
    ):
        yield process, Run(None, [process.pid], [log], mark)  # type: ignore[arg-type]
        for pid in alive(mark):
            os.kill(pid, signal.SIGKILL)


def child_of(process: "subprocess.Popen[bytes]") -> int:
    (child,) = [c.pid for c in psutil.Process(process.pid).children() if "predict.py" in " ".join(c.cmdline())]
    return child


def ended(process: "subprocess.Popen[bytes]", job: Run) -> int:
    """Wait for the process to end; returns its status and notes the seconds on the job."""
    began = time.monotonic()
    status = process.wait(40)
    job.seconds = time.monotonic() - began
    return status


# A process fails


@pytest.mark.parametrize(
    ("name", "options", "ranks"),
    [
        ("a callback raises (one process)", fault("raise"), 1),
        ("rank 0 raises", fault("raise", 0), 2),
        ("rank 1 raises late", fault("raise", 1, 17), 2),
        ("rank 1 exits", fault("exit", 1), 2),
        ("rank 1 is killed (SIGKILL)", fault("kill", 1), 2),
        ("rank 0 is killed (SIGKILL)", fault("kill", 0), 2),
        ("rank 1 is killed (SIGKILL), slabs", (*fault("kill", 1), "run.distribute=slab"), 2),
        ("rank 0 is killed (SIGKILL), slabs", (*fault("kill", 0), "run.distribute=slab"), 2),
        ("rank 1 of 3 is killed (SIGKILL), slabs", (*fault("kill", 1, 6), "run.distribute=slab"), 3),
        ("rank 2 of 3 is killed (SIGKILL), slabs", (*fault("kill", 2, 6), "run.distribute=slab"), 3),
        ("rank 2 of 3 raises, slabs", (*fault("raise", 2, 6), "run.distribute=slab"), 3),
        ("the writer thread dies (one process)", fault("writer"), 1),
        ("the writer thread of rank 1 dies", fault("writer", 1), 2),
        ("the loader dies (one process)", fault("loader"), 1),
        ("the loader of rank 1 dies", fault("loader", 1), 2),
        ("the loader of rank 1 dies, slabs", (*fault("loader", 1), "run.distribute=slab"), 2),
    ],
)
def test_a_fault_in_one_process_ends_the_run_in_all(
    name: str, options: tuple[str, ...], ranks: int, place: Place, forks: Server
) -> None:
    """Within seconds, with a status other than 0; finished subjects stay, and the same command does the rest."""
    job = forks.start(*JOB, *options, cwd=place.folder, ranks=ranks)
    statuses = job.wait()
    assert 0 not in statuses, job.text
    assert job.seconds < 20
    place.check(name, job, statuses)
    assert len(rows(place.out)) < len(SUBJECTS)
    place.goes_on(forks)


@pytest.mark.parametrize("ranks", [1, 2])
def test_stop_iteration_in_user_code_is_not_a_silent_end_of_the_run(ranks: int, place: Place, forks: Server) -> None:
    """Lightning takes it for the end of the data: subjects not predicted get failed rows and status 1."""
    job = forks.start(*JOB, *fault("stop", ranks - 1), cwd=place.folder, ranks=ranks)
    statuses = job.wait()
    assert statuses == [1] * ranks, job.text
    place.check(f"StopIteration from user code ({ranks} process{'es' * (ranks > 1)})", job, statuses)
    failed = [row for row in rows(place.out).values() if row["status"] == "failed"]
    assert failed
    assert all("the run ended before all of its patches had come" in row["error"] for row in failed)
    assert len(rows(place.out)) == len(SUBJECTS)
    place.goes_on(forks)


@pytest.mark.parametrize(
    ("name", "options", "killed"),
    [
        ("Lightning's ddp: rank 0 raises", fault("raise", 0), None),
        ("Lightning's ddp: rank 1 raises late", fault("raise", 1, 17), None),
        ("Lightning's ddp: rank 1 is killed (SIGKILL)", (), "child"),
        ("Lightning's ddp: rank 0 is killed (SIGKILL)", (), "parent"),
    ],
)
def test_a_fault_in_one_of_lightnings_processes_ends_the_command(
    name: str, options: tuple[str, ...], killed: str | None, place: Place, forks: Server
) -> None:
    """Rank 0 returns a status other than 0, and no process goes on alone."""
    with started_by_lightning(place, *options) as (process, job):
        if killed:
            job.until(place.out / "manifest.csv", "done")
            os.kill(child_of(process) if killed == "child" else process.pid, signal.SIGKILL)
        else:
            job.until(place.folder / "log.txt", "a fault of the test")
        status = ended(process, job)
        assert status == (-9 if killed == "parent" else 1), job.text
        place.check(name, job, [status])
    place.goes_on(forks)


# Signals


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
@pytest.mark.parametrize(("who", "ranks"), [("the only process", 1), ("rank 0", 2), ("rank 1", 2), ("all ranks", 2)])
@pytest.mark.parametrize("distribute", ["subject", "slab"])
def test_a_signal_ends_the_run_in_order(
    number: signal.Signals, who: str, ranks: int, distribute: str, place: Place, forks: Server
) -> None:
    """Whichever process gets it, all end with 128 + its number; finished subjects have files and rows."""
    if ranks == 1 and distribute == "slab":
        pytest.skip("one process has no slabs")
    job = forks.start(*JOB, f"run.distribute={distribute}", cwd=place.folder, ranks=ranks)
    job.until(place.out / "manifest.csv", "done")
    job.began = time.monotonic()
    for pid in {"the only process": job.pids, "rank 0": job.pids[:1], "rank 1": job.pids[1:], "all ranks": job.pids}[
        who
    ]:
        os.kill(pid, number)
    statuses = job.wait()
    assert statuses == [128 + number] * ranks, job.text
    assert job.seconds < 5
    place.check(f"{number.name} to {who}{', slabs' * (distribute == 'slab')}", job, statuses)
    assert 0 < len(rows(place.out)) < len(SUBJECTS)
    assert all(row["status"] == "done" for row in rows(place.out).values())
    told = json.loads((place.out / "run.json").read_text())
    assert (told["status"], told["exit_status"], told["reason"]) == ("stopped", 128 + number, number.name)
    assert "Traceback" not in job.text
    place.goes_on(forks)


@pytest.mark.parametrize("who", ["child", "group"])
def test_sigterm_ends_processes_of_lightning_with_status_143(who: str, place: Place, forks: Server) -> None:
    """Sent to the child alone, or to the whole group as by docker stop or SLURM."""
    with started_by_lightning(place) as (process, job):
        job.until(place.out / "manifest.csv", "done")
        if who == "child":
            os.kill(child_of(process), signal.SIGTERM)
        else:
            os.killpg(process.pid, signal.SIGTERM)
        status = ended(process, job)
        assert status == 143, job.text
        place.check(f"Lightning's ddp: SIGTERM to the {who}", job, [status])
    place.goes_on(forks)


def test_the_parent_of_spawned_processes_forwards_sigterm(place: Place, forks: Server) -> None:
    """It is not a rank itself; the status is 143."""
    with started_by_lightning(place, "trainer.strategy=ddp_spawn") as (process, job):
        job.until(place.out / "manifest.csv", "done")
        os.kill(process.pid, signal.SIGTERM)
        status = ended(process, job)
        assert status == 143, job.text
        place.check("ddp_spawn: SIGTERM to the parent", job, [status])
    place.goes_on(forks)


def test_a_killed_spawned_process_ends_the_run(place: Place, forks: Server) -> None:
    """torch ends the others, and the parent returns 1."""
    with started_by_lightning(place, "trainer.strategy=ddp_spawn") as (process, job):
        job.until(place.out / "manifest.csv", "done")
        spawned = [c for c in psutil.Process(process.pid).children() if "spawn_main" in " ".join(c.cmdline())]
        spawned[-1].kill()
        status = ended(process, job)
        assert status == 1, job.text
        place.check("ddp_spawn: a process is killed (SIGKILL)", job, [status])
    place.goes_on(forks)


def test_a_run_killed_at_any_moment_is_completed_by_the_next(place: Place, forks: Server) -> None:
    r"""SIGKILL at 20 random moments, each followed by the same command; then nothing is missing, wrong or left
    over.

    Runs that end before they are killed do not count. Finished subjects are then predicted again, so that files are
    also being replaced when the next run is killed.
    """
    random.seed(0)
    killed, again = 0, ()
    while killed < 20:
        # All at once, as when a machine goes down; another test kills a single process.
        job = forks.start(*JOB, *again, cwd=place.folder, ranks=1 + killed % 2)
        time.sleep(random.uniform(0.2, 1.2))
        for pid in job.pids:
            os.kill(pid, signal.SIGKILL)
        statuses = job.wait()
        killed += set(statuses) == {-signal.SIGKILL}
        again = ("run.resume=false",) if 0 in statuses else ()
        if (place.out / "manifest.csv").exists():
            assert (place.lost(), place.wrong()) == ([], [])
    place.check("SIGKILL at 20 random moments, then the same command", job, statuses)
    place.goes_on(forks)


# Disks


def test_a_full_disk_fails_only_the_subjects_that_do_not_fit(place: Place, forks: Server) -> None:
    """Their rows give the reason and no partial file is left; with room, the same command does the rest."""
    if not has_tmpfs(place.out, "64k"):
        pytest.skip("may not mount a file system")
    try:
        for n in range(4):
            name = f"t{n}"
            place.volumes[name] = save(place.folder / f"in/{name}.nii.gz", noise((40, 40, 40), n))
        job = forks.start(*JOB, cwd=place.folder, env={"SLOW": "0"})
        statuses = job.wait()
        assert statuses == [1], job.text
        place.check("the disk is full", job, statuses)
        failed = {name: row["error"] for name, row in rows(place.out).items() if row["status"] == "failed"}
        assert failed
        assert all("No space left on device" in error for error in failed.values())
        assert [path.name for path in place.out.iterdir() if path.name.startswith(".")] == []
        subprocess.run(["mount", "-o", "remount,size=8m", str(place.out)], check=True)
        place.goes_on(forks)
    finally:
        subprocess.run(["umount", str(place.out)], check=True)


def test_a_folder_that_becomes_read_only_loses_no_finished_file(place: Place, forks: Server) -> None:
    """The rest fails with the reason, or the run ends since the manifest cannot be written; later it is completed."""
    if not has_tmpfs(place.out, "8m"):
        pytest.skip("may not mount a file system")
    try:
        job = forks.start(*JOB, cwd=place.folder)
        job.until(place.out / "manifest.csv", "done")
        # The open manifest prevents remounting, so the folder is bind-mounted over itself, read-only.
        frozen = subprocess.run(["mount", "--bind", "-o", "ro", str(place.out), str(place.out)], capture_output=True)
        assert frozen.returncode == 0, frozen.stderr
        statuses = job.wait()
        assert statuses == [1], job.text
        place.check("the output folder becomes read-only", job, statuses)
        subprocess.run(["umount", str(place.out)], check=True)
        place.goes_on(forks)
    finally:
        subprocess.run(["umount", "--recursive", str(place.out)], check=True)


# Subjects


def test_broken_files_fail_alone_among_good_ones(place: Place, forks: Server) -> None:
    """Truncated, empty, not NIfTI, and one for which the network gives NaN: one row each with the reason."""
    whole = (place.folder / "in/s00.nii.gz").read_bytes()
    broken = {"cut": whole[:-200], "empty": b"", "text": b"hello\n" * 100, "gz": whole[:30] + b"x" * 500}
    for name, content in broken.items():
        (place.folder / f"in/{name}.nii.gz").write_bytes(content)
    x = noise((16, 12, 12)) % 60
    x[0, 0, 0] = 88
    save(place.folder / "in/nan.nii.gz", x)
    for name in SUBJECTS:
        place.volumes[name] = save(place.folder / f"in/{name}.nii.gz", place.volumes[name] % 60)
    job = forks.start(*JOB, "model.net._target_=synthetic.Touchy", cwd=place.folder)
    statuses = job.wait()
    assert statuses == [1], job.text
    place.check("truncated, empty and other files among good ones; NaN from the network", job, statuses)
    found = rows(place.out)
    assert {name for name, row in found.items() if row["status"] == "done"} == set(SUBJECTS)
    assert {name for name, row in found.items() if row["status"] == "failed"} == {*broken, "nan"}
    assert all(name in found[name]["error"] for name in broken)
    assert "NaN or infinite" in found["nan"]["error"]


@pytest.mark.parametrize(
    ("options", "status", "said"),
    [
        (("+model.net.most=1",), 0, "batches of 1"),
        (("+model.net.most=2",), 0, "batches of 2"),
        (("+model.net.most=3", "+model.net.times=3"), 0, "sums are kept on the host"),
        (("+model.net.most=0",), 1, "out of memory"),
    ],
)  # fmt: skip
def test_out_of_memory_on_the_device_fails_a_subject_last(
    options: tuple[str, ...], status: int, said: str, place: Place, forks: Server
) -> None:
    """First batches become smaller, then sums move to the host."""
    job = forks.start(*JOB, "model.net._target_=synthetic.Cramped", *options, cwd=place.folder)
    statuses = job.wait()
    assert statuses == [status], job.text
    place.check(f"out of memory on the device, simulated ({said})", job, statuses)
    assert said in job.text
    wanted = "failed" if status else "done"
    assert {row["status"] for row in rows(place.out).values()} == {wanted}
    assert len(rows(place.out)) == len(SUBJECTS)
