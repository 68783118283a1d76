"""Laws of weights: they come out of every common file, nothing pickled runs unasked, what does not fit is listed."""

import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import safetensors.torch
import torch
from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.module import from_lightning, from_state_dict, from_torchscript
from voxquilt.weights import read_lightning, read_state_dict, read_torchscript

X = torch.randn(2, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))


class Net(nn.Module):
    """Two layers, four keys."""

    def __init__(self, width: int = 3) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, width, 1)
        self.last = nn.Conv3d(width, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(self.first(x).relu())


class Lit(pl.LightningModule):
    """A user's module: a hyperparameter of plain type, and an argument that is not in the checkpoint."""

    def __init__(self, width: int, offset: float = 0.0) -> None:
        super().__init__()
        self.save_hyperparameters(ignore=["offset"])
        self.net = Net(width)
        self.offset = offset

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) + self.offset


class Bomb:
    """What pickle runs when it is loaded: a file appears."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, (str(self.marker),)


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
def test_a_torchscript_archive_predicts_as_what_was_traced(tmp_path: Path) -> None:
    """Scripted and traced archives load in eval mode, and a list of them is an ensemble."""
    nets = [net(0), net(1)]
    torch.jit.script(nets[0]).save(tmp_path / "a.pt")
    torch.jit.trace(nets[1], X).save(tmp_path / "b.ts")
    loaded = read_torchscript([tmp_path / "a.pt", str(tmp_path / "b.ts")])
    assert [same(a, b) for a, b in zip(loaded, nets, strict=True)] == [True, True]
    assert not any(module.training for module in loaded)
    with torch.no_grad():
        mean = from_torchscript([tmp_path / "a.pt", tmp_path / "b.ts"])(X)[""]
        assert torch.allclose(mean, (nets[0](X) + nets[1](X)) / 2)


def test_what_is_no_torchscript_archive_is_refused(tmp_path: Path) -> None:
    """A state dict, an empty file and a missing one: the path, and which model= to use."""
    torch.save(net().state_dict(), tmp_path / "state.pt")
    (tmp_path / "empty.pt").touch()
    for name in ("state.pt", "empty.pt", "missing.pt"):
        with pytest.raises(ConfigError, match=f"{name} is no TorchScript archive .*model=state_dict"):
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
    """Bare, under the usual keys, and safetensors: the network becomes the one that was saved."""
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
        mean = from_state_dict(net(), [tmp_path / "1.pt", tmp_path / "2.pt"])(X)[""]
        assert torch.allclose(mean, (net(1)(X) + net(2)(X)) / 2)


def test_without_weights_a_network_stays_as_it_is() -> None:
    """ckpt_path=null means the network as it is built."""
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


@pytest.mark.parametrize("prefix", ["net.", "module.", "_orig_mod.", "a.b."])
def test_keys_behind_a_prefix_get_a_hint(tmp_path: Path, prefix: str) -> None:
    """The message says which model.prefix to try."""
    torch.save({prefix + key: value for key, value in net().state_dict().items()}, tmp_path / "a.pt")
    with pytest.raises(ConfigError) as caught:
        read_state_dict(net(), tmp_path / "a.pt")
    text = str(caught.value)
    assert f"try model.prefix={prefix}" in text
    assert "4 missing: first.weight, first.bias, last.weight, last.bias" in text
    assert f"4 unexpected: {prefix}first.weight" in text


def test_what_does_not_fit_is_listed_by_kind(tmp_path: Path) -> None:
    """Missing, unexpected and misshapen keys, the path, and no weights half loaded."""
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
    """Eight are named, then the number of all."""
    torch.save(net().state_dict() | {f"x{n}": torch.ones(1) for n in range(30)}, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"30 unexpected: x0, .*x7, \.\.\. \(30 in all\)"):
        read_state_dict(net(), tmp_path / "a.pt")


def test_strict_false_takes_what_fits_but_never_nothing(tmp_path: Path) -> None:
    """Missing and unexpected keys are let pass, other shapes and a file without one fitting key are not."""
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
def test_a_file_without_a_state_dict_says_so(tmp_path: Path, content: object) -> None:
    """The path, and the keys under which one would have been found."""
    torch.save(content, tmp_path / "a.pt")
    with pytest.raises(ConfigError, match=r"a\.pt holds no state dict.*state_dict, model_state_dict, model"):
        read_state_dict(net(), tmp_path / "a.pt")


# Lightning


def test_a_lightning_checkpoint_brings_its_hyperparameters(tmp_path: Path) -> None:
    """The class is built with the saved width; arguments that are not in the checkpoint are given beside."""
    module = lit_checkpoint(tmp_path / "a.ckpt")
    (loaded,) = read_lightning("test_weights.Lit", tmp_path / "a.ckpt")
    assert same(loaded, module)
    (moved,) = read_lightning("test_weights.Lit", tmp_path / "a.ckpt", {"offset": 2.0})
    with torch.no_grad():
        assert torch.equal(moved(X), module(X) + 2)
        mean = from_lightning("test_weights.Lit", [tmp_path / "a.ckpt"] * 2, {"offset": 2.0})(X)[""]
        assert torch.allclose(mean, module(X) + 2)


def test_a_lightning_checkpoint_is_a_state_dict_with_a_prefix_too(tmp_path: Path) -> None:
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
def test_a_class_that_is_none_is_refused(tmp_path: Path, module_class: str, message: str) -> None:
    """Before the checkpoint is opened."""
    with pytest.raises(ConfigError, match=message):
        read_lightning(module_class, tmp_path / "missing.ckpt")


def test_a_checkpoint_that_does_not_fit_its_class_names_both(tmp_path: Path) -> None:
    """Bare weights, other sizes, and arguments that the class does not have."""
    torch.save(net().state_dict(), tmp_path / "bare.ckpt")
    with pytest.raises(ConfigError, match=r"bare\.ckpt is no Lightning checkpoint; use model=state_dict"):
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
    """Files that make a folder when they are unpickled, and how a user would load each."""
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
def test_what_is_pickled_in_a_file_is_not_run(tmp_path: Path, name: str) -> None:
    """The file is refused by its path, with the way to trust it, and its code has not run."""
    marker = tmp_path / "ran"
    load = bombs(tmp_path, marker)[name]
    with pytest.raises(ConfigError, match=r"bomb|plain") as caught:
        load(False)
    assert not marker.exists()
    assert name == "bomb.safetensors" or "model.trust_checkpoint=true" in str(caught.value)


def test_only_trust_runs_it(tmp_path: Path) -> None:
    """The bomb is a real one: with trust_checkpoint=true it goes off."""
    marker = tmp_path / "ran"
    with pytest.raises(ConfigError):
        bombs(tmp_path, marker)["bomb.pt"](True)
    assert marker.exists()


def test_torchscript_runs_nothing_pickled(tmp_path: Path) -> None:
    """A pickle under a TorchScript name is refused too."""
    marker = tmp_path / "ran"
    bombs(tmp_path, marker)
    for name in ("bomb.pt", "plain.pth"):
        with pytest.raises(ConfigError, match="is no TorchScript archive"):
            read_torchscript(tmp_path / name)
    assert not marker.exists()


def test_a_pickled_module_loads_when_it_is_trusted(tmp_path: Path) -> None:
    """torch.save(model) is refused by default and gives its weights with trust_checkpoint=true."""
    torch.save(net(4), tmp_path / "whole.pt")
    torch.save({"model": net(4).state_dict(), "args": Path("x")}, tmp_path / "args.pt")
    for name in ("whole.pt", "args.pt"):
        with pytest.raises(ConfigError, match=f"{name} holds more than tensors.*trust_checkpoint=true"):
            from_state_dict(net(), tmp_path / name)
        predictor = from_state_dict(net(), tmp_path / name, trust_checkpoint=True)
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
    """Truncated, empty, a web page, reversed."""
    path = tmp_path / f"weights{suffix}"
    (safetensors.torch.save_file if suffix == ".safetensors" else torch.save)(net().state_dict(), path)
    path.write_bytes(damage(path.read_bytes()))
    with pytest.raises(ConfigError) as caught:
        read_state_dict(net(), path)
    assert str(path) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_a_missing_file_or_a_folder_is_named(tmp_path: Path) -> None:
    """Also a list without a file."""
    for path in (tmp_path, tmp_path / "missing.pt", tmp_path / "missing.safetensors"):
        with pytest.raises(ConfigError, match=str(path)):
            read_state_dict(net(), path)
    with pytest.raises(ConfigError, match="ckpt_path names no file"):
        read_state_dict(net(), [])
    with pytest.raises(ConfigError, match="ckpt_path names no file"):
        read_torchscript(())
