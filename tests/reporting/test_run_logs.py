"""Tests loggers of real runs: each gets what TensorBoard gets, of rank 0 alone, and none can fail a run."""

import csv
import io
import json
import pickle
import posixpath
import re
import subprocess
import threading
from pathlib import Path
from typing import Any

import logged_runs
import numpy as np
import pytest
import torch
import yaml
from forks import Server, checked
from hypothesis import given
from hypothesis import strategies as st
from logged_runs import save_labelled
from PIL import Image
from synthetic import has_tmpfs
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator
from tensorboard.summary.writer.record_writer import RecordWriter

from voxquilt.cli.exit_status import ExitStatus
from voxquilt.cli.loggers import build_loggers, check_loggers
from voxquilt.errors import ConfigError
from voxquilt.prediction.run_events import _statistics
from voxquilt.prediction.tensorboard import EventFile
from voxquilt.reporting.database_turns import turn
from voxquilt.reporting.manifest import Row
from voxquilt.reporting.run_logs import _mlflow_name, loggable

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=class_networks.Bands", "ckpt_path=null",
    "data.patch_size=8", "trainer=cpu", "output_dir=out", "stitch.class_names=[nothing,a,b c,d]",
    "callbacks.writer.report=false",
)  # fmt: skip
TRAIN = (*logged_runs.TRAIN, "trainer.max_epochs=2")


def mine(name: str, path: str = "mine.jsonl") -> tuple[str, ...]:
    """The arguments that add a logger of the tests' own."""
    return f"+logger.{name.lower()}._target_=loggers.{name}", f"+logger.{name.lower()}.path={path}"


@pytest.fixture
def place(tmp_path: Path) -> Path:
    return save_labelled(tmp_path)


def run(forks: Server, place: Path, *arguments: str, ranks: int = 1, script: str = "predict", status: int = 0) -> str:
    job = forks.start(*arguments, cwd=place, ranks=ranks, script=script)
    assert checked(job.wait(120)) == status, job.text
    assert "Traceback" not in job.text
    return job.text


def test_a_full_disk_ends_a_training_with_one_message_and_keeps_its_last_checkpoint(forks: Server, place: Path) -> None:
    """Neither TensorBoard's thread nor the checkpoint that does not fit shows a traceback; with room, it goes on."""
    if not has_tmpfs(place / "outputs", "4m"):
        pytest.skip("may not mount a file system")
    try:
        fill = ("+callbacks.fault._target_=synthetic.FillDisk", f"+callbacks.fault.folder={place}/outputs")
        text = run(forks, place, *TRAIN, "trainer.max_epochs=3", *fill, script="train", status=1)
        last = place / "outputs/checkpoints/last.ckpt"
        told = [line for line in text.splitlines() if line.startswith("voxquilt:")]
        assert re.fullmatch(r"voxquilt: \S+\.ckpt: writing failed: No space left on device\. No partial .*", told[0])
        assert told[1:] == [f"voxquilt: stopped; the same command with ckpt_path={last} goes on."]
        assert text.count("Errno 28") <= 1  # of TensorBoard, if it was writing then
        assert not [path for path in last.parent.iterdir() if path.name.startswith(".")]
        assert torch.load(last, weights_only=True)["epoch"] == 0
        (place / "outputs/fill").unlink()
        run(forks, place, *TRAIN, "trainer.max_epochs=3", f"ckpt_path={last}", script="train")
        assert torch.load(last, weights_only=True)["epoch"] == 2
    finally:
        subprocess.run(["umount", str(place / "outputs")], check=True)


def test_errors_of_tensorboards_thread_are_one_warning(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capfd: pytest.CaptureFixture[str], caplog: pytest.LogCaptureFixture
) -> None:
    """Also where it fails at the last numbers; errors of other threads are shown as ever."""

    def fail(*_: object) -> None:
        raise OSError(28, "No space left on device")

    shown: list[object] = []
    monkeypatch.setattr(threading, "excepthook", lambda args: shown.append(args.exc_value))
    events = EventFile(tmp_path)
    events.numbers({"a": 1.0}, 0)
    monkeypatch.setattr(RecordWriter, "write", fail)
    events.numbers({"a": 2.0}, 1)
    events.end([])
    assert caplog.messages == ["nothing more is written for TensorBoard: OSError: [Errno 28] No space left on device"]
    assert (shown, capfd.readouterr().err) == ([], "")
    thread = threading.Thread(target=fail)
    thread.start()
    thread.join()
    assert [str(error) for error in shown] == ["[Errno 28] No space left on device"]


def test_one_process_at_a_time_opens_a_database(tmp_path: Path) -> None:
    """Another waits until the first has left; databases of other folders, and servers, do not."""
    entered = threading.Event()

    def enter() -> None:
        with turn(f"sqlite:///{tmp_path}/mlflow.db"):
            entered.set()

    with turn(f"sqlite:///{tmp_path}/mlflow.db"):
        other = threading.Thread(target=enter, daemon=True)
        other.start()
        for uri in ("http://127.0.0.1:5000", f"sqlite:///{tmp_path.parent}/mlflow.db", "sqlite:////nowhere/a.db", None):
            with turn(uri):
                pass
        assert not entered.wait(0.3)
    assert entered.wait(10)
    other.join()
    assert list(tmp_path.iterdir()) == []


def csv_rows(path: Path) -> list[dict[str, float]]:
    """The rows of a CSVLogger's file, without empty cells."""
    with open(path, newline="", encoding="utf-8") as file:
        return [{name: float(cell) for name, cell in row.items() if cell} for row in csv.DictReader(file)]


def recorded(path: Path, kind: str) -> list[tuple[int, Any]]:
    entries = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
    return [(step, value) for name, step, value in entries if name == kind]


def events(folder: Path) -> EventAccumulator:
    (file,) = folder.rglob("events.out.tfevents.*")
    found = EventAccumulator(str(file), size_guidance={"images": 0, "scalars": 0})
    return found.Reload()


def test_every_logger_gets_the_numbers_and_pictures_that_tensorboard_gets(place: Path, forks: Server) -> None:
    """Also numbers of each label, which are those of statistics.csv; and the settings, once."""
    (place / "in/bad.nii").write_bytes(b"no image")
    run(forks, place, *JOB, "logger=csv", *mine("Recording"), status=1)
    board = events(place / "out/tensorboard")
    rows, numbers = csv_rows(place / "out/csv/version_0/metrics.csv"), recorded(place / "mine.jsonl", "numbers")
    assert [row.pop("step") for row in rows] == [step for step, _ in numbers] == [0, 1, 2, 3, 0]
    assert rows == [values for _, values in numbers]
    for tag in board.Tags()["scalars"]:
        wanted = [(one.step, pytest.approx(one.value, rel=1e-6)) for one in board.Scalars(tag)]
        assert [(step, values[tag]) for step, values in numbers if tag in values] == wanted
    more = {tag for _, values in numbers for tag in values} - set(board.Tags()["scalars"])
    assert more
    assert all(tag.startswith("statistics/") for tag in more)
    with open(place / "out/statistics.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            logged = numbers[int(row["subject"][1]) + 1][1]
            for column in ("voxels", "components", "touches_border", "mean", "sd"):
                name = f"statistics/{column}/{row['name'] or row['label']}"
                assert logged.get(name) == (float(row[column]) if row[column] else None)
    pictures = recorded(place / "mine.jsonl", "picture")
    assert [step for step, _ in pictures] == [1, 2, 3]
    for n, (_, picture) in enumerate(pictures):
        (shown,) = board.Images(f"overlay/s{n}")
        array = np.asarray(Image.open(io.BytesIO(shown.encoded_image_string)))
        assert picture == {f"overlay/s{n}": int(array.astype(np.int64).sum()), "shape": list(array.shape)}
    ((_, settings),) = recorded(place / "mine.jsonl", "settings")
    assert settings == yaml.safe_load((place / "out/csv/version_0/hparams.yaml").read_text())
    assert (settings["data.patch_size"], settings["output_dir"]) == (8, "out")
    kinds = [json.loads(line)[0] for line in (place / "mine.jsonl").read_text().splitlines()]
    # A run that is killed has logged the subjects that are done.
    assert all(kinds[n + 1] == "saved" for n, kind in enumerate(kinds) if kind == "numbers")
    assert recorded(place / "mine.jsonl", "end") == [(None, "success")]


def test_cells_of_statistics_that_are_empty_are_not_logged() -> None:
    """Such as the components of labels that are noise, which are not counted."""
    cells = {"output": "labels", "label": "1", "name": "liver", "voxels": "7", "components": "", "ct_mean": "2.5"}
    row = Row("a", "done", ("a_labels.nii.gz",), statistics=[cells])
    assert _statistics(row) == {"statistics/voxels/liver": 7, "statistics/ct_mean/liver": 2.5}


def test_labels_of_one_name_are_logged_apart() -> None:
    """Those of a series are still means of its volumes; a mean of two organs would be of none."""
    names, named = ("kidney", "kidney", ""), [("labels", "0"), ("labels", "1"), ("other", "0")]
    rows = [
        {"output": output, "label": str(n), "name": name, "voxels": str(10 * n + int(frame)), "frame": frame}
        for output, frame in named
        for n, name in enumerate(names, 1)
    ]
    wanted = {"kidney 1": 10.5, "kidney 2": 20.5, "3": 30.5}
    row = Row("a", "done", ("a_labels.nii.gz",), statistics=[cells for cells in rows if cells["output"] == "labels"])
    assert _statistics(row) == {f"statistics/voxels/{name}": voxels for name, voxels in wanted.items()}
    row = Row("a", "done", ("a_labels.nii.gz", "a_other_labels.nii.gz"), kinds=("labels", "labels"), statistics=rows)
    found = {f"statistics/voxels/labels/{name}": voxels for name, voxels in wanted.items()}
    assert _statistics(row) == found | {
        f"statistics/voxels/other/{name}": voxels - 0.5 for name, voxels in wanted.items()
    }


def test_a_logger_works_without_tensorboard_and_without_pictures(place: Path, forks: Server) -> None:
    """A logger that takes no pictures has none drawn; one of TensorBoard's own gets them."""
    run(forks, place, *JOB, "logger=[csv,tensorboard]", "callbacks.writer.tensorboard=false")
    board = events(place / "out/tensorboard/version_0")
    assert board.Tags()["images"] == ["overlay/s0", "overlay/s1", "overlay/s2"]
    assert [one.step for one in board.Scalars("volume_ml/b c")] == [0, 1, 2]
    assert len(csv_rows(place / "out/csv/version_0/metrics.csv")) == 4


@pytest.mark.parametrize("distribute", ["subject", "slab"])
def test_only_rank_0_logs(distribute: str, place: Path, forks: Server) -> None:
    """Each subject once, whichever process has predicted it."""
    run(forks, place, *JOB, "logger=csv", *mine("Recording"), f"run.distribute={distribute}", ranks=2)
    numbers = recorded(place / "mine.jsonl", "numbers")
    assert sorted(step for step, values in numbers if "subject/failed" in values) == [0, 1, 2]
    assert [path.name for path in (place / "out/csv").iterdir()] == ["version_0"]


def test_a_run_that_goes_on_and_shards_have_files_of_their_own(place: Path, forks: Server) -> None:
    """Nothing that was logged before is replaced; with nothing to do nothing is logged but settings."""
    for _ in range(2):
        run(forks, place, *JOB, "logger=csv")
    assert {path.name for path in (place / "out/csv").iterdir()} == {"version_0", "version_1"}
    assert len(csv_rows(place / "out/csv/version_0/metrics.csv")) == 4
    assert not (place / "out/csv/version_1/metrics.csv").exists()
    for n in range(2):
        run(forks, place, *JOB, "logger=csv", "output_dir=of_shards", "shard.count=2", f"shard.index={n}")
    steps = [csv_rows(place / f"of_shards/csv_{n}_of_2/version_0/metrics.csv") for n in range(2)]
    assert len(steps[0]) + len(steps[1]) == 5


def test_no_logger_fails_a_run(place: Path, forks: Server) -> None:
    """One warning for each; the others, and the volumes, are complete."""
    names = ("Broken", "Unreachable", "Stubborn")
    text = run(forks, place, *JOB, "logger=csv", *(a for name in names for a in mine(name, f"{name}.jsonl")))
    assert text.count("nothing more is logged by Broken: OSError: the server is gone") == 1
    assert text.count("nothing is logged by Unreachable: ConnectionError: no server answers") == 1
    assert text.count("Stubborn has not all settings: ValueError: changing settings is not allowed") == 1
    assert text.count("server") == 2
    assert len(csv_rows(place / "out/csv/version_0/metrics.csv")) == 4
    assert len(recorded(place / "Broken.jsonl", "numbers")) == 1
    assert not (place / "Unreachable.jsonl").exists()
    assert len(recorded(place / "Stubborn.jsonl", "numbers")) == 4


def test_a_training_logs_to_all_of_its_loggers(place: Path, forks: Server) -> None:
    """Curves, a picture for each validation, and hyperparameters once; a broken logger does not end it."""
    more = ("logger=[csv,tensorboard]", *mine("Recording"), *mine("Broken", "Broken.jsonl"))
    text = run(forks, place, *TRAIN, *more, script="train")
    assert text.count("nothing more is logged by Broken") == 1
    rows = csv_rows(place / "outputs/csv/version_0/metrics.csv")
    losses = [row["train_loss"] for row in rows if "train_loss" in row]
    board = events(place / "outputs/tensorboard")
    assert losses == pytest.approx([one.value for one in board.Scalars("train_loss")])
    assert len(losses) == 2
    numbers = recorded(place / "mine.jsonl", "numbers")
    assert [values["val_dice"] for _, values in numbers if "val_dice" in values] == pytest.approx(
        [one.value for one in board.Scalars("val_dice")]
    )
    shown = [np.asarray(Image.open(io.BytesIO(one.encoded_image_string))) for one in board.Images("validation/s0")]
    assert [picture["validation/s0"] for _, picture in recorded(place / "mine.jsonl", "picture")] == [
        int(picture.astype(np.int64).sum()) for picture in shown
    ]
    ((_, settings),) = recorded(place / "mine.jsonl", "settings")
    assert settings["data.patch_size"] == 8
    written = yaml.safe_load((place / "outputs/csv/version_0/hparams.yaml").read_text())
    assert settings == written


@pytest.mark.parametrize(
    ("node", "message"),
    [
        ({"mine": 3}, r"logger\.mine must be a logger with a _target_, such as logger=csv; it is 3\."),
        ("csv", r"logger must be a logger with a _target_"),
        ({"_target_": "a.B", "csv": {"_target_": "c.D"}}, r"logger has a _target_ beside logger\.csv: give that one"),
        ({"x": {"_target_": "lightning.pytorch.loggers.WandbLogger"}}, r"logger\.x needs .* 'voxquilt\[wandb\]'\. Not"),
        ({"_target_": "lightning.pytorch.loggers.MLFlowLogger"}, r"logger needs .* 'voxquilt\[mlflow\]'"),
    ],
)
def test_a_wrong_logger_is_refused(node: Any, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """By its key, before torch is imported; a missing package by the extra that brings it."""
    monkeypatch.setattr("voxquilt.cli.loggers.find_spec", lambda name: None)
    with pytest.raises(ConfigError, match=message):
        check_loggers(node)


def test_a_folder_of_logged_runs_is_not_taken_for_a_package(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Weights & Biases logs into a folder named wandb."""
    (tmp_path / "wandb").mkdir()
    monkeypatch.setattr("sys.path", [str(tmp_path)])
    with pytest.raises(ConfigError, match="needs the package wandb"):
        check_loggers({"_target_": "lightning.pytorch.loggers.WandbLogger"})


def test_loggers_are_one_or_several_or_none(tmp_path: Path) -> None:
    """By name, or as one node as earlier configurations have it; what is null is left out."""
    node = {"_target_": "lightning.pytorch.loggers.CSVLogger", "save_dir": str(tmp_path)}
    for config, count in ((node, 1), ({"a": node, "b": node, "c": None}, 2)):
        check_loggers(config)
        assert len(build_loggers(config)) == count
    for config in (None, {}, {"a": None}):
        check_loggers(config)
        assert build_loggers(config) is False
    with pytest.raises(ConfigError, match=r"logger\.a is a Identity, which is not a logger of Lightning's"):
        build_loggers({"a": {"_target_": "torch.nn.Identity"}})


@given(st.text(max_size=20), st.text(max_size=20))
def test_names_for_mlflow_are_valid_and_differ_where_names_differ(name: str, other: str) -> None:
    """Of letters, digits and _-./ and blanks, and no path that leads elsewhere; good names stay as they are."""
    shown, beside = (_mlflow_name(f"volume_ml/{text}") for text in (name, other))
    assert re.fullmatch(r"[A-Za-z0-9_/. -]+", shown)
    assert posixpath.normpath(shown) == shown
    assert (shown == beside) == (name == other)
    if re.fullmatch(r"[A-Za-z0-9_]+", name):
        assert shown == f"volume_ml/{name}"


def test_settings_for_loggers_are_plain_and_have_no_secrets() -> None:
    """Only sections of the run, not those of the loggers; nothing that is null."""
    configuration = {"run": {"seed": None, "log": "auto"}, "logger": {"wandb": {"key": "secret"}}, "output_dir": "a"}
    assert loggable(configuration) == {"run.log": "auto", "output_dir": "a"}


def test_an_exit_status_has_a_score_for_sweepers() -> None:
    """Also where it was made in another process; without a score it is no number to optimise."""
    status = pickle.loads(pickle.dumps(ExitStatus(0, 0.75)))
    assert (status, float(status)) == (0, 0.75)
    with pytest.raises(ValueError, match="the run has no score; its exit status is 1"):
        float(ExitStatus(1))
