"""Tests the shape probe: output shapes without voxels, live bytes to the byte, and the memory of a real pass."""

import subprocess
import sys
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from monai.networks.nets.segresnet import SegResNet
from monai.networks.nets.swin_unetr import SwinUNETR
from monai.networks.nets.unet import UNet
from torch import Tensor, nn

from voxquilt.models.patch_network import PatchNetwork
from voxquilt.planning.shape_probe import probe

MIB = 2**20


class Two(nn.Module):
    """Two named outputs, one of them half as large."""

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"seg": torch.cat([x, x, x], 1), "low": nn.functional.avg_pool3d(x, 2)}


class Chain(nn.Module):
    """Five pointwise steps: two tensors live at a time, or all with `kept`."""

    def __init__(self, kept: bool) -> None:
        super().__init__()
        self.kept = kept

    def forward(self, x: Tensor) -> Tensor:
        steps = [x + 1]
        for _ in range(4):
            steps.append(steps[-1] * 2)
            if not self.kept:
                del steps[0]
        return steps[-1]


def test_shapes_of_all_outputs_are_found_without_computing() -> None:
    """By name, for a batch that no machine could hold."""
    found = probe(PatchNetwork([Two()]), 1, (2**14, 2**14, 2**14), 8)
    assert found.outputs == {"seg": (8, 3, 2**14, 2**14, 2**14), "low": (8, 1, 2**13, 2**13, 2**13)}
    assert found.output_bytes == 8 * 4 * (3 * 2**42 + 2**39)
    assert found.types == {"seg": torch.float32, "low": torch.float32}


@pytest.mark.parametrize(("kept", "tensors"), [(False, 2), (True, 5)])
def test_bytes_are_counted_while_tensors_live(kept: bool, tensors: int) -> None:
    """To the byte: views and in-place operations cost nothing."""
    found = probe(Chain(kept), 1, (16, 16, 16), 2)
    assert found.peak_bytes == tensors * 2 * 16**3 * 4
    views = nn.Sequential(nn.Flatten(2), nn.ReLU(inplace=True), nn.Unflatten(2, (16, 16, 16)))
    assert probe(views, 1, (16, 16, 16), 2).peak_bytes == 0


CLASSES = {
    "unet": lambda: UNet(3, 1, 3, (8, 16, 32), (2, 2), num_res_units=2, norm="batch"),
    "instance": lambda: UNet(3, 1, 3, (8, 16, 32), (2, 2), act=("leakyrelu", {"inplace": True})),
    "segresnet": lambda: SegResNet(init_filters=8, out_channels=2),
    "swin": lambda: SwinUNETR(in_channels=1, out_channels=2, feature_size=12),
    "flips": lambda: PatchNetwork([UNet(3, 1, 2, (8, 16), (2,))], flips=[0, 1]),
    "two outputs": lambda: PatchNetwork([Two()]),
    "to a device": lambda: Moves(),
    "scripted": lambda: torch.jit.script(nn.Sequential(nn.Conv3d(1, 7, 3, padding=1), nn.InstanceNorm3d(7), nn.ReLU())),
}


class Moves(nn.Module):
    """Makes tensors on the device of its patches and of its weights, and moves patches there, named and unnamed."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.ones(2))
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, x: Tensor) -> Tensor:
        x = x.to(self.weight.device).to(device=self.weight.device, dtype=torch.float64).to("cpu", torch.float32)
        x = x * self.scale + torch.arange(x.shape[-1], device=x.device) + torch.tensor(3.0, device="cpu")
        return torch.cat(
            [x * self.weight[0], x.new_ones(x.shape) + self.weight.view(2, 1, 1, 1)[:1], torch.zeros(x.shape)], 1
        )


@pytest.mark.parametrize("name", CLASSES)
@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_without_torchs_compiler_the_same_is_found(name: str, device: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Shapes, types and bytes are those of FakeTensorMode, which imports it; most networks do without."""
    with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript old; users have it
        net = CLASSES[name]()
    with monkeypatch.context() as patched:
        patched.setattr("voxquilt.planning.shape_probe.FakeTensorMode", None)
        quick = probe(net, 1, (64, 64, 64), 2, device=device)
    monkeypatch.setattr("voxquilt.planning.shape_probe._MetaCounter", None)
    assert quick == probe(net, 1, (64, 64, 64), 2, device=device)


class ByDevice(nn.Module):
    """Asks what `meta` cannot answer, each time in another way."""

    def __init__(self, question: str) -> None:
        super().__init__()
        self.question = question
        self.recurrent = nn.GRU(1, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        match self.question:
            case "attention":
                rows = x.flatten(2)
                return nn.functional.scaled_dot_product_attention(rows, rows, rows).view_as(x)
            case "recurrence":
                return self.recurrent(x.flatten(2).mT)[0].mT.unflatten(2, x.shape[2:])
            case "device":
                assert x.device.type in ("cpu", "cuda")
        with torch.autocast(x.device.type, torch.bfloat16):
            return nn.functional.conv3d(x, torch.ones(3, 1, 1, 1, 1))


@pytest.mark.parametrize("question", ["attention", "recurrence", "device", "autocast"])
def test_what_depends_on_the_device_is_found_on_the_host(question: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Attention and recurrence choose their kernels by it, and a network may ask for it; the bytes are the host's."""
    net = ByDevice(question)
    found = probe(net, 1, (8, 8, 8), 2)
    monkeypatch.setattr("voxquilt.planning.shape_probe._MetaCounter", None)
    assert found == probe(net, 1, (8, 8, 8), 2)
    assert found.outputs[""] == (2, {"attention": 1, "recurrence": 2}.get(question, 3), 8, 8, 8)


def test_probing_neither_counts_nor_changes_the_weights() -> None:
    """The training mode of its modules stays too."""
    net = nn.Sequential(nn.Conv3d(1, 512, 1), nn.Dropout(), nn.Conv3d(512, 2, 1)).train()
    before = {name: value.clone() for name, value in net.state_dict().items()}
    assert probe(net, 1, (4, 4, 4)).peak_bytes < sum(p.nbytes for p in net.parameters()) * 1000
    assert all(module.training for module in net.modules())
    assert all(torch.equal(before[name], value) for name, value in net.state_dict().items())
    assert type(net[0].weight.data) is Tensor


class Keeps(nn.Module):
    """Keeps what it makes in its first forward pass, as an attribute, a buffer, by shape and in a list."""

    def __init__(self) -> None:
        super().__init__()
        self.ramp: Tensor | None = None
        self.register_buffer("ones", None)
        self.by_shape: dict[torch.Size, Tensor] = {}
        self.listed: list[Tensor] = []

    def forward(self, x: Tensor) -> Tensor:
        if self.ramp is None:
            self.ramp = torch.arange(x.shape[-1])
            self.ones = torch.ones(x.shape[-1])
            self.late = torch.ones(1)
            self.listed.append(torch.ones(1, device=x.device))
        kept = self.by_shape.setdefault(x.shape, torch.ones(x.shape, device=x.device))
        return x + self.ramp + self.ones + self.late + kept + sum(self.listed)


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
def test_a_network_keeps_nothing_of_a_probe(autocast: torch.dtype | None) -> None:
    """Tensors without data, which it would add to real ones."""
    net = PatchNetwork([Keeps().train()])
    assert probe(net, 1, (8, 8, 8), autocast=autocast).outputs == {"": (1, 1, 8, 8, 8)}
    out = net.eval()(torch.zeros(1, 1, 8, 8, 8))[""]
    assert type(out) is Tensor
    assert torch.equal(out[0, 0, 0, 0], torch.arange(8) + 4.0)


class KeepsScripted(nn.Module):
    """The same in TorchScript."""

    ramp: Tensor | None

    def __init__(self) -> None:
        super().__init__()
        self.ramp = None
        self.passes = 0

    def forward(self, x: Tensor) -> Tensor:
        self.passes += 1
        if self.ramp is None:
            self.ramp = torch.arange(x.shape[-1], device=x.device)
        ramp = self.ramp
        assert ramp is not None
        return x + ramp


@pytest.mark.parametrize("autocast", [None, torch.bfloat16])
@pytest.mark.parametrize("nested", [False, True])
def test_torchscript_keeps_nothing_of_a_probe(nested: bool, autocast: torch.dtype | None) -> None:
    """Neither a module that is the network, nor those inside it, nor one among modules of Python."""
    with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript old; users have it
        scripted: Any = torch.jit.script(nn.Sequential(KeepsScripted(), KeepsScripted()) if nested else KeepsScripted())
    for net in (scripted, PatchNetwork([scripted]), nn.Sequential(nn.Identity(), scripted).train()):
        for _ in range(2):
            assert probe(net, 1, (8, 8, 8), autocast=autocast).outputs == {"": (1, 1, 8, 8, 8)}
    for module in scripted if nested else [scripted]:
        assert module.passes == 0
        assert module.ramp is None
        assert module.training
    out = scripted(torch.zeros(1, 1, 8, 8, 8))
    assert torch.equal(out[0, 0, 0, 0], torch.arange(8) * (1.0 + nested))


def test_probing_with_wrong_channels_raises_the_networks_own_error() -> None:
    """Before anything is computed."""
    with pytest.raises(RuntimeError, match="4 channels"):
        probe(UNet(3, 1, 2, [8, 16], [2]), 4, (16, 16, 16))


def test_torchscript_is_probed_without_voxels_too() -> None:
    """Scripted and traced."""
    net = UNet(3, 1, 5, [8, 16], [2], num_res_units=1).eval()
    with warnings.catch_warnings(action="ignore"):  # torch calls TorchScript old; users have it
        traced = torch.jit.trace(net, torch.zeros(1, 1, 16, 16, 16))
        scripted = torch.jit.script(nn.Sequential(nn.Conv3d(1, 7, 3, padding=1), nn.ReLU()))
    assert probe(PatchNetwork([traced]), 1, (32, 32, 16), 3).outputs == {"": (3, 5, 32, 32, 16)}
    assert probe(PatchNetwork([scripted]), 1, (32, 32, 16), 3).outputs == {"": (3, 7, 32, 32, 16)}


def test_half_precision_takes_half_of_the_bytes() -> None:
    """Under autocast, and for half-precision weights."""
    net = nn.Sequential(nn.Conv3d(1, 32, 3, padding=1), nn.Conv3d(32, 32, 3, padding=1))
    full = probe(net, 1, (32, 32, 32))
    auto, half = probe(net, 1, (32, 32, 32), autocast=torch.bfloat16), probe(net.bfloat16(), 1, (32, 32, 32))
    assert auto.types == half.types == {"": torch.bfloat16}
    assert half.output_bytes == full.output_bytes // 2
    assert auto.peak_bytes < 0.8 * full.peak_bytes


@pytest.mark.parametrize(
    ("make", "single", "mixed"),
    [
        (lambda: UNet(3, 1, 14, (16, 32, 64, 128, 256), (2, 2, 2, 2), num_res_units=2), 60, 32),
        (lambda: SegResNet(out_channels=14), 51, 37),
        (lambda: SwinUNETR(in_channels=1, out_channels=14, feature_size=24), 431, 422),
    ],
)
@pytest.mark.parametrize("batch", [1, 4])
def test_a_gpus_memory_is_what_was_measured_on_one(
    make: Callable[[], nn.Module], single: int, mixed: int, batch: int
) -> None:
    """MiB per patch of 64 voxels that torch 2.11 allocated on an H100, in float32 and under autocast to bf16."""
    for autocast, measured in ((None, single), (torch.bfloat16, mixed)):
        found = probe(PatchNetwork([make()]), 1, (64, 64, 64), batch, device="cuda", autocast=autocast)
        assert found.peak_bytes == pytest.approx(batch * measured * 2**20, rel=0.2)


_MEASURE = """
import ctypes, sys
ctypes.CDLL(None).mallopt(-3, 2**20)  # what is freed goes back at once, so that the peak is what is live
import torch
from test_shape_probe import NETWORKS, hwm, resident
from voxquilt.planning.shape_probe import probe
torch.set_num_threads(2)
name, size, batch = sys.argv[1], int(sys.argv[2]), int(sys.argv[3])
net = NETWORKS[name]().eval()
found = probe(net, 1, (size,) * 3, batch)
with torch.inference_mode():
    net(torch.zeros(1, 1, 32, 32, 32))
    patches = torch.ones(batch, 1, size, size, size)
    before = resident()
    open('/proc/self/clear_refs', 'w').write('5')
    made = net(patches)
    print(found.peak_bytes, hwm() - before)
"""


def resident() -> int:
    """Resident memory of this process in bytes."""
    with open("/proc/self/statm") as file:
        return int(file.read().split()[1]) * 4096


def hwm() -> int:
    """The peak of `resident` since its last reset."""
    with open("/proc/self/status") as file:
        return next(int(line.split()[1]) * 1024 for line in file if line.startswith("VmHWM"))


NETWORKS = {
    "small": lambda: UNet(3, 1, 4, [16, 32, 64], [2, 2], num_res_units=1),
    "many classes": lambda: UNet(3, 1, 100, [32, 64, 128], [2, 2], num_res_units=1),
    "flips": lambda: PatchNetwork([UNet(3, 1, 4, [16, 32, 64], [2, 2], num_res_units=1)], flips=[0]),
    "one layer": lambda: nn.Conv3d(1, 105, 1),
    "two layers": lambda: nn.Sequential(nn.Conv3d(1, 32, 3, padding=1), nn.ReLU(), nn.Conv3d(32, 60, 3, padding=1)),
}


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
@pytest.mark.parametrize(
    ("name", "size", "batch"),
    [("small", 96, 2), ("many classes", 64, 2), ("flips", 96, 2), ("one layer", 96, 2), ("one layer", 96, 1),
     ("two layers", 64, 3)],
)  # fmt: skip
def test_a_real_pass_on_the_host_takes_the_predicted_memory(name: str, size: int, batch: int) -> None:
    """Within 15 % and 30 MiB, copies by oneDNN included; in a process of its own."""
    done = subprocess.run(
        [sys.executable, "-c", _MEASURE, name, str(size), str(batch)], capture_output=True, text=True, check=True,
        cwd=Path(__file__).parent, timeout=300,
    )  # fmt: skip
    predicted, measured = map(int, done.stdout.split())
    assert abs(predicted - measured) <= 0.15 * measured + 30 * MIB
