"""Tests weights on the command line: every format predicts the same volume, and no file runs its pickles."""

import io
import pickle
import zipfile
from collections.abc import Callable
from pathlib import Path

import lightning.pytorch as pl
import numpy as np
import pytest
import safetensors.torch
import torch
from forks import Server, checked
from networks import Lit, unet
from odd_files import Bomb
from onnx_files import export, export_anew, graph, with_external
from synthetic import noise, read, run, save

pytestmark = pytest.mark.filterwarnings("ignore")  # of torch.jit and torch.export, which saves weights here

JOB = ("data.inputs=in", "data.patch_size=16", "data.patch_overlap=8", "data.batch_size=3", "trainer=cpu")
PRODUCTS = ("stitch.products=[probabilities,labels]", "callbacks.writer.compress=false")
NET = ("model/net=unet", "model.net.out_channels=3", "model.net.channels=[4,8]", "model.net.strides=[2]")
STATE = ("model=state_dict", *NET)
LIT = ("model=lightning", "model.module_class=networks.Lit")


def lit_checkpoint(path: Path) -> None:
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(Lit())
    trainer.save_checkpoint(path)


def exported(path: Path) -> None:
    """An archive for batches of two, although the run has batches of three."""
    torch.export.save(torch.export.export(unet(), (torch.randn(2, 1, 16, 16, 16),)), path)


SAVERS: dict[str, Callable[[Path], object]] = {
    "net.pt": lambda path: torch.save(unet().state_dict(), path),
    "net.pth": lambda path: torch.save({"model_state_dict": unet().state_dict(), "epoch": 3}, path),
    "net.safetensors": lambda path: safetensors.torch.save_file(unet().state_dict(), path),
    "lit.ckpt": lit_checkpoint,
    "old.ckpt": lambda path: torch.save(
        torch.load(path.with_name("lit.ckpt"), weights_only=True), path, _use_new_zipfile_serialization=False
    ),
    "script.pt": lambda path: torch.jit.save(torch.jit.script(unet()), path),
    "net.pt2": exported,
    "net.onnx": lambda path: export_anew(path, unet(), (2, 1, 16, 16, 16)),
    "two.onnx": lambda path: export(path, unet(), (2, 1, 16, 16, 16)),
}
FORMATS = {
    "state dict": (*STATE, "ckpt_path=net.pt"),
    "wrapped state dict": (*STATE, "ckpt_path=net.pth"),
    "safetensors": (*STATE, "ckpt_path=net.safetensors"),
    "Lightning": (*LIT, "ckpt_path=lit.ckpt"),
    "Lightning in torch's old format": (*LIT, "ckpt_path=old.ckpt"),
    "Lightning as a state dict": (*STATE, "ckpt_path=lit.ckpt", "model.prefix=net."),
    "TorchScript": ("model=torchscript", "ckpt_path=script.pt"),
    "exported": ("model=exported", "ckpt_path=net.pt2"),
    "ONNX": ("model=onnx", "ckpt_path=net.onnx"),
    "ONNX by itself": ("ckpt_path=net.onnx",),
    "ONNX of two patches": ("ckpt_path=two.onnx",),
    "ONNX beside TorchScript": ("ckpt_path=[net.onnx,script.pt]",),
    "TorchScript by itself": ("ckpt_path=script.pt",),
    "exported by itself": ("ckpt_path=net.pt2",),
    "ensemble": (*STATE, "ckpt_path=[net.pt,net.safetensors]", "model.offload=true"),
    "channels last": (*STATE, "ckpt_path=net.pt", "model.channels_last=true"),
}


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("formats")
    save(folder / "in/a.nii", noise((24, 20, 18)))
    for name, saver in SAVERS.items():
        saver(folder / name)
    return folder


@pytest.fixture(scope="module")
def wanted(place: Path, forks: Server) -> np.ndarray:
    """Probabilities predicted from the state dict."""
    job = forks.start(*JOB, *PRODUCTS, *FORMATS["state dict"], "output_dir=wanted", cwd=place)
    assert checked(job.wait()) == 0, job.text
    return read(place / "wanted/a_probabilities.nii")


@pytest.mark.parametrize("name", [name for name in FORMATS if name != "state dict"])
def test_every_format_predicts_the_same_volume(name: str, place: Path, forks: Server, wanted: np.ndarray) -> None:
    """One network in every listed format: probabilities agree to 1e-5, labels except for ties."""
    folder = f"out_{name.replace(' ', '_')}"
    job = forks.start(*JOB, *PRODUCTS, *FORMATS[name], f"output_dir={folder}", cwd=place)
    assert checked(job.wait()) == 0, job.text
    made = read(place / folder / "a_probabilities.nii")
    assert wanted.shape == (24, 20, 18, 3)
    assert wanted.std() > 0.01, "the volume is no constant"
    np.testing.assert_allclose(made, wanted, atol=1e-5, rtol=0)
    np.testing.assert_allclose(made.sum(-1), 1, atol=1e-5)


def test_flips_predict_the_same_with_onnx(place: Path, forks: Server) -> None:
    """Averaged over all flips of two axes."""
    for name in ("state dict", "ONNX by itself"):
        options = (*FORMATS[name], "model.flips=[0,2]", f"output_dir=flipped_{name[0]}")
        job = forks.start(*JOB, *PRODUCTS, *options, cwd=place)
        assert checked(job.wait()) == 0, job.text
    one, other = (read(place / f"flipped_{letter}/a_probabilities.nii") for letter in "sO")
    np.testing.assert_allclose(one, other, atol=1e-5, rtol=0)


@pytest.mark.parametrize("strategy", ["", "trainer.strategy=ddp_spawn"])
def test_two_processes_predict_the_same_with_onnx(
    place: Path, tmp_path: Path, wanted: np.ndarray, strategy: str
) -> None:
    """Started by Lightning, as commands or by pickling the network; each opens the file by itself."""
    options = (*FORMATS["ONNX by itself"], f"output_dir={tmp_path}", "trainer=ddp", "trainer.devices=2")
    for n in range(2):
        save(tmp_path / f"in/{n}.nii", read(place / "in/a.nii"))
    done = run(
        "predict.py", *JOB, *PRODUCTS, f"data.inputs={tmp_path}/in", *options, "trainer.accelerator=cpu",
        *filter(None, [strategy]), cwd=place,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    for n in range(2):
        np.testing.assert_allclose(read(tmp_path / f"{n}_probabilities.nii"), wanted, atol=1e-5, rtol=0)


def test_the_fixed_patch_of_an_onnx_file_is_the_default(place: Path, forks: Server, wanted: np.ndarray) -> None:
    """And any other is refused before the run, by one message."""
    without = tuple(option for option in JOB if "patch_size" not in option)
    job = forks.start(*without, *PRODUCTS, "ckpt_path=two.onnx", "output_dir=default", cwd=place)
    assert checked(job.wait()) == 0, job.text
    assert "from two.onnx: data.patch_size=[16, 16, 16]" in job.text
    np.testing.assert_allclose(read(place / "default/a_probabilities.nii"), wanted, atol=1e-5, rtol=0)
    for options in ((), ("model=onnx",)):
        job = forks.start(*JOB, "data.patch_size=24", "ckpt_path=two.onnx", "output_dir=no", *options, cwd=place)
        assert checked(job.wait()) == 2, job.text
        assert "exported for inputs of 1 x 16 x 16 x 16" in one_message(job.text)


@pytest.mark.parametrize("options", [(), ("data.patch_size=8",)])
@pytest.mark.parametrize("suffix", ["onnx", "ts", "pt2"])
def test_a_network_of_two_inputs_is_refused_as_such(
    suffix: str, options: tuple[str, ...], tmp_path: Path, forks: Server
) -> None:
    """Before a patch size is asked for, where the file can be read without torch."""
    save(tmp_path / "in/a.nii", noise((16, 16, 16)))
    pair = (torch.zeros(1, 1, 8, 8, 8), torch.zeros(1, 1, 8, 8, 8))
    file, shape = tmp_path / f"two.{suffix}", [1, 1, "i", "j", "k"]
    if suffix == "onnx":
        graph(file, [("Add", ["x", "y"], ["z"])], inputs={"x": shape, "y": shape}, outputs={"z": shape})
    elif suffix == "ts":
        torch.jit.save(torch.jit.trace(Sum(), pair), file)
    else:
        torch.export.save(torch.export.export(Sum(), pair), file)
    job = forks.start("data.inputs=in", "trainer=cpu", f"ckpt_path={file.name}", *options, cwd=tmp_path)
    assert checked(job.wait()) == 2, job.text
    text = one_message(job.text)
    if options or suffix == "onnx":
        assert f"{file.name} cannot be used" in text
        assert "wanted is one, the patches." in text
        assert "patch_size" not in text


class Sum(torch.nn.Module):
    """A network of two inputs."""

    def forward(self, x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
        return x + y


def test_onnx_files_of_an_ensemble_that_take_other_patches_are_refused(place: Path, forks: Server) -> None:
    """By name, whether data.patch_size is missing or said."""
    export(place / "larger.onnx", unet(), (2, 1, 24, 24, 24))
    options = ("data.inputs=in", "ckpt_path=[two.onnx,larger.onnx]", "trainer=cpu", "output_dir=others")
    job = forks.start(*options, cwd=place)
    assert checked(job.wait()) == 2, job.text
    assert "two.onnx was exported for patches of [16, 16, 16] voxels and larger.onnx for [24, 24, 24]" in job.text
    job = forks.start(*options, "data.patch_size=16", cwd=place)
    assert checked(job.wait()) == 2, job.text
    assert "larger.onnx was exported for inputs of 1 x 24 x 24 x 24" in job.text


def test_a_2d_onnx_file_predicts_slices_of_its_own_size(place: Path, forks: Server) -> None:
    """Its two axes and model.squeeze_axis make the patch size: a pooling of 3 x 3 voxels, exactly."""
    export(place / "flat.onnx", torch.nn.AvgPool2d(3, 1, 1, count_include_pad=False), (1, 1, 24, 20))
    options = ("ckpt_path=flat.onnx", "model.squeeze_axis=2", "stitch.products=[image]", "output_dir=flat")
    job = forks.start("data.inputs=in", "trainer=cpu", "callbacks.writer.compress=false", *options, cwd=place)
    assert checked(job.wait()) == 0, job.text
    image = torch.from_numpy(noise((24, 20, 18)).astype(np.float32)).permute(2, 0, 1)
    pooled = torch.nn.functional.avg_pool2d(image, 3, 1, 1, count_include_pad=False).permute(1, 2, 0)
    np.testing.assert_allclose(read(place / "flat/a_image.nii"), pooled, rtol=1e-5)


def test_a_plan_counts_an_onnx_file_without_guessing(place: Path, forks: Server) -> None:
    """run.dry_run knows its outputs."""
    job = forks.start(*JOB, *FORMATS["ONNX by itself"], "run.dry_run=true", "run.log=json", cwd=place)
    assert checked(job.wait()) == 0, job.text
    assert '"outputs": {"": [3, 3, 16, 16, 16]}' in job.text
    assert "guess" not in job.text


ODD: dict[str, tuple[Callable[[Path], object], str]] = {
    "cut": (lambda path: path.write_bytes(export(path, unet(), (1, 1, 16, 16, 16)).read_bytes()[:5000]), "damaged"),
    "outside": (lambda path: with_external(path, "../w"), "outside its own folder"),
    "missing": (lambda path: with_external(path, "w"), "must be beside it"),
    "custom": (lambda path: graph(path, [("MyOp", ["x"], ["y"], {"domain": "custom.domain"})]), "MyOp"),
    "wrong weights": (lambda path: with_external(path, "w", bytes(256), 100), "cannot be used by onnxruntime"),
}


@pytest.mark.parametrize("name", ODD)
def test_an_onnx_file_that_cannot_be_used_is_one_message(name: str, tmp_path: Path, forks: Server) -> None:
    """Exit status 2, and no output."""
    make, message = ODD[name]
    make(tmp_path / "odd.onnx")
    save(tmp_path / "in/a.nii", noise((16, 16, 16)))
    job = forks.start("data.inputs=in", "data.patch_size=4", "ckpt_path=odd.onnx", "trainer=cpu", cwd=tmp_path)
    assert checked(job.wait()) == 2, job.text
    assert not list((tmp_path / "outputs").glob("*.nii*"))
    assert message in one_message(job.text)
    assert "odd.onnx" in one_message(job.text)


def one_message(text: str) -> str:
    """The only message of a run that was not started."""
    told = [line for line in text.splitlines() if line.startswith("voxquilt:")]
    assert len(told) == 1, text
    assert "Traceback" not in text
    return told[0]


@pytest.mark.slow
def test_a_compiled_network_predicts_the_same_volume(place: Path, forks: Server, wanted: np.ndarray) -> None:
    """With torch's own compiler, which takes a minute; the last batch is filled up."""
    job = forks.start(*JOB, *PRODUCTS, *FORMATS["state dict"], "model.compile=true", "output_dir=compiled", cwd=place)
    assert checked(job.wait(300)) == 0, job.text
    np.testing.assert_allclose(read(place / "compiled/a_probabilities.nii"), wanted, atol=1e-5, rtol=0)


# Trust


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def with_record(path: Path, record: str, content: bytes) -> bytes:
    """A copy of a zip archive with one more record."""
    new = io.BytesIO()
    with zipfile.ZipFile(path) as old, zipfile.ZipFile(new, "w") as file:
        for name in old.namelist():
            file.writestr(name, content if name.partition("/")[2] == record else old.read(name))
    return new.getvalue()


def state_bomb(place: Path, bomb: Bomb) -> bytes:
    return saved({**unet().state_dict(), "bomb": bomb})


def lit_bomb(place: Path, bomb: Bomb) -> bytes:
    content = torch.load(place / "lit.ckpt", weights_only=True)
    return saved(content | {"hyper_parameters": {"scale": bomb}})


def old_bomb(place: Path, bomb: Bomb) -> bytes:
    content = torch.load(place / "lit.ckpt", weights_only=True) | {"hyper_parameters": {"scale": bomb}}
    torch.save(content, buffer := io.BytesIO(), _use_new_zipfile_serialization=False)
    return buffer.getvalue()


BOMBS: dict[str, tuple[tuple[str, ...], str, Callable[[Path, Bomb], bytes]]] = {
    "state dict .pt": (STATE, "bomb.pt", state_bomb),
    "state dict .pth": (STATE, "bomb.pth", state_bomb),
    "bare pickle .pth": (STATE, "bomb.pth", lambda place, bomb: pickle.dumps({"state_dict": bomb})),
    "Lightning .ckpt": (LIT, "bomb.ckpt", lit_bomb),
    "Lightning .ckpt as a state dict": ((*STATE, "model.prefix=net."), "bomb.ckpt", lit_bomb),
    "pickle as .safetensors": (STATE, "bomb.safetensors", lambda place, bomb: pickle.dumps(bomb)),
    "checkpoint as .safetensors": (STATE, "bomb.safetensors", state_bomb),
    "TorchScript data.pkl": (
        ("model=torchscript",), "bomb.pt",
        lambda place, bomb: with_record(place / "script.pt", "data.pkl", pickle.dumps(bomb, protocol=2)),
    ),
    "TorchScript constants.pkl": (
        ("model=torchscript",), "bomb.pt",
        lambda place, bomb: with_record(place / "script.pt", "constants.pkl", pickle.dumps((bomb,), protocol=2)),
    ),
    "checkpoint as TorchScript": (("model=torchscript",), "bomb.pt", state_bomb),
    "exported .pt2": (
        ("model=exported",), "bomb.pt2",
        lambda place, bomb: with_record(place / "net.pt2", "data/sample_inputs/model.pt", saved(((bomb,), {}))),
    ),
    "exported .pt2 by itself": (
        (), "bomb.pt2",
        lambda place, bomb: with_record(place / "net.pt2", "data/sample_inputs/model.pt", saved(((bomb,), {}))),
    ),
    "checkpoint by itself": ((), "bomb.ckpt", lit_bomb),
    "old format by itself": ((), "bomb.ckpt", old_bomb),
    "old format .ckpt": (LIT, "bomb.ckpt", old_bomb),
    "checkpoint as .pt2": (("model=exported",), "bomb.pt2", state_bomb),
}  # fmt: skip


@pytest.mark.parametrize("name", BOMBS)
def test_no_file_runs_code_pickled_in_it(name: str, place: Path, tmp_path: Path, forks: Server) -> None:
    """One message that names the file, exit status 2, and no output."""
    options, file, make = BOMBS[name]
    marker = tmp_path / "ran"
    (tmp_path / file).write_bytes(make(place, Bomb(marker)))
    save(tmp_path / "in/a.nii", noise((16, 16, 16)))
    job = forks.start(*JOB, *options, f"ckpt_path={file}", cwd=tmp_path)
    assert checked(job.wait()) == 2, job.text
    assert not marker.exists()
    assert not (tmp_path / "outputs").exists()
    told = [line for line in job.text.splitlines() if line.startswith("voxquilt:")]
    assert len(told) == 1, job.text
    assert file in told[0]
    assert "Traceback" not in job.text


@pytest.mark.parametrize(
    ("name", "option"),
    [
        ("state dict .pt", "model.trust_checkpoint=true"),
        ("Lightning .ckpt", "model.trust_checkpoint=true"),
        ("exported .pt2", "model.trust_checkpoint=true"),
    ],
)
def test_the_bombs_are_real(name: str, option: str, place: Path, tmp_path: Path, forks: Server) -> None:
    """The same files run their code if they are trusted."""
    options, file, make = BOMBS[name]
    marker = tmp_path / "ran"
    (tmp_path / file).write_bytes(make(place, Bomb(marker)))
    save(tmp_path / "in/a.nii", noise((16, 16, 16)))
    forks.start(*JOB, *options, f"ckpt_path={file}", option, cwd=tmp_path).wait()
    assert marker.exists()
