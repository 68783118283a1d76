"""The LightningModule that predicts: it carries a PatchNetwork and knows nothing of subjects."""

import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from voxquilt.data.batch import PatchBatch
from voxquilt.errors import ConfigError, InputError, OutputError
from voxquilt.models.chunking import in_chunks
from voxquilt.models.patch_network import Named, PatchNetwork
from voxquilt.models.weights.reading import (
    Paths,
    listed,
    read_exported,
    read_lightning,
    read_state_dict,
    read_torchscript,
)
from voxquilt.models.weights.stored_settings import EXPORTED, LIGHTNING, TORCHSCRIPT, kind_of

log = logging.getLogger("voxquilt")


class Options(TypedDict, total=False):
    """The options of PatchNetwork, which every source of weights shares."""

    outputs: Sequence[str | None] | None
    flips: Sequence[int]
    average: str
    activation: str | None
    squeeze_axis: int | None
    output: str
    offload: bool | str
    compile: bool
    channels_last: bool


class PatchPredictor(LightningModule):
    """Predicts patch batches.

    Args:
        networks: A network, or the members of an ensemble.
        options: See PatchNetwork.
    """

    def __init__(self, networks: nn.Module | Sequence[nn.Module], **options: Unpack[Options]) -> None:
        super().__init__()
        self.network = PatchNetwork([networks] if isinstance(networks, nn.Module) else networks, **options)
        self._most: int | None = None
        self._full = 0

    def setup(self, stage: str) -> None:
        """Compile, in each process: what is compiled is not handed from one to another."""
        self.network.compile_members()

    def forward(self, patches: Any) -> Named:
        """Outputs by name for a (B, C, I, J, K) batch."""
        return self.network(patches)

    def predict_step(self, batch: PatchBatch, batch_idx: int) -> Named | Exception:
        """Outputs by name; an error of the network is returned, so that it costs these subjects and not the run.

        Where the device has too little memory for a batch, it and those to come are predicted in smaller ones.
        """
        try:
            patches = batch.data.to(self.dtype)
            if self.dtype == torch.float16 and not patches.isfinite().all():
                return InputError(
                    "voxels beyond 65504 are infinite in float16: scale them by preprocess.intensity, or set "
                    "trainer.precision=bf16-true."
                )
            return self._within_memory(patches)
        except StopIteration:
            return OutputError("the network raised StopIteration.")  # raised on, it would end the run without an error
        except Exception as error:
            return error

    def _within_memory(self, patches: Tensor) -> Named:
        # What is compiled is compiled for one size of batches, so that smaller ones are filled up.
        self._full = max(self._full, len(patches)) if self.network.compiled else len(patches)
        size = min(self._full, self._most or self._full)
        try:
            return in_chunks(self, patches, most=size, least=size if self.network.compiled else None)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            self._most = (size + 1) // 2
            log.warning("the device's memory is full: batches of %d from here on.", self._most)
        # Here, where the error and the network's tensors that it holds are gone.
        torch.cuda.empty_cache()
        return self._within_memory(patches)


def from_file(
    ckpt_path: Paths,
    net: nn.Module | None = None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from weights that say what they are, or from a network and its weights.

    Raises:
        ConfigError: weights without a network, or files of several kinds.
    """
    if net is not None:
        members = read_state_dict(net, ckpt_path, prefix=prefix, strict=strict, trust=trust_checkpoint)
        return PatchPredictor(members, **options)
    kinds = {kind_of(path) for path in listed(ckpt_path)}
    if kinds == {TORCHSCRIPT}:
        return from_torchscript(ckpt_path, **options)
    if kinds == {EXPORTED}:
        return from_exported(ckpt_path, trust_checkpoint=trust_checkpoint, **options)
    what = (
        "a Lightning checkpoint without settings of voxquilt" if kinds == {LIGHTNING} else "weights without a network"
    )
    raise ConfigError(
        f"{listed(ckpt_path)[0]} is {what}: say which network they are for, by model.net._target_=my_package.MyNet and "
        f"its arguments (model.prefix=net. for a LightningModule's self.net), or by model=lightning "
        f"model.module_class=my_package.MyModule."
    )


def from_torchscript(ckpt_path: Paths, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from TorchScript archives; see `voxquilt.models.weights.reading.read_torchscript`."""
    return PatchPredictor(read_torchscript(ckpt_path), **options)


def from_exported(ckpt_path: Paths, *, trust_checkpoint: bool = False, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from exported programs; see `voxquilt.models.weights.reading.read_exported`."""
    return PatchPredictor(read_exported(ckpt_path, trust=trust_checkpoint), **options)


def from_state_dict(
    net: nn.Module,
    ckpt_path: Paths | None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from a network and its weights; see `voxquilt.models.weights.reading.read_state_dict`."""
    members = read_state_dict(net, ckpt_path, prefix=prefix, strict=strict, trust=trust_checkpoint)
    return PatchPredictor(members, **options)


def from_lightning(
    module_class: str,
    ckpt_path: Paths,
    module_args: Mapping[str, Any] | None = None,
    *,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from a LightningModule and its checkpoint; see `voxquilt.models.weights.reading.read_lightning`."""
    return PatchPredictor(read_lightning(module_class, ckpt_path, module_args, trust=trust_checkpoint), **options)
