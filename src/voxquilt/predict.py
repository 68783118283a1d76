"""Predicts one volume, without Lightning or Hydra: the pipeline in one function, to be read first."""

from collections.abc import Callable, Iterable

import numpy as np
import torch
from torch import Tensor

from voxquilt.data.batch import named_outputs
from voxquilt.data.batch_buffer import BatchBuffer
from voxquilt.data.conversion import SubjectLike, to_mask, to_subject
from voxquilt.data.copy_stream import copy_stream
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.foreground import patches_to_predict, patches_to_skip
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import Subject
from voxquilt.geometry.frame import Padding, Triple, to_triple
from voxquilt.geometry.output_layout import halo_of
from voxquilt.geometry.padding import NO_PADDING
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher
from voxquilt.vocabulary import OUTPUTS, check_name


@torch.inference_mode()
def predict_volume(
    network: Callable[[Tensor], Tensor | dict[str, Tensor]],
    subject: SubjectLike,
    patch_size: int | Iterable[int],
    patch_overlap: int | Iterable[int] = 0,
    *,
    padding_mode: str | float | None = None,
    divisible_by: int | Iterable[int] = 1,
    placement: str = "regular",
    step: float | None = None,
    batch_size: int = 1,
    skip: float | SubjectLike | None = None,
    preprocess: Preprocess | None = None,
    stitch: Stitch | str | None = None,
    output: str = "auto",
    device: torch.device | str = "cpu",
) -> dict[str, np.ndarray]:
    """Cut a subject into patches, predict them, stitch the outputs, and bring them back to the subject's own space.

    >>> network = torch.nn.Conv3d(1, 2, 3, padding=1).eval()
    >>> predict_volume(network, torch.rand(1, 20, 18, 16), patch_size=16, patch_overlap=8)["labels"].shape
    (1, 20, 18, 16)

    Args:
        network: (B, C, pi, pj, pk) to (B, C', pi, pj, pk), or to several of these by name. C are the channels of all
            the subject's images, in their order, without label maps where there are other images. Put it in eval mode
            before.
        subject: The images: a Subject, or anything that can be turned into one, such as a path, a (C, I, J, K) tensor
            or array, MONAI's MetaTensor, TorchIO's Subject; see `voxquilt.data.conversion.to_subject`.
        patch_size, patch_overlap, padding_mode, divisible_by, placement, step: See GridSampler.
        batch_size: Patches per forward pass.
        skip: Patches without foreground are not predicted and count as background: nothing above a number in the first
            image in model space, or nothing above 0 in a mask on the subject's grid (a LabelMap, or like `subject`).
        preprocess: To model space; RAS with the file's spacing by default.
        stitch: Blend and products, or the name of a blend; gaussian and labels (an image for one channel) by default.
        output: How outputs lie in patches: as large or smaller by one integer factor ('auto'), by a factor per axis
            ('resampled'), or without the border that valid convolutions use up ('cropped', found by one forward pass
            of zeros): then outputs lie side by side, or overlap by `patch_overlap`.
        device: Where the network is. Images are prepared there too, unless its memory is too small for that or
            `preprocess` has `device="cpu"`.

    Returns:
        (C, I, J, K) arrays in native space by product name, such as 'labels'; `voxquilt.data.formats.nifti.write` saves
        them.

    Raises:
        VoxquiltError: an input, the grid, the shape of a patch, or an output is wrong; see `voxquilt.errors`.
    """
    subject = to_subject(subject)
    preprocess, device = preprocess or Preprocess(), torch.device(device)
    previous = {name: image for name, image in subject.images.items() if name in (preprocess.one_hot or ())}
    subject = Subject((subject.get_images_dict() or subject.images) | previous)
    skip = skip if isinstance(skip, float | int | None) else to_mask(skip)
    stitch = Stitch(stitch) if isinstance(stitch, str) else stitch or Stitch()
    stream = copy_stream(device, beside=False)
    feed = None if stream is None else DeviceFeed(stream, takes_volumes=preprocess.device == "auto")
    on_device = None if feed is None else feed.try_on_device(lambda: preprocess(subject, feed))
    model_subject, space = on_device or preprocess(subject)
    cropped = check_name(output, OUTPUTS, "output") == "cropped"
    size = to_triple(patch_size, "patch_size", minimum=1)
    halo = _halo(network, model_subject, size, device) if cropped else NO_PADDING
    sampler = GridSampler(
        model_subject, size, patch_overlap, padding_mode, fit=True, divisible_by=divisible_by, halo=halo,
        placement=placement, step=step,
    )  # fmt: skip
    skipped = patches_to_skip(skip, sampler, subject, space)
    numbers = patches_to_predict(sampler, skipped)
    stitcher = SubjectStitcher(stitch, sampler, space, skipped=skipped, layout=output)
    source = sampler.source(stream if on_device else None)
    buffer = BatchBuffer((batch_size, source.channels, *sampler.patch_size), feed)
    for start in range(0, len(numbers), batch_size):
        indices = numbers[start : start + batch_size]
        buffer.begin()
        buffer.fill(source, indices, 0)
        outputs = network(buffer.data[: len(indices)])
        stitcher.add(named_outputs(outputs, len(indices)), indices)
        del outputs  # or they would stay in memory beside the next
    return stitcher.volumes()


def _halo(
    network: Callable[[Tensor], Tensor | dict[str, Tensor]], subject: Subject, patch: Triple, device: torch.device
) -> Padding:
    """The border of a patch that the network's outputs lack, measured with a patch of zeros."""
    channels = sum(image.shape[0] for image in subject.images.values())
    outputs = named_outputs(network(torch.zeros(1, channels, *patch, device=device)), 1)
    return halo_of({name: tensor.shape for name, tensor in outputs.items()}, patch)
