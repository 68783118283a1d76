"""Provides the LightningModule that predicts patches; it carries a PatchNetwork and knows no subjects."""

import logging
from collections.abc import Sequence
from typing import Any, TypedDict, Unpack

import torch
from lightning.pytorch import LightningModule
from torch import Tensor, nn

from voxquilt.data.batch import PatchBatch
from voxquilt.data.device_feed import BEYOND_HALF
from voxquilt.errors import InputError, OutputError
from voxquilt.models.chunking import in_chunks
from voxquilt.models.cudnn_check import cudnn_warning
from voxquilt.models.patch_network import Named, PatchNetwork
from voxquilt.models.weights.onnx_network import OnnxNetwork

log = logging.getLogger("voxquilt")


class Options(TypedDict, total=False):
    """The options of PatchNetwork, which all sources of weights share."""

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
    """Predicts batches of patches.

    >>> predictor = PatchPredictor(nn.Conv3d(1, 2, 1), flips=[0])
    >>> predictor(torch.zeros(4, 1, 8, 8, 8))[""].shape
    torch.Size([4, 2, 8, 8, 8])

    Args:
        networks: A network, or the members of an ensemble.
        options: See PatchNetwork.
    """

    def __init__(self, networks: nn.Module | Sequence[nn.Module], **options: Unpack[Options]) -> None:
        super().__init__()
        self.network = PatchNetwork([networks] if isinstance(networks, nn.Module) else networks, **options)
        self._memory_limit: int | None = None
        self._full_batch = 0

    def setup(self, stage: str) -> None:
        """Compile, and open ONNX files, in each process, since the results cannot be sent from one to another."""
        trainer = self._trainer
        device = self.device if trainer is None else trainer.strategy.root_device
        self.network.compile_members(device)
        for member in self.network.networks:
            if isinstance(member, OnnxNetwork):
                member.open_session(device)  # here, where a device without onnxruntime's support ends the run
        if device.type == "cuda" and trainer is not None and trainer.is_global_zero:
            warning = cudnn_warning(torch.backends.cudnn.version(), str(trainer.precision))
            if warning:
                log.warning("%s", warning)

    def forward(self, patches: Any) -> Named:
        """Outputs by name for a (B, C, I, J, K) batch."""
        return self.network(patches)

    def predict_step(self, batch: PatchBatch, batch_idx: int) -> Named | Exception:
        """Outputs by name; an error of the network is returned, so that these subjects fail and not the run.

        Where the device has too little memory for a batch, it and later ones are predicted in smaller batches.
        """
        try:
            is_on_host = batch.data.device.type == "cpu"
            # On a device this would wait for it in each batch; there GridDataModule checks whole volumes.
            if self.dtype == torch.float16 and is_on_host and not batch.data.half().isfinite().all():
                return InputError(BEYOND_HALF)
            # Where the batch may have to be predicted again, the network, which may work in place, gets a copy.
            return self._within_memory(batch.data, copy=not is_on_host or len(batch.rows) > 1)
        except StopIteration:
            return OutputError(
                "the network raised StopIteration."
            )  # raised here, it would end the run without an error
        except Exception as error:
            # Without its frames, which hold the network's tensors: memory that is needed to try again.
            return error.with_traceback(None) if isinstance(error, torch.OutOfMemoryError) else error

    def try_full_batches(self) -> None:
        """Predict whole batches again, since something else has left the device."""
        self._memory_limit = None

    def _within_memory(self, data: Tensor, *, copy: bool) -> Named:
        patches = data.to(self.dtype, copy=copy)
        # A network is compiled for one size of batches, so that smaller ones are filled up.
        self._full_batch = max(self._full_batch, len(patches)) if self.network.compiled else len(patches)
        size = min(self._full_batch, self._memory_limit or self._full_batch)
        try:
            least = size if self.network.compiled else None
            return in_chunks(self.network, patches, most=size, least=least, copies=self.network.reuses_outputs)
        except torch.OutOfMemoryError:
            if size == 1:
                raise
            self._memory_limit = (size + 1) // 2
            log.warning("the device's memory is full: batches of %d from here on.", self._memory_limit)
        # After the block, where the error is gone, and with it the network's tensors that it holds.
        del patches
        torch.cuda.empty_cache()
        return self._within_memory(data, copy=copy)
