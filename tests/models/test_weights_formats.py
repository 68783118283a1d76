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
from synthetic import noise, read, save

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
    "script.pt": lambda path: torch.jit.save(torch.jit.script(unet()), path),
    "net.pt2": exported,
}
FORMATS = {
    "state dict": (*STATE, "ckpt_path=net.pt"),
    "wrapped state dict": (*STATE, "ckpt_path=net.pth"),
    "safetensors": (*STATE, "ckpt_path=net.safetensors"),
    "Lightning": (*LIT, "ckpt_path=lit.ckpt"),
    "Lightning as a state dict": (*STATE, "ckpt_path=lit.ckpt", "model.prefix=net."),
    "TorchScript": ("model=torchscript", "ckpt_path=script.pt"),
    "exported": ("model=exported", "ckpt_path=net.pt2"),
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
