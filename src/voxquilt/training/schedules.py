"""Provides learning-rate schedules: a cosine after a warm-up, and a polynomial decay."""

from monai.optimizers.lr_scheduler import WarmupCosineSchedule
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LRScheduler, PolynomialLR


def warmup_cosine(optimizer: Optimizer, steps: int, *, warmup: float = 0.05) -> LRScheduler:
    """A learning rate that rises for a share of the steps, then falls as a cosine to 0; MONAI's schedule."""
    return WarmupCosineSchedule(optimizer, warmup_steps=round(warmup * steps), t_total=steps)


def polynomial(optimizer: Optimizer, steps: int, *, power: float = 0.9) -> LRScheduler:
    """A learning rate that falls to 0 as a power of the share of steps left, as in nnU-Net; torch's PolynomialLR."""
    return PolynomialLR(optimizer, total_iters=steps, power=power)
