"""Provides networks that a self-check must find wrong, or not comparable."""

import os
import signal

import torch
from synthetic import Over50
from torch import Tensor, nn


class WrongInHalf(Over50):
    """Computes the far corner of a patch wrongly in bfloat16, as a convolution of cuDNN 9.8 to 9.10 does."""

    def forward(self, x: Tensor) -> Tensor:
        scores = super().forward(x)
        if scores.dtype == torch.bfloat16:
            scores[:, 1, -1, -1, -1] = 1e4
        return scores


class Noisy(Over50):
    """Draws random numbers."""

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + torch.rand_like(x[:, :1])


class TwoOutputs(nn.Module):
    """Gives two outputs with as many channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.b = nn.Conv3d(1, 3, 1), nn.Conv3d(1, 3, 1)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"a": self.a(x), "b": self.b(x)}


class Interrupted(Over50):
    """Is built while somebody presses Ctrl-C."""

    def __init__(self) -> None:
        super().__init__()
        os.kill(os.getpid(), signal.SIGINT)
