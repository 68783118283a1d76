"""Tests PatchNetwork: averages equal a plain loop, outputs keep their names, and 2-D networks get planes."""

from collections.abc import Callable, Sequence
from itertools import product
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxquilt.errors import ConfigError, OutputError
from voxquilt.models.patch_network import PatchNetwork, to_activation

PATCHES = torch.randn(2, 3, 5, 4, 6, generator=torch.Generator().manual_seed(0))


class Returning(nn.Module):
    """A network that calls a function."""

    def __init__(self, function: Callable[[Tensor], Any]) -> None:
        super().__init__()
        self.function = function

    def forward(self, x: Tensor) -> Any:
        return self.function(x)


def conv(seed: int = 0, size: int = 3) -> nn.Conv3d:
    """A convolution that is not equivariant under flips."""
    torch.manual_seed(seed)
    return nn.Conv3d(3, 4, size, padding=size // 2)


def subsets(axes: Sequence[int]) -> list[list[int]]:
    """Tensor dimensions of every combination of flips."""
    return [[a + 2 for a, on in zip(axes, bits, strict=True) if on] for bits in product((0, 1), repeat=len(axes))]


def close(a: Tensor, b: Tensor) -> bool:
    return a.shape == b.shape and torch.allclose(a, b, atol=1e-6)


@torch.no_grad()
def test_a_single_network_is_called_unchanged() -> None:
    """Without flips and names the output is the network's own tensor, under the name ''."""
    output = torch.ones(2, 1, 5, 4, 6, dtype=torch.float16)
    assert PatchNetwork([Returning(lambda x: output)])(PATCHES)[""] is output
    net = conv()
    assert torch.equal(PatchNetwork([net])(PATCHES)[""], net(PATCHES))


@torch.no_grad()
@pytest.mark.parametrize("flips", [[0], [2, 1], [0, 1, 2]])
def test_flips_change_nothing_for_an_equivariant_network(flips: list[int]) -> None:
    """A 1x1x1 convolution commutes with flips: each output returns to its voxel."""
    net = conv(size=1)
    assert close(PatchNetwork([net], flips=flips)(PATCHES)[""], net(PATCHES))


@torch.no_grad()
@pytest.mark.parametrize("flips", [[1], [0, 2], [0, 1, 2]])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
@pytest.mark.parametrize("activation", [None, "softmax", "sigmoid", "none"])
def test_flips_average_over_every_combination(flips: list[int], average: str, activation: str | None) -> None:
    """The mean over all 2^n subsets of the axes, of raw or activated scores."""
    net = conv()
    act = {None: lambda s: s.softmax(1), "softmax": lambda s: s.softmax(1), "sigmoid": torch.sigmoid}.get(
        activation, lambda s: s
    )
    act = act if average == "probabilities" else (lambda s: s)
    expected = torch.stack([act(net(PATCHES.flip(dims)).flip(dims)) for dims in subsets(flips)]).mean(0)
    got = PatchNetwork([net], flips=flips, average=average, activation=activation)(PATCHES)[""]
    assert close(got, expected)
    assert not close(got, act(net(PATCHES)))


@torch.no_grad()
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_an_ensemble_is_the_mean_of_its_members(average: str) -> None:
    """Three members and a flip: six passes, one mean."""
    nets = [conv(seed) for seed in range(3)]
    act = (lambda s: s.softmax(1)) if average == "probabilities" else (lambda s: s)
    runs = [act(net(PATCHES.flip(d)).flip(d)) for net in nets for d in ([], [4])]
    assert close(PatchNetwork(nets, flips=[2], average=average)(PATCHES)[""], torch.stack(runs).mean(0))


def test_a_network_that_works_in_place_changes_nothing_for_the_next() -> None:
    """Each member and each flip gets its own copy of the patches."""
    nets = [Returning(lambda x: x.add_(1)), Returning(lambda x: x.mul_(2))]
    patches = PATCHES.clone()
    assert close(PatchNetwork(nets, flips=[0])(patches)[""], (PATCHES + 1 + PATCHES * 2) / 2)
    assert torch.equal(patches, PATCHES)


def test_averages_are_float32_for_outputs_of_every_type() -> None:
    """Half precision would round 2048 + 1; integers would wrap."""
    nets = [Returning(lambda x: torch.full((2, 1, 5, 4, 6), 2049.0 - 2 * (x[0, 0, 0, 0, 0] > 9)).half())]
    got = PatchNetwork([*nets, Returning(lambda x: torch.full((2, 1, 5, 4, 6), 1).half())])(PATCHES)[""]
    assert got.dtype == torch.float32
    assert got.unique().tolist() == [1024.5]  # half holds 2048 for 2049
    bytes_ = PatchNetwork([Returning(lambda x: torch.full((2, 1, 5, 4, 6), 200, dtype=torch.uint8))] * 2)(PATCHES)[""]
    assert bytes_.unique().tolist() == [200.0]


def test_averaging_probabilities_activates_a_single_member_too() -> None:
    """average=probabilities promises probabilities, even with nothing to average."""
    net = conv()
    with torch.no_grad():
        got = PatchNetwork([net], average="probabilities")(PATCHES)[""]
        assert close(got, net(PATCHES).softmax(1))


def test_the_default_activation_is_softmax_for_several_channels_only() -> None:
    """One channel is unchanged, since its soft-max is 1 everywhere."""
    one = torch.randn(2, 1, 3, 3, 3)
    assert torch.equal(to_activation(None)(one), one)
    assert close(to_activation(None)(PATCHES).sum(1), torch.ones(2, 5, 4, 6))
    assert torch.equal(to_activation("softmax")(one), torch.ones_like(one))


# Several outputs


def test_a_tuples_outputs_are_numbered_or_named() -> None:
    """out0, out1, ... by default, else the given names in order; null drops one."""
    net = Returning(lambda x: (x, x + 1, x + 2))
    assert {n: o[0, 0, 0, 0, 0] - PATCHES[0, 0, 0, 0, 0] for n, o in PatchNetwork([net])(PATCHES).items()} == {
        "out0": 0, "out1": 1, "out2": 2,
    }  # fmt: skip
    got = PatchNetwork([net], outputs=["seg", None, "edge"])(PATCHES)
    assert list(got) == ["seg", "edge"]
    assert torch.equal(got["edge"], PATCHES + 2)
    assert list(PatchNetwork([Returning(lambda x: [x])], outputs=["only"])(PATCHES)) == ["only"]


def test_a_mappings_outputs_keep_their_names_or_are_chosen() -> None:
    """model.outputs chooses; the others are ignored, even those that are not tensors."""
    net = Returning(lambda x: {"seg": x, "edge": -x, "epoch": 3, 5: x})
    got = PatchNetwork([net], outputs=["edge"])(PATCHES)
    assert list(got) == ["edge"]
    assert torch.equal(got["edge"], -PATCHES)
    whole = PatchNetwork([Returning(lambda x: {"seg": x, 5: -x})])(PATCHES)
    assert list(whole) == ["seg", "5"]


@torch.no_grad()
def test_each_output_is_averaged_by_itself() -> None:
    """Flips and members apply to every output, whatever its channels and size."""
    net, half = conv(), nn.AvgPool3d((1, 2, 2))
    both = Returning(lambda x: {"full": net(x), "half": half(net(x))[:, :1]})
    got = PatchNetwork([both], flips=[0, 2])(PATCHES)
    runs = [(net(PATCHES.flip(d)).flip(d), half(net(PATCHES.flip(d)))[:, :1].flip(d)) for d in subsets([0, 2])]
    assert close(got["full"], torch.stack([a for a, _ in runs]).mean(0))
    assert close(got["half"], torch.stack([b for _, b in runs]).mean(0))
    assert got["half"].shape == (2, 1, 5, 2, 3)


# 2-D networks


@torch.no_grad()
@pytest.mark.parametrize("axis", [0, 1, 2])
def test_a_2d_network_gets_planes_without_the_squeezed_axis(axis: int) -> None:
    """(B, C, J, K), (B, C, I, K) or (B, C, I, J); its output gets the axis back."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 3, padding=1)
    patches = PATCHES.narrow(axis + 2, 1, 1)
    expected = net(patches.squeeze(axis + 2)).unsqueeze(axis + 2)
    got = PatchNetwork([net], squeeze_axis=axis)(patches)[""]
    assert got.shape == (2, 2, *patches.shape[2:])
    assert torch.equal(got, expected)


@torch.no_grad()
def test_flips_name_axes_of_the_patch_not_of_the_plane() -> None:
    """With axis 1 squeezed, a flip of axis 2 is one of the plane's last axis."""
    torch.manual_seed(0)
    net = nn.Conv2d(3, 2, 3, padding=1)
    patches = PATCHES.narrow(3, 0, 1)
    plane = patches[:, :, :, 0]
    expected = (net(plane) + net(plane.flip(3)).flip(3)) / 2
    assert close(PatchNetwork([net], squeeze_axis=1, flips=[2])(patches)[""], expected.unsqueeze(3))


# Errors


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"flips": [3]}, "flips must be different axes"),
        ({"flips": [0, 0]}, "flips must be different axes"),
        ({"flips": [-1]}, "flips must be different axes"),
        ({"squeeze_axis": 3}, "squeeze_axis must be null, 0, 1 or 2"),
        ({"squeeze_axis": -1}, "squeeze_axis must be null, 0, 1 or 2"),
        ({"average": "logit"}, "average must be one of .* Did you mean logits"),
        ({"activation": "soft"}, "activation must be one of softmax, sigmoid, none"),
    ],
)
def test_wrong_options_are_refused_by_the_constructor(options: dict[str, Any], message: str) -> None:
    """Before a patch is predicted."""
    with pytest.raises(ConfigError, match=message):
        PatchNetwork([conv()], **options)


@pytest.mark.parametrize(
    ("function", "outputs", "message"),
    [
        (lambda x: None, None, "the network gave NoneType"),
        (lambda x: 3.0, None, "the network gave float"),
        (lambda x: (x, x), ["seg"], "model.outputs has 1 names and the network 2 outputs"),
        (lambda x: (x, 3), None, r"outputs \['out1'\] are not tensors"),
        (lambda x: {"seg": x, "epoch": 3}, None, r"outputs \['epoch'\] are not tensors"),
        (lambda x: {"seg": x}, ["sge"], r"names \['sge'\]; the network gives \['seg'\]"),
        (lambda x: {}, None, "no tensors are left"),
        (lambda x: x[0], None, r"has shape \(3, 5, 4, 6\); wanted is \(B, C, I, J, K\)"),
        (lambda x: (x, x), [None, None], "no tensors are left"),
    ],
)
def test_an_unusable_output_is_an_error_that_describes_it(
    function: Callable[[Tensor], Any], outputs: list[str | None] | None, message: str
) -> None:
    """The OutputError says what came and what was wanted."""
    with pytest.raises(OutputError, match=message):
        PatchNetwork([Returning(function)], outputs=outputs)(PATCHES)


def coarser(x: Tensor, n: int) -> list[Tensor]:
    """Outputs as of deep supervision: the scores, then the same at lower resolutions."""
    return [x, *(nn.functional.avg_pool3d(x, (1, 2, 2)) for _ in range(n - 1))]


@pytest.mark.parametrize("n", [2, 3, 4])
@pytest.mark.parametrize("kind", [list, tuple])
def test_the_error_on_deep_supervision_says_how_to_keep_the_first_output(n: int, kind: type) -> None:
    """The suggested setting works; if all outputs are named, all are returned."""
    net = Returning(lambda x: kind(coarser(x, n)))
    nulls = ",null" * (n - 1)
    with pytest.raises(OutputError) as caught:
        PatchNetwork([net])(PATCHES)
    assert f"Set model.outputs=[seg{nulls}] to keep the first" in str(caught.value)
    with pytest.raises(OutputError) as caught:
        PatchNetwork([net], outputs=["seg"])(PATCHES)
    assert f"such as model.outputs=[seg{nulls}]" in str(caught.value)
    assert list(PatchNetwork([net], outputs=["seg", *[None] * (n - 1)])(PATCHES)) == ["seg"]
    names = [f"level{k}" for k in range(n)]
    assert list(PatchNetwork([net], outputs=names)(PATCHES)) == names


def test_the_error_also_recognises_nested_and_stacked_deep_supervision() -> None:
    """A list in a tuple, and one stacked tensor. Outputs of equal size or other channels are several outputs."""
    with pytest.raises(
        OutputError, match=r"are not tensors; choose others by model\.outputs, such as model\.outputs=\[seg,null\]"
    ):
        PatchNetwork([Returning(lambda x: (x, coarser(x, 3)))])(PATCHES)
    assert list(PatchNetwork([Returning(lambda x: (x, coarser(x, 3)))], outputs=["seg", None])(PATCHES)) == ["seg"]
    with pytest.raises(OutputError, match="Is it stacked for deep supervision"):
        PatchNetwork([Returning(lambda x: torch.stack([x, x], 1))])(PATCHES)
    for other in (lambda x: (x, x), lambda x: (x, coarser(x, 2)[1][:, :1]), lambda x: (coarser(x, 2)[1], x)):
        assert list(PatchNetwork([Returning(other)])(PATCHES)) == ["out0", "out1"]


def test_members_with_different_output_names_are_an_error() -> None:
    """They could not be averaged."""
    nets = [Returning(lambda x: {"a": x}), Returning(lambda x: {"b": x})]
    with pytest.raises(OutputError, match=r"outputs \['a'\] and \['b'\]"):
        PatchNetwork(nets)(PATCHES)


def test_a_squeezed_axis_must_have_one_voxel() -> None:
    """The message names the axis and what to set."""
    with pytest.raises(OutputError, match=r"one voxel along k; they have 6\. Set data\.patch_size to 1 there"):
        PatchNetwork([nn.Conv2d(3, 2, 1)], squeeze_axis=2)(PATCHES)
    with pytest.raises(OutputError, match=r"wanted is .* two spatial axes"):
        PatchNetwork([Returning(lambda x: x.mean(3))], squeeze_axis=2)(PATCHES[..., :1])
