"""Tests sweeps: every job has its own folder, named by what the sweep varies, and shards share one."""

import csv
import re
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server
from hypothesis import given, settings
from hypothesis import strategies as st
from synthetic import noise, run, save

from voxquilt.cli.sweeps import folder_name, with_names

NETWORK = ("model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null", "trainer=cpu")


def statuses(folder: Path) -> dict[str, str]:
    """Statuses of a run's subjects."""
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row["status"] for row in csv.DictReader(file)}


def files(folder: Path) -> set[str]:
    """Label files below a folder."""
    return {path.relative_to(folder).as_posix() for path in folder.rglob("*_labels.nii.gz")}


def test_a_sweep_of_predictions_gives_each_job_its_folder_and_table(forks: Server, tmp_path: Path) -> None:
    """Four jobs; repeated in another order, all are already done."""
    volume = save(tmp_path / "scans/a.nii", noise((40, 20, 20)))
    common = ("data.inputs=scans", "data.patch_overlap=4", *NETWORK)
    sweep = ("stitch.overlap_mode=crop,average", "data.patch_size=32,48", "output_dir=out")
    done = run("predict.py", "--multirun", *sweep, *common, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    names = {f"data.patch_size-{size}+stitch.overlap_mode-{mode}" for size in (32, 48) for mode in ("crop", "average")}
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    for name in names:
        assert statuses(tmp_path / "out" / name) == {"a": "done"}
        labels = nib.load(tmp_path / "out" / name / "a_labels.nii.gz")
        np.testing.assert_array_equal(np.asarray(labels.dataobj), volume > 50)
        record = (tmp_path / "out" / name / "run.json").read_text()
        assert f'"overlap_mode": "{name.rpartition("-")[2]}"' in record
    done = forks.run(*common, "output_dir=out", *reversed(sweep[:2]), "-m", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert {path.name for path in (tmp_path / "out").iterdir()} == names
    assert all(statuses(tmp_path / "out" / name) == {"a": "skipped"} for name in names)


@pytest.mark.parametrize(
    ("sweep", "wanted"),
    [
        (["data.patch_size=8,16", "output_dir=o"], {"o/data.patch_size-8", "o/data.patch_size-16"}),
        (["data.patch_size=range(8,10)"], {"outputs/data.patch_size-8", "outputs/data.patch_size-9"}),
        # a sweep over output_dir, or one named by a varied key, keeps its folders
        (["output_dir=x,y"], {"x", "y"}),
        (["output_dir=x,y", "data.patch_size=8,9", "run.overwrite=true"], {"x", "y"}),
        (["data.patch_size=8,16", "output_dir=o/${data.patch_size}"], {"o/8", "o/16"}),
        (["data.patch_size=8,16", "output_dir=o/${hydra:job.num}"], {"o/0", "o/1"}),
        (["data.patch_size=8,16", "+mine=p_${data.patch_size}", "output_dir=o/${mine}"], {"o/p_8", "o/p_16"}),
        (["data.patch_size=8,16", "output_dir=o/${half:${data.patch_size}}"], {"o/4", "o/8"}),
        # varied keys that the name leaves out become a folder inside
        (
            ["data.patch_size=8,16", "stitch.overlap_mode=crop,hann", "output_dir=o/${data.patch_size}"],
            {f"o/{n}/stitch.overlap_mode-{mode}" for n in (8, 16) for mode in ("crop", "hann")},
        ),
        (["data.patch_size=8,16", "output_dir=${oc.env:HERE}/o"], {"o/data.patch_size-8", "o/data.patch_size-16"}),
        # of a key that is typed twice the last counts
        (
            ["stitch.overlap_mode=crop", "stitch.overlap_mode=hann,crop"],
            {f"outputs/stitch.overlap_mode-{mode}" for mode in ("hann", "crop")},
        ),
        # shards of one run
        (["shard.count=2", "shard.index=0,1"], {"outputs"}),
        (
            ["shard.count=2", "shard.index=0,1", "data.patch_size=8,9"],
            {"outputs/data.patch_size-8", "outputs/data.patch_size-9"},
        ),
        # a single value is not a sweep
        (["stitch.overlap_mode=crop"], {"outputs"}),
        (["data.inputs=scans/a.nii,scans/b.nii"], {f"outputs/data.inputs-scans_{name}.nii-*" for name in "ab"}),
        (["--config-dir=more", "experiment=swept"], {f"outputs/data.patch_overlap-{n}" for n in (2, 4)}),
    ],
)
def test_a_job_has_the_expected_folder(sweep: list[str], wanted: set[str], forks: Server, tmp_path: Path) -> None:
    """Wherever its values come from, no two jobs share a folder."""
    for name in "ab":
        save(tmp_path / f"scans/{name}.nii", noise((8, 8, 8)))
    (tmp_path / "more/experiment").mkdir(parents=True)
    (tmp_path / "more/experiment/swept.yaml").write_text(
        "# @package _global_\nhydra: {sweeper: {params: {data.patch_overlap: '2,4'}}}\n"
    )
    common = (
        "data.inputs=scans",
        "data.patch_size=8",
        *NETWORK,
        "callbacks.writer.tensorboard=false",
        "callbacks.writer.report=false",
    )
    varied = {text.partition("=")[0] for text in sweep}
    done = forks.run(
        "-m", *(text for text in common if text.partition("=")[0] not in varied), *sweep, cwd=tmp_path,
        env={"HERE": str(tmp_path)},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    found = {path.parent.relative_to(tmp_path).as_posix() for path in tmp_path.rglob("run*.json")}
    assert len(found) == len(wanted)
    for pattern in wanted:
        assert [name for name in found if re.fullmatch(pattern.replace("+", r"\+").replace("*", ".*"), name)], found


def test_training_jobs_keep_their_checkpoints_apart(forks: Server, tmp_path: Path) -> None:
    """One job per fold; together they are an ensemble whose paths need no quotes."""
    for n in range(3):
        save(tmp_path / f"in/{n}.nii", noise((8, 8, 8), n))
        save(tmp_path / f"labels/{n}.nii", (noise((8, 8, 8), n) > 50).astype(np.uint8))
    job = forks.start(
        "--multirun", "data.fold=0,1,2", "data.folds=3", "data.inputs=in", "data.labels=labels/{subject}.nii",
        "data.patch_size=8", "model.net.channels=[2,2]", "model.net.strides=[2]", "trainer=cpu",
        "trainer.max_epochs=1", "data.patches_per_volume=1", "trainer.check_val_every_n_epoch=1", "logger=null",
        cwd=tmp_path, script="train",
    )  # fmt: skip
    assert job.wait(120) == [0], job.text
    paths = [f"outputs/data.fold-{n}/checkpoints/best.ckpt" for n in range(3)]
    scores = [torch.load(tmp_path / path, weights_only=True)["state_dict"] for path in paths]
    first = next(iter(scores[0]))
    assert not torch.equal(scores[0][first], scores[1][first])
    assert not (tmp_path / "outputs/checkpoints").exists()
    assert not list(tmp_path.rglob("tensorboard"))  # a logger that is not wanted
    done = forks.run("data.inputs=in", f"ckpt_path=[{','.join(paths)}]", "output_dir=p", "trainer=cpu", cwd=tmp_path)
    assert (done.returncode, files(tmp_path / "p")) == (0, {f"{n}_labels.nii.gz" for n in range(3)}), done.stderr


def test_a_sweep_of_trainings_over_several_processes_is_refused(forks: Server, tmp_path: Path) -> None:
    """Each process of ddp would start the whole sweep again; the message has the remedies."""
    save(tmp_path / "in/a.nii", noise((8, 8, 8)))
    job = forks.start(
        "-m", "data.fold=0,1", "data.inputs=in", "data.labels=in/{subject}.nii", "data.patch_size=8", "trainer=ddp",
        "trainer.accelerator=cpu", "trainer.devices=2", cwd=tmp_path, script="train",
    )  # fmt: skip
    assert job.wait(60) == [2], job.text
    assert job.text.count("voxquilt: --multirun with trainer.devices=2: each process of ddp would begin the whole") == 2
    assert not (tmp_path / "outputs").exists()


@settings(deadline=None)
@given(st.dictionaries(st.text("abz._/", min_size=1, max_size=30), st.text(max_size=90), min_size=1, max_size=4))
def test_the_name_of_a_jobs_folder_is_safe_short_and_unique(values: dict[str, str]) -> None:
    """At most 120 letters, digits and ._+-, not hidden; other values give another name, in any order of keys."""
    name = folder_name(values)
    assert re.fullmatch(r"[A-Za-z0-9_+-][A-Za-z0-9._+-]{0,119}", name)
    assert folder_name(dict(reversed(values.items()))) == name
    key = next(iter(values))
    for other in (f"{values[key]}x", f"{values[key]}/", f"{values[key]}é", f" {values[key]}"):
        assert folder_name({**values, key: other}) != name
    assert with_names(list(values)) == list(values)  # no sweep, no change
