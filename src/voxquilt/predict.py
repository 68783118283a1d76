"""The whole pipeline for one volume, without Lightning or Hydra. Read this first."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from voxquilt.preprocess import Preprocess
from voxquilt.sampler import GridSampler
from voxquilt.stitch import Quilt, Stitch
from voxquilt.subject import Subject


@torch.inference_mode()
def predict_volume(
    network: Callable[[Tensor], Tensor | dict[str, Tensor]],
    subject: Subject,
    patch_size: int | Iterable[int],
    patch_overlap: int | Iterable[int] = 0,
    *,
    padding_mode: str | float | None = None,
    divisible_by: int | Iterable[int] = 1,
    batch_size: int = 1,
    preprocess: Preprocess | None = None,
    stitch: Stitch | None = None,
) -> dict[str, np.ndarray]:
    """Cut a subject into patches, predict them, quilt the outputs, and bring them back to the subject's own space.

    Args:
        network: (B, C, pi, pj, pk) to (B, C', pi, pj, pk), or to several of these by name. C are the channels of all
            the subject's images, in their order. Put it in eval mode before.
        subject: The images.
        patch_size, patch_overlap, padding_mode, divisible_by: See GridSampler.
        batch_size: Patches a forward pass.
        preprocess: To model space; RAS with the file's spacing by default.
        stitch: Blend and products; gaussian and labels (an image for one channel) by default.

    Returns:
        (C, I, J, K) arrays in native space by product name, such as 'labels'; `voxquilt.nifti.write` saves them.

    Raises:
        VoxquiltError: of the kind that tells what is wrong: input, grid, patch shape, ledger or output.
    """
    model_subject, space = (preprocess or Preprocess())(subject)
    sampler = GridSampler(model_subject, patch_size, patch_overlap, padding_mode, fit=True, divisible_by=divisible_by)
    quilt = Quilt(stitch or Stitch(), sampler, space)
    for start in range(0, len(sampler), batch_size):
        indices = sampler.grid.streaming_order[start : start + batch_size].tolist()
        patches = [torch.cat([sampler.cut(name, n) for name in model_subject.images]) for n in indices]
        outputs = network(torch.stack(patches).float())
        quilt.add(outputs if isinstance(outputs, dict) else {"": outputs}, sampler.locations[indices])
    return quilt.volumes()
