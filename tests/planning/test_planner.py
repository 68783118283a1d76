"""Tests the planner: it predicts from headers what a run does, refuses what cannot fit, and writes no volume."""

import json
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from time import perf_counter
from typing import Any

import numpy as np
import pytest
import torch
from forks import Server, checked
from lightning.pytorch import Trainer
from synthetic import ROOT, Over50, count_headers, noise, read, save
from torch import Tensor, nn

from voxquilt.data.preprocess import Preprocess
from voxquilt.data.staging import STAGED
from voxquilt.data.subject_size import RunSize, SubjectSize, combined, run_size
from voxquilt.models.predictor import PatchPredictor
from voxquilt.planning.machine import disk_free, memory_available
from voxquilt.planning.planner import MachineResources, Planner
from voxquilt.planning.preflight import largest_by_trial, weights_on_device
from voxquilt.planning.resource_estimate import MIB, RunSettings, bytes_on_disk, estimate, plan_outputs
from voxquilt.planning.shape_probe import Probe
from voxquilt.prediction.datamodule import GridDataModule
from voxquilt.prediction.timing import Rates
from voxquilt.stitching.stitch import Stitch

NETWORK = ("model=state_dict", "model.net._target_=synthetic.Over50", "ckpt_path=null")
JOB = ("data.inputs=in", *NETWORK, "data.patch_size=8", "data.patch_overlap=4", "data.batch_size=3")


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five subjects of different sizes."""
    folder = tmp_path_factory.mktemp("place")
    for n in range(5):
        save(folder / f"in/s{n}.nii.gz", noise((12 + 5 * n, 17, 14), n), np.diag([-1.0, 1.3, 0.8, 1.0]))
    return folder


def plan(folder: Path, name: str = "plan.json") -> dict[str, object]:
    return json.loads((folder / name).read_text())


@pytest.mark.parametrize("ranks", [1, 2])
def test_a_plan_predicts_patches_shapes_and_loads_of_the_run(
    ranks: int, place: Path, tmp_path: Path, forks: Server
) -> None:
    """For every subject and rank; only plan.json is written."""
    out = f"output_dir={tmp_path / 'out'}"
    job = forks.start(*JOB, out, "run.dry_run=true", "preprocess.spacing=1.1", cwd=place, ranks=ranks)
    assert checked(job.wait()) == 0, job.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    told = plan(tmp_path / "out")
    job = forks.start(*JOB, out, "preprocess.spacing=1.1", cwd=place, ranks=ranks)
    assert checked(job.wait()) == 0, job.text
    record = json.loads((tmp_path / "out/run.json").read_text())
    assert told["patches"] == record["patches"]
    assert [rank["load"] - rank["subjects"] for rank in told["ranks"]] == [rank["patches"] for rank in record["ranks"]]
    for one in told["per_subject"]:
        made = read(tmp_path / f"out/{one['subject']}_labels.nii.gz")
        assert one["shape"] == list(made.shape)
        assert one["output_at_most"] == made.nbytes
        assert one["spacing"] == [1.0, 1.3, 0.8]
        assert one["model_shape"] == [round(n * mm / 1.1) for n, mm in zip(made.shape, [1.0, 1.3, 0.8], strict=True)]
    assert told["outputs"] == {"": [3, 2, 8, 8, 8]}
    assert told["fits"]


def test_a_plan_leaves_out_done_subjects_and_other_shards(place: Path, tmp_path: Path, forks: Server) -> None:
    """It covers what is left of a run, or of one shard."""
    out = f"output_dir={tmp_path / 'out'}"
    (tmp_path / "some").mkdir()
    for n in (1, 3):
        (tmp_path / f"some/s{n}.nii.gz").symlink_to(place / f"in/s{n}.nii.gz")
    assert forks.start(*JOB, out, cwd=place).wait() == [0]
    (tmp_path / "out/s2_labels.nii.gz").unlink()
    assert forks.start(*JOB, out, "run.dry_run=true", cwd=place).wait() == [0]
    told = plan(tmp_path / "out")
    assert [one["subject"] for one in told["per_subject"]] == ["s2"]
    assert told["done_before"] == 4
    shares: list[str] = []
    for index in range(2):
        words = (f"shard.index={index}", "shard.count=2", f"output_dir={tmp_path / 'shards'}", "run.dry_run=true")
        assert forks.start(*JOB, *words, cwd=place).wait() == [0]
        shares += [s["subject"] for s in plan(tmp_path / "shards", f"dry_plan_{index}_of_2.json")["per_subject"]]
    assert sorted(shares) == [f"s{n}" for n in range(5)]


def test_a_timed_plan_writes_no_volume(place: Path, tmp_path: Path, forks: Server) -> None:
    """It gives seconds per subject and process."""
    out = f"output_dir={tmp_path / 'out'}"
    job = forks.start(*JOB, out, "run.dry_run=time", cwd=place, ranks=2)
    assert checked(job.wait()) == 0, job.text
    assert [path.name for path in (tmp_path / "out").iterdir()] == ["plan.json"]
    told = plan(tmp_path / "out")
    assert all(rank["seconds"] > 0 for rank in told["ranks"])
    assert told["seconds"] == max(rank["seconds"] for rank in told["ranks"])
    assert {"reading", "patches", "writing"} == set(told["per_subject"][0]["seconds"])


@pytest.mark.parametrize(
    ("threads", "of_one", "of_three"),
    # Reading the first, 10 patches of 3 s each plus the threads' time for reading and writing, writing the last.
    [(0, 5 + 1 + 30 + 4, 5 + 1 + 90 + 4), (2, 5 + 1 + 30 + 4, 5 + 1 + 90 + (2 * 1 + 2 * 4) / 2 + 4)],
)
def test_estimated_seconds_count_overlapping_steps_once(threads: int, of_one: float, of_three: float) -> None:
    """A network on the host shares its threads with reading and writing, one on a GPU does not; slow writing counts."""
    one = SubjectSize((2, 3, 4), (2, 3, 4), (1, 1, 1), 1, 10, 24, 96, 96, 50, 50)
    rates = Rates(read=1 / 50, patch=3, write=4 / 24, begin=5, threads=threads)
    assert rates.subject(one) == pytest.approx({"reading": 1, "patches": 30, "writing": 4})
    assert rates.total([]) == 0
    assert rates.total([one]) == pytest.approx(of_one)
    assert rates.total([one] * 3) == pytest.approx(of_three)
    behind = Rates(read=1 / 50, patch=3, write=100 / 24, begin=5, threads=0)  # writing is what takes longest
    assert behind.total([one] * 3) == pytest.approx(5 + 1 + 2 * 100 + 100)


def test_a_timed_plan_measures_the_network(place: Path, tmp_path: Path, forks: Server) -> None:
    """For one that takes 0.3 s per batch of 3, a patch takes 0.1 s plus the time for cutting and adding."""
    words = (*JOB, f"output_dir={tmp_path / 'out'}", "model.net._target_=synthetic.Slow", "run.dry_run=time")
    job = forks.start(*words, cwd=place, env={"SLOW": "0.3"})
    assert job.wait() == [0], job.text
    told = plan(tmp_path / "out")
    for one in told["per_subject"]:
        assert 0.1 * one["patches"] - 0.01 <= one["seconds"]["patches"] <= 0.16 * one["patches"]
    assert told["seconds"] >= sum(one["seconds"]["patches"] for one in told["per_subject"]) - 0.1


@pytest.mark.parametrize(("offload", "wanted"), [(True, 40), ("auto", 60), (False, 60)])
def test_an_offloaded_ensemble_needs_its_largest_member_on_the_device(offload: bool | str, wanted: int) -> None:
    """In bytes of float32, biases included; otherwise it needs all members."""
    small, large = nn.Conv3d(1, 1, (1, 1, 4)), nn.Conv3d(1, 1, (1, 1, 9))
    assert weights_on_device(PatchPredictor([small, large], offload=offload)) == wanted


def test_a_run_that_cannot_fit_is_refused_before_it_starts(place: Path, tmp_path: Path, forks: Server) -> None:
    """Status 2 and one message with what would fit; a dry run prints the same and ends with 0."""
    words = (*JOB, f"output_dir={tmp_path / 'out'}", "data.patch_size=256", "data.batch_size=4096")
    job = forks.start(*words, cwd=place)
    assert job.wait() == [2]
    assert "does not fit the host's memory: it needs " in job.text
    assert "It fits with data.batch_size=" in job.text
    assert "Traceback" not in job.text
    assert [path.name for path in (tmp_path / "out").glob("[!.]*")] == []
    job = forks.start(*words, cwd=place, ranks=2)
    assert checked(job.wait()) == 2
    assert job.text.count("does not fit the host's memory") == 1
    assert forks.start(*words, "run.dry_run=true", cwd=place).wait() == [0]
    told = plan(tmp_path / "out")
    assert "does not fit" in told["refusal"]
    assert not told["fits"]


def test_an_automatic_batch_size_gives_the_same_files(place: Path, tmp_path: Path, forks: Server) -> None:
    """As many patches as keep a CPU busy, and one number for all processes."""
    for ranks in (1, 2):
        out = tmp_path / f"out{ranks}"
        job = forks.start(*JOB, "data.batch_size=auto", f"output_dir={out}", cwd=place, ranks=ranks)
        assert checked(job.wait()) == 0, job.text
        np.testing.assert_array_equal(read(out / "s4_labels.nii.gz"), noise((32, 17, 14), 4) > 50)


def test_each_header_is_read_once_before_a_run(place: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """By a single process, whatever is planned."""
    read = count_headers(monkeypatch)
    data = GridDataModule(str(place / "in"), 8, 4)
    data.setup("predict")
    assert sorted(read) == [f"s{n}" for n in range(5)]
    assert data.plan.size.patches == sum(size.patches - 1 for size in data.plan.costs)
    assert data.plan.loads == [sum(size.patches for size in data.plan.costs)]


def test_planning_takes_at_most_20_ms_per_small_subject(place: Path, tmp_path: Path) -> None:
    """For two thousand subjects."""
    scans = tmp_path / "in"
    scans.mkdir()
    save(tmp_path / "one.nii", noise((8, 8, 8)))
    for n in range(2000):
        (scans / f"s{n:04}.nii").hardlink_to(tmp_path / "one.nii")
    data = GridDataModule(str(scans), 8, 4)
    began = perf_counter()
    data.setup("predict")
    assert perf_counter() - began < 2000 * 0.02
    assert data.plan.size.subjects == 2000


# Requirements


SETTINGS = RunSettings(Stitch(), Path("out"), (8, 8, 8), 2, 1, 2**40, True, 500 * MIB)
ONE = RunSize(subjects=1, patches=27, voxels=10**6, file=10**6, largest=10**6, channels=1, ring=10**5, loaded=10**6)


def passed(channels: int) -> Probe:
    return Probe({"": (2, channels, 8, 8, 8)}, 10**6, 10**5, {"": torch.float32})


@pytest.mark.parametrize(
    ("stitch", "channels", "made", "sums"),
    [
        (Stitch(), 3, {"labels": 1}, 3 * 4),
        (Stitch(), 1, {"image": 4}, 4),
        (Stitch(), 300, {"labels": 2}, 300 * 4),
        (Stitch(products=["labels", "probabilities", "entropy"]), 3,
         {"labels": 1, "probabilities": 12, "entropy": 4}, 12),
        (Stitch(products=["disagreement"]), 3, {"disagreement": 4}, (3 + 1) * 4),
        (Stitch(compare=["crop"]), 3, {"labels": 1, "labels_crop": 1}, 2 * 3 * 4),
        (Stitch(products=["labels", "disagreement"], activation="sigmoid"), 2, {"labels": 2, "disagreement": 8},
         (2 + 2 * 2) * 4),
    ],
)  # fmt: skip
def test_estimated_bytes_of_products_and_sums_equal_those_of_stitching(
    stitch: Stitch, channels: int, made: dict[str, int], sums: float
) -> None:
    """Bytes per voxel, for each product and for the ring."""
    outputs = plan_outputs(stitch, {"": (2, channels, 8, 8, 8)}, (8, 8, 8))
    assert {one.name: one.voxel_bytes for one in outputs.files} == made
    assert outputs.sums == sums


def test_an_output_of_half_size_takes_an_eighth_of_the_sums() -> None:
    """Half along each axis."""
    assert plan_outputs(Stitch(), {"": (2, 4, 4, 4, 4)}, (8, 8, 8)).sums == 4 * 4 / 8


def test_large_products_are_counted_on_disk_instead_of_memory() -> None:
    """Beside the outputs, which need room too."""
    outputs = plan_outputs(Stitch(products=["probabilities"]), passed(3).outputs, (8, 8, 8))
    small, large = (estimate(ONE, passed(3), outputs, replace(SETTINGS, in_memory=limit))
                    for limit in (2**40, 0))  # fmt: skip
    assert small.host["products"] - large.host["products"] == 12 * 10**6
    assert (small.scratch, large.scratch) == (0, 12 * 10**6)
    assert large.bound == 12 * 10**6
    assert bytes_on_disk(outputs.files, 10**6, compress=False) == 12 * 10**6
    assert large.disk < large.bound


def test_memory_grows_with_workers_and_batch_size_by_what_each_holds() -> None:
    """Loaded images per worker, patches per batch; the sums stay the same."""
    size, outputs = combined([ONE, ONE, ONE]), plan_outputs(Stitch(), passed(3).outputs, (8, 8, 8))

    def host(**changes: int) -> dict[str, int]:
        return dict(estimate(size, passed(3), outputs, replace(SETTINGS, **changes)).host)

    assert host(num_workers=2)["images"] - host(num_workers=0)["images"] == 2 * ONE.loaded
    assert host(num_workers=9)["images"] == 3 * ONE.loaded  # there are only three
    assert host(batch_size=4)["batches"] == 2 * host(batch_size=2)["batches"] == 2 * 2 * 2 * 512 * 4
    assert host()["sums"] == ONE.ring * 12 + 512 * 4


def test_with_a_gpu_network_and_sums_are_counted_on_the_device() -> None:
    """The host keeps only the outputs that come back."""
    outputs = plan_outputs(Stitch(), passed(3).outputs, (8, 8, 8))
    found = estimate(ONE, passed(3), outputs, replace(SETTINGS, gpu=True, weights=5))
    assert found.device["weights"] == 5
    assert found.device["network"] == 10**6
    assert found.device["sums"] == ONE.ring * 12 + 512 * 4
    assert (found.host["sums"], found.host["network"]) == (0, 10**5)


def test_images_on_the_device_are_counted_there() -> None:
    """Those ahead and those being prepared; the host keeps the voxels of one file, and the buffers of copies."""
    size, outputs = (
        replace(combined([ONE, ONE, ONE]), reading=3 * 10**6, stored=10**5),
        plan_outputs(Stitch(products=["labels", "probabilities"]), passed(3).outputs, (8, 8, 8)),
    )
    there, here = (
        estimate(size, passed(3), outputs, replace(SETTINGS, gpu=True, images_on_device=on)) for on in (True, False)
    )
    assert there.images_on_device
    assert not here.images_on_device
    assert (there.device["images"], there.device["reading"]) == (2 * ONE.loaded, 3 * 10**6)
    assert (there.host["images"], there.host["reading"]) == (0, 10**5 + STAGED)
    assert (here.host["images"], here.host["reading"]) == (2 * ONE.loaded, 3 * 10**6)
    assert here.device.keys() == {"weights", "network", "batches", "sums", "products"}
    for both in (there, here):
        assert both.device["batches"] == 3 * 2 * 512 * 4  # two that are filled in turn, and the network's copy
        assert both.device["products"] == 2 * (1 + 12) * 10**6


def device_planner(settings: RunSettings, size: RunSize = ONE) -> Planner:
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    return Planner(trainer, PatchPredictor(Over50()), size, replace(settings, gpu=True, images_on_device=True))


def test_products_are_counted_on_the_device_where_half_of_its_free_memory_holds_them() -> None:
    """With the sums, as the stitcher decides; also those that are too large for the host's memory."""
    outputs = plan_outputs(Stitch(products=["probabilities"]), passed(3).outputs, (8, 8, 8))
    settings = replace(SETTINGS, gpu=True, weights=7, in_memory=0)
    used = 7 + 10**6 + 3 * 2 * 512 * 4
    need = 12 * 10**6 + ONE.ring * 12 + 512 * 4
    for memory, kept in ((used + 2 * need, 12 * 10**6), (used + 2 * need - 2, None)):
        device = estimate(ONE, passed(3), outputs, replace(settings, device_memory=memory)).device
        assert device.get("products") == kept


def test_images_stay_on_the_host_where_the_device_is_too_small() -> None:
    """The plan says so, and counts them on the host."""
    planner = device_planner(SETTINGS)
    forecast = planner.plan()
    assert forecast.settings.images_on_device
    assert forecast.as_json()["images_on"] == "device"
    need = sum(size for what, size in forecast.requirements.device.items() if what != "products")
    forecast = device_planner(replace(SETTINGS, device_memory=need)).plan()  # nothing to spare
    assert not forecast.settings.images_on_device
    assert forecast.as_json()["images_on"] == "host"
    assert forecast.requirements.host["images"] == ONE.loaded
    assert any("images stay on the host" in note for note in forecast.notes)


@pytest.mark.parametrize(("most", "size"), [(1, 1), (2, 1), (3, 2), (5, 2), (6, 4), (10, 4), (11, 8), (10**9, 64)])
@pytest.mark.parametrize(
    "error", [torch.OutOfMemoryError("CUDA out of memory."), RuntimeError("only supports less than INT_MAX elements")]
)
def test_the_batch_size_of_a_device_passes_a_forward_with_a_quarter_to_spare(
    most: int, size: int, error: RuntimeError
) -> None:
    """The largest power of two whose trial, a quarter larger and one more, fits; one if none does."""
    sizes: list[int] = []

    def forward(patches: Tensor) -> Tensor:
        sizes.append(len(patches))
        if len(patches) > most:
            raise error
        return patches

    assert largest_by_trial(forward, (1, 2, 2, 2), torch.device("cpu"), device_planner(SETTINGS)) == size
    assert sizes == sorted(sizes)


def test_a_trial_leaves_room_for_images_sums_and_products(monkeypatch: pytest.MonkeyPatch) -> None:
    """Memory for them is taken while batches are tried; where there is none, they go to the host."""
    planner, empty, taken = device_planner(SETTINGS), torch.empty, list[int]()
    device = planner.plan().requirements.device
    wanted = sum(device[key] for key in ("images", "reading", "sums", "products"))

    def take(count: Any, **options: Any) -> Tensor:
        if not isinstance(count, int):  # a tensor without data, of the network's
            return empty(count, **options)
        taken.append(count)
        if len(taken) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory.")
        return empty(count, **options)

    def forward(patches: Tensor) -> Tensor:
        return patches

    with monkeypatch.context() as patched:
        patched.setattr(torch, "empty", take)
        for _ in range(2):
            assert largest_by_trial(forward, (1, 2, 2, 2), torch.device("cpu"), planner) == 64
    assert taken == [wanted, wanted]


def test_the_size_of_a_run_adds_voxels_and_keeps_the_largest_subject(place: Path) -> None:
    """Computed at once or by rank; unreadable files are counted."""
    data = GridDataModule(str(place / "in"), 8, 4, preprocess=Preprocess(spacing=2.0))
    sizes = [data.grids.cost(case).size for case in data.cases]
    total = run_size([*sizes, None])
    assert total == combined([run_size(sizes[:2]), run_size([None]), run_size(sizes[2:])])
    assert (total.subjects, total.unread) == (6, 1)
    assert total.voxels == sum((12 + 5 * n) * 17 * 14 for n in range(5))
    assert total.largest == 32 * 17 * 14
    assert total.file == 2 * total.voxels
    last = sizes[-1]
    assert last is not None
    # float32 in model space, since it is resampled, and padded to a patch where it is smaller.
    assert last.model == (16, 11, 6)
    assert last.loaded == 4 * 16 * 11 * 8
    assert last.stored == 2 * 32 * 17 * 14


def refusal(tmp_path: Path, memory: int, disk: int, **changes: object) -> str | None:
    settings = replace(
        SETTINGS,
        stitch=Stitch(products=["labels", "probabilities"]),
        folder=tmp_path,
        patch_size=(64, 64, 64),
        batch_size=8,
        **changes,
    )
    size = RunSize(3, 27, 3 * 10**8, 6 * 10**8, 10**8, 1, 10**7, 2 * 10**8)
    trainer = Trainer(accelerator="cpu", logger=False, enable_progress_bar=False)
    planner = Planner(trainer, PatchPredictor(Over50()), size, settings)
    planner._machine = MachineResources(memory, disk, 1)
    return planner.plan().refusal


def test_the_smallest_change_that_makes_a_run_fit_is_named(tmp_path: Path) -> None:
    """Changes that keep the outputs first; none if nothing helps."""
    plenty = 2**50
    assert refusal(tmp_path, plenty, plenty) is None
    found = refusal(tmp_path, 2_500_000_000, plenty)
    assert found is not None
    assert "It fits with data.num_workers=0." in found
    found = refusal(tmp_path, 1_500_000_000, plenty, num_workers=0)
    assert found is not None
    assert "It fits with callbacks.writer.in_memory=256." in found
    found = refusal(tmp_path, plenty, 10**8)
    assert found is not None
    assert "does not fit the disk: it needs about " in found
    assert "It fits with stitch.products=null." in found
    found = refusal(tmp_path, 10**6, plenty)
    assert found is not None
    assert "No single setting does it" in found


def test_memory_limits_of_cgroups_count(tmp_path: Path) -> None:
    """Of versions 1 and 2, of the process's group or a parent; page cache counts as free."""
    for version, files in ((2, ("memory.max", "memory.current", "inactive_file")),
                           (1, ("memory.limit_in_bytes", "memory.usage_in_bytes", "total_inactive_file"))):  # fmt: skip
        root = tmp_path / str(version)
        (root / "proc/self").mkdir(parents=True)
        (root / "proc/self/cgroup").write_text("0::/a/b\n" if version == 2 else "3:cpu:/\n4:memory:/a/b\n")
        top = root / "sys/fs/cgroup" / ("" if version == 2 else "memory")
        for folder, limit in ((top / "a", 5 * MIB), (top / "a/b", 8 * MIB)):
            folder.mkdir(parents=True)
            for name, text in zip(files[:2], (limit, 3 * MIB), strict=True):
                (folder / name).write_text(f"{text}\n")
            (folder / "memory.stat").write_text(f"anon 1\n{files[2]} {MIB}\n")
        assert memory_available(root) == 3 * MIB
    (tmp_path / "2/sys/fs/cgroup/a/memory.max").write_text("max\n")
    assert memory_available(tmp_path / "2") == 6 * MIB
    assert memory_available(tmp_path / "nowhere") > 100 * MIB


def test_free_disk_is_known_for_a_folder_that_does_not_exist_yet(tmp_path: Path) -> None:
    """It is that of the nearest existing parent."""
    assert disk_free(tmp_path / "a/b/c") == pytest.approx(disk_free(tmp_path), rel=0.1)


def test_memory_of_a_network_that_depends_on_values_is_guessed(place: Path, tmp_path: Path, forks: Server) -> None:
    """The plan says so, and the run goes on."""
    words = (*JOB, "model.net._target_=synthetic.Touchy", f"output_dir={tmp_path / 'out'}")
    job = forks.start(*words, "run.dry_run=true", cwd=place)
    assert job.wait() == [0], job.text
    notes = plan(tmp_path / "out")["notes"]
    assert isinstance(notes, list)
    assert "its memory is a guess" in notes[0]


def test_a_failing_network_is_a_note_in_the_plan(tmp_path: Path, forks: Server) -> None:
    """In the run it would be failed subjects."""
    save(tmp_path / "in/a.nii", np.full((8, 8, 8), 77, np.int16))
    job = forks.start(*JOB, "model.net._target_=synthetic.Touchy", "run.dry_run=time", cwd=tmp_path)
    assert job.wait() == [0], job.text
    assert "note: a cannot be timed: ValueError: there is a 77" in job.text
    assert [path.name for path in (tmp_path / "outputs").iterdir()] == ["plan.json"]


def test_the_plan_notes_what_it_does_not_count(place: Path, tmp_path: Path, forks: Server) -> None:
    """Compiling, and volumes shared by processes."""
    words = (*JOB, f"output_dir={tmp_path / 'out'}", "model.compile=true", "run.distribute=slab", "run.dry_run=true")
    job = forks.start(*words, cwd=place, ranks=2)
    assert job.wait() == [0, 0], job.text
    notes = plan(tmp_path / "out")["notes"]
    assert isinstance(notes, list)
    assert [note.partition(" ")[0] for note in notes] == ["torch.compile", "each"]


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_predicted_memory_is_what_a_run_takes(tmp_path: Path) -> None:
    """Within 15 % of the measured peak, in two of the benchmark's five configurations."""
    benchmark = (str(ROOT / "benchmarks/planned.py"), "--memory", "--check", "0.15")
    command = [sys.executable, *benchmark, "--only", "labels", "flips, disagreement"]
    done = subprocess.run(command, capture_output=True, text=True, timeout=550, check=False)
    assert done.returncode == 0, done.stdout + done.stderr
