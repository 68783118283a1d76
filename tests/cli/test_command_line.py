"""Tests the command line: wrong input is one message and status 2, every subject has a row, and files are right."""

import csv
import gzip
import json
import os
import struct
import subprocess
from itertools import permutations, product
from pathlib import Path

import nibabel as nib
import numpy as np
import pytest
import torch
from forks import Server
from hydra import compose, initialize_config_dir
from synthetic import Over50, noise, read, run, save, unpacked

from voxquilt import __version__
from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.predict_config import check_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.data.discovery import find_cases
from voxquilt.errors import ConfigError

NETWORK = ("model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null")
GRID = ("data.patch_size=8", "data.patch_overlap=4")


def manifest(folder: Path) -> dict[str, dict[str, str]]:
    with open(folder / "manifest.csv", newline="", encoding="utf-8") as file:
        return {row["subject"]: row for row in csv.DictReader(file)}


def tree(folder: Path) -> list[str]:
    return sorted(str(path.relative_to(folder)) for path in folder.rglob("*"))


def table(stdout: str) -> dict[str, list[str]]:
    """The cells of the printed table by subject."""
    lines = [line.split("│")[1:-1] for line in stdout.splitlines() if line.startswith("│")]
    return {line[0].strip(): [cell.strip() for cell in line[1:]] for line in lines}


# Nothing is started


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working folder with a few scans, next to a torch that cannot be imported."""
    folder = tmp_path_factory.mktemp("place")
    (folder / "stub/torch").mkdir(parents=True)
    (folder / "stub/torch/__init__.py").write_text("raise ImportError('torch was imported for a light error')\n")
    work = folder / "work"
    for name in ("a", "b"):
        save(work / f"scans/{name}.nii", noise((8, 8, 8)))
    save(work / "twice/a.nii", noise((8, 8, 8)))
    (work / "empty").mkdir()
    (work / "table.csv").write_text("subject,t1,t2\ns1,scans/a.nii,\n")
    (work / "weights.pt").write_bytes(b"\x80\x02" + bytes(64))  # damaged, which torch has to say
    return folder


def light(place: Path, *arguments: str) -> "subprocess.CompletedProcess[str]":
    """Run where importing torch fails, and assert that no file is written."""
    before = tree(place / "work")
    done = run("predict.py", *arguments, cwd=place / "work", env={"PYTHONPATH": str(place / "stub")})
    assert tree(place / "work") == before
    assert "Traceback" not in done.stderr
    return done


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        # keys and groups
        ("data.patch_siz=8", "there is no key data.patch_siz. Did you mean data.patch_size?"),
        ("+data.patch_siz=8", "there is no key data.patch_siz. Did you mean data.patch_size?"),
        ("+run.resum=true", "there is no key run.resum"),
        ("+stich.overlap_mode=crop", "there is no key stich. Did you mean stitch?"),
        ("model=unett", "there is no model=unett; there are auto, bundle, exported"),
        ("experiment=brain", "there is no experiment=brain; there are brain_extraction"),
        ("callbacks.writer=null", "callbacks.writer needs a _target_"),
        ("callbacks.writer.in_memory=1GB", "callbacks.writer.in_memory must be null or a number of MiB; it is '1GB'"),
        ("callbacks.writer.in_memory=-1", "callbacks.writer.in_memory must be null or a number of MiB; it is -1"),
        ("ckpt_path=[a=b.ckpt]", "needs quotes inside quotes, such as 'ckpt_path=\"epoch=3.ckpt\"'"),
        ("data.images={t1:{subject}.nii}", "needs quotes inside quotes"),
        ("run=null", "run"),
        # grid and loader
        ("data.patch_size=0", "data.patch_size must be at least 1 along axis i; it is 0"),
        ("data.patch_size=[8,8]", "data.patch_size must be an integer or three"),
        ("data.patch_size=abc", "integer or three of them, in voxels along i, j, k; it is 'abc'"),
        ("data.patch_size=8.0", "data.patch_size must be an integer"),
        ("data.patch_overlap=8", "axis i: patch_overlap 8 must be smaller than patch size 8"),
        ("data.patch_overlap=[2,2,10]", "axis k: patch_overlap 10 must be smaller"),
        ("data.patch_overlap=3", "patch_overlap must be even"),
        ("data.patch_overlap=-2", "patch_overlap must be at least 0"),
        ("data.divisible_by=0", "data.divisible_by must be at least 1"),
        ("data.batch_size=0", "data.batch_size must be an integer of at least 1; it is 0"),
        ("data.num_workers=true", "data.num_workers must be an integer"),
        ("data.padding_mode=reflekt", "data.padding_mode (null, a number, or a mode of numpy.pad) must be one of"),
        ("data.nonfinite=ignore", "data.nonfinite must be one of error, zero"),
        ("data.skip=true", "data.skip is null, a number, or a mask's path with {subject}; it is True"),
        ("data.skip=[1,2]", "data.skip is null, a number, or a mask's path"),
        ("data.skip=masks/{subject}.nii", "data.skip=masks/{subject}.nii: no subject has such a mask (relative to"),
        ("data.margin=5", "data.margin=5 is around the box of data.within, which is null; set both."),
        ("data.labels=truth.nii", "data.labels is a path with {subject}, such as 'labels/{subject}.nii.gz', or one"),
        ("data.labels=truth/{subject}.nii", "data.labels=truth/{subject}.nii: no subject has such a file (relative to"),
        ("run.surface_tolerance=-1", "run.surface_tolerance must be a number of mm from 0; it is -1"),
        # model space, network and products
        ("preprocess.orientation=RAX", "one letter of each pair L/R, A/P, S/I"),
        ("preprocess.spacing=-1", "spacing must be null, a positive number of mm, or three"),
        ("preprocess.spacing=[1,2]", "spacing must be null, a positive number of mm, or three"),
        ("preprocess.intensity=[clip]", "preprocess.intensity must be a list of callables, each with its _target_"),
        ("preprocess.intensity={t9: []}", "preprocess.intensity names ['t9']; the images are ['image']"),
        ("stitch.overlap_mode=gausian", "it is 'gausian'. Did you mean gaussian?"),
        ("stitch.products=[lables]", "it is 'lables'. Did you mean labels?"),
        ("stitch.products=labels", "stitch.products is a list, such as '[labels]'"),
        ("stitch.threshold=high", "stitch.threshold must be a number"),
        (
            "stitch.compare=[crop,han]",
            "stitch.compare must be one of crop, average, hann, gaussian, nnunet, monai; it is 'han'",
        ),
        ("stitch.compare=hann", "stitch.compare is a list, such as '[crop,hann]'"),
        (
            "stitch.restore=label",
            "stitch.restore must be one of scores, probabilities, labels; it is 'label'. Did you mean labels?",
        ),
        ("stitch.fill=black", "stitch.fill is null, a number, or a number for each channel; it is 'black'"),
        ("stitch.class_names=brain", "stitch.class_names is a list"),
        ("stitch.postprocess=[fill]", "stitch.postprocess must be a list of callables"),
        ("model.average=mean", "model.average must be one of logits, probabilities"),
        ("model.activation=relu", "model.activation must be one of softmax, sigmoid, none"),
        ("model.flips=0", "model.flips is a list"),
        ("model.offload=cpu", "model.offload must be one of true, false, auto; it is 'cpu'"),
        ("model.compile=1", "model.compile must be one of true, false; it is 1"),
        ("model.channels_last=auto", "model.channels_last must be one of true, false; it is 'auto'"),
        ("run.on_error=ignore", "run.on_error must be one of skip, raise"),
        ("run.allowed_targets=[voxquilt.*]", "model.net._target_=synthetic.Over50 is not among run.allowed_targets"),
        ("run.distribute=slabs", "run.distribute must be one of subject, slab, auto; it is 'slabs'. Did you mean slab"),
        ("run.resume=maybe", "run.resume must be true or false; it is 'maybe'"),
        ("run.overwrite=1", "run.overwrite must be true or false; it is 1"),
        ("trainer.strategy=fsdp", "trainer.strategy=fsdp divides the network between processes"),
        ("shard.index=4", "shard.index=4 is not below shard.count=1: shards are counted from 0"),
        ("shard.count=two", "shard.count must be an integer; it is 'two'"),
        ("shard.count=0", "shard.index=0 is not below shard.count=0"),
        ("shard.index=-1", "shard.index must be an integer; it is -1"),
        # files
        ("ckpt_path=best.ckpt", "ckpt_path: there is no file best.ckpt"),
        ("ckpt_path=epoch=3-step=10.ckpt", "ckpt_path: there is no file epoch=3-step=10.ckpt"),
        ("ckpt_path=[weights.pt,other.pt]", "ckpt_path: there is no file other.pt"),
        ("data.inputs=nowhere", "there is no file or folder nowhere"),
        ("data.inputs=empty", "the folder empty has no image file"),
        ("data.inputs=scans/*.nii.gz", "no image file matches scans/*.nii.gz"),
        ("data.inputs=1e3", "1000.0 is float, not a path; quote it"),
        ("data.inputs=[scans,twice]", "two subjects have the id 'a': scans/a.nii and twice/a.nii"),
        ("data.inputs=table.csv", "table.csv, line 2"),
        ("data.images.t1=t1.nii", "data.images.t1 needs {subject}"),
        ("output_dir=scans", "output_dir=scans is the folder of data.inputs"),
        ("output_dir=./scans/../scans/", "is the folder of data.inputs"),
        ("output_dir=weights.pt/out", "cannot be written"),
        ("output_dir=weights.pt", "weights.pt is not a folder"),
        ("output_dir=null", "output_dir must be a folder's name"),
        ("output_dir=10_1", "output_dir must be a folder's name"),
    ],
)  # fmt: skip
def test_a_wrong_configuration_is_one_message_and_status_2(arguments: str, message: str, place: Path) -> None:
    """Before torch is imported or a file is written."""
    done = light(place, "data.inputs=scans", *NETWORK, *GRID, arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert done.stderr.count("voxquilt: ") <= 1
    assert done.stdout == ""


def test_keys_that_need_a_value_are_all_named_at_once(place: Path) -> None:
    """With the kind of value that each needs."""
    done = light(place, "model=state_dict")
    assert done.returncode == 2
    keys = [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]]
    assert keys == ["ckpt_path", "data.inputs", "data.patch_size", "model.net"]
    done = light(place)
    assert done.returncode == 2
    keys = [line.split(":")[0].strip() for line in done.stderr.splitlines()[1:]]
    assert keys == ["ckpt_path", "data.inputs", "data.patch_size"]


def test_help_and_configuration_are_printed_within_seconds(place: Path) -> None:
    """--help explains the keys that people use, --cfg job shows all of them; status 0."""
    done = light(place, "--help")
    assert done.returncode == 0
    keys = ["data.inputs", "data.images", "data.patch_size", "data.patch_overlap", "data.batch_size", "ckpt_path",
            "model", "preprocess.orientation", "preprocess.spacing", "preprocess.intensity", "stitch.overlap_mode",
            "stitch.products", "trainer.", "output_dir", "run.on_error", "Exit status"]  # fmt: skip
    assert [key for key in keys if key not in done.stdout] == []
    done = light(place, "--version")
    assert (done.returncode, done.stdout) == (0, f"voxquilt {__version__}\n")
    done = light(place, "--cfg", "job", "model=torchscript")
    assert done.returncode == 0
    assert "overlap_mode: gaussian" in done.stdout


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("model.net._target_=synthetic.Over51",), "'Over51' is importable from module 'synthetic'"),
        (("+trainer.foo=1",), "trainer cannot be built from lightning.pytorch.Trainer"),
        (("+trainer.max_epoch=1",), "There is no trainer.max_epoch. Did you mean trainer.max_epochs?"),
        (("model.net._target_=synthetic.Slow", "model.net.canels=2"), "There is no model.net.canels."),
        (("ckpt_path=weights.pt",), "weights.pt cannot be read as weights"),
    ],
)
def test_an_error_found_while_building_is_one_message_and_status_2(
    forks: Server, arguments: tuple[str, ...], message: str, place: Path
) -> None:
    """A class that does not exist, an unknown argument, an invalid weights file; nothing is written."""
    before = tree(place / "work")
    done = forks.run("data.inputs=scans", *NETWORK, *GRID, *arguments, cwd=place / "work")
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stderr.count("voxquilt: ") == 1
    assert tree(place / "work") == before


def test_build_names_the_key_and_the_cause() -> None:
    """In process: a wrong nested argument, a class of ours that refuses, and a target that Hydra forbids."""
    net = {"_target_": "torch.nn.Sequential", "_args_": [{"_target_": "torch.nn.Conv3d", "in_chanels": 1}]}
    with pytest.raises(ConfigError, match=r"model cannot be built from torch\.nn\.Sequential: .*'in_chanels'"):
        build(net, "model")
    with pytest.raises(
        ConfigError, match=r"There is no model\._args_\[0\]\.in_chanels\. Did you mean .*\.in_channels\?"
    ):
        build(net, "model")
    unet = {"_target_": "monai.networks.nets.UNet", "outchannels": 2, "in_channels": 1}
    with pytest.raises(ConfigError) as caught:
        build({"_target_": "voxquilt.predictor_from_state_dict", "net": unet, "ckpt_path": None}, "model")
    assert "There is no model.net.outchannels. Did you mean model.net.out_channels? " in str(caught.value)
    assert "monai.networks.nets.UNet takes spatial_dims, in_channels, out_channels, channels, " in str(caught.value)
    right = {"_target_": "torch.nn.Identity"}
    with pytest.raises(ConfigError, match=r"There is no model\.flps\. Did you mean model\.flips\?"):
        build({"_target_": "voxquilt.predictor_from_state_dict", "net": right, "ckpt_path": None, "flps": [0]}, "model")
    transform = {"_target_": "monai.transforms.NormalizeIntensity", "nonzer": True}
    with pytest.raises(ConfigError, match=r"no preprocess\.intensity\[0\]\.nonzer\. Did you mean .*\.nonzero\?"):
        build({"_target_": "voxquilt.Preprocess", "intensity": [transform]}, "preprocess")
    with pytest.raises(ConfigError, match=r"^spacing must be null"):
        build({"_target_": "voxquilt.Preprocess", "spacing": -1}, "preprocess")
    with pytest.raises(ConfigError, match=r"(?s)model cannot be built from os\.system: .*blocklisted"):
        build({"_target_": "os.system", "command": "true"}, "model")


def test_the_allow_list_covers_everything_that_is_imported(place: Path) -> None:
    """Including a LightningModule's class. A pattern ends with .*; without it only the exact name matches."""
    allowed = "run.allowed_targets=[voxquilt.*,lightning.pytorch.Trainer,synthetic.Over50]"
    for extra, refused in (
        ("model.net._target_=synthetic.Over5", "model.net._target_=synthetic.Over5 "),
        ("preprocess.intensity=[{_target_: numpy.abs}]", "preprocess.intensity[0]._target_=numpy.abs"),
        ("model.net._target_=voxquilty.Net", "model.net._target_=voxquilty.Net"),
    ):
        done = light(place, "data.inputs=scans", *NETWORK, *GRID, allowed, extra)
        assert (done.returncode, refused in done.stderr) == (2, True)
    module = ("model=lightning", "model.module_class=os.path", "ckpt_path=weights.pt")
    done = light(place, "data.inputs=scans", *module, *GRID, allowed)
    assert (done.returncode, "model.module_class=os.path is not among" in done.stderr) == (2, True)


@pytest.mark.parametrize(
    ("typed", "understood"),
    [
        ("data.labels={subject}/seg.nii", 'data.labels="{subject}/seg.nii"'),
        ("data.labels='{subject}/seg.nii'", "data.labels='{subject}/seg.nii'"),
        ('data.images={t1: "{subject}/t1.nii"}', 'data.images={t1: "{subject}/t1.nii"}'),
        ("data.images.t1=a b/{subject}.nii", '++data.images.t1="a b/{subject}.nii"'),
        ("+data.images.t1=x/{subject}.nii", '+data.images.t1="x/{subject}.nii"'),
        ("ckpt_path=epoch=3-step=10.ckpt", 'ckpt_path="epoch=3-step=10.ckpt"'),
        ("model.net.channels=[16,32]", "++model.net.channels=[16,32]"),
        ("model.module_args.width=3", "++model.module_args.width=3"),
        ("model/net=unet", "model/net=unet"),
        ("logger=null", "~logger"),
        ("logger.name=null", "logger.name=null"),
        ("x=range(start=1,stop=3)", "x=range(start=1,stop=3)"),
        ("~data.batch_size", "~data.batch_size"),
        ("--config-dir=/a=b", "--config-dir=/a=b"),
        ("data.inputs=scans/*.nii.gz", "data.inputs=scans/*.nii.gz"),
        ("data.inputs=~/a", 'data.inputs="~/a"'),
        ("data.inputs=Zoë's (1) #2.nii", 'data.inputs="Zoë\'s (1) #2.nii"'),
        ("data.inputs=[a.nii,b.nii]", "data.inputs=[a.nii,b.nii]"),
        ("data.inputs=a.nii,b.nii", "data.inputs=a.nii,b.nii"),
        ("data.inputs=", "data.inputs="),
    ],
)
def test_overrides_reach_hydra_as_they_were_meant(typed: str, understood: str) -> None:
    """Paths are quoted once where Hydra's grammar needs it; everything else is passed as typed."""
    assert to_overrides([typed]) == [understood]
    assert to_overrides([understood]) == [understood]


# Runs


def test_a_folder_of_bad_files_is_reported_and_the_good_ones_are_finished(tmp_path: Path) -> None:
    """Each bad file has a row with a reason that names it; ids are strings, labels are right, the status is 1."""
    scans = tmp_path / "méd scans"
    good = {name: save(scans / f"{name}.nii.gz", noise((12, 9, 7), n))
            for n, name in enumerate(["001", "10_1", "1e3", "Zoë ß 1", "zz"])}  # fmt: skip
    x = noise((20, 20, 20))
    packed = gzip.compress(nib.Nifti1Image(x, np.eye(4)).to_bytes())
    (scans / "truncated.nii.gz").write_bytes(packed[: len(packed) // 2])
    (scans / "flipped.nii.gz").write_bytes(packed[:5000] + bytes([packed[5000] ^ 1]) + packed[5001:])
    (scans / "short.nii").write_bytes(nib.Nifti1Image(x, np.eye(4)).to_bytes()[:-1])
    (scans / "empty.nii").touch()
    (scans / "text.nii").write_text("no image\n" * 100)
    (scans / "text_gz.nii.gz").write_text("no image\n" * 100)
    save(scans / "two_d.nii", noise((9, 9)))
    save(scans / "five_d.nii", noise((4, 4, 4, 1, 2)))
    save(scans / "nan.nii", np.where(noise((9, 9, 9)) > 98, np.nan, 1).astype(np.float32))
    save(scans / "complex.nii", np.ones((4, 4, 4), np.complex64))
    save(scans / "rgb.nii", np.zeros((4, 4, 4), np.dtype([("R", "u1"), ("G", "u1"), ("B", "u1")])))
    save(scans / "zero_axis.nii", np.zeros((4, 0, 4), np.int16))
    flat = bytearray(nib.Nifti1Image(noise((4, 4, 4)), np.eye(4)).to_bytes())
    struct.pack_into("<h12f", flat, 254, 1, *[0.0] * 12)
    struct.pack_into("<12f", flat, 280, *[0.0] * 12)
    (scans / "degenerate.nii").write_bytes(flat)
    (scans / "alone.img").write_bytes(b"\0" * 100)

    done = run("predict.py", f"data.inputs={scans}", "output_dir=aus gabe", *NETWORK, *GRID, cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr == ""
    rows = manifest(tmp_path / "aus gabe")
    reasons = {
        "truncated": "may be truncated or damaged", "flipped": "may be truncated or damaged",
        "short": "smaller than its header says", "empty": "the file is empty", "text": "not a NIfTI file",
        "text_gz": "not a NIfTI file", "two_d": "2-D", "five_d": "it has 2 channels, and the network takes 1",
        "nan": "NaN or infinite",
        "complex": "complex", "rgb": "RGB", "zero_axis": "an axis without voxels", "degenerate": "degenerate",
        "alone": "not a NIfTI file",
    }  # fmt: skip
    assert rows.keys() == good.keys() | reasons.keys()
    for name, reason in reasons.items():
        assert (rows[name]["status"], rows[name]["outputs"]) == ("failed", "")
        assert reason in rows[name]["error"]
        assert f"{name}." in rows[name]["error"]
        assert reason in done.stdout
    printed = table(done.stdout)
    for name, array in good.items():
        assert (rows[name]["status"], rows[name]["outputs"]) == ("done", f"{name}_labels.nii.gz")
        np.testing.assert_array_equal(read(tmp_path / f"aus gabe/{name}_labels.nii.gz"), array > 50)
        assert printed[name][:3] == ["done", f"{(array > 50).sum() / 1000:.1f}", "4"]
    assert sorted(os.listdir(tmp_path / "aus gabe")) == sorted(
        [f"{name}_labels.nii.gz" for name in good]
        + ["labels.ctbl", "labels.txt", "manifest.csv", "statistics.csv", "run.json"]
        + ["report", "report.html", "tensorboard"]
    )
    assert "volume [ml]" in done.stdout
    assert "5 of 19 subjects done" in done.stdout
    header = (tmp_path / "aus gabe/manifest.csv").read_text().splitlines()[0]
    assert header.startswith("subject,status,outputs,patches,seconds,error")


def test_a_table_of_several_images_predicts_with_a_lightning_state_dict(forks: Server, tmp_path: Path) -> None:
    """Columns become channels, inputs are not moved, and run.json holds the configuration and versions."""
    a, b = save(tmp_path / "in/a b.nii.gz", noise((9, 9, 9), 1)), save(tmp_path / "in/b.nii.gz", noise((9, 9, 9), 2))
    mine = save(tmp_path / "mine/s3_labels.nii.gz", noise((9, 9, 9), 3))
    rows = "s1,a b.nii.gz,b.nii.gz\n007,b.nii.gz,a b.nii.gz\ns3,b.nii.gz,../mine/s3_labels.nii.gz\n"
    (tmp_path / "in/table.csv").write_text(f"subject,t1,t2\n{rows}")
    torch.save(
        {"state_dict": {f"net.{k}": v for k, v in Over50(2).state_dict().items()}}, tmp_path / "epoch=3-step=9.ckpt"
    )
    done = forks.run(
        "data.inputs=in/table.csv", "output_dir=out", *GRID, "data.batch_size=3", "model=state_dict",
        "model.net._target_=synthetic.Over50", "model.net.channels=2", "ckpt_path=epoch=3-step=9.ckpt",
        "model.prefix=net.", "stitch.products=[labels,probabilities]", "stitch.overlap_mode=crop",
        "callbacks.writer.compress=false", "callbacks.writer.overlay=true", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    np.testing.assert_array_equal(read(tmp_path / "out/s1_labels.nii"), a > 50)
    np.testing.assert_array_equal(read(tmp_path / "out/007_labels.nii"), b > 50)
    assert read(tmp_path / "out/s1_probabilities.nii").shape == (9, 9, 9, 2)
    np.testing.assert_array_equal(read(tmp_path / "mine/s3_labels.nii.gz"), mine)
    assert manifest(tmp_path / "out")["007"]["outputs"] == "007_labels.nii;007_probabilities.nii;007_overlay.png"
    assert (tmp_path / "out/007_overlay.png").read_bytes()[:4] == b"\x89PNG"
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert {key: record[key] for key in ("subjects", "done", "failed", "patches")} == {
        "subjects": 3, "done": 3, "failed": 0, "patches": 24,
    }  # fmt: skip
    assert record["configuration"]["ckpt_path"] == "epoch=3-step=9.ckpt"
    assert record["configuration"]["data"]["patch_size"] == 8
    assert record["configuration"]["model"]["net"] == {"_target_": "synthetic.Over50", "channels": 2}
    assert record["versions"]["torch"] == torch.__version__
    assert record["seconds"] > 0


def test_shards_share_the_subjects_and_the_folder(forks: Server, tmp_path: Path) -> None:
    """Each subject once, by patches from headers; a shard may have none; run.status lists what is missing."""
    sizes = {"a": 40, "b": 8, "c": 12, "d": 24, "e": 16}
    volumes = {name: save(tmp_path / f"scans/{name}.nii.gz", noise((9, 9, n), n)) for name, n in sizes.items()}
    (tmp_path / "scans/f.nii.gz").write_bytes(b"no image")
    arguments = ("data.inputs=scans", *NETWORK, *GRID, "shard.count=8")

    def shard(index: int) -> set[str]:
        done = forks.run(*arguments, "shard.index=${oc.env:PART}", cwd=tmp_path, env={"PART": str(index)})
        with open(tmp_path / f"outputs/manifest_{index}_of_8.csv", newline="", encoding="utf-8") as file:
            rows = {row["subject"]: row["status"] for row in csv.DictReader(file)}
        assert done.returncode == (1 if "f" in rows else 0)
        record = json.loads((tmp_path / f"outputs/run_{index}_of_8.json").read_text())
        assert record["subjects"] == len(rows)
        return set(rows)

    found = [shard(index) for index in (0, 1, 7)]
    assert found == [{"a"}, {"d"}, set()]  # the longest first
    done = forks.run(*arguments, "run.status=true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (1, "")
    assert "3 of 8 shards have begun; not 2, 3, 4, 5, 6" in done.stdout
    assert "2 of 6 subjects done, 0 failed, 4 missing\nmissing: b, c, e, f\n" in done.stdout
    found += [shard(index) for index in (2, 3, 4, 5)]
    assert sorted(name for subjects in found for name in subjects) == list("abcdef")
    done = forks.run(*arguments, "run.status=true", cwd=tmp_path)
    assert done.returncode == 1
    assert "5 of 6 subjects done, 1 failed, 0 missing\nf: failed: " in done.stdout
    for name, volume in volumes.items():
        np.testing.assert_array_equal(read(tmp_path / f"outputs/{name}_labels.nii.gz"), volume > 50)
    (tmp_path / "scans/f.nii.gz").unlink()
    done = forks.run(*arguments, "run.status=true", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")


def test_skipping_and_comparing_work_from_the_command_line(forks: Server, tmp_path: Path) -> None:
    """Patches outside a mask cost nothing, a subject without its mask fails alone, and each blend has its own files."""
    for n, name in enumerate("abc"):
        save(tmp_path / f"scans/{name}.nii.gz", noise((9, 30, 9), n))
        mask = np.zeros((9, 30, 9), np.uint8)
        mask[4, 2 if name == "a" else 29, 3] = name != "c"
        if name != "b":
            save(tmp_path / f"masks/{name}.nii.gz", mask)
    arguments = ("data.inputs=scans", *NETWORK, *GRID, "data.batch_size=3", "stitch.compare=[crop,hann]")
    done = forks.run(
        *arguments, "data.skip=masks/{subject}.nii.gz", "stitch.products=[labels,disagreement]",
        "stitch.restore=labels", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    assert "labels are made in model space" in done.stdout
    rows = manifest(tmp_path / "outputs")
    names = [f"a_{product}.nii.gz" for product in ("labels", "disagreement", "labels_crop", "labels_hann")]
    assert rows["a"]["outputs"].split(";") == names
    # There are two patches along i and k each; of the seven along j one contains the voxel.
    assert (rows["a"]["patches"], rows["a"]["skipped"]) == ("4", "24")
    assert table(done.stdout)["a"][2] == "4 of 28"
    assert "masks/b.nii.gz: there is no such file" in rows["b"]["error"]
    assert (rows["c"]["patches"], rows["c"]["skipped"]) == ("0", "28")
    record = json.loads((tmp_path / "outputs/run.json").read_text())
    assert (record["patches"], record["patches_skipped"]) == (4, 52)
    for mode in ("", "_crop", "_hann"):
        labels = read(tmp_path / f"outputs/a_labels{mode}.nii.gz")
        covered = np.s_[:, : 6 if mode == "_crop" else 8]  # of crop, half of the overlap is the neighbour's
        np.testing.assert_array_equal(labels[covered], noise((9, 30, 9), 0)[covered] > 50)
        assert not labels[:, 8:].any()
        assert not read(tmp_path / f"outputs/c_labels{mode}.nii.gz").any()

    done = forks.run(*arguments, "data.skip=-1", "output_dir=all", cwd=tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    assert {(row["patches"], row["skipped"]) for row in manifest(tmp_path / "all").values()} == {("28", "0")}
    for n, name in enumerate("abc"):
        np.testing.assert_array_equal(read(tmp_path / f"all/{name}_labels.nii.gz"), noise((9, 30, 9), n) > 50)


def test_products_kept_on_disk_give_the_same_files(forks: Server, tmp_path: Path) -> None:
    """They are kept in unlinked files: byte for byte as from memory, and nothing else in the folder."""
    save(tmp_path / "scans/a.nii.gz", noise((9, 12, 10)), np.diag([-1.0, 2, 1.5, 1]))
    for limit in ("0", "null"):
        done = forks.run(
            "data.inputs=scans", *NETWORK, *GRID, "stitch.products=[probabilities,entropy]",
            f"callbacks.writer.in_memory={limit}", f"output_dir=limit_{limit}", "preprocess.spacing=1.3", cwd=tmp_path,
        )  # fmt: skip
        assert (done.returncode, done.stderr) == (0, "")
    assert sorted(os.listdir(tmp_path / "limit_0")) == sorted(os.listdir(tmp_path / "limit_null"))
    for name in ("a_probabilities.nii.gz", "a_entropy.nii.gz"):
        assert unpacked(tmp_path / "limit_0" / name) == unpacked(tmp_path / "limit_null" / name)


def test_subject_patterns_work_from_the_command_line(forks: Server, tmp_path: Path) -> None:
    """With unquoted {subject}; images on different grids and a missing image fail and are named."""
    x = save(tmp_path / "raw/s1/t1.nii", noise((9, 9, 9), 1))
    save(tmp_path / "raw/s1/t2.nii", noise((9, 9, 9), 2))
    save(tmp_path / "raw/s2/t1.nii", noise((9, 9, 9), 1))
    save(tmp_path / "raw/s2/t2.nii", noise((9, 9, 8), 1))
    save(tmp_path / "raw/s3/t1.nii", noise((9, 9, 9), 1))
    save(tmp_path / "raw/s4/t1.nii", noise((9, 9, 9), 1))
    save(tmp_path / "raw/s4/t2.nii", noise((9, 9, 9), 1), np.diag([1, 1, 1.5, 1]))
    done = forks.run(
        "data.inputs=raw", "data.images.t1={subject}/t1.nii", "data.images.t2={subject}/t2.nii",
        "output_dir=out", *GRID, *NETWORK, "model.net.channels=2", cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (1, "")
    rows = manifest(tmp_path / "out")
    assert {name: row["status"] for name, row in rows.items()} == {
        "s1": "done", "s2": "failed", "s3": "failed", "s4": "failed",
    }  # fmt: skip
    np.testing.assert_array_equal(read(tmp_path / "out/s1_labels.nii.gz"), x > 50)
    for name in ("s2", "s4"):
        assert "different grids" in rows[name]["error"]
        assert f"raw/{name}/t1.nii" in rows[name]["error"]
        assert f"raw/{name}/t2.nii" in rows[name]["error"]
    assert "raw/s3/t2.nii: there is no such file" in rows["s3"]["error"]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_every_orientation_of_a_volume_gives_the_same_labels_in_the_world(forks: Server, tmp_path: Path) -> None:
    """All 48 flips and permutations of an oblique volume, by a TorchScript ensemble, are equal voxel by voxel."""
    x = noise((13, 10, 8))
    affine = np.array([[0.9, 0.2, 0, -3], [-0.2, 1.1, 0.1, 5], [0, -0.1, 1.6, 7], [0, 0, 0, 1]])
    for order in permutations(range(3)):
        for flips in product((1, -1), repeat=3):
            turned = x.transpose(order)[:: flips[0], :: flips[1], :: flips[2]]
            to_old = np.eye(4)  # voxel of the turned array to voxel of x
            to_old[:3, :3] = 0
            for new, (old, flip) in enumerate(zip(order, flips, strict=True)):
                to_old[old, new] = flip
                to_old[old, 3] = 0 if flip == 1 else x.shape[old] - 1
            name = "".join(map(str, order)) + "".join("pm"[f < 0] for f in flips)
            save(tmp_path / f"in/{name}.nii", turned.copy(), affine @ to_old)
    for member in ("a.pt", "b.pt"):
        torch.jit.script(Over50()).save(tmp_path / member)
    done = forks.run(
        "data.inputs=in/*.nii", "output_dir=out", *GRID, "data.batch_size=7", "data.num_workers=2",
        "model=torchscript", "ckpt_path=[a.pt,b.pt]", "model.flips=[0,2]", "callbacks.writer.compress=false",
        cwd=tmp_path,
    )  # fmt: skip
    assert (done.returncode, done.stderr) == (0, "")
    for order in permutations(range(3)):
        for flips in product((1, -1), repeat=3):
            name = "".join(map(str, order)) + "".join("pm"[f < 0] for f in flips)
            labels = read(tmp_path / f"out/{name}_labels.nii")
            back = labels[:: flips[0], :: flips[1], :: flips[2]].transpose(np.argsort(order))
            np.testing.assert_array_equal(back, x > 50)
            source, written = nib.load(tmp_path / f"in/{name}.nii"), nib.load(tmp_path / f"out/{name}_labels.nii")
            np.testing.assert_array_equal(written.affine, source.affine)


def test_on_error_raise_ends_with_the_reason_and_status_1(forks: Server, tmp_path: Path) -> None:
    """One message on stderr; the subjects before it are finished, and run.json is written."""
    x = save(tmp_path / "in/a.nii", noise((8, 8, 8)))
    (tmp_path / "in/b.nii").touch()
    save(tmp_path / "in/c.nii", noise((30, 30, 30)))
    done = forks.run("data.inputs=in", *GRID, *NETWORK, "run.on_error=raise", "data.num_workers=0", cwd=tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith("voxquilt: b: in/b.nii: the file is empty.")
    assert "Traceback" not in done.stderr
    np.testing.assert_array_equal(read(tmp_path / "outputs/a_labels.nii.gz"), x > 50)
    assert {name: row["status"] for name, row in manifest(tmp_path / "outputs").items()} == {"a": "done", "b": "failed"}
    assert json.loads((tmp_path / "outputs/run.json").read_text())["failed"] == 1


def test_patterns_need_no_data_inputs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """data.images alone finds the subjects."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "raw/a/t1.nii", noise((4, 4, 4)))
    register_resolvers()
    overrides = ["data.images={t1: 'raw/{subject}/t1.nii'}", "data.patch_size=4", "ckpt_path=null", "model=torchscript"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = check_predict(compose("predict", overrides))
    assert plain["data"]["inputs"] is None
    assert [case.subject for case in find_cases(None, plain["data"]["images"])] == ["a"]


def test_classes_in_the_working_folder_are_found(tmp_path: Path) -> None:
    """A network in a file next to the data needs no PYTHONPATH."""
    (tmp_path / "beside.py").write_text("from synthetic import Over50\n\n\nclass Mine(Over50):\n    pass\n")
    save(tmp_path / "in/a.nii", volume := noise((6, 6, 6)))
    network = ("model=state_dict", "model.net._target_=beside.Mine", "ckpt_path=null")
    result = run("predict.py", "data.inputs=in", "data.patch_size=6", *network, cwd=tmp_path)
    assert result.returncode == 0, result.stderr
    np.testing.assert_array_equal(read(tmp_path / "outputs/a_labels.nii.gz"), np.asarray(volume) > 50)


@pytest.mark.parametrize(
    ("activation", "average", "wanted"),
    [
        ("null", "logits", None), ("sigmoid", "logits", "sigmoid"), ("null", "probabilities", "applied"),
        ("softmax", "probabilities", "applied"), ("sigmoid", "probabilities", "applied_sigmoid"),
    ],
)  # fmt: skip
def test_probabilities_are_not_activated_twice(activation: str, average: str, wanted: str | None) -> None:
    """What stitching applies follows from what the network applied; several labels per voxel stay several."""
    register_resolvers()
    overrides = ["model=torchscript", f"model.activation={activation}", f"model.average={average}"]
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        assert compose("predict", overrides).stitch.activation == wanted


def test_a_run_whose_record_cannot_be_written_ends_with_status_1(forks: Server, tmp_path: Path) -> None:
    """A disk lost at the end is not a wrong configuration; the message names the file."""
    save(tmp_path / "in/a.nii", noise((8, 8, 8)))
    (tmp_path / "beside.py").write_text(
        "import pathlib, synthetic\n\n\nclass Blocker(synthetic.Over50):\n    def forward(self, x):\n"
        "        path = pathlib.Path('outputs/run.json')\n        path.unlink()\n        path.mkdir()\n"
        "        return super().forward(x)\n"
    )
    network = ("model=state_dict", "model.net._target_=beside.Blocker", "ckpt_path=null")
    done = forks.run("data.inputs=in", *GRID, *network, cwd=tmp_path)
    assert done.returncode == 1
    assert f"{tmp_path}/outputs/run.json: writing failed" in done.stderr
    assert "Traceback" not in done.stderr
    assert manifest(tmp_path / "outputs")["a"]["status"] == "done"
