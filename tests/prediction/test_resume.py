"""Tests resuming: finished subjects are skipped, changed settings are refused by name, and the rest is predicted."""

import csv
import inspect
import json
import os
import shutil
import signal
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import numpy as np
import pytest
import torch
from forks import Run, Server, checked
from hydra import compose, initialize_config_dir
from hypothesis import given
from hypothesis import strategies as st
from omegaconf import OmegaConf
from synthetic import Over50, noise, read, save

from voxquilt.cli.main import conf_dir
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.predict_config import check_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.shard_status import print_status
from voxquilt.data.discovery import SubjectFiles, find_cases
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError
from voxquilt.filesystem import write_json
from voxquilt.prediction.datamodule import RunPlan
from voxquilt.prediction.fingerprint import NO_VOXELS, inputs, settings
from voxquilt.prediction.resume import Resume, finished
from voxquilt.prediction.run_record import RunRecord
from voxquilt.reporting.manifest import Manifest, Row, read_rows

JOB = (
    "data.inputs=in", "model=state_dict", "model.net._target_=synthetic.Slow",
    "ckpt_path=w.pt", "data.patch_size=8", "data.patch_overlap=4", "data.batch_size=3",
    "callbacks.writer.tensorboard=false", "callbacks.writer.report=false",
)  # fmt: skip
NAMES = ("a", "b", "c")


class Place:
    """A folder with three subjects, weights, and the outputs of runs."""

    def __init__(self, folder: Path, forks: Server, *, new: bool = True) -> None:
        self.folder, self.out, self.forks = folder, folder / "outputs", forks
        if not new:
            return
        for n, name in enumerate(NAMES):
            self.subject(name, n)
        torch.save(Over50().state_dict(), folder / "w.pt")

    def subject(self, name: str, seed: int) -> None:
        save(self.folder / f"in/{name}.nii.gz", noise((12, 9, 8), seed))

    def right(self, name: str, suffix: str = ".nii.gz") -> bool:
        """Whether a subject's labels are those of its input."""
        made = read(self.out / f"{name}_labels{suffix}")
        return np.array_equal(made, read(self.folder / f"in/{name}.nii.gz") > 50)

    def run(self, *options: str, status: int = 0, ranks: int = 1, slow: str = "0") -> Run:
        """Run the command and assert its exit status."""
        job = self.forks.start(*JOB, *options, cwd=self.folder, ranks=ranks, env={"SLOW": slow})
        assert checked(job.wait(20)) == status, job.text
        assert "Traceback" not in job.text
        return job

    def rows(self, name: str = "manifest.csv") -> dict[str, dict[str, str]]:
        with open(self.out / name, newline="", encoding="utf-8") as file:
            found = list(csv.DictReader(file))
        assert len({row["subject"] for row in found}) == len(found), "a subject has two rows"
        return {row["subject"]: row for row in found}

    def statuses(self, name: str = "manifest.csv") -> dict[str, str]:
        return {subject: row["status"] for subject, row in self.rows(name).items()}

    def record(self) -> dict[str, Any]:
        return json.loads((self.out / "run.json").read_text())

    def disk(self) -> dict[str, tuple[int, bytes]]:
        """Everything in the output folder, with times of change."""
        return {path.name: (path.stat().st_mtime_ns, path.read_bytes()) for path in self.out.iterdir()}

    def redone(self, before: dict[str, tuple[int, bytes]]) -> set[str]:
        """Subjects whose labels changed since `before`."""
        labels = {name: found for name, found in self.disk().items() if "_labels" in name}
        return {name.partition("_")[0] for name, found in labels.items() if before.get(name) != found}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory, forks: Server) -> Path:
    """A folder after its first run. Tests copy it back in place, since fingerprints include paths and times."""
    found = Place(tmp_path_factory.mktemp("made") / "place", forks)
    weights = Over50()
    torch.nn.init.constant_(weights.bias, 3.0)
    torch.save(weights.state_dict(), found.folder / "other.pt")
    found.run()
    assert found.statuses() == dict.fromkeys(NAMES, "done")
    shutil.copytree(found.folder, found.folder.with_name("kept"))
    return found.folder


@pytest.fixture
def place(made: Path, forks: Server) -> Place:
    shutil.rmtree(made)
    shutil.copytree(made.with_name("kept"), made)
    return Place(made, forks, new=False)


# Nothing to do


def test_a_second_run_skips_every_subject(place: Place) -> None:
    """Status 0, no file written, and a network that would take a minute is not called."""
    before, first = place.disk(), place.rows()
    job = place.run(slow="60")
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")
    for column in ("outputs", "patches", "fingerprint", "finished", "volume_ml"):
        assert [row[column] for row in place.rows().values()] == [row[column] for row in first.values()]
    assert place.redone(before) == set()
    told = place.record()
    assert (told["skipped"], told["done"], told["patches"], told["exit_status"]) == (3, 0, 0, 0)
    assert told["ranks"][0]["patches"] == 0
    assert "3 of 3 subjects done, 3 of them before" in job.text
    assert sorted(place.disk()) == sorted(before)
    place.run(slow="60", ranks=2)
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")


@pytest.mark.parametrize(
    "options",
    [
        (
            "data.batch_size=1", "data.num_workers=0", "callbacks.writer.in_memory=0", "run.on_error=raise",
            "model.trust_checkpoint=true", "+callbacks.timer._target_=lightning.pytorch.callbacks.Timer",
        ),
        (
            "output_dir=../{name}/./outputs", "run.distribute=slab", "data.inputs=[./in]", "trainer.benchmark=true",
            "ckpt_path=./copy.pt", "data.patch_size=[8,8,8]",
        ),
    ],
)  # fmt: skip
def test_settings_that_change_no_voxel_redo_nothing(options: tuple[str, ...], place: Place) -> None:
    """Speed, place and names of files; weights are identified by their content."""
    shutil.copyfile(place.folder / "w.pt", place.folder / "copy.pt")
    before = place.disk()
    place.run(*(option.format(name=place.folder.name) for option in options), slow="60")
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")
    assert place.redone(before) == set()


# Changed settings

OTHERWISE = [
    ("stitch.overlap_mode=crop", 'stitch.overlap_mode was "gaussian" and is "crop"'),
    ("stitch.products=[labels,entropy]", 'stitch.products was null and is ["labels", "entropy"]'),
    ("stitch.threshold=0.4", "stitch.threshold was null and is 0.4"),
    ("stitch.compare=[hann]", 'stitch.compare was [] and is ["hann"]'),
    ("stitch.restore=labels", 'stitch.restore was "scores" and is "labels"'),
    ("stitch.class_names=[none,some]", 'stitch.class_names was null and is ["none", "some"]'),
    ("model.activation=sigmoid", 'model.activation was null and is "sigmoid"'),
    ("model.flips=[0]", "model.flips was [] and is [0]"),
    ("+model.net.channels=1", "model.net.channels was null and is 1"),
    ("model.net._target_=synthetic.Over50", 'model.net._target_ was "synthetic.Slow" and is "synthetic.Over50"'),
    ("ckpt_path=other.pt", "ckpt_path has other weights"),
    ("ckpt_path=[w.pt,w.pt]", "ckpt_path has other weights (3 subjects: a, b, c)"),
    ("model.ckpt_path=other.pt", "ckpt_path has other weights"),
    ("data.patch_size=6", "data.patch_size was 8 and is 6"),
    ("data.patch_overlap=2", "data.patch_overlap was 4 and is 2"),
    ("data.padding_mode=edge", 'data.padding_mode was null and is "edge"'),
    ("data.divisible_by=4", "data.divisible_by was 1 and is 4"),
    ("data.nonfinite=zero", 'data.nonfinite was "error" and is "zero"'),
    ("data.skip=20", "data.skip was null and is 20"),
    ("preprocess.spacing=2.0", "preprocess.spacing was null and is 2"),
    ("preprocess.orientation=LPS", 'preprocess.orientation was "RAS" and is "LPS"'),
    ("preprocess.intensity=[{_target_: monai.transforms.NormalizeIntensity}]", "preprocess.intensity was null and is"),
    ("stitch.postprocess=[{_target_: monai.transforms.FillHoles}]", "stitch.postprocess was [] and is [{"),
    ("callbacks.writer.compress=false", "callbacks.writer.compress was true and is false"),
    ("callbacks.writer.overlay=true", "callbacks.writer.overlay was false and is true"),
    ("trainer.precision=bf16-true", 'trainer.precision was null and is "bf16-true"'),
    ("run.seed=3", "run.seed was null and is 3"),
    ("stitch.fill=-1", "stitch.fill was null and is -1"),
    ("model.average=probabilities", 'model.average was "logits" and is "probabilities"'),
    ("model.squeeze_axis=2", "model.squeeze_axis was null and is 2"),
    ("model.strict=false", "model.strict was true and is false"),
    ("+callbacks.writer.later=1", "callbacks.writer.later was null and is 1"),
]


@pytest.mark.parametrize(("option", "said"), OTHERWISE, ids=[option for option, _ in OTHERWISE])
def test_a_setting_that_changes_outputs_is_refused_by_its_name(
    option: str, said: str, place: Place, monkeypatch: pytest.MonkeyPatch
) -> None:
    """With the old and the new value; no other setting is named."""
    monkeypatch.chdir(place.folder)
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = check_predict(compose("predict", to_overrides([*JOB, option])))
    resume = Resume(place.out, plain)
    with pytest.raises(ConfigError, match="has outputs of 3 subjects that were made otherwise") as caught:
        resume.todo(find_cases("in"))
    text = str(caught.value)
    assert f"\n  {said}" in text
    assert text.count(" (3 subjects: a, b, c)\n") == (
        2 if "activation" in option or "average" in option else 1
    )  # stitch.activation follows it


def test_a_refusal_ends_every_process_and_changes_nothing(place: Place) -> None:
    """Status 2 and one message that names all changes, also for processes of torchrun."""
    before = place.disk()
    for ranks in (1, 2):
        text = place.run("data.skip=20", "run.seed=3", status=2, ranks=ranks).text
        assert text.count("run.seed was null and is 3 (3 subjects: a, b, c)") == 1
        assert text.count("data.skip was null and is 20 (3 subjects: a, b, c)") == 1
        assert text.count("run.overwrite=true") == 1
    place.run("shard.count=2", "shard.index=1", "ckpt_path=other.pt", status=2)
    (place.out / "plan_of_2.json").unlink()  # how the shards divide the subjects, which tells the shard what is its own
    assert place.disk() == before


def test_overwriting_redoes_only_subjects_with_other_settings(place: Place) -> None:
    """Here a and b; c already has the new settings and is skipped."""
    other = ("model.net._target_=synthetic.Over50", "callbacks.writer.overlay=false")
    place.run("data.inputs=in/c.nii.gz", *other, "run.overwrite=true")
    before = place.disk()
    assert "(2 subjects: a, b)" in place.run(*other, status=2).text
    place.run(*other, "run.overwrite=true")
    assert place.statuses() == {"a": "done", "b": "done", "c": "skipped"}
    assert place.redone(before) == {"a", "b"}
    place.run(*other)
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")


def test_run_resume_false_redoes_everything_with_any_settings(place: Place) -> None:
    """Without run.overwrite; the outputs are the new ones."""
    before = place.disk()
    place.run("run.resume=false", "callbacks.writer.compress=false")
    assert place.statuses() == dict.fromkeys(NAMES, "done")
    assert all(place.right(name, ".nii") for name in NAMES)
    place.run("run.resume=false")
    assert place.redone(before) == {*NAMES}
    assert place.statuses() == dict.fromkeys(NAMES, "done")


def test_the_order_of_images_is_in_the_fingerprint(tmp_path: Path, forks: Server) -> None:
    """It is the order of the network's channels."""
    for name in ("t1", "t2"):
        save(tmp_path / f"in/a_{name}.nii.gz", noise((9, 9, 9), len(name)))
    job = (*JOB, "model.net._target_=synthetic.FirstMinusSecond", "ckpt_path=null", "data.inputs=in")
    one, two = ('t1: "{subject}_t1.nii.gz"', 't2: "{subject}_t2.nii.gz"')
    for images, status in ((f"{{{one}, {two}}}", 0), (f"{{{two}, {one}}}", 2), (f"{{{one}, {two}}}", 0)):
        made = forks.start(*job, f"data.images={images}", cwd=tmp_path)
        assert made.wait() == [status], made.text
        assert ('data.images was ["t1", "t2"] and is ["t2", "t1"]' in made.text) == (status == 2)
    assert read_rows([tmp_path / "outputs/manifest.csv"])["a"].status == "skipped"


def test_the_names_of_images_are_in_the_fingerprint(tmp_path: Path) -> None:
    """If t1 and t2 swap names, preprocessing treats their files differently."""
    paths = [tmp_path / name for name in ("x.nii", "y.nii")]
    for path in paths:
        path.write_bytes(b"1")
    ours, theirs = (SubjectFiles("a", dict(zip(names, paths, strict=True))) for names in (("t1", "t2"), ("t2", "t1")))
    assert inputs([ours]) != inputs([theirs])
    assert inputs([SubjectFiles("a", {"image": paths[0]})]) == inputs([SubjectFiles("a", {"t1": paths[0]})])


def leaves(node: Any, key: str = "") -> Iterator[str]:
    """Full keys of all values of a configuration, empty mappings included."""
    if not isinstance(node, dict) or not node:
        yield key
        return
    for name, child in node.items():
        yield from leaves(child, f"{key}.{name}".lstrip("."))


def changed(plain: dict[str, Any], key: str, value: Any) -> dict[str, Any]:
    """A configuration with another value for a key."""
    name, _, rest = key.partition(".")
    return {**plain, name: changed(plain.get(name) or {}, rest, value) if rest else value}


@cache
def composed(*options: str) -> dict[str, Any]:
    """The configuration of predict.py, with interpolations unresolved."""
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = OmegaConf.to_container(compose("predict", to_overrides(options)), resolve=False)
    assert isinstance(plain, dict)
    return changed(
        changed({str(key): value for key, value in plain.items()}, "ckpt_path", None), "model.ckpt_path", None
    )


LATER = (
    "data.suffixes", "data.extra_images", "data.placement", "data.step", "data.within", "data.margin",
    "preprocess.transpose", "preprocess.grid", "preprocess.crop", "preprocess.interpolation", "preprocess.per_slice",
    "preprocess.intensity_first", "preprocess.one_hot", "preprocess.one_hot_interpolation",
    "stitch.order", "stitch.per_slice", "stitch.regions",
    "stitch.classes", "stitch.combine",
)  # fmt: skip


def test_settings_that_were_added_do_not_count_at_their_defaults() -> None:
    """So that an earlier version's outputs count as done; away from the default each counts."""
    plain = composed()
    assert not set(LATER) & settings(plain).keys()
    for key in LATER:
        section, _, name = key.partition(".")
        assert name in plain[section], "no such setting"
        counts = key not in ("data.suffixes", "data.extra_images")  # by the files and the images' names
        value = "another" if counts else {"t1": "a"}
        assert (settings(changed(plain, key, value)) != settings(plain)) == counts, key


KINDS: list[tuple[str, ...]] = [
    (),
    *((f"model={kind}",) for kind in ("state_dict", "lightning", "torchscript", "exported")),
    *((f"trainer={kind}",) for kind in ("cpu", "gpu", "ddp", "slurm")),
    ("model/net=unet",),
    ("logger=tensorboard", "+callbacks.mine._target_=my_package.Mine", "+callbacks.mine.steps=3"),
]


@pytest.mark.parametrize("options", KINDS, ids=str)
def test_every_key_is_in_the_fingerprint_unless_listed_as_harmless(options: tuple[str, ...]) -> None:
    """Walks the whole composed configuration, so a new key counts until it is listed."""
    plain = composed(*options)
    before, keys = settings(plain), [key for key in leaves(plain) if key != "run.content_hash"]
    assert {"stitch.fill", "model.average", "model.squeeze_axis", "data.patch_size", "run.seed"} <= {*keys}
    for key in keys:
        parents = key.split(".")
        named = any(".".join(parents[:n]) in NO_VOXELS for n in range(1, len(parents) + 1))
        named |= key.startswith("callbacks.") and not key.startswith("callbacks.writer.")
        if key not in ("ckpt_path", "model.ckpt_path"):  # files, which another test changes
            one_image = {key: {"t1": "a"} for key in ("data.images", "data.suffixes", "data.extra_images")}
            value = {**one_image, "trainer.plugins": [{"_target_": "a.B"}]}.get(key, "another")
            assert (settings(changed(plain, key, value)) != before) != named, key
    assert settings(plain, content=True) != before


def test_every_key_listed_as_harmless_exists() -> None:
    """In the configuration or among the arguments of Lightning's Trainer."""
    keys = [f"{name}." for options in [*KINDS, ("model=nnunet",)] for name in leaves(composed(*options))]
    known = {f"trainer.{name}" for name in inspect.signature(pl.Trainer).parameters}
    assert [key for key in NO_VOXELS - known if not any(name.startswith(f"{key}.") for name in keys)] == []


def test_of_trainer_arguments_only_precision_and_computing_plugins_count() -> None:
    """For every argument of Lightning's Trainer; plugins for clusters only say where a run is."""
    arguments = [*inspect.signature(pl.Trainer).parameters]
    counted = [name for name in arguments if settings({"trainer": {name: "another"}}) != settings({})]
    assert sorted(counted) == ["plugins", "precision"]
    slurm = {"_target_": "lightning.pytorch.plugins.environments.SLURMEnvironment", "auto_requeue": False}
    assert settings({"trainer": {"plugins": [slurm]}}) == settings({})
    assert settings({"trainer": {"plugins": [slurm, {"_target_": "x.HalfPrecision"}]}}) != settings({})


def test_a_new_setting_that_is_null_does_not_change_the_fingerprint(tmp_path: Path) -> None:
    """Null counts as absent; weights count by the content of their files."""
    assert settings({"stitch": {"later": None}, "model": {"net": {"width": None}}}) == settings({})
    for name, content in (("a", b"1"), ("b", b"1"), ("c", b"2")):
        (tmp_path / name).write_bytes(content)
    a, b, c = (settings({"ckpt_path": str(tmp_path / name), "model": {}}) for name in "abc")
    assert a == b != c


def test_the_digest_distinguishes_values_and_types_of_settings() -> None:
    """Each of these differs; an absent section equals an empty one."""
    kinds: list[Any] = [None, 0, 1, True, "1", "null", [], [0], [0, 1], [1, 0], [[0], 1], {"a": 1}]
    digests = [
        Resume(Path(), {"data": {"skip": kind}, "model": {"ckpt_path": None}}).settings_digest for kind in kinds
    ]  # fmt: skip
    assert len(set(digests)) == len(kinds)
    assert settings({}) == settings({"data": {}, "model": {}, "trainer": {"devices": 3, "accelerator": "cpu"}})


# Inputs


def test_a_changed_input_is_refused_and_named_and_only_it_is_redone(place: Place) -> None:
    """The message names the subject; with run.overwrite=true the others are skipped."""
    place.subject("b", 8)
    before = place.disk()
    text = place.run(status=2).text
    assert "its input files changed (1 subject: b)" in text
    assert place.disk() == before
    place.run("run.overwrite=true")
    assert place.statuses() == {"a": "skipped", "b": "done", "c": "skipped"}
    assert place.redone(before) == {"b"}
    assert place.right("b")


def test_with_content_hash_a_touched_or_moved_input_is_unchanged(place: Place) -> None:
    """Time of change and folder do not matter; a changed voxel does."""
    hashed = ("run.content_hash=true", "run.overwrite=true")
    text = place.run("run.content_hash=true", status=2).text
    assert "run.content_hash was false and is true (3 subjects: a, b, c)" in text
    assert "input files" not in text
    place.run(*hashed)
    before = place.disk()
    os.utime(place.folder / "in/a.nii.gz", (1, 1))
    place.run("run.content_hash=true")
    (place.folder / "in").rename(place.folder / "moved")
    place.run("run.content_hash=true", "data.inputs=moved")
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")
    assert place.redone(before) == set()
    save(place.folder / "moved/c.nii.gz", noise((12, 9, 8), 30))
    assert "its input files changed (1 subject: c)" in place.run(
        "run.content_hash=true", "data.inputs=moved", status=2
    ).text  # fmt: skip


def test_without_content_hash_a_touched_input_is_refused(place: Place) -> None:
    """By default only path, size and time of change are compared."""
    os.utime(place.folder / "in/a.nii.gz", (1, 1))
    assert "its input files changed (1 subject: a)" in place.run(status=2).text


@pytest.mark.parametrize("content", [False, True])
@pytest.mark.parametrize("part", ["a.hdr", "a.img", "mask_a.nii"])
def test_every_file_of_a_subject_is_in_the_fingerprint(part: str, content: bool, tmp_path: Path) -> None:
    """The .img beside a .hdr, and a mask of data.skip."""
    for name in ("a.hdr", "a.img", "mask_a.nii"):
        (tmp_path / name).write_bytes(b"1")
    case, mask = find_cases(str(tmp_path / "a.hdr"))[0], str(tmp_path / "mask_{subject}.nii")
    before = inputs([case], [mask], content=content)
    assert inputs([case], [mask], content=content) == before
    (tmp_path / part).write_bytes(b"22")
    assert inputs([case], [mask], content=content) != before


def test_with_content_hash_a_moved_mask_is_unchanged(tmp_path: Path) -> None:
    """Like the inputs, data.skip then only says where files are; without content_hash it is a setting."""
    plain = [{"data": {"skip": f"{folder}/{{subject}}.nii"}} for folder in ("here", "there")]
    assert settings(plain[0], content=True) == settings(plain[1], content=True)
    assert settings(plain[0]) != settings(plain[1])
    assert settings({"data": {"skip": 3}}, content=True) != settings({"data": {"skip": 4}}, content=True)


# Which subjects are predicted


def test_a_deleted_output_is_predicted_again(place: Place) -> None:
    """Only that subject's; until then the status reports it as missing."""
    before = place.disk()
    (place.out / "b_labels.nii.gz").unlink()
    assert "2 of 3 subjects done, 0 failed, 1 missing" in place.run("run.status=true", status=1).text
    place.run()
    assert place.statuses() == {"a": "skipped", "b": "done", "c": "skipped"}
    assert place.redone(before) == {"b"}
    assert place.right("b")


def test_a_new_subject_is_added_and_a_failed_one_is_tried_again(place: Place) -> None:
    """The others are skipped; the status is 1 as long as one fails."""
    place.subject("d", 7)
    (place.folder / "in/e.nii.gz").write_bytes(b"")
    before = place.disk()
    place.run(status=1)
    skipped = dict.fromkeys(NAMES, "skipped")
    assert place.statuses() == {**skipped, "d": "done", "e": "failed"}
    place.run(status=1)
    assert place.statuses() == {**skipped, "d": "skipped", "e": "failed"}
    text = place.run("run.status=true", status=1).text
    assert "4 of 5 subjects done, 1 failed, 0 missing" in text
    assert "e: failed: in/e.nii.gz: the file is empty." in text
    place.subject("e", 9)
    place.run()
    assert place.statuses() == {**skipped, "d": "skipped", "e": "done"}
    assert place.redone(before) == {"d", "e"}
    assert "5 of 5 subjects done, 0 failed, 0 missing" in place.run("run.status=true").text


def test_a_run_over_one_subject_keeps_the_rows_of_the_others(place: Place) -> None:
    """Done ones, and failed ones with their reason; the full run then skips what is done."""
    (place.folder / "in/d.nii.gz").write_bytes(b"")
    place.run(status=1)
    before = place.disk()
    place.run("data.inputs=in/b.nii.gz", slow="60")
    assert place.statuses() == {"a": "skipped", "b": "skipped", "c": "skipped", "d": "failed"}
    assert place.record()["subjects"] == 1
    place.run("data.inputs=in/b.nii.gz", "run.resume=false")
    assert place.statuses() == {"a": "skipped", "b": "done", "c": "skipped", "d": "failed"}
    place.run("data.inputs=[in/a.nii.gz,in/b.nii.gz,in/c.nii.gz]", slow="60")
    assert place.redone(before) == {"b"}


def test_shards_and_unsharded_runs_count_each_others_rows(place: Place) -> None:
    """In one folder, whichever wrote last."""
    before = place.disk()
    for index in range(2):
        place.run(f"shard.index={index}", "shard.count=2", slow="60")
    parts = [place.statuses(f"manifest_{index}_of_2.csv") for index in range(2)]
    assert parts[0] | parts[1] == dict.fromkeys(NAMES, "skipped")
    (place.out / "manifest.csv").unlink()
    (place.out / "run.json").unlink()
    place.run(slow="60")
    place.run("shard.index=1", "shard.count=3", slow="60")
    assert place.redone(before) == set()
    assert "3 of 3 subjects done" in place.run("run.status=true", "shard.count=2").text


def test_the_latest_row_of_all_manifests_counts(place: Place) -> None:
    """Subjects that shards overwrote have the shards' settings; going back is refused again."""
    place.run("shard.index=0", "shard.count=2", "run.seed=1", "run.overwrite=true")
    ours = set(place.statuses("manifest_0_of_2.csv"))
    assert f"({len(ours)} subject" in place.run(status=2).text
    place.run("run.overwrite=true")
    assert {name for name, status in place.statuses().items() if status == "done"} == ours
    assert "3 subjects" in place.run("run.seed=1", status=2).text


def test_after_a_run_died_while_overwriting_shards_nothing_counts_as_done(place: Place) -> None:
    """Files may be of either run then, so rows in the shards' manifests must not count."""
    for index in range(2):
        place.run(f"shard.index={index}", "shard.count=2", "run.seed=1", "run.overwrite=true")
    job = place.forks.start(*JOB, "run.overwrite=true", cwd=place.folder, env={"SLOW": "60"})
    job.until(place.out / "run.json", '"running"')
    job.until(place.out / "manifest.csv", "is to be made again")
    os.kill(job.pids[0], 9)
    job.wait()
    before = place.disk()
    place.run("run.seed=1")
    assert place.redone(before) == {*NAMES}
    assert place.statuses() == dict.fromkeys(NAMES, "done")


# Manifests


def written(path: Path, *rows: Row) -> bytes:
    Manifest(path, rows).close()
    return path.read_bytes()


@given(cut=st.integers(1, 400))
def test_a_truncated_last_line_is_not_a_row(cut: int, tmp_path_factory: pytest.TempPathFactory) -> None:
    """Wherever a crash cut it, also within the fingerprint; the rows before count."""
    path = tmp_path_factory.getbasetemp() / "torn.csv"
    rows = [
        Row("a", "done", ("a_labels.nii.gz",), 3, 1.5, "", 2.25, 1, fingerprint="0123-4567"),
        Row("b", "failed", error='he said "no", twice', finished="2026-01-01", fingerprint="0123-89ab"),
        Row("c", "done", ("c_labels.nii.gz",), volume_ml=0.5, fingerprint="0123-cdef"),
    ]
    whole = written(path, *rows)
    assert read_rows([path]) == {row.subject: row for row in rows}
    cut = min(cut, len(whole) - 1)
    path.write_bytes(whole[:-cut])
    lines = whole[:-cut].count(b"\n")
    assert list(read_rows([path]).values()) == rows[: max(0, lines - 1)]


def test_a_run_continues_after_a_truncated_line(place: Place) -> None:
    """The subject whose row was lost is predicted again, without a message about its fingerprint."""
    manifest, before = place.out / "manifest.csv", place.disk()
    manifest.write_bytes(manifest.read_bytes()[:-8])
    place.run()
    assert place.statuses() == {"a": "skipped", "b": "skipped", "c": "done"}
    assert place.redone(before) == {"c"}


def test_outputs_without_fingerprints_are_not_overwritten_unless_asked(place: Place) -> None:
    """Manifests of earlier versions have fewer columns and do not tell the settings."""
    with open(place.out / "manifest.csv", "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["subject", "status", "outputs", "patches", "seconds", "error", "volume_ml", "skipped"])
        writer.writerow(["a", "done", "a_labels.nii.gz", "4", "0.100", "", "1.000", "0"])
        writer.writerow(["b", "failed", "", "0", "0.100", "broken", "", "0"])
    before = place.disk()
    text = place.run(status=2).text
    assert "by a run that left no fingerprint (1 subject: a)" in text
    assert place.disk() == before
    assert "1 of 3 subjects done, 1 failed, 1 missing" in place.run("run.status=true", status=1).text
    place.run("run.overwrite=true")
    assert place.statuses() == dict.fromkeys(NAMES, "done")


def test_settings_that_are_no_longer_on_record_are_still_refused(place: Place) -> None:
    """Without run.json the message cannot name the change, but the fingerprint differs."""
    (place.out / "run.json").unlink()
    assert "with settings that are no longer on record (3 subjects: a, b, c)" in place.run("run.seed=1", status=2).text
    place.run(slow="60")
    assert place.statuses() == dict.fromkeys(NAMES, "skipped")


def test_invalid_tables_beside_the_manifest_are_ignored(tmp_path: Path) -> None:
    """Other tables and records that match the pattern, invalid numbers, and bytes that are not text."""
    written(tmp_path / "manifest.csv", Row("a", "done", ("a.nii",)), Row("b", "done", ("b.nii",)), Row("c", "done"))
    for name in ("a.nii", "c.nii"):
        (tmp_path / name).touch()
    (tmp_path / "manifest_x.csv").write_bytes(b"\xff\xfe\x00,\n1,2,3\n")
    (tmp_path / "manifest_y.csv").write_text("name,age\r\na,3\r\n")
    (tmp_path / "manifest_z.csv").write_text("subject,status,outputs,patches,seconds\r\na,done,x,many,1\r\n")
    (tmp_path / "manifest_dir.csv").mkdir()
    (tmp_path / "run_x.json").write_text("[1]")
    (tmp_path / "run_y.json").write_text("{")
    assert finished(tmp_path).keys() == {"a"}
    assert finished(tmp_path / "no") == {}


def test_the_later_of_two_rows_counts_in_whichever_file(tmp_path: Path) -> None:
    """By the time of writing, not the file's name; of equal times, the last in the file."""
    new, old = (
        Row("a", status, ("a.nii",), finished=at) for status, at in (("failed", "2026-02"), ("done", "2026-01"))
    )
    for first, second in ((new, old), (old, new)):
        written(tmp_path / "manifest.csv", first)
        written(tmp_path / "manifest_0_of_2.csv", second)
        assert read_rows(tmp_path.glob("manifest*.csv"))["a"] == new
        written(tmp_path / "manifest.csv", first, second)
        assert read_rows([tmp_path / "manifest.csv"])["a"] == new
    (tmp_path / "manifest_0_of_2.csv").unlink()
    written(tmp_path / "manifest.csv", Row("a", "failed", finished="2026"), Row("a", "done", finished="2026"))
    assert read_rows([tmp_path / "manifest.csv"])["a"].status == "done"


def test_a_subject_to_be_redone_is_not_done_in_any_manifest(tmp_path: Path) -> None:
    """From before a run's first subject on; at its end the manifest has one row per subject."""
    (tmp_path / "a.nii").touch()
    written(tmp_path / "manifest_0_of_2.csv", Row("a", "done", ("a.nii",), finished="2020", fingerprint="old"))
    plan = RunPlan(Group(None), [], [], ["a", "b"], [], {})
    record = RunRecord(tmp_path, plan, (0, 1), {})
    assert finished(tmp_path) == {}
    assert print_status([SubjectFiles("a", {})], tmp_path, 1) == 1
    row = Row("a", "done", ("a.nii",), fingerprint="new")
    record.add(row)
    assert finished(tmp_path) == {"a": row}
    assert record.close([], None) == 1  # b has no row
    lines = (tmp_path / "manifest.csv").read_text().splitlines()
    assert [line.split(",")[:2] for line in lines[1:]] == [["a", "done"], ["b", "failed"]]
    told = json.loads((tmp_path / "run.json").read_text())
    assert (told["subjects"], told["done"], told["failed"], told["missing"]) == (2, 1, 1, 0)


def test_todo_compares_each_subject(tmp_path: Path) -> None:
    """Done, made with other settings, failed, missing and new, in one folder."""
    (tmp_path / "in").mkdir()
    for name in "abcde":
        (tmp_path / f"in/{name}.nii").write_text(name)
    cases = find_cases(str(tmp_path / "in"))
    resume = Resume(tmp_path / "out", {"data": {"skip": 1}})
    assert resume.todo(cases).done == {}
    prints = dict(zip("abcde", resume.todo(cases).fingerprints, strict=True))
    assert len(set(prints.values())) == 5
    (tmp_path / "out").mkdir()
    for name in "abd":
        (tmp_path / f"out/{name}_labels.nii").touch()
    rows = [
        Row("a", "done", ("a_labels.nii",), fingerprint=prints["a"]),
        Row("b", "skipped", ("b_labels.nii",), fingerprint=prints["b"]),
        Row("c", "done", ("c_labels.nii",), fingerprint=prints["c"]),
        Row("d", "failed", ("d_labels.nii",), fingerprint=prints["d"]),
    ]
    written(tmp_path / "out/manifest.csv", *rows)
    todo = resume.todo(cases)
    assert {name: row.status for name, row in todo.done.items()} == {"a": "skipped", "b": "skipped"}
    write_json(tmp_path / "out/run.json", {"settings": {resume.settings_digest: resume.settings}})
    changed = Resume(tmp_path / "out", {"data": {"skip": 2}})
    with pytest.raises(
        ConfigError, match=r"outputs of 2 subjects .*\n  data\.skip was 1 and is 2 \(2 subjects: a, b\)"
    ):
        changed.todo(cases)
    assert Resume(tmp_path / "out", {"data": {"skip": 2}}, overwrite=True).todo(cases).done == {}
    assert Resume(tmp_path / "out", {"data": {"skip": 1}}, skip_done=False).todo(cases).done == {}


def test_files_of_replaced_outputs_are_removed(place: Place) -> None:
    """With fewer products or another suffix. Files of the user's stay."""
    place.run("stitch.products=[labels,entropy]", "run.overwrite=true")
    assert (place.out / "a_entropy.nii.gz").exists()
    (place.out / "a_notes.txt").write_text("mine")
    place.run("data.inputs=in/a.nii.gz", "callbacks.writer.compress=false", "run.overwrite=true")
    names = sorted(path.name for path in place.out.iterdir())
    assert [name for name in names if name.startswith("a_")] == ["a_labels.nii", "a_notes.txt"]
    assert [name for name in names if name.startswith("b_")] == ["b_entropy.nii.gz", "b_labels.nii.gz"]


def test_a_run_killed_while_redoing_still_leads_to_removal_of_old_files(place: Place, forks: Server) -> None:
    """Killed before it wrote anything: the next run still knows which files to remove."""
    place.run("stitch.products=[labels,entropy]", "run.overwrite=true")
    job = forks.start(*JOB, "run.overwrite=true", cwd=place.folder, env={"SLOW": "60"})
    job.until(place.out / "run.json", '"running"')
    os.kill(job.pids[0], signal.SIGKILL)
    job.wait()
    place.run("run.overwrite=true")
    assert sorted(path.name for path in place.out.glob("*entropy*")) == []
    assert place.statuses() == dict.fromkeys(NAMES, "done")
    assert json.loads((place.out / "run.json").read_text())["replaces"] == {}
