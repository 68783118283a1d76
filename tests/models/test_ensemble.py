"""Tests offloaded ensembles and compiled networks: what is on the device, which batch sizes run, equal outputs."""

import pickle
import weakref

import pytest
import torch
import torch._dynamo.testing
from hypothesis import given
from hypothesis import strategies as st
from lightning.pytorch import Trainer
from synthetic import Over50, noise, read, save
from torch import Tensor, nn

import voxquilt.models.ensemble
from voxquilt.data.batch import PatchBatch
from voxquilt.errors import ConfigError
from voxquilt.models.ensemble import Ensemble, size_of, waiting
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.predictor import PatchPredictor
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.stitching.stitch import Stitch

PATCHES = torch.randn(5, 1, 4, 4, 4, generator=torch.Generator().manual_seed(0))
META = torch.device("meta")


def nets(count: int) -> list[nn.Module]:
    torch.manual_seed(0)
    return [nn.Sequential(nn.Conv3d(1, 2, 3, padding=1), nn.BatchNorm3d(2)).eval() for _ in range(count)]


def devices(members: Ensemble) -> list[str]:
    """Devices of each member's weights and buffers."""
    return ["+".join(sorted({t.device.type for t in (*m.parameters(), *m.buffers())})) for m in members]


# Which members wait


@given(st.lists(st.integers(0, 20), max_size=6), st.integers(0, 80))
def test_resident_members_and_the_largest_waiting_one_fit_the_device(sizes: list[int], room: int) -> None:
    """As many stay as fit beside the largest of the others; if none does, all wait."""
    found = waiting(sizes, room)
    stay = len(sizes) - len(found)
    assert found == frozenset(range(stay, len(sizes))), "the first ones stay"

    def held(n: int) -> int:
        return sum(sizes[:n]) + max(sizes[n:], default=0)

    assert stay == 0 or held(stay) <= room
    assert all(held(n) > room for n in range(stay + 1, len(sizes) + 1))


def test_size_is_weights_and_buffers_in_bytes() -> None:
    """27 * 2 weights, 2 biases, 2 + 2 of the norm, 2 + 2 running statistics, and an int64 count."""
    assert size_of(nets(1)[0]) == 4 * (54 + 2 + 4 + 4) + 8
    assert size_of(nets(1)[0].half()) == 2 * (54 + 2 + 4 + 4) + 8


@pytest.mark.parametrize(
    ("offload", "free", "where"),
    [
        ("auto", 10**6, ["meta", "meta", "meta"]),
        ("auto", 264 * 2 * 2, ["meta", "cpu", "cpu"]),
        ("auto", 264 * 2 * 3, ["meta", "meta", "meta"]),
        ("auto", 264 * 2 * 3 - 2, ["meta", "cpu", "cpu"]),
        ("auto", 0, ["cpu", "cpu", "cpu"]),
        (True, 10**6, ["cpu", "cpu", "cpu"]),
        (False, 0, ["meta", "meta", "meta"]),
    ],
)
def test_members_that_do_not_fit_wait_on_the_host(
    monkeypatch: pytest.MonkeyPatch, offload: bool | str, free: int, where: list[str]
) -> None:
    """They may take half of the free memory, the largest waiting member included."""
    monkeypatch.setattr(voxquilt.models.ensemble, "free_bytes", lambda device: free)
    members = Ensemble(nets(3), offload)
    members.to(META)
    assert devices(members) == where
    assert sorted(members.waiting) == [n for n in range(3) if where[n] == "cpu"]


class FakeDevice:
    """Counts the bytes of the copies that are alive, as a device would hold them."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.held = self.peak = 0
        monkeypatch.setattr(voxquilt.models.ensemble, "copy_to_device", self.copy_to_device)

    def copy_to_device(self, tensor: Tensor, device: torch.device) -> Tensor:
        assert device == META
        copy = tensor.clone()
        self.held += copy.nbytes
        self.peak = max(self.peak, self.held)
        weakref.finalize(copy.untyped_storage(), self._freed, copy.nbytes)
        return copy

    def _freed(self, count: int) -> None:
        self.held -= count


def test_a_member_that_waits_is_on_the_device_only_while_it_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """At most one at a time; the host copies keep their memory."""
    device = FakeDevice(monkeypatch)
    members = Ensemble(nets(3), True)
    members.to(META)
    before = [(t.data_ptr(), t.clone()) for t in members.state_dict().values()]
    for n in range(3):
        with members.ready(n) as network:
            assert network is members[n]
            assert device.held == size_of(network)
            here = {t.data_ptr() for t in members[n].state_dict().values()}
            assert not here & {pointer for pointer, _ in before}, "it runs on the copies"
    assert device.peak == size_of(members[0])
    after = [(t.data_ptr(), t) for t in members.state_dict().values()]
    assert all(a == b and torch.equal(x, y) for (a, x), (b, y) in zip(before, after, strict=True))


def test_offload_on_the_host_does_nothing() -> None:
    """With offload=true on a CPU."""
    members = Ensemble(nets(2), True)
    members.to("cpu").float()
    assert not members.waiting
    with members.ready(1) as network:
        assert network is members[1]


def test_a_change_of_type_reaches_waiting_members() -> None:
    """trainer.precision=bf16-true casts the module before or after it is moved; integer buffers stay integers."""
    members = Ensemble(nets(2), True)
    members.to(META).to(torch.bfloat16)
    assert devices(members) == ["cpu", "cpu"]
    assert {t.dtype for m in members for t in m.parameters()} == {torch.bfloat16}
    assert {t.dtype for m in members for t in m.buffers()} == {torch.bfloat16, torch.int64}


def test_a_member_that_raises_returns_to_the_host(monkeypatch: pytest.MonkeyPatch) -> None:
    """An error in the network leaves no weights on the device."""
    device = FakeDevice(monkeypatch)
    members = Ensemble(nets(2), True)
    members.to(META)
    before = [t.data_ptr() for t in members.state_dict().values()]

    def run() -> None:
        with members.ready(0):
            raise ValueError("a fault of the network")

    with pytest.raises(ValueError, match="a fault"):
        run()
    assert [t.data_ptr() for t in members.state_dict().values()] == before
    assert device.held == 0


@pytest.mark.parametrize("flips", [(), (0, 2)])
def test_an_offloaded_ensemble_predicts_the_same(monkeypatch: pytest.MonkeyPatch, flips: tuple[int, ...]) -> None:
    """To the bit, in inference mode as under Lightning; each member is moved once per batch, whatever the flips."""
    turns: list[int] = []
    networks = nets(3)
    plain = PatchNetwork(networks, flips=flips)
    waits = PatchNetwork([pickle.loads(pickle.dumps(n)) for n in networks], flips=flips, offload=True)
    waits.networks.waiting = frozenset(range(3))  # as on a device
    ready = Ensemble.ready
    monkeypatch.setattr(Ensemble, "ready", lambda self, n: (turns.append(n), ready(self, n))[1])
    with torch.inference_mode():
        assert torch.equal(waits(PATCHES)[""], plain(PATCHES)[""])
    assert turns == [0, 1, 2, 0, 1, 2]


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_torchscript_members_can_be_offloaded(monkeypatch: pytest.MonkeyPatch) -> None:
    """Their parameters and buffers are moved like those of modules."""
    device = FakeDevice(monkeypatch)
    members = Ensemble([torch.jit.script(net) for net in nets(2)], True)
    members.to(META)
    assert devices(members) == ["cpu", "cpu"]
    with members.ready(1) as network:
        assert device.held == size_of(network)
        network(PATCHES)
    assert device.held == 0


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device")
def test_on_a_gpu_an_offloaded_ensemble_takes_the_memory_of_one_member() -> None:
    """Four members of 64 MB: peak memory is that of one, weights are pinned, outputs are equal to the bit."""
    torch.manual_seed(0)
    networks = [nn.Sequential(nn.Conv3d(1, 4, 1), nn.Flatten(2), nn.Linear(64, 64)) for _ in range(4)]
    for network in networks:
        network.register_buffer("ballast", torch.zeros(2**24))
    patches = PATCHES.cuda()
    peaks, outputs = [], []
    for offload in (False, True):
        ensemble = PatchNetwork([pickle.loads(pickle.dumps(n)) for n in networks], offload=offload).cuda()
        torch.cuda.reset_peak_memory_stats()
        with torch.inference_mode():
            runs = [network(patches) for network in ensemble.networks] if not offload else []
            for n in range(4 * offload):
                with ensemble.networks.ready(n) as network:
                    runs.append(network(patches))
        outputs.append(torch.stack(runs).cpu())
        peaks.append(torch.cuda.max_memory_allocated())
        if offload:
            assert all(t.is_pinned() for t in ensemble.networks.parameters())
        del ensemble, runs, network
        torch.cuda.empty_cache()
    assert torch.equal(*outputs)
    assert peaks[1] < peaks[0] - 2 * 2**26


# Compiled networks, and channels last


class Sizes(Over50):
    """Records the size and memory layout of every batch."""

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[tuple[int, bool]] = []

    def forward(self, x: Tensor) -> Tensor:
        self.seen.append((len(x), x.is_contiguous(memory_format=torch.channels_last_3d)))
        return super().forward(x)


def predicted(predictor: PatchPredictor, sizes: list[int]) -> list[Tensor]:
    found = []
    for n, size in enumerate(sizes):
        patches = torch.randn(size, 1, 4, 4, 4, generator=torch.Generator().manual_seed(n)) * 100
        outputs = predictor.predict_step(PatchBatch(patches, []), n)
        assert not isinstance(outputs, Exception)
        found.append(outputs[""])
    return found


def test_all_batches_of_a_compiled_network_have_one_size(monkeypatch: pytest.MonkeyPatch) -> None:
    """Smaller ones are filled up and the surplus is dropped: outputs are those of each batch alone."""
    monkeypatch.setattr(torch, "compile", lambda network: network)  # what is compiled could not tell what it sees
    networks = [Sizes(), Sizes()]
    sizes = [4, 4, 3, 4, 1]
    predictor = PatchPredictor(networks[0], compile=True)
    predictor.setup("predict")
    made, plain = predicted(predictor, sizes), predicted(PatchPredictor(networks[1]), sizes)
    assert [size for size, _ in networks[0].seen] == [4] * 5
    assert [size for size, _ in networks[1].seen] == sizes
    assert [len(outputs) for outputs in made] == sizes
    assert all(torch.equal(a, b) for a, b in zip(made, plain, strict=True))


def test_after_a_full_device_batches_of_a_compiled_network_have_one_size() -> None:
    """After one halving every batch runs in twos, the last one filled up."""
    network = Sizes()
    plain = network.forward

    class Cramped(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            if len(x) > 2:
                raise torch.OutOfMemoryError("out of memory")
            return plain(x)

    made = predicted(PatchPredictor(Cramped(), compile=True), [4, 3])
    assert [size for size, _ in network.seen] == [2, 2, 2, 2]
    assert [len(outputs) for outputs in made] == [4, 3]


@pytest.mark.filterwarnings("ignore")
def test_a_network_is_compiled_once(monkeypatch: pytest.MonkeyPatch) -> None:
    """State dicts keep their keys, a pickled predictor is compiled where it is set up, and outputs are the same."""
    torch._dynamo.reset()
    counted = torch._dynamo.testing.CompileCounter()
    compiled = torch.compile
    monkeypatch.setattr(torch, "compile", lambda network: compiled(network, backend=counted))
    predictor = PatchPredictor(nets(2), compile=True)
    keys = list(predictor.state_dict())
    predictor.setup("predict")
    assert list(predictor.state_dict()) == keys
    with torch.inference_mode():
        made, plain = predicted(predictor, [4, 3, 2]), predicted(PatchPredictor(nets(2)), [4, 3, 2])
    assert counted.frame_count == 1, "once, for members that are alike and for all batches"
    for a, b in zip(made, plain, strict=True):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)
    again = pickle.loads(pickle.dumps(PatchPredictor(nets(2), compile=True)))
    torch._dynamo.reset()
    again.setup("predict")
    with torch.inference_mode():
        predicted(again, [4])
    assert counted.frame_count == 2


@pytest.mark.filterwarnings("ignore::DeprecationWarning")
def test_compiling_torchscript_is_an_error() -> None:
    """It would silently have no effect."""
    with pytest.raises(ConfigError, match="compile=true has no effect on TorchScript"):
        PatchPredictor(torch.jit.script(nets(1)[0]), compile=True)


@pytest.mark.parametrize("squeeze_axis", [None, 1])
def test_channels_last_sets_the_memory_layout_of_weights_and_patches(squeeze_axis: int | None) -> None:
    """In three and two dimensions; outputs are equal up to rounding."""
    conv, form = (nn.Conv3d, torch.channels_last_3d) if squeeze_axis is None else (nn.Conv2d, torch.channels_last)
    seen: list[bool] = []
    torch.manual_seed(0)
    network = conv(3, 4, 3, padding=1)
    patches = torch.randn(2, 3, 6, 1 if squeeze_axis else 6, 6)
    plain = PatchNetwork([network], squeeze_axis=squeeze_axis)(patches)[""]
    network.register_forward_pre_hook(lambda _, args: seen.append(args[0].is_contiguous(memory_format=form)))
    made = PatchNetwork([network], squeeze_axis=squeeze_axis, channels_last=True)(patches)[""]
    assert seen == [True]
    assert network.weight.is_contiguous(memory_format=form)
    torch.testing.assert_close(made, plain, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("channels", [1, 3])
def test_patches_that_are_channels_last_have_one_layout(channels: int) -> None:
    """Strides too, which with one channel may be others, and for each of which a network is compiled again."""
    network, seen = nn.Conv3d(channels, 4, 3, padding=1), set[tuple[int, ...]]()
    network.register_forward_pre_hook(lambda _, args: seen.add(args[0].stride()))
    predictor = PatchNetwork([network], channels_last=True)
    patches = torch.randn(2, channels, 6, 5, 4)
    wanted = predictor(patches)[""]
    for other in (patches.contiguous(memory_format=torch.channels_last_3d), patches.mT.contiguous().mT):
        torch.testing.assert_close(predictor(other)[""], wanted)
    assert seen == {(120 * channels, 1, 20 * channels, 4 * channels, channels)}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("precision", ["bf16-mixed", "bf16-true"])
def test_sums_are_float32_for_patches_of_every_type(tmp_path_factory: pytest.TempPathFactory, precision: str) -> None:
    """Two overlapping patches of 256 and 258 with equal weights: bfloat16 cannot represent their mean."""
    folder = tmp_path_factory.mktemp("precision")
    image = noise((12, 8, 8))
    image[0, 0, 0], image[4, 0, 0] = 0, 1  # where the patches begin
    save(folder / "in/a.nii", image)
    writer = VolumeWriter(folder / "out", Stitch("average", ["logits"]), compress=False)
    trainer = Trainer(
        accelerator="cpu", precision=precision, callbacks=[writer], logger=False, enable_progress_bar=False,
        enable_model_summary=False,
    )  # fmt: skip

    class Corner(nn.Module):
        def forward(self, x: Tensor) -> Tensor:
            return torch.where(x[:, :, :1, :1, :1] == 0, 256.0, 258.0).expand_as(x).bfloat16()

    data = GridDataModule(folder / "in", 8, (4, 0, 0))
    trainer.predict(PatchPredictor(Corner()), datamodule=data, return_predictions=False)
    assert writer.status == 0
    logits = read(folder / "out/a_logits.nii")
    assert logits.dtype == "float32"
    # bfloat16 has steps of 2 above 256.
    assert sorted(set(logits.ravel().tolist())) == [256.0, 257.0, 258.0]
