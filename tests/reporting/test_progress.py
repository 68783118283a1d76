"""Tests progress reports: counts are true, bars appear on terminals only, and nothing is shown twice."""

import csv
import io
import json
import os
import pty
import re
import select
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from forks import Server, checked
from PIL import Image
from synthetic import ROOT, noise, save
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from voxquilt.reporting.manifest import Row
from voxquilt.reporting.progress import JsonProgress, PlainProgress, RichProgress, make_display
from voxquilt.reporting.progress_counts import RunProgress

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Slow", "ckpt_path=null", "data.patch_size=8",
    "data.patch_overlap=4", "data.batch_size=2",
)  # fmt: skip


def news(rank: int, predicted: int, **of: int) -> dict[str, object]:
    return {"rank": rank, "predicted": predicted, "of": of}


def done(subject: str, patches: int, skipped: int = 0) -> Row:
    return Row(subject, "done", patches=patches, skipped=skipped)


def test_progress_is_complete_only_when_the_last_file_is_written() -> None:
    """The last patch of a subject counts together with its row."""
    tally = RunProgress({"a": 4, "b": 6})
    assert (tally.total, tally.subjects, tally.patches) == (10, 2, 0)
    tally.news(news(0, 4, a=4))
    assert (tally.patches, tally.predicted, tally.current) == (3, 4, "a")
    tally.row(done("a", 4))
    assert (tally.patches, tally.done) == (4, 1)
    tally.news(news(0, 10, a=4, b=6))  # a's late news counts no more
    assert tally.patches == 9
    tally.row(done("b", 6))
    assert (tally.patches, tally.done, tally.failed) == (10, 2, 0)


def test_a_failed_subject_counts_as_failed_and_completes_its_patches() -> None:
    """The total does not change."""
    tally = RunProgress({"a": 4, "b": 6})
    tally.news(news(0, 3, b=3))
    tally.row(Row("b", "failed"))
    assert (tally.patches, tally.total, tally.done, tally.failed) == (6, 10, 0, 1)


def test_patches_of_processes_that_share_a_volume_add_up() -> None:
    """Each reports its own patches; the latest total of each rank counts."""
    tally = RunProgress({"a": 10}, 2)
    tally.news(news(0, 3, a=3))
    tally.news(news(1, 4, a=4))
    tally.news(news(1, 5, a=5))
    assert (tally.patches, tally.predicted) == (8, 8)


def test_time_left_is_estimated_from_predicted_patches_only() -> None:
    """Patches skipped by data.skip take no time, before or after."""
    tally = RunProgress({"a": 100, "b": 100})
    began = tally._began
    assert tally.left(began + 1) is None
    tally.news(news(0, 20, a=20))
    tally.row(done("a", 20, 80))
    # 20 patches in 10 s; a fifth of b's 100 will be predicted.
    assert tally.rate(began + 10) == pytest.approx(2.0)
    assert tally.left(began + 10) == pytest.approx(10.0)


def test_a_progress_display_is_chosen_by_name_or_by_the_terminal() -> None:
    """Without a terminal it prints lines."""
    kinds = {"auto": PlainProgress, "plain": PlainProgress, "rich": RichProgress, "json": JsonProgress}
    assert {name: type(make_display(name)) for name in kinds} == kinds


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Four subjects, one of which cannot be read."""
    for n in range(3):
        save(tmp_path / f"in/s{n}.nii.gz", noise((16, 12, 12 + 4 * n), n))
    (tmp_path / "in/bad.nii.gz").write_bytes(b"no image")
    return tmp_path


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{ROOT}/src:{ROOT}/tests", "COLUMNS": "110", "TERM": "xterm"} | more


def on_a_terminal(*arguments: str, cwd: Path) -> tuple[int, str]:
    """The output of a run on a terminal."""
    master, slave = pty.openpty()
    command = [sys.executable, str(ROOT / "predict.py"), *arguments]
    process = subprocess.Popen(command, cwd=cwd, stdin=slave, stdout=slave, stderr=slave, env=environment(SLOW="0.1"))
    os.close(slave)
    shown = b""
    while process.poll() is None or select.select([master], [], [], 0)[0]:
        try:
            if select.select([master], [], [], 0.1)[0]:
                shown += os.read(master, 2**16)
        except OSError:  # its other end is closed
            break
    os.close(master)
    return process.wait(), shown.decode(errors="replace")


def test_a_terminal_shows_bars_between_unbroken_lines(place: Path) -> None:
    """Both bars end at 100 %, the failed subject is reported, and each subject has a line of its own."""
    status, shown = on_a_terminal(*JOB, cwd=place)
    assert status == 1, shown
    plain = re.sub(r"\x1b\[[0-9;?]*[a-zA-Z]", "", shown)
    assert re.search(r"subjects [━╺╸ ]+ +100% 4/4 +1 failed", plain), plain
    assert re.search(r"patches [━╺╸ ]+ +100% (\d+)/\1 ", plain), plain
    assert "patches/s" in plain or "/s, " in plain
    for n in range(3):
        lines = [line.strip() for line in re.split(r"[\r\n]+", plain) if f"s{n}: done: " in line]
        assert len(lines) == 1
        assert re.fullmatch(rf".*s{n}: done: \d+ patches, \d+\.\d s: s{n}_labels\.nii\.gz", lines[0]), lines


def test_without_a_terminal_there_are_lines_and_no_bars(place: Path, forks: Server) -> None:
    """One per subject, without control characters."""
    job = forks.start(*JOB, cwd=place)
    assert job.wait() == [1]
    assert "\x1b" not in job.text
    assert "━━━━ " not in job.text.partition("voxquilt\n")[0]
    assert job.text.count(": done: ") == 3
    assert job.text.count("bad: failed: ") == 1


@pytest.mark.parametrize("ranks", [1, 2])
def test_json_progress_is_one_object_per_line_and_nothing_else(ranks: int, place: Path) -> None:
    """For all processes together: a start, each subject once, growing progress, and an end with the exit status."""
    devices = ("trainer=cpu", f"trainer.devices={ranks}", *(["trainer.strategy=ddp"] if ranks > 1 else []))
    command = [sys.executable, str(ROOT / "predict.py"), *JOB, *devices, "run.log=json"]
    done = subprocess.run(
        command, cwd=place, env=environment(SLOW="0.2"), capture_output=True, text=True, timeout=180, check=False
    )
    assert done.returncode == 1, done.stderr
    events = [json.loads(line) for line in done.stdout.splitlines()]
    assert [events[0]["event"], events[-1]["event"]] == ["start", "end"]
    subjects = [one for one in events if one["event"] == "subject"]
    assert sorted((one["subject"], one["status"]) for one in subjects) == [
        ("bad", "failed"), *((f"s{n}", "done") for n in range(3)),
    ]  # fmt: skip
    moved = [one["patches"] for one in events if one["event"] == "progress"]
    assert moved
    assert moved == sorted(moved)
    total = sum(one["patches"] for one in subjects)
    end = {key: events[-1][key] for key in ("done", "failed", "subjects", "patches", "patches_total", "exit_status")}
    assert end == {"done": 3, "failed": 1, "subjects": 4, "patches": total, "patches_total": total, "exit_status": 1}
    assert (events[0]["patches_total"], events[0]["processes"]) == (total, ranks)


def test_several_processes_show_nothing_twice(place: Path, forks: Server) -> None:
    """Only rank 0 prints."""
    job = forks.start(*JOB, cwd=place, ranks=2)
    assert checked(job.wait()) == 1
    for n in range(3):
        assert job.text.count(f"s{n}: done: ") == 1
    assert job.text.count("bad: failed: ") == 1


def boards(place: Path) -> list[EventAccumulator]:
    """TensorBoard contents of each run, in order."""
    found = [EventAccumulator(str(folder)) for folder in sorted((place / "outputs/tensorboard").iterdir())]
    for board in found:
        board.Reload()
    return found


def test_tensorboard_has_each_subjects_numbers_and_picture(place: Path, forks: Server) -> None:
    """Steps are subject numbers; volumes are named by class and agree with the manifest."""
    job = forks.start(*JOB, "stitch.class_names=[background,bright]", cwd=place)
    assert job.wait() == [1], job.text
    (board,) = boards(place)
    scalars, pictures = board.Tags()["scalars"], board.Tags()["images"]
    assert sorted(pictures) == [f"overlay/s{n}" for n in range(3)]
    # bad, s0, s1, s2 are subjects 0 to 3.
    volumes = {one.step: one.value for one in board.Scalars("volume_ml/bright")}
    expected = {n + 1: float((noise((16, 12, 12 + 4 * n), n) > 50).sum()) / 1000 for n in range(3)}
    assert volumes == pytest.approx(expected)
    assert "volume_ml/background" not in scalars
    assert {one.step: one.value for one in board.Scalars("subject/failed")} == {0: 1, 1: 0, 2: 0, 3: 0}
    with open(place / "outputs/manifest.csv", newline="", encoding="utf-8") as file:
        rows = {n: row for n, row in enumerate(sorted(csv.DictReader(file), key=lambda row: row["subject"]))}
    seconds = {one.step: one.value for one in board.Scalars("subject/seconds")}
    assert seconds == pytest.approx({n: float(row["seconds"]) for n, row in rows.items()}, abs=1e-3)
    pace = {one.step: one.value for one in board.Scalars("subject/patches_per_second")}
    assert pace == pytest.approx({n: int(rows[n]["patches"]) / seconds[n] for n in (1, 2, 3)}, rel=1e-3)
    outcome = json.loads((place / "outputs/run.json").read_text())
    for name in ("patches_per_second", "voxels_per_second", "seconds", "done", "failed"):
        assert board.Scalars(f"run/{name}")[0].value == pytest.approx(outcome[name])
    peak = board.Scalars("run/peak_memory_mib/rank_0")[0].value
    assert peak == pytest.approx(outcome["ranks"][0]["peak_memory_mib"])
    assert all(0.3 * peak < one.value <= 1.01 * peak for one in board.Scalars("memory_mib/rank_0"))


def test_tensorboard_shows_the_same_picture_as_the_overlay_file(place: Path, forks: Server) -> None:
    """With callbacks.writer.overlay it is the file itself; a run without work leaves no event file."""
    for overlay in ("false", "true"):
        job = forks.start(*JOB, "data.inputs=in/s0.nii.gz", f"callbacks.writer.overlay={overlay}",
                          "run.overwrite=true", cwd=place)  # fmt: skip
        assert job.wait() == [0], job.text
    job = forks.start(*JOB, "data.inputs=in/s0.nii.gz", "callbacks.writer.overlay=true", cwd=place)
    assert job.wait() == [0], job.text
    shown = [board.Images("overlay/s0")[0].encoded_image_string for board in boards(place)]
    assert len(shown) == 2
    with Image.open(place / "outputs/s0_overlay.png") as written:
        for picture in shown:
            assert np.array_equal(np.asarray(Image.open(io.BytesIO(picture))), np.asarray(written))


def test_a_run_works_without_tensorboard(place: Path, forks: Server) -> None:
    """If it is not wanted, or if its file cannot be written, which is reported once."""
    (place / "outputs").mkdir()
    (place / "outputs/tensorboard").touch()
    job = forks.start(*JOB, cwd=place)
    assert job.wait() == [1], job.text
    assert job.text.count("nothing more is written for TensorBoard: ") == 1
    assert job.text.count(": done: ") == 3
    job = forks.start(*JOB, "callbacks.writer.tensorboard=false", "output_dir=without", cwd=place)
    assert job.wait() == [1], job.text
    assert not (place / "without/tensorboard").exists()
