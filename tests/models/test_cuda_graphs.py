"""Tests that outputs of CUDA graphs, which the next run overwrites, are used or copied before; and cuDNN's warning."""

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from voxquilt.data.batch import PatchBatch
from voxquilt.models.cudnn_check import cudnn_warning
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.predictor import PatchPredictor

PATCHES = torch.randn(5, 2, 4, 5, 6, generator=torch.Generator().manual_seed(0))


class Graphs:
    """Stands for torch.compile: graphs share their memory, so that each run spoils the outputs of all before it."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.live: list[Tensor] = []
        self.steps = self.runs = 0
        self.modes: list[str | None] = []
        monkeypatch.setattr(torch, "compile", self.compile)
        monkeypatch.setattr(torch.compiler, "cudagraph_mark_step_begin", self.mark)

    def mark(self) -> None:
        self.steps += 1

    def compile(self, network: nn.Module, mode: str | None = None) -> Callable[[Tensor], Any]:
        def run(patches: Tensor) -> Any:
            self.modes.append(mode)
            if mode is None:
                return network(patches)
            for tensor in self.live:
                tensor.fill_(torch.nan)
            self.runs += 1
            outputs = network(patches.clone())
            self.live = list(outputs.values()) if isinstance(outputs, dict) else [outputs]
            return outputs

        return run


def conv(seed: int, dtype: torch.dtype = torch.float32) -> nn.Module:
    torch.manual_seed(seed)
    return nn.Conv3d(2, 3, 3, padding=1).to(dtype)


class Several(nn.Module):
    """Two outputs by name."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        self.net = conv(seed)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        return {"seg": self.net(x), "edge": -self.net(x)}


@torch.inference_mode()
@pytest.mark.parametrize("make", [conv, Several])
@pytest.mark.parametrize("members", [1, 3])
@pytest.mark.parametrize("flips", [(), (0,), (1, 2)])
@pytest.mark.parametrize("average", ["logits", "probabilities"])
def test_ensembles_and_flips_do_not_read_overwritten_outputs(
    make: Callable[[int], nn.Module],
    members: int,
    flips: tuple[int, ...],
    average: str,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """Their means are those without graphs, and each run says that a new step begins."""
    wanted = PatchNetwork([make(n) for n in range(members)], flips=flips, average=average)(PATCHES)
    graphs = Graphs(monkeypatch)
    network = PatchNetwork([make(n) for n in range(members)], flips=flips, average=average, compile=True)
    network.compile_members("cuda")
    for _ in range(2):
        made = network(PATCHES)
        assert made.keys() == wanted.keys()
        for name, output in wanted.items():
            torch.testing.assert_close(made[name], output)
    assert graphs.steps == graphs.runs == 2 * members * 2 ** len(flips)


@torch.inference_mode()
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_a_single_networks_output_is_neither_copied_nor_converted(
    dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch
) -> None:
    """It is the graph's own memory, in the network's type; of several the mean is float32."""
    graphs = Graphs(monkeypatch)
    network = PatchNetwork([conv(0, dtype)], compile=True)
    network.compile_members("cuda")
    assert network.reuses_outputs
    output = network(PATCHES.to(dtype))[""]
    assert output is graphs.live[0]
    assert output.dtype == dtype
    network = PatchNetwork([conv(0, dtype), conv(1, dtype)], compile=True)
    network.compile_members("cuda")
    assert network(PATCHES.to(dtype))[""].dtype == torch.float32


@torch.inference_mode()
def test_after_a_full_device_chunks_of_a_batch_are_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    """Each chunk's run overwrites the one before; all have the size that was compiled for."""
    sizes: list[int] = []

    class Cramped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.net = conv(0)

        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("CUDA out of memory.")
            sizes.append(len(x))
            return self.net(x)

    Graphs(monkeypatch)
    predictor = PatchPredictor(Cramped(), compile=True)
    predictor.network.compile_members("cuda")
    outputs = predictor.predict_step(PatchBatch(PATCHES, []), 0)
    assert not isinstance(outputs, Exception)
    torch.testing.assert_close(outputs[""], conv(0)(PATCHES))
    assert sizes == [2, 2, 2]


def test_members_that_wait_on_the_host_are_compiled_without_graphs(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their weights lie elsewhere in each batch, and a graph would read where they were."""
    graphs = Graphs(monkeypatch)
    network = PatchNetwork([conv(0), conv(1)], compile=True)
    network.compile_members("cuda")
    network.networks.waiting = frozenset([1])
    with torch.inference_mode():
        network(PATCHES)
    assert graphs.modes == ["reduce-overhead", None]


def test_there_are_graphs_only_on_cuda_and_if_wanted(monkeypatch: pytest.MonkeyPatch) -> None:
    """On the host networks are compiled as before, and nothing is copied."""
    graphs = Graphs(monkeypatch)
    network = PatchNetwork([conv(0)], compile=True)
    network.compile_members("cpu")
    network(PATCHES)
    assert (graphs.modes, graphs.steps, network.reuses_outputs) == ([None], 0, False)
    network = PatchNetwork([conv(0)])
    network.compile_members("cuda")
    network(PATCHES)
    assert (graphs.modes, graphs.steps, network.reuses_outputs) == ([None], 0, False)


def test_an_error_for_want_of_memory_holds_none() -> None:
    """Its frames would keep the network's tensors while the batch is tried again."""

    class Hungry(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    error = PatchPredictor(Hungry()).predict_step(PatchBatch(PATCHES, []), 0)
    assert isinstance(error, torch.OutOfMemoryError)
    assert error.__traceback__ is None
    assert error.__context__ is None


@pytest.mark.parametrize(
    ("version", "precision", "warns"),
    [
        (91002, "bf16-mixed", True),
        (90800, "bf16-true", True),
        (91499, "bf16-mixed", True),
        (91500, "bf16-mixed", False),
        (90701, "bf16-mixed", False),
        (91002, "32-true", False),
        (91002, "16-mixed", False),
        (None, "bf16-mixed", False),
    ],
)
def test_a_cudnn_without_right_convolutions_is_named(version: int | None, precision: str, warns: bool) -> None:
    """With its version, and what to install."""
    warning = cudnn_warning(version, precision)
    assert (warning is not None) == warns
    if version == 91002 and warning is not None:
        assert warning.startswith("cuDNN 9.10.2: ")
        assert "nvidia-cudnn-cu12>=9.15" in warning
