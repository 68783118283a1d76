"""Tests the program that started this project: TorchIO's loop over a real head, with voxquilt in its place."""

import numpy as np
import pytest
import torch
import torch.nn as nn

import voxquilt as tio


def test_the_seed_program_runs_unchanged() -> None:
    """A user's loop, word for word; one channel has one arg-max, so its output is 0 in the shape of the head."""

    # fmt: off
    patch_overlap = 4, 4, 4          # or just 4
    patch_size = 88, 88, 60
    subject = tio.datasets.Colin27() # Colin27(Keys: ('t1', 'head', 'brain'); images: 3)
    grid_sampler = tio.inference.GridSampler(subject, patch_size, patch_overlap)
    patch_loader = torch.utils.data.DataLoader(grid_sampler, batch_size=4)
    aggregator = tio.inference.GridAggregator(grid_sampler)
    model = nn.Identity().eval()
    with torch.no_grad():
        for patches_batch in patch_loader:
            input_tensor = patches_batch['t1'][tio.DATA]
            locations = patches_batch[tio.LOCATION]
            logits = model(input_tensor)
            labels = logits.argmax(dim=tio.CHANNELS_DIMENSION, keepdim=True)
            aggregator.add_batch(labels, locations)
    # fmt: on
    with pytest.warns(RuntimeWarning, match="int64 to int32"):
        output_tensor = aggregator.get_output_tensor()

    assert repr(subject) == "Colin27(Keys: ('t1', 'head', 'brain'); images: 3)"
    assert output_tensor.shape == (1, 181, 217, 181)
    assert output_tensor.dtype == torch.int32
    assert not output_tensor.any()


class Bright(nn.Module):
    """Two classes by intensity: 1 where it is above 50."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.cat([50 - x, x - 50], 1)


@pytest.mark.slow
@pytest.mark.parametrize("mode", ["crop", "gaussian"])
def test_the_loop_labels_every_voxel_of_the_head_as_the_model_does(mode: str) -> None:
    """Labels stitched by crop, and the arg-max of blended logits, equal the model's answer for the whole head."""
    subject = tio.datasets.Colin27()
    grid_sampler = tio.inference.GridSampler(subject, (88, 88, 60), 4)
    aggregator = tio.inference.GridAggregator(grid_sampler, overlap_mode=mode)
    model = Bright().eval()
    with torch.no_grad():
        for batch in torch.utils.data.DataLoader(grid_sampler, batch_size=4):
            logits = model(batch["t1"][tio.DATA])
            answer = logits.argmax(1, keepdim=True).int() if mode == "crop" else logits
            aggregator.add_batch(answer, batch[tio.LOCATION])
    output = aggregator.get_output_tensor()
    labels = output if mode == "crop" else output.argmax(0, keepdim=True)
    expected = subject["t1"].data > 50
    # Logits are whole numbers, so rounding decides the label only at 50 itself.
    decided = subject["t1"].data != 50 if mode == "gaussian" else torch.ones_like(expected)
    assert torch.equal(labels.bool()[decided], expected[decided])
    assert labels.unique().tolist() == [0, 1]


def test_head_and_masks_share_grid_and_patch_locations() -> None:
    """The three images have one grid, and their patches one location."""
    subject = tio.datasets.Colin27()
    assert subject.spatial_shape == (181, 217, 181)
    assert subject.spacing == (1, 1, 1)
    sampler = tio.GridSampler(subject, (88, 88, 60), 4)
    patch = sampler[len(sampler) - 1]
    i0, j0, k0, i1, j1, k1 = patch[tio.LOCATION].tolist()
    for name in ("t1", "head", "brain"):
        assert torch.equal(patch[name][tio.DATA], subject[name].data[:, i0:i1, j0:j1, k0:k1])
    np.testing.assert_array_equal(subject["head"].data.unique(), [0, 1])
    np.testing.assert_array_equal(subject["brain"].data.unique(), [0, 1])
    assert (subject["t1"].data[subject["head"].data == 0] > 0).float().mean() < 0.01
