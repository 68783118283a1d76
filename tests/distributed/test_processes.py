"""Tests runs with several processes: the files of one process, each subject once, one manifest, one exit status."""

import csv
import json
import warnings
from pathlib import Path

import numpy as np
import pytest
import torch
from forks import Server, checked
from synthetic import Over50, noise, read, run, save

NETWORK = ("model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null")
GRID = ("data.patch_size=8", "data.patch_overlap=4", "data.batch_size=3")
JOB = ("data.inputs=in", *NETWORK, *GRID, "callbacks.writer.tensorboard=false", "callbacks.writer.report=false")


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    assert len({row["subject"] for row in rows}) == len(rows), "a subject has two rows"
    return {row["subject"]: row for row in rows}


def record(folder: Path) -> dict[str, object]:
    return json.loads((folder / "run.json").read_text())


def outputs(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.glob("*.nii.gz"))


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """Seven subjects of different sizes, and what one process predicts for them, per blend."""
    folder = tmp_path_factory.mktemp("place")
    for n in range(7):
        affine = np.diag([-1.0, 1.3, 0.8, 1.0]) if n % 2 else np.eye(4)
        save(folder / f"in/s{n}.nii.gz", noise((12 + 5 * n, 17, 14), n), affine)
    save(folder / "one/s9.nii.gz", noise((40, 30, 12), 9))
    for mode in ("crop", "gaussian"):
        for inputs in ("in", "one"):
            done = forks.start(*JOB, *options(mode), f"data.inputs={inputs}", f"output_dir={inputs}_{mode}", cwd=folder)
            assert done.wait() == [0], done.text
    return folder


def options(mode: str) -> tuple[str, ...]:
    return (
        f"stitch.overlap_mode={mode}", "stitch.products=[labels,logits,probabilities,disagreement]",
        "preprocess.spacing=1.1", "stitch.compare=[average]",
        "stitch.postprocess=[{_target_: monai.transforms.KeepLargestConnectedComponent}]",
    )  # fmt: skip


def assert_same(ours: Path, theirs: Path, mode: str) -> None:
    r"""Labels, and for crop the scores, are equal to the bit; the rest up to rounding.

    The soft-max of torch rounds by a voxel's position in the slab.
    """
    assert outputs(ours) == outputs(theirs)
    for name in outputs(theirs):
        if "labels" not in name and (mode != "crop" or "logits" not in name):
            np.testing.assert_allclose(read(ours / name), read(theirs / name), rtol=1e-4, atol=1e-5, err_msg=name)
        else:
            np.testing.assert_array_equal(read(ours / name), read(theirs / name), err_msg=name)


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("distribute", ["subject", "slab", "auto"])
@pytest.mark.parametrize("mode", ["crop", "gaussian"])
def test_several_processes_write_the_files_of_one(
    ranks: int, distribute: str, mode: str, place: Path, tmp_path: Path, forks: Server
) -> None:
    """Seven subjects on two and three processes, assigned as a whole or in slabs."""
    out = tmp_path / "out"
    job = forks.start(*JOB, *options(mode), f"output_dir={out}", f"run.distribute={distribute}", cwd=place, ranks=ranks)
    assert checked(job.wait()) == 0, job.text
    assert_same(out, place / f"in_{mode}", mode)
    rows, told = manifest(out), record(out)
    assert {name: row["status"] for name, row in rows.items()} == {f"s{n}": "done" for n in range(7)}
    assert (told["status"], told["exit_status"], told["processes"]) == ("finished", 0, ranks)
    shares = [rank["patches"] for rank in told["ranks"]]  # type: ignore[attr-defined]
    assert sum(shares) == sum(int(row["patches"]) for row in rows.values())
    assert min(shares) > 0
    assert max(shares) < 1.5 * sum(shares) / ranks
    assert job.text.count(": done: ") == 7
    assert job.orphans() == []


@pytest.mark.parametrize("distribute", ["subject", "slab", "auto"])
@pytest.mark.parametrize("ranks", [2, 3])
def test_one_subject_on_several_processes_gives_the_same_files(
    ranks: int, distribute: str, place: Path, tmp_path: Path, forks: Server
) -> None:
    """As a whole, the other processes end cleanly without work; in slabs, which auto chooses, all have a part."""
    out = tmp_path / "out"
    job = forks.start(
        *JOB, "data.inputs=one", *options("gaussian"), f"output_dir={out}", f"run.distribute={distribute}",
        cwd=place, ranks=ranks,
    )  # fmt: skip
    assert checked(job.wait()) == 0, job.text
    assert_same(out, place / "one_gaussian", "gaussian")
    idle = [rank["patches"] for rank in record(out)["ranks"]].count(0)  # type: ignore[attr-defined]
    assert idle == (ranks - 1 if distribute == "subject" else 0)


@pytest.mark.parametrize("strategy", ["ddp", "ddp_spawn"])
def test_processes_started_by_lightning_give_the_same_files(strategy: str, place: Path, tmp_path: Path) -> None:
    """As subprocesses or spawned: one table, one line per subject, and status 1 if a subject fails."""
    for n in range(7):
        (tmp_path / "in").mkdir(exist_ok=True)
        (tmp_path / f"in/s{n}.nii.gz").write_bytes((place / f"in/s{n}.nii.gz").read_bytes())
    (tmp_path / "in/bad.nii.gz").write_bytes((place / "in/s0.nii.gz").read_bytes()[:300])
    with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript old; users have it
        torch.jit.script(Over50()).save(tmp_path / "net.pt")  # which spawned processes are handed by pickle
    done = run(
        "predict.py", "data.inputs=in", *GRID, "model=torchscript", "ckpt_path=net.pt", *options("gaussian"),
        "trainer.accelerator=cpu", "trainer.devices=2", f"trainer.strategy={strategy}", cwd=tmp_path,
    )  # fmt: skip
    assert done.returncode == 1, done.stderr
    assert_same(tmp_path / "outputs", place / "in_gaussian", "gaussian")
    rows = manifest(tmp_path / "outputs")
    assert {name for name, row in rows.items() if row["status"] == "failed"} == {"bad"}
    assert "bad.nii.gz" in rows["bad"]["error"]
    assert (done.stdout + done.stderr).count("s3: done: ") == 1
    assert done.stdout.count("7 of 8 subjects done") == 1
    assert "Traceback" not in done.stderr


def test_processes_without_work_end_cleanly(tmp_path: Path, forks: Server) -> None:
    """A volume of one patch cannot be divided, so two of three processes have nothing to do, in every mode."""
    x = save(tmp_path / "in/a.nii.gz", noise((8, 8, 8)))
    for distribute in ("slab", "auto"):
        job = forks.start(*JOB, f"run.distribute={distribute}", f"output_dir={distribute}", cwd=tmp_path, ranks=3)
        assert checked(job.wait()) == 0, job.text
        np.testing.assert_array_equal(read(tmp_path / distribute / "a_labels.nii.gz"), x > 50)


@pytest.mark.parametrize("distribute", ["subject", "slab"])
def test_a_failed_subject_fails_alone_among_several_processes(distribute: str, tmp_path: Path, forks: Server) -> None:
    """Unreadable, raising or not finite, on any rank: one row each with the reason; others in the batch are right."""
    good = {f"s{n}": save(tmp_path / f"in/s{n}.nii.gz", noise((30, 9, 9), n) % 60) for n in range(3)}
    (tmp_path / "in/empty.nii.gz").touch()
    for name, value, where in (("raises", 77, 2), ("nan", 88, 28)):
        x = noise((30, 9, 9)) % 60
        x[where, 4, 4] = value
        save(tmp_path / f"in/{name}.nii.gz", x)
    job = forks.start(
        *JOB, "model.net._target_=synthetic.Touchy", f"run.distribute={distribute}", "data.num_workers=3", cwd=tmp_path,
        ranks=3,
    )  # fmt: skip
    assert checked(job.wait()) == 1, job.text
    rows = manifest(tmp_path / "outputs")
    assert {name for name, row in rows.items() if row["status"] == "done"} == set(good)
    assert rows.keys() == {*good, "empty", "raises", "nan"}
    reasons = {"empty": "the file is empty", "raises": "there is a 77", "nan": "NaN or infinite"}
    assert [name for name, reason in reasons.items() if reason not in rows[name]["error"]] == []
    for name, x in good.items():
        np.testing.assert_array_equal(read(tmp_path / f"outputs/{name}_labels.nii.gz"), x > 50)
    assert len(outputs(tmp_path / "outputs")) == len(good)


def test_on_error_raise_stops_all_processes(tmp_path: Path, forks: Server) -> None:
    """In order, with status 1; finished subjects stay."""
    for n in range(40):
        save(tmp_path / f"in/s{n:02}.nii.gz", noise((16, 16, 16), n))
    (tmp_path / "in/s05.nii.gz").write_bytes(b"")
    slow = ("model.net._target_=synthetic.Slow", "run.on_error=raise")
    job = forks.start(*JOB, *slow, cwd=tmp_path, ranks=2, env={"SLOW": "0.02"})
    assert checked(job.wait()) == 1, job.text
    rows = manifest(tmp_path / "outputs")
    assert rows["s05"]["status"] == "failed"
    assert len(rows) < 40
    assert {f"{name}_labels.nii.gz" for name in rows} - {"s05_labels.nii.gz"} == set(outputs(tmp_path / "outputs"))
    assert "s05: in/s05.nii.gz: the file is empty. (run.on_error=raise stops here.)" in job.text
    assert record(tmp_path / "outputs")["status"] == "stopped"
    assert "Traceback" not in job.text


def test_a_wrong_configuration_is_reported_once_by_all_processes(tmp_path: Path, forks: Server) -> None:
    """Before anything starts, and if only rank 0 detects it afterwards: every process ends with status 2."""
    save(tmp_path / "in/a.nii.gz", noise((9, 9, 9)))
    for wrong, message in (("data.patch_size=0", "data.patch_size must be at least 1"), ("data.inputs=no", "no file")):
        job = forks.start(*JOB, wrong, cwd=tmp_path, ranks=2)
        assert checked(job.wait()) == 2
        assert job.text.count(message) == 1, job.text
    assert checked(forks.start(*JOB, cwd=tmp_path, ranks=2).wait()) == 0
    job = forks.start(*JOB, "stitch.overlap_mode=crop", cwd=tmp_path, ranks=2)
    assert checked(job.wait()) == 2
    assert job.text.count('stitch.overlap_mode was "gaussian" and is "crop"') == 1, job.text
    assert "Traceback" not in job.text
