"""Tests that a CUDA device gives the same results as the host."""

import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from importlib.util import find_spec
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from forks import Server
from label_numbers import check_numbers
from lightning.pytorch import Trainer
from synthetic import Over50, Plus, noise, read, save

from voxquilt.data.batch import cut_batches
from voxquilt.data.copy_stream import CudaStream
from voxquilt.data.device_feed import DeviceFeed
from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.foreground import patches_to_predict
from voxquilt.data.grid_loader import GridLoader
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.staging import Staging
from voxquilt.data.subject import ScalarImage, Subject
from voxquilt.data.subject_task import SubjectTask
from voxquilt.errors import OutputError
from voxquilt.geometry.frame import Frame
from voxquilt.geometry.padding import to_padding
from voxquilt.geometry.slab_split import Part, split_rows
from voxquilt.geometry.space import Space
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.planner import Planner
from voxquilt.predict import predict_volume
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.writer_callback import VolumeWriter
from voxquilt.reporting import device_statistics, statistics_table
from voxquilt.reporting import label_statistics as label_statistics_module
from voxquilt.reporting.device_statistics import is_worthwhile
from voxquilt.reporting.label_intensities import Intensities
from voxquilt.reporting.label_statistics import label_statistics
from voxquilt.reporting.statistics_table import statistics_rows
from voxquilt.stitching.blend_registry import BLENDS
from voxquilt.stitching.device_transfer import Progress
from voxquilt.stitching.execution import Execution
from voxquilt.stitching.kernels.loading import kernels_run_on
from voxquilt.stitching.output_rings import Memory
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.subject_stitcher import SubjectStitcher

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="there is no CUDA device"),
]


@contextmanager
def never_waiting() -> Iterator[None]:
    """What waits for the device is an error."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch warns that it may not see all that waits
        torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("mode", [*BLENDS])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_sums_on_the_device_equal_sums_on_the_host(mode: str, spacing: float | None) -> None:
    """The ring, the restoring to native space and the products all run on the device."""
    generator = torch.Generator().manual_seed(0)
    subject = Subject(t1=ScalarImage(tensor=torch.randn(1, 30, 22, 26, generator=generator)))
    model_subject, space = Preprocess(spacing=spacing)(subject)
    sampler = GridSampler(model_subject, 12, 4, fit=True)
    patches = torch.randn(len(sampler), 3, 12, 12, 12, generator=generator)
    names = ["logits", "probabilities", "entropy", "disagreement"]
    made = {}
    for device in ("cpu", "cuda"):
        quilt = SubjectStitcher(Stitch(mode, names, fill=0), sampler, space, skipped=[1, 5])
        for n in sampler.grid.streaming_order.tolist():
            if n not in (1, 5):
                quilt.add({"": patches[n : n + 1].to(device)}, [n])
        made[device] = quilt.volumes()
    for name in names:
        np.testing.assert_allclose(made["cuda"][name], made["cpu"][name], rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("restore", ["scores", "labels"])
def test_labels_made_on_the_device_equal_those_of_the_host(restore: str) -> None:
    """Ties included: scores are whole numbers and all weights are powers of 2, so that nothing is rounded."""
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 32, 24, 40)))
    model_subject, space = Preprocess(spacing=2.0)(subject)
    sampler = GridSampler(model_subject, 8, 4)
    assert sampler.grid.counts == (3, 2, 4)  # no voxel is in three patches along an axis
    patches = torch.randint(0, 50, (len(sampler), 40, 8, 8, 8), generator=torch.Generator().manual_seed(0)).float()
    made = {}
    for device in ("cpu", "cuda"):
        quilt = SubjectStitcher(Stitch("crop", compare=["average"], restore=restore), sampler, space)
        for n in sampler.grid.streaming_order.tolist():
            quilt.add({"": patches[n : n + 1].to(device)}, [n])
        made[device] = quilt.volumes()
    for name, labels in made["cpu"].items():
        np.testing.assert_array_equal(made["cuda"][name], labels)


def test_a_run_on_the_device_writes_the_labels_of_the_host(tmp_path: Path) -> None:
    """A voxel-wise network gives identical labels."""
    save(tmp_path / "in/a.nii", volume := noise((20, 17, 14)))
    writer = VolumeWriter(tmp_path / "out")
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4, batch_size=3)
    trainer.predict(PatchPredictor(Over50()), datamodule=data, return_predictions=False)
    np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), np.asarray(volume) > 50)


@pytest.mark.parametrize("mode", [*BLENDS])
@pytest.mark.parametrize("skipped", [[], [0, 5]])
def test_parts_on_the_device_and_on_the_host_equal_one_process(mode: str, skipped: list[int]) -> None:
    """Heads travel through the host, between any two kinds of process."""
    generator = torch.Generator().manual_seed(0)
    subject = Subject(t1=ScalarImage(tensor=torch.randn(1, 40, 14, 12, generator=generator)))
    model_subject, space = Preprocess(spacing=0.9)(subject)
    sampler = GridSampler(model_subject, 8, 4, fit=True)
    patches = torch.randn(len(sampler), 3, 8, 8, 8, generator=generator)
    stitch = Stitch(mode, ["logits", "disagreement"], fill=0)

    def quilted(device: str, part: Part, *, whole: bool) -> SubjectStitcher:
        quilt = SubjectStitcher(stitch, sampler, space, skipped=skipped, part=part, holds_all=whole)
        for n in patches_to_predict(sampler, skipped, part):
            quilt.add({"": patches[n : n + 1].to(device)}, [n])
        return quilt

    parts = split_rows(sampler.grid, 3)
    expected = quilted("cpu", Part(parts[0].axis, 0, parts[-1].stop), whole=True).volumes()
    for devices in (("cuda", "cpu", "cuda"), ("cpu", "cuda", "cuda")):
        team = [quilted(d, part, whole=n == 0) for n, (d, part) in enumerate(zip(devices, parts, strict=True))]
        for quilt, following in reversed(list(pairwise(team))):
            head = following.head()
            assert head is not None
            assert {planes.device.type for planes in head} == {"cpu"}
            quilt.join(head)
        for quilt in team[1:]:
            for name, where, array in quilt.parts():
                team[0].place(name, where, array)
        for name, volume in team[0].volumes().items():
            np.testing.assert_allclose(volume, expected[name], rtol=1e-4, atol=1e-5)


EXECUTIONS = [Execution(deferred=True), Execution(deferred=True, kernels=True)]


def head_of(spacing: float | None) -> tuple[GridSampler, Space]:
    """A sampler of a head whose voxel axes point elsewhere than the model's, and its space."""
    affine = np.array([[0, 0, 1.2, 3], [-1, 0, 0, 1], [0, 1, 0, -4], [0, 0, 0, 1]])
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 70, 52, 61), affine=affine))
    model_subject, space = Preprocess("RAS", spacing)(subject)
    return GridSampler(model_subject, (24, 32, 20), 12, fit=True), space


def stitched(
    stitch: Stitch, sampler: GridSampler, space: Space, batches: Sequence[torch.Tensor], execution: Execution | None
) -> SubjectStitcher:
    """A stitcher with all patches; batches take turns."""
    quilt, size = SubjectStitcher(stitch, sampler, space, memory=Memory(execution=execution)), len(batches[0])
    numbers = sampler.grid.streaming_order.tolist()
    for n, first in enumerate(range(0, len(numbers), size)):
        some = numbers[first : first + size]
        quilt.add({"": batches[n % len(batches)][: len(some)]}, some)
    return quilt


def batches_of(classes: int, dtype: torch.dtype, *, last: bool = False) -> list[torch.Tensor]:
    """Three batches of five patches for `head_of`."""
    generator = torch.Generator().manual_seed(0)
    batches = [torch.randn(5, classes, 24, 32, 20, generator=generator).to(dtype) for _ in range(3)]
    return [batch.contiguous(memory_format=torch.channels_last_3d) for batch in batches] if last else batches


def test_triton_works_on_this_machine() -> None:
    """So that the other tests are not about torch alone."""
    assert find_spec("triton") is None or kernels_run_on(torch.device("cuda", torch.cuda.current_device()))


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("classes", [2, 14, 300])
@pytest.mark.parametrize(("dtype", "last"), [(torch.float32, False), (torch.bfloat16, True), (torch.float16, False)])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_volumes_of_the_device_are_those_of_the_host_and_always_the_same(
    execution: Execution, classes: int, dtype: torch.dtype, last: bool, spacing: float | None
) -> None:
    """Scores to 1e-4, labels in 99.99 % of the voxels, and two runs to the bit."""
    if execution.kernels and find_spec("triton") is None:
        pytest.skip("there is no Triton")
    sampler, space = head_of(spacing)
    batches, stitch = batches_of(classes, dtype, last=last), Stitch("gaussian", ["labels", "logits"])
    on_device = [batch.cuda() for batch in batches]
    expected = stitched(stitch, sampler, space, batches, None).volumes()
    made, again = (stitched(stitch, sampler, space, on_device, execution).volumes() for _ in range(2))
    np.testing.assert_allclose(made["logits"], expected["logits"], rtol=1e-4, atol=1e-4)
    assert made["labels"].dtype == expected["labels"].dtype
    assert (made["labels"] == expected["labels"]).mean() >= 0.9999
    for name, volume in made.items():
        np.testing.assert_array_equal(again[name], volume)


@pytest.mark.parametrize("execution", EXECUTIONS)
@pytest.mark.parametrize("mode", ["crop", "gaussian"])
@pytest.mark.parametrize("spacing", [None, 1.7])
def test_nothing_waits_for_the_device_before_a_subject_is_finished(
    execution: Execution, mode: str, spacing: float | None
) -> None:
    """Of all products, once kernels are compiled."""
    if execution.kernels and find_spec("triton") is None:
        pytest.skip("there is no Triton")
    sampler, space = head_of(spacing)
    batches = [batch.cuda() for batch in batches_of(3, torch.bfloat16)]
    stitch = Stitch(mode, ["labels", "logits", "probabilities", "entropy", "disagreement"], compare=["average"])
    expected = stitched(stitch, sampler, space, batches, execution).volumes()
    with never_waiting():
        quilt = stitched(stitch, sampler, space, batches, execution)
    for name, volume in quilt.volumes().items():
        np.testing.assert_array_equal(volume, expected[name])


@pytest.mark.parametrize("execution", EXECUTIONS)
def test_scores_of_the_device_that_are_not_finite_are_an_error(execution: Execution) -> None:
    """When the subject is finished."""
    if execution.kernels and find_spec("triton") is None:
        pytest.skip("there is no Triton")
    sampler, space = head_of(1.7)
    batches = [batch.cuda() for batch in batches_of(3, torch.float32)]
    batches[1][2, 1, 12, 16, 10] = torch.inf
    with pytest.raises(OutputError, match="NaN or infinite"):
        stitched(Stitch("hann", ["labels"]), sampler, space, batches, execution).volumes()


def test_a_volume_larger_than_the_pinned_buffers_arrives_whole() -> None:
    """It travels in pieces, of which two are on their way at a time."""
    source = torch.randint(0, 255, (2**24 * 3 + 5,), dtype=torch.uint8, device="cuda")
    progress, target = Progress(source.device), np.zeros(len(source), dtype=np.uint8)
    progress.mark()
    progress.download([source], [target])
    np.testing.assert_array_equal(target, source.cpu())


@pytest.mark.parametrize("mode", ["crop", "gaussian"])
@pytest.mark.parametrize("spacing", [None, 1.3])
def test_sums_that_move_to_the_host_halfway_equal_those_that_stay(mode: str, spacing: float | None) -> None:
    """Patches that were added before the device was full are kept."""
    subject = Subject(t1=ScalarImage(tensor=torch.zeros(1, 30, 22, 26)))
    model_subject, space = Preprocess(spacing=spacing)(subject)
    sampler = GridSampler(model_subject, 12, 4, fit=True)
    patches = torch.randn(len(sampler), 3, 12, 12, 12, generator=torch.Generator().manual_seed(0)).cuda()
    made = []
    for moved in (False, True):
        quilt = SubjectStitcher(Stitch(mode, ["logits", "labels"], fill=[0, 1, 2]), sampler, space, skipped=[2])
        for place, n in enumerate(sampler.grid.streaming_order.tolist()):
            if n != 2:
                quilt.add({"": patches[n : n + 1]}, [n])
            if moved and place == len(sampler) // 2:
                quilt.to(torch.device("cpu"))
        made.append(quilt.volumes())
    np.testing.assert_allclose(made[1]["logits"], made[0]["logits"], rtol=1e-5, atol=1e-5)
    assert (made[1]["labels"] == made[0]["labels"]).mean() > 0.999


class Hungry(Over50):
    """Needs 256 MiB of device memory per patch."""

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        held = torch.empty(len(x) * 2**28, dtype=torch.uint8, device=x.device)
        return super().forward(x) + held[0] * 0


@pytest.mark.parametrize(("room", "wanted"), [(3 * 2**29, "done"), (2**27, "failed")])
def test_a_full_device_makes_batches_smaller_before_subjects_fail(room: int, wanted: str, tmp_path: Path) -> None:
    """With CUDA's own error: labels are right if one patch fits; if none does, every subject has its reason."""
    save(tmp_path / "in/a.nii", volume := noise((20, 17, 14)))
    writer = VolumeWriter(tmp_path / "out")
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(tmp_path / "in", 8, 4, batch_size=8)
    torch.cuda.empty_cache()
    torch.cuda.set_per_process_memory_fraction(room / torch.cuda.mem_get_info()[1])
    try:
        trainer.predict(PatchPredictor(Hungry()), datamodule=data, return_predictions=False)
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert [row.status for row in writer.rows] == [wanted]
    if wanted == "done":
        np.testing.assert_array_equal(read(tmp_path / "out/a_labels.nii.gz"), np.asarray(volume) > 50)
    else:
        assert "out of memory" in writer.rows[0].error


# Images on the device


DEVICE = torch.device("cuda", 0)
AFFINE = np.array([[0, 0, -1.3, 4], [-0.8, 0, 0, 9], [0, 2, 0, -7], [0, 0, 0, 1.0]])


def predict_on_gpu(out: Path, scans: Path, network: torch.nn.Module, stitch: Stitch, **options: Any) -> VolumeWriter:
    """A run on the GPU."""
    writer = VolumeWriter(out, stitch, compress=False)
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    data = GridDataModule(scans, 8, 4, batch_size=3, **options)
    trainer.predict(PatchPredictor(network), datamodule=data, return_predictions=False)
    return writer


@pytest.mark.parametrize("dtype", [np.uint8, np.int16, np.float32, np.float64])
def test_volumes_arrive_on_the_device_as_they_are(dtype: type) -> None:
    """Through pinned buffers much smaller than a volume, several in a row, with the order of axes that they had."""
    stream = CudaStream(DEVICE)
    staging = Staging(stream, 1000)
    volumes = [torch.from_numpy(noise((2, 31, 22, 17), n).astype(dtype)).permute(0, 3, 2, 1) for n in range(3)]
    with stream.active():
        made = [staging.upload(volume) for volume in volumes]
    torch.cuda.synchronize()
    for volume, copy in zip(volumes, made, strict=True):
        assert copy.device == DEVICE
        assert copy.stride() == volume.stride()
        assert torch.equal(copy.cpu(), volume)


@pytest.mark.parametrize("mode", ["constant", "edge", "reflect", "symmetric", "wrap", "mean"])
def test_padding_on_the_device_equals_numpy(mode: str) -> None:
    """The volume stays there."""
    volume = torch.from_numpy(noise((2, 7, 6, 5)))
    pad, padding = to_padding(mode), ((3, 9), (0, 1), (4, 0))
    made = pad(volume.cuda(), padding)
    assert made.is_cuda
    assert torch.equal(made.cpu(), pad(volume, padding))


@pytest.mark.parametrize("workers", [0, 1, 3])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"preprocess": Preprocess("LPS", 1.1)},
        {"preprocess": Preprocess(None, intensity=[torch.neg, lambda x: x.numpy() + 0.5])},  # numpy wants the host
        {"padding_mode": "reflect", "skip": 98.5},
        {"preprocess": Preprocess(spacing=1.1, device="cpu")},
    ],
)
def test_images_prepared_on_the_device_give_the_hosts_outputs(
    workers: int, options: dict[str, Any], tmp_path: Path
) -> None:
    """Eight subjects in a row; scores within 1e-4 of those of the host."""
    for n in range(8):
        save(tmp_path / f"in/s{n}.nii.gz", noise((19 + n, 11, 14), n), AFFINE)
    stitch = Stitch(products=["logits"], fill=[0.0])
    writer = predict_on_gpu(tmp_path / "out", tmp_path / "in", Plus(), stitch, num_workers=workers, **options)
    assert [row.status for row in writer.rows] == ["done"] * 8
    for n in range(8):
        wanted = predict_volume(Plus(), tmp_path / f"in/s{n}.nii.gz", 8, 4, stitch=stitch, **options)["logits"][0]
        np.testing.assert_allclose(read(tmp_path / f"out/s{n}_logits.nii"), wanted, rtol=1e-4, atol=1e-4)


def test_batches_are_cut_on_the_device_without_waiting(tmp_path: Path) -> None:
    """Not once in a subject, whether it is on the device or on the host; the batches hold the host's patches."""
    save(tmp_path / "a.nii", noise((19, 11, 14)), AFFINE)
    task = SubjectTask(SubjectFiles("a", {"image": tmp_path / "a.nii"}))
    loader = GridLoader((8, 8, 8), (4, 4, 4), Preprocess(spacing=1.3))
    wanted = torch.cat([batch.data.clone() for batch in cut_batches([loader.load(task)], 3)])
    for takes_volumes in (True, False):
        feed = DeviceFeed(CudaStream(DEVICE), takes_volumes=takes_volumes, channels_last=True)
        loaded = loader.load(task, 0, feed)
        assert loaded.source.is_on_device == takes_volumes
        seen: list[torch.Tensor] = []
        torch.cuda.synchronize()
        with never_waiting():
            seen = [batch.to(DEVICE).data.clone() for batch in cut_batches([loaded], 3, feed)]
        torch.testing.assert_close(torch.cat(seen).cpu(), wanted, rtol=1e-4, atol=1e-4)


def test_one_volume_is_predicted_on_the_device() -> None:
    """By predict_volume, from a tensor on the host."""
    image = ScalarImage(tensor=torch.from_numpy(noise((17, 9, 12)))[None], affine=AFFINE)
    options: dict[str, Any] = {"preprocess": Preprocess(spacing=1.4), "batch_size": 4, "padding_mode": "edge"}
    made = predict_volume(Plus(), image, 8, 4, device="cuda", **options)["image"]
    np.testing.assert_allclose(made, predict_volume(Plus(), image, 8, 4, **options)["image"], rtol=1e-4, atol=1e-4)


# Of torch's own compiler.
@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The CUDA Graph is empty")
@pytest.mark.parametrize("members", [1, 2])
def test_a_network_compiled_to_cuda_graphs_gives_the_same(members: int, tmp_path: Path) -> None:
    """Also an ensemble with flips, while other subjects are loaded."""
    for n in range(4):
        save(tmp_path / f"in/s{n}.nii.gz", noise((19, 11, 14), n))
    stitch, volumes = Stitch(products=["logits"]), []
    for compiled in (False, True):
        torch.manual_seed(0)
        networks = [torch.nn.Conv3d(1, 2, 3, padding=1) for _ in range(members)]
        writer = VolumeWriter(tmp_path / str(compiled), stitch, compress=False)
        trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
        predictor = PatchPredictor(networks, flips=[0] * (members > 1), compile=compiled)
        data = GridDataModule(tmp_path / "in", 8, 4, batch_size=3, num_workers=2)
        trainer.predict(predictor, datamodule=data, return_predictions=False)
        assert [row.status for row in writer.rows] == ["done"] * 4
        volumes.append([read(tmp_path / f"{compiled}/s{n}_logits.nii") for n in range(4)])
    # Convolutions in TF32 are rounded to 10 bits.
    for plain, graphed in zip(*volumes, strict=True):
        np.testing.assert_allclose(graphed, plain, rtol=1e-2, atol=0.5)


@pytest.mark.parametrize("on_device", [True, False])
def test_predicted_device_memory_is_what_a_run_takes(on_device: bool, tmp_path: Path) -> None:
    """Within 15 %, for a network with large activations, a resampled volume and 14 classes."""
    save(tmp_path / "in/a.nii", noise((200, 200, 180)))
    network = torch.nn.Sequential(
        torch.nn.Conv3d(1, 32, 3, padding=1), torch.nn.ReLU(), torch.nn.Conv3d(32, 32, 3, padding=1), torch.nn.ReLU(),
        torch.nn.Conv3d(32, 14, 1),
    )  # fmt: skip
    preprocess = Preprocess(spacing=1.2, device="auto" if on_device else "cpu")
    data = GridDataModule(tmp_path / "in", 64, 32, batch_size=2, preprocess=preprocess)
    predictor, writer = PatchPredictor(network), VolumeWriter(tmp_path / "out")
    trainer = Trainer(accelerator="gpu", devices=1, logger=False, callbacks=[writer], enable_progress_bar=False)
    torch.cuda.empty_cache()
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    trainer.predict(predictor, datamodule=data, return_predictions=False)
    peak = torch.cuda.max_memory_allocated() - before
    required = Planner(trainer, predictor, data.run_size, writer.options.settings(data, predictor)).plan().requirements
    assert required.images_on_device == on_device
    assert sum(required.device.values()) == pytest.approx(peak, rel=0.15)


def blobs(shape: tuple[int, int, int], labels: Sequence[int], dtype: str) -> np.ndarray:
    """Smooth labels with some noise, which makes many small components."""
    generator = torch.Generator().manual_seed(0)
    coarse = torch.randn(1, 1, 5, 6, 4, generator=generator)
    fine = torch.nn.functional.interpolate(coarse, shape, mode="trilinear")[0, 0]
    classes = ((fine + 1) * len(labels) / 2).clamp(0, len(labels)).round().long().numpy()
    classes[np.random.default_rng(0).random(shape) < 0.01] = 1
    return np.array([0, *labels], dtype)[classes]


@pytest.mark.parametrize("strict", [False, True])
@pytest.mark.parametrize(
    ("labels", "dtype"),
    [
        (range(1, 15), "u1"),
        ([3, 700, 65535], "u2"),
        ([1, 70000, 2**31 + 7], "u4"),
        ([5, 9], "i8"),
        (range(1, 200), "u1"),
    ],
)
def test_numbers_of_labels_on_the_device_are_those_of_the_host(
    labels: Sequence[int], dtype: str, strict: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also of images that are not kept there, the same each time, without float atomics, and in any thread."""
    shape = (130, 119, 101)
    volume, random = blobs(shape, labels, dtype), np.random.default_rng(1)
    noisy = random.normal(100, 300, shape)
    images: dict[str, np.ndarray] = {kind: noisy.astype(kind) for kind in ("u1", "i2", "f2", "f4", "f8")}
    images |= {"u2": (noisy + 3000).astype("u2"), "wide": (noisy * 1e6).astype("i4"), "?": noisy > 0}
    images |= {"F": np.asfortranarray(images["i2"]), "flipped": images["i2"][::-1, :, ::-1]}
    images["f4"][::7] = np.nan
    frame, device = Frame(shape, np.diag([1.0, 2, 1.5, 1])), torch.device("cuda")
    assert is_worthwhile(device, volume.size)
    monkeypatch.setattr(device_statistics, "_PIECES", [device_statistics.Pieces(2**19, images["f2"].nbytes, 5 * 2**27)])
    wanted = label_statistics(volume, frame, images)
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.use_deterministic_algorithms(strict)
    try:
        with ThreadPoolExecutor(1) as pool:
            found, again = (
                pool.submit(label_statistics, volume, frame, images, device=device).result() for _ in range(2)
            )
    finally:
        torch.use_deterministic_algorithms(False)
    assert torch.cuda.memory_allocated() == before
    assert torch.cuda.max_memory_allocated() - before < 5 * 2**27
    assert found == again
    check_numbers(found, wanted, check_moments)


def check_moments(ours: Intensities, theirs: Intensities) -> None:
    assert (ours.mean, ours.sd) == pytest.approx((theirs.mean, theirs.sd), rel=1e-9)


def test_rows_of_a_large_volume_come_from_the_device(monkeypatch: pytest.MonkeyPatch) -> None:
    """They are the host's, to the last digit, and nothing made the host take over."""
    labels = blobs((160, 150, 140), range(1, 15), "u1")[None]
    image = np.random.default_rng(2).normal(100, 300, labels.shape).astype("f4")
    call = ("a", "labels", labels, Frame((160, 150, 140), np.eye(4)), {"t1": image, "t2": image.astype("i2")}, {})
    wanted = statistics_rows(*call)
    monkeypatch.delattr(statistics_table, "_note")
    monkeypatch.delattr(label_statistics_module, "_Volume")
    assert statistics_rows(*call, device=torch.device("cuda", 0)) == wanted


@pytest.mark.parametrize("precision", ["32-true", "bf16-mixed", "16-true"])
def test_a_self_check_passes_on_the_device(precision: str, tmp_path: Path, forks: Server) -> None:
    """With images, sums and products there; a network of several layers is compared with the host's."""
    save(tmp_path / "in/a.nii.gz", noise((40, 30, 36)), np.diag([1.0, 1.2, 2, 1]))
    network = "{_target_: torch.nn.Conv3d, in_channels: 1, out_channels: 3, kernel_size: 3, padding: 1}"
    run = forks.start(
        "data.inputs=in", f"model.net={network}", "ckpt_path=null", "data.patch_size=16", "data.patch_overlap=8",
        "trainer=gpu", f"trainer.precision={precision}", "preprocess.spacing=1.5", "run.selfcheck=true",
        "stitch.products=[labels,probabilities,entropy]", cwd=tmp_path,
    )  # fmt: skip
    assert run.wait() == [0], run.text
