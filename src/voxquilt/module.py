"""The LightningModule that predicts: it carries a PatchNetwork and knows nothing of subjects."""

import logging
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypedDict, Unpack

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from voxquilt.batch import PatchBatch
from voxquilt.chunks import in_chunks
from voxquilt.errors import ConfigError, OutputError
from voxquilt.geometry import to_triple
from voxquilt.network import Named, PatchNetwork
from voxquilt.weights import Paths, read_exported, read_lightning, read_state_dict, read_torchscript

log = logging.getLogger("voxquilt")


class Options(TypedDict, total=False):
    """The options of PatchNetwork, which every source of weights shares."""

    outputs: Sequence[str | None] | None
    flips: Sequence[int]
    average: str
    activation: str | None
    squeeze_axis: int | None
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
            return self._within_memory(batch.data.to(self.dtype))
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


def from_torchscript(ckpt_path: Paths, **options: Unpack[Options]) -> PatchPredictor:
    """A predictor from TorchScript archives; see `voxquilt.weights.read_torchscript`."""
    return PatchPredictor(read_torchscript(ckpt_path), **options)


def from_exported(
    ckpt_path: Paths,
    *,
    patch_size: int | Iterable[int] | None = None,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from exported programs; see `voxquilt.weights.read_exported`.

    Args:
        ckpt_path: The archives.
        patch_size: Of the patches to come, in voxels, to be refused at once where a program takes only others.
        trust_checkpoint: Load what could run code.
        options: See PatchNetwork.

    Raises:
        ConfigError: a file cannot be used, or not for such patches.
    """
    programs = read_exported(ckpt_path, trust=trust_checkpoint)
    if patch_size is not None:
        squeezed = options.get("squeeze_axis")
        size = to_triple(patch_size, "data.patch_size", minimum=1)
        seen = [n for axis, n in enumerate(size) if axis != squeezed]
        for program in programs:
            wanted = program.sizes[2:]
            if len(wanted) != len(seen) or any(n not in (None, m) for n, m in zip(wanted, seen, strict=True)):
                raise ConfigError(
                    f"data.patch_size={list(size)} does not fit the exported program, which takes "
                    f"{['any' if n is None else n for n in wanted]}."
                )
    return PatchPredictor(programs, **options)


def from_state_dict(
    net: nn.Module,
    ckpt_path: Paths | None,
    *,
    prefix: str | None = None,
    strict: bool = True,
    trust_checkpoint: bool = False,
    **options: Unpack[Options],
) -> PatchPredictor:
    """A predictor from a network and its weights; see `voxquilt.weights.read_state_dict`."""
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
    """A predictor from a LightningModule and its checkpoint; see `voxquilt.weights.read_lightning`."""
    return PatchPredictor(read_lightning(module_class, ckpt_path, module_args, trust=trust_checkpoint), **options)
