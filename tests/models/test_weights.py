"""Tests weights: every common file is read, nothing pickled runs unless trusted, keys that do not fit are listed."""

import gzip
import io
import pickle
import tarfile
import zipfile
from collections.abc import Callable
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import lightning.pytorch as pl
import nibabel as nib
import numpy as np
import pytest
import safetensors.torch
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from odd_files import Bomb
from torch import Tensor, nn

from voxquilt.cli.instantiate import build
from voxquilt.cli.plain_config import check_weights
from voxquilt.errors import ConfigError
from voxquilt.models.factory import (
    predictor_from_file,
    predictor_from_lightning,
    predictor_from_state_dict,
    predictor_from_torchscript,
)
from voxquilt.models.weights.detect import not_weights
from voxquilt.models.weights.reading import read_exported, read_lightning, read_state_dict, read_torchscript
from voxquilt.text import reason_of

X = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers with four keys."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, width, 1)
        self.last = nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Lit(pl.LightningModule):
    """A user's module with a plain hyperparameter, and an argument that is not in the checkpoint."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["offset"])
        self.net = Net(width)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.offset


def net(seed: int = 0, width: int = 3) -> Net:
    torch.manual_seed(seed)
    return Net(width)


def lit_checkpoint(path: Path, width: int = 4) -> Lit:
    """A checkpoint as Lightning's Trainer saves it, without training."""
    torch.manual_seed(1)
    module = Lit(width)
    trainer = pl.Trainer(logger=False, enable_progress_bar=False, enable_model_summary=False, accelerator="cpu")
    trainer.strategy.connect(module)
    trainer.save_checkpoint(path)
    return module


def same(a: nn.Module, b: nn.Module) -> bool:
    with torch.no_grad():
        return torch.equal(a(X), b(X))


# TorchScript


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_a_torchscript_archive_predicts_as_its_network(tmp_path: Path) -> None:
    """Scripted and traced archives load in eval mode, and a list of them is an ensemble."""
    nets = [net(0), net(1)]
    torch.jit.script(nets[0]).save(tmp_path / "a.pt")
    torch.jit.trace(nets[1], X).save(tmp_path / "b.ts")
    loaded = read_torchscript([tmp_path / "a.pt", str(tmp_path / "b.ts")])
    assert [same(a, b) for a, b in zip(loaded, nets, strict=True)] == [True, True]
    assert not any(module.training for module in loaded)
    with torch.no_grad():
        mean = predictor_from_torchscript([tmp_path / "a.pt", tmp_path / "b.ts"])(X)[""]
        assert torch.allclose(mean, (nets[0](X) + nets[1](X)) / 2)


def test_a_file_that_is_not_torchscript_is_refused(tmp_path: Path) -> None:
    """For a state dict and a missing file: the message has the path and which model= to use."""
    torch.save(net().state_dict(), tmp_path / "state.pt")
    for name in ("state.pt", "missing.pt"):
        with pytest.raises(ConfigError, match=f"{name} is not a TorchScript archive .*model=state_dict"):
            read_torchscript(tmp_path / name)


# State dicts


@pytest.mark.parametrize(
    ("name", "wrap"),
    [
        ("raw.pt", lambda state: state),
        ("raw.pth", dict),
        ("state.ckpt", lambda state: {"state_dict": state, "epoch": 3}),
        ("model.pt", lambda state: {"model": state, "optimizer": {"lr": 0.1}}),
        ("monai.pt", lambda state: {"model_state_dict": state}),
        ("nnunet.pth", lambda state: {"network_weights": state}),
        ("w.safetensors", None),
    ],
)
def test_state_dicts_are_found_in_every_common_wrapping(
    tmp_path: Path, name: str, wrap: Callable[[Any], Any] | None
) -> None:
    """Bare, under the usual keys, and in safetensors files."""
    trained, fresh = net(7), net(8)
    path = tmp_path / name
    if wrap is None:
        safetensors.torch.save_file(trained.state_dict(), path)
    else:
        torch.save(wrap(trained.state_dict()), path)
    (loaded,) = read_state_dict(fresh, path)
    assert same(loaded, trained)
    assert not same(fresh, trained), "the user's network is copied, not changed"


def test_a_list_of_files_is_an_ensemble_of_copies(tmp_path: Path) -> None:
    """Each member has its own weights."""
    for seed in (1, 2):
        torch.save(net(seed).state_dict(), tmp_path / f"{seed}.pt")
    members = read_state_dict(net(), [tmp_path / "1.pt", tmp_path / "2.pt"])
    assert [same(m, net(s)) for m, s in zip(members, (1, 2), strict=True)] == [True, True]
    with torch.no_grad():
        mean = predictor_from_state_dict(net(), [tmp_path / "1.pt", tmp_path / "2.pt"])(X)[""]
        assert torch.allclose(mean, (net(1)(X) + net(2)(X)) / 2)


def test_without_weights_a_network_stays_as_it_is() -> None:
    """ckpt_path=null keeps the initial weights."""
    module = net()
    assert read_state_dict(module, None) == [module]


def test_a_prefix_is_stripped_and_other_keys_left_out(tmp_path: Path) -> None:
    """What a LightningModule saved of its self.net fits the bare network."""
    state = {f"net.{key}": value for key, value in net(5).state_dict().items()}
    torch.save(
        {"state_dict": state | {"loss.weight": torch.ones(2), "epoch_net.x": torch.ones(1)}}, tmp_path / "a.ckpt"
    )
    (loaded,) = read_state_dict(net(), tmp_path / "a.ckpt", prefix="net.")
    assert same(loaded, net(5))
    with pytest.raises(ConfigError, match=r"no key begins with model\.prefix='model\.'; keys are net\.first\.weight"):
        read_state_dict(net(), tmp_path / "a.ckpt", prefix="model.")


@pytest.mark.parametrize("prefix", ["net.", "model.net.", "_orig.", "a.b."])
def test_the_error_on_prefixed_keys_suggests_model_prefix(tmp_path: Path, prefix: str) -> None:
    """With the prefix to use."""
    torch.save({prefix + key: value for key, value in net().state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(ConfigError) as caught:
        read_state_dict(net(), tmp_path / "a.pt")
    text = str(caught.value)
    assert f"try model.prefix={prefix}" in text
    assert "4 missing: first.weight, first.bias, last.weight, last.bias" in text
    assert f"4 unexpected: {prefix}first.weight" in text


def test_keys_that_do_not_fit_are_listed_by_kind(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen keys and the path; no weights are loaded."""
    state = net(1, width=5).state_dict()
    del state["first.bias"]
    torch.save(state | {"extra": torch.ones(1)}, tmp_path / "a.pt")
    fresh = net()
    with pytest.raises(ConfigError) as caught:
        read_state_dict(fresh, tmp_path / "a.pt")
    text = str(caught.value)
    assert text.startswith(f"{tmp_path / 'a.pt'} does not fit the network:")
    assert "1 missing: first.bias" in text
    assert "1 unexpected: extra" in text
    assert "2 of another shape: first.weight (5, 1, 1, 1, 1) for (3, 1, 1, 1, 1), last.weight" in text
    assert same(fresh, net())


def test_long_lists_of_keys_are_cut(tmp_path: Path) -> None:
    """After eight, with the number of all."""
    torch.save(net().state_dict() | {f"x{n}": torch.ones(1) for n in range(30)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"30 unexpected: x0, .*x7, \.\.\. \(30 in all\)"):
        read_state_dict(net(), tmp_path / "a.pt")


def test_strict_false_loads_what_fits_but_at_least_one_key(tmp_path: Path) -> None:
    """Missing and unexpected keys are allowed; other shapes, or a file without a fitting key, are not."""
    trained = net(3)
    torch.save({"first.weight": trained.first.weight, "other": torch.ones(1)}, tmp_path / "part.pt")
    (loaded,) = read_state_dict(net(), tmp_path / "part.pt", strict=False)
    assert torch.equal(loaded.state_dict()["first.weight"], trained.first.weight)
    assert torch.equal(loaded.state_dict()["last.bias"], net().last.bias)
    torch.save({f"net.{key}": value for key, value in trained.state_dict().items()}, tmp_path / "none.pt")
    with pytest.raises(ConfigError, match=r"try model\.prefix=net\."):
        read_state_dict(net(), tmp_path / "none.pt", strict=False)
    torch.save(net(width=5).state_dict(), tmp_path / "wide.pt")
    with pytest.raises(ConfigError, match="3 of another shape"):
        read_state_dict(net(), tmp_path / "wide.pt", strict=False)


@pytest.mark.parametrize("content", [{}, {"a": 3}, [torch.ones(2)], torch.ones(2), {"state_dict": {"a": "b"}}, "text"])
def test_a_file_without_a_state_dict_is_an_error(tmp_path: Path, content: object) -> None:
    """With the path and the keys that were tried."""
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt holds no state dict.*state_dict, model_state_dict, model"):
        read_state_dict(net(), tmp_path / "a.pt")


# Lightning


def test_a_lightning_checkpoint_brings_its_hyperparameters(tmp_path: Path) -> None:
    """The class gets the saved width; arguments that the checkpoint lacks can be given."""
    module = lit_checkpoint(tmp_path / "a.ckpt")
    (loaded,) = read_lightning("test_weights.Lit", tmp_path / "a.ckpt")
    assert same(loaded, module)
    (moved,) = read_lightning("test_weights.Lit", tmp_path / "a.ckpt", {"offset": 2.0})
    with torch.no_grad():
        assert torch.equal(moved(X), module(X) + 2)
        mean = predictor_from_lightning("test_weights.Lit", [tmp_path / "a.ckpt"] * 2, {"offset": 2.0})(X)[""]
        assert torch.allclose(mean, module(X) + 2)


def test_a_lightning_checkpoint_can_be_read_as_a_prefixed_state_dict(tmp_path: Path) -> None:
    """model=state_dict with model.prefix=net. needs no class."""
    module = lit_checkpoint(tmp_path / "a.ckpt")
    (loaded,) = read_state_dict(net(width=4), tmp_path / "a.ckpt", prefix="net.")
    assert same(loaded, module.net)


@pytest.mark.parametrize(
    ("module_class", "message"),
    [
        ("test_weights.Litt", "model.module_class=test_weights.Litt cannot be imported"),
        ("no_such_package.Lit", "cannot be imported: No module named 'no_such_package'"),
        ("Lit", "cannot be imported"),
        ("test_weights.Net", "is not a LightningModule"),
        ("test_weights.X", "is not a LightningModule"),
    ],
)
def test_a_name_that_is_not_a_lightning_class_is_refused(tmp_path: Path, module_class: str, message: str) -> None:
    """Before the checkpoint is opened."""
    with pytest.raises(ConfigError, match=message):
        read_lightning(module_class, tmp_path / "missing.ckpt")


def test_a_checkpoint_that_does_not_fit_its_class_is_an_error_that_names_both(tmp_path: Path) -> None:
    """Bare weights, other shapes, and arguments that the class does not have."""
    torch.save(net().state_dict(), tmp_path / "bare.ckpt")
    with pytest.raises(ConfigError, match=r"bare\.ckpt is not a Lightning checkpoint; use model=state_dict"):
        read_lightning("test_weights.Lit", tmp_path / "bare.ckpt")
    lit_checkpoint(tmp_path / "a.ckpt")
    with pytest.raises(
        ConfigError, match=r"module_args names \['ofset'\]; test_weights.Lit takes \['width', 'offset'\]"
    ):
        read_lightning("test_weights.Lit", tmp_path / "a.ckpt", {"ofset": 1})
    with pytest.raises(ConfigError, match=r"(?s)a\.ckpt does not fit Lit: .*size mismatch"):
        read_lightning("test_weights.Lit", tmp_path / "a.ckpt", {"width": 7})


# Trust


def bombs(folder: Path, marker: Path) -> dict[str, Callable[[bool], Any]]:
    """Files that create a folder when they are unpickled, and how a user would load each."""
    bomb = {"state_dict": {"w": Bomb(marker)}, "pytorch-lightning_version": "2.6.6"}
    torch.save(bomb, folder / "bomb.pt")
    torch.save(bomb, folder / "bomb.ckpt")
    (folder / "plain.pth").write_bytes(pickle.dumps(bomb))
    (folder / "bomb.safetensors").write_bytes(pickle.dumps(bomb))
    state = {
        name: lambda trust, name=name: read_state_dict(net(), folder / name, trust=trust)
        for name in ("bomb.pt", "bomb.ckpt", "plain.pth", "bomb.safetensors")
    }
    return state | {"lightning": lambda trust: read_lightning("test_weights.Lit", folder / "bomb.ckpt", trust=trust)}


@pytest.mark.parametrize("name", ["bomb.pt", "bomb.ckpt", "plain.pth", "bomb.safetensors", "lightning"])
def test_code_pickled_in_a_file_is_not_run(tmp_path: Path, name: str) -> None:
    """The file is refused by its path, with how to trust it."""
    marker = tmp_path / "ran"
    load = bombs(tmp_path, marker)[name]
    with pytest.raises(ConfigError, match=r"bomb|plain") as caught:
        load(False)
    assert not marker.exists()
    # torch.load refuses a bare pickle, trusted or not.
    assert ("model.trust_checkpoint=true" in str(caught.value)) == (name not in ("plain.pth", "bomb.safetensors"))


def test_code_pickled_in_a_trusted_file_runs(tmp_path: Path) -> None:
    """With trust_checkpoint=true it does run, so the files of the other test are real."""
    marker = tmp_path / "ran"
    with pytest.raises(ConfigError):
        bombs(tmp_path, marker)["bomb.pt"](True)
    assert marker.exists()


def test_a_pickle_named_as_torchscript_is_refused(tmp_path: Path) -> None:
    """Nothing in it runs."""
    marker = tmp_path / "ran"
    bombs(tmp_path, marker)
    for name in ("bomb.pt", "plain.pth"):
        with pytest.raises(ConfigError, match=r"is not a (TorchScript archive|file of weights)"):
            read_torchscript(tmp_path / name)
    assert not marker.exists()


def test_a_pickled_module_loads_only_if_it_is_trusted(tmp_path: Path) -> None:
    """A file of torch.save(model), with and without trust_checkpoint=true."""
    torch.save(net(4), tmp_path / "whole.pt")
    torch.save({"model": net(4).state_dict(), "args": Path("x")}, tmp_path / "args.pt")
    for name in ("whole.pt", "args.pt"):
        with pytest.raises(ConfigError, match=f"{name} holds more than tensors.*trust_checkpoint=true"):
            predictor_from_state_dict(net(), tmp_path / name)
        predictor = predictor_from_state_dict(net(), tmp_path / name, trust_checkpoint=True)
        with torch.no_grad():
            assert torch.equal(predictor(X)[""], net(4)(X))


# Damaged files


@pytest.mark.parametrize("suffix", [".pt", ".ckpt", ".safetensors"])
@pytest.mark.parametrize(
    "damage", [lambda b: b[: len(b) // 2], lambda b: b"", lambda b: b"<html>404", lambda b: b[::-1]]
)
def test_a_damaged_file_is_one_message_that_names_it(
    tmp_path: Path, suffix: str, damage: Callable[[bytes], bytes]
) -> None:
    """Truncated, empty, a web page, and reversed bytes."""
    path = tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(net().state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        read_state_dict(net(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    """So is a list without a file."""
    for path in (tmp_path, tmp_path / "missing.pt", tmp_path / "missing.safetensors"):
        with pytest.raises(ConfigError, match=str(path)):
            read_state_dict(net(), path)
    with pytest.raises(ConfigError, match="ckpt_path names no file"):
        read_state_dict(net(), [])
    with pytest.raises(ConfigError, match="ckpt_path names no file"):
        read_torchscript(())


# Files that are not weights


def zipped(**members: bytes) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members.items():
            archive.writestr(name.replace("_", "."), content)
    return buffer.getvalue()


def arrays() -> bytes:
    np.savez(buffer := io.BytesIO(), a=np.ones(2))
    return buffer.getvalue()


def tarred(name: str) -> bytes:
    with tarfile.open(fileobj=(buffer := io.BytesIO()), mode="w") as archive:
        archive.addfile(tarfile.TarInfo(name))
    return buffer.getvalue()


NIFTI = nib.Nifti1Image(np.zeros((3, 3, 3), np.uint8), np.eye(4)).to_bytes()
NO_WEIGHTS: dict[str, tuple[bytes, str]] = {
    "an empty file": (b"", "it is empty: copying or downloading it was broken off"),
    "a git-LFS pointer": (
        b"version https://git-lfs.github.com/spec/v1\noid sha256:4d7a\nsize 12345\n",
        "a pointer of git-LFS and not the file itself: run 'git lfs pull'",
    ),
    "a git-annex pointer": (b"/annex/objects/SHA256E-s3--4d7a.pt\n", "a pointer of git-annex"),
    "a web page": (
        b"\n<!DOCTYPE html>\n<html><title>Sign in</title></html>",
        "an HTML page, such as a login or an error",
    ),
    "a page without a type": (b"<html lang='de'><body>\xc3\xa4</body></html>", "an HTML page"),
    "an answer in JSON": (
        b'{"message": "Not Found", "status": 404}',
        'it is JSON that begins with \'{"message": "Not Fo',
    ),
    "a text": (b"Access denied\n", "it is text that begins with 'Access denied'"),
    "a NIfTI volume": (NIFTI, "it is a NIfTI volume."),
    "a packed NIfTI volume": (gzip.compress(NIFTI), "it is a NIfTI volume, packed by gzip"),
    "something packed": (gzip.compress(b"abc"), "it is packed by gzip, which weights never are"),
    "a zip archive": (zipped(readme_txt=b"hello", weights_pt=b"x"), "not of torch: unpack it (readme.txt, weights.pt)"),
    "arrays of NumPy": (arrays(), "it is NumPy arrays (.npz) (a.npy)"),
    "Keras": (b"\x89HDF\r\n\x1a\n" + bytes(100), "an HDF5 file"),
    "a pickle": (pickle.dumps({"a": np.ones(3)}), "a pickle that torch.save did not write"),
    "a pickle of protocol 2": (pickle.dumps({"a": [1.0]}, protocol=2), "a pickle that torch.save did not write"),
    "a tar archive": (tarred("readme.txt"), "a tar archive: unpack it"),
    "torch's first format": (tarred("sys_info"), "the tar archive that torch wrote before version 0.1.10, which"),
    "safetensors by another name": (safetensors.torch.save({"a": torch.ones(2)}), "give it the suffix .safetensors"),
}


@pytest.mark.parametrize("kind", NO_WEIGHTS)
def test_a_file_that_is_not_weights_is_described(kind: str, tmp_path: Path) -> None:
    """In one line, whatever reader is used, and before torch is imported if the command line names it."""
    content, said = NO_WEIGHTS[kind]
    path = tmp_path / "weights.pt"
    path.write_bytes(content)
    for read in (
        lambda: read_state_dict(net(), path),
        lambda: read_torchscript(path),
        lambda: read_exported(path),
        lambda: read_lightning("test_weights.Lit", path),
        lambda: predictor_from_file(path),
        lambda: check_weights({"ckpt_path": [str(path)]}),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        assert said in str(caught.value)
        assert str(caught.value).startswith(f"{path} is not a file of weights: it is ")
        assert "\n" not in str(caught.value)


def test_weights_are_never_described_as_another_kind_of_file(tmp_path: Path) -> None:
    """In every format that is read, whatever their first bytes are."""
    trained = net()
    torch.save(trained.state_dict(), tmp_path / "a.pt")
    torch.save(trained.state_dict(), tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    torch.save(trained.state_dict(), tmp_path / "old4.pth", _use_new_zipfile_serialization=False, pickle_protocol=4)
    safetensors.torch.save_file(trained.state_dict(), tmp_path / "a.safetensors")
    for protocol in (2, 3, 4, 5):  # lengths of headers, with which such files begin as pickles do
        length = int.from_bytes([0x80, protocol], "little")
        pickled = tmp_path / f"{protocol}.safetensors"
        short = safetensors.torch.save(trained.state_dict(), {"note": ""})
        blank = length - int.from_bytes(short[:8], "little")
        pickled.write_bytes(safetensors.torch.save(trained.state_dict(), {"note": " " * blank}))
        assert pickled.read_bytes()[:2] == bytes([0x80, protocol])
        assert same(read_state_dict(net(8), pickled)[0], trained)
    lit_checkpoint(tmp_path / "a.ckpt")
    for path in tmp_path.iterdir():
        assert not_weights(path) == ""
    for name, trust in (("old.pth", False), ("old4.pth", True)):  # torch reads protocol 4 only where it is trusted
        assert same(read_state_dict(net(8), tmp_path / name, trust=trust)[0], trained)
    torch.save(trained.state_dict(), tmp_path / "b.safetensors")
    with pytest.raises(ConfigError, match=r"it is torch's own format: give it the suffix \.pt"):
        read_state_dict(net(), tmp_path / "b.safetensors")


class Opaque:
    """A type that weights may not hold."""


@pytest.mark.parametrize(
    ("value", "named"),
    [
        (Opaque(), "test_weights.Opaque"),
        (np.float64(3), "numpy._core.multiarray.scalar"),
        (Path("x"), "pathlib."),
        (slice(3), "slice"),
    ],
)
def test_a_refused_type_is_named_without_terminal_codes(value: Any, named: str, tmp_path: Path) -> None:
    """In one line that says what to do, for Lightning checkpoints too."""
    torch.save({"pytorch-lightning_version": "2", "state_dict": net().state_dict(), "extra": value}, tmp_path / "a.pt")
    for read in (
        lambda: read_state_dict(net(), tmp_path / "a.pt"),
        lambda: read_lightning("test_weights.Lit", tmp_path / "a.pt"),
    ):
        with pytest.raises(ConfigError) as caught:
            read()
        text = str(caught.value)
        assert text.startswith(f"{tmp_path / 'a.pt'} holds more than tensors and plain values: ")
        assert named in text.partition("It was not unpickled")[0]
        assert "model.trust_checkpoint=true" in text
        assert "\x1b" not in text
        assert "\n" not in text


def test_messages_quote_errors_without_terminal_codes() -> None:
    """Errors that fail a subject, and errors from building the configuration."""
    error = RuntimeError("\x1b[1mdo this\x1b[0m or \x1b[38;5;9mthat\x1b[0m")
    assert reason_of(error) == "RuntimeError: do this or that"
    with pytest.raises(ConfigError) as caught:
        build({"_target_": "test_weights.raises_in_bold"}, "model")
    assert "ValueError: bold\n" in str(caught.value)


def raises_in_bold() -> None:
    raise ValueError("\x1b[1mbold\x1b[0m")


# Wrapped state dicts

INNER = st.sampled_from(["", "_orig_mod.", "module.", "_orig_mod.module.", "module._orig_mod."])


@given(st.lists(st.sampled_from(["net", "ema", "weights", "a.b"]), max_size=3), INNER, INNER, st.booleans())
@settings(deadline=None, max_examples=40)
def test_the_only_state_dict_of_a_file_is_found_at_any_depth(
    around: list[str], outer: str, inner: str, beside: bool
) -> None:
    """Beside optimizers, numbers and metrics, and with keys of compiled or DDP-wrapped modules."""
    trained = net(7)
    content: Any = {f"{outer}{key.replace('.', f'.{inner}')}": value for key, value in trained.state_dict().items()}
    for key in around:
        content = {key: content}
        if beside:
            moments = {"step": torch.ones(1), "exp_avg": torch.ones(3)}
            content |= {"epoch": 3, "optimizer": {"state": {0: moments}}, "optim_d": {"x": torch.ones(2)}, "best": 0.5}
    with TemporaryDirectory() as folder:
        torch.save(content, path := Path(folder) / "a.pt")
        (loaded,) = read_state_dict(net(8), path)
    assert same(loaded, trained)


def test_the_only_fitting_state_dict_is_taken_else_all_are_listed(tmp_path: Path) -> None:
    """model.prefix chooses; a misspelt prefix is answered with the nearest."""
    gan = {"generator": net(1).state_dict(), "discriminator": net(2, width=5).state_dict()}
    torch.save(gan, tmp_path / "gan.pt")
    assert same(read_state_dict(net(), tmp_path / "gan.pt")[0], net(1))
    assert same(read_state_dict(net(width=5), tmp_path / "gan.pt")[0], net(2, width=5))
    torch.save({"net": net(3).state_dict(), "ema": {"shadow": net(4).state_dict()}}, tmp_path / "two.pt")
    for width, which in ((3, "2 of them fit the network"), (9, "none of them fits the network")):
        with pytest.raises(ConfigError) as caught:
            read_state_dict(net(width=width), tmp_path / "two.pt")
        assert which in str(caught.value)
        assert "choose one:\n  model.prefix=net.  (4 tensors)\n  model.prefix=ema.shadow.  (4 tensors)" in str(
            caught.value
        )
    for prefix, seed in (("net.", 3), ("net", 3), ("ema.shadow.", 4)):
        assert same(read_state_dict(net(), tmp_path / "two.pt", prefix=prefix)[0], net(seed))
    with pytest.raises(ConfigError, match=r"no key begins with model\.prefix='nett\.'.* Did you mean net\.\?"):
        read_state_dict(net(), tmp_path / "two.pt", prefix="nett.")


@pytest.mark.parametrize("wrapped", ["net._orig_mod.", "_orig_mod.net.", "net.module.", "_orig_mod.module.net."])
def test_prefix_and_lightning_reader_ignore_keys_of_wrappers(wrapped: str, tmp_path: Path) -> None:
    """Of torch.compile and DDP, around the module or around its network."""
    lit_checkpoint(tmp_path / "a.ckpt")
    content = torch.load(tmp_path / "a.ckpt", weights_only=True)
    state = {key.replace("net.", wrapped, 1): value for key, value in content["state_dict"].items()}
    torch.save(content | {"state_dict": state}, tmp_path / "b.ckpt")
    (plain,), (compiled,) = (read_lightning("test_weights.Lit", tmp_path / name) for name in ("a.ckpt", "b.ckpt"))
    assert same(plain, compiled)
    (bare,) = read_state_dict(net(8, width=4), tmp_path / "b.ckpt", prefix="net.")
    assert torch.equal(bare(X), plain(X))


class Named(nn.Module):
    """Its keys look like those of a wrapped network."""

    def __init__(self) -> None:
        super().__init__()
        self.module = nn.Conv3d(1, 1, 1)
        self.last = nn.ModuleDict({"module": nn.Conv3d(1, 2, 1)})

    def forward(self, x: Tensor) -> Tensor:
        return self.last["module"](self.module(x))


@pytest.mark.parametrize("outer", ["", "module.", "_orig_mod."])
def test_a_network_may_have_parts_called_module(outer: str, tmp_path: Path) -> None:
    """Their keys are kept, also if the network was wrapped."""
    trained = Named()
    torch.save({outer + key: value for key, value in trained.state_dict().items()}, tmp_path / "a.pt")
    (loaded,) = read_state_dict(Named(), tmp_path / "a.pt")
    assert same(loaded, trained)


class Stepping(Lit):
    """Its predict_step differs from its forward."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return self(batch).argmax(1)


class Formless(pl.LightningModule):
    """It has a predict_step but no forward."""

    def predict_step(self, batch: Any, batch_idx: int) -> Tensor:
        return batch


def test_a_warning_says_that_predict_step_is_not_called(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """A run calls forward; a module without one is an error."""
    lit_checkpoint(tmp_path / "a.ckpt")
    (loaded,) = read_lightning("test_weights.Stepping", tmp_path / "a.ckpt")
    assert loaded(X).shape == (2, 2, 4, 4, 4)
    assert "test_weights.Stepping.predict_step is not called: a run calls forward" in caplog.text
    caplog.clear()
    read_lightning("test_weights.Lit", tmp_path / "a.ckpt")
    assert caplog.text == ""
    with pytest.raises(ConfigError, match=r"test_weights\.Formless has no forward, which is what a run calls"):
        read_lightning("test_weights.Formless", tmp_path / "a.ckpt")
