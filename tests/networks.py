"""Provides networks for tests that processes import by name, such as `networks.Lit`."""

import lightning.pytorch as pl
import torch
from monai.networks.nets import UNet
from torch import Tensor, nn


class ValidOver50(nn.Module):
    """Scores of the middle of each 5 x 5 x 5 neighbourhood, so that labels are exactly x > 50."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        inner = x[:, :, 2:-2, 2:-2, 2:-2]
        return torch.cat([50 - inner, inner - 50], 1)


def unet() -> nn.Module:
    torch.manual_seed(0)
    return UNet(3, 1, 3, channels=(4, 8), strides=(2,), num_res_units=1).eval()


class Lit(pl.LightningModule):
    """A user's module with a network and a hyperparameter."""

    def __init__(self, scale: float = 1.0) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.net = unet()
        self.scale = scale

    def forward(self, x: Tensor) -> Tensor:
        return self.net(x) * self.scale
