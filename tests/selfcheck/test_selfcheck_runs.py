"""Tests run.selfcheck by the command: models from elsewhere, several processes, wrong settings, wrong kernels."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from bundles import make_bundle, make_image
from forks import Server
from nnunet_folders import MAIN, balanced, make_model, write_case
from onnx_files import export
from synthetic import Over50, noise, save

AFFINE = np.array([[-1.1, 0.2, 0, 4], [0.2, 1.2, 0, 9], [0, 0, 1.4, -7], [0, 0, 0, 1.0]])
ONE = {f"{MAIN}normalization_schemes": ["ZScoreNormalization"], f"{MAIN}use_mask_for_norm": [False]}
OURS = (
    "data.inputs=in", "model.net._target_=synthetic.Over50", "ckpt_path=net.pt", "data.patch_size=12",
    "data.patch_overlap=6", "preprocess.spacing=1.6",
)  # fmt: skip


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """A cohort whose file has an odd name, and weights."""
    save(tmp_path / "in/ä b.nii.gz", noise((22, 19, 26)), AFFINE)
    torch.save(Over50().state_dict(), tmp_path / "net.pt")
    return tmp_path


def check(forks: Server, folder: Path, *options: str, ranks: int = 1) -> tuple[list[int], dict[str, Any], str]:
    """Run it; gives the exit statuses, what was found, and what was printed."""
    run = forks.start(*options, "run.selfcheck=true", "run.log=json", "output_dir=out", cwd=folder, ranks=ranks)
    statuses = run.wait(120)
    lines = [line for line in run.text.splitlines() if line.startswith('{"event": "selfcheck"')]
    assert not (folder / "out").exists()
    return statuses, json.loads(lines[0]) if lines else {}, run.text


def off(found: dict[str, Any]) -> list[str]:
    """The checks that found something."""
    return [check["check"] for check in found["checks"] if not check["ok"]]


def test_processes_that_share_volumes_pass_and_each_checks_the_network(place: Path, forks: Server) -> None:
    """As torchrun starts them; they meet in a folder that they name alike."""
    statuses, found, text = check(forks, place, *OURS, "run.distribute=slab", ranks=2)
    assert (statuses, off(found)) == ([0, 0], []), text
    names = [one["check"] for one in found["checks"]]
    assert [name[-11:] for name in names if name.startswith("the network")] == ["(process 0)", "(process 1)"]


def test_a_wrong_setting_is_told_to_all_processes_and_none_waits(place: Path, forks: Server) -> None:
    """With status 2, as without a self-check."""
    save(place / "in/ä b.nii.gz", noise((12, 12, 12, 3)), AFFINE)
    statuses, found, text = check(forks, place, *OURS, ranks=2)
    assert (statuses, found) == ([2, 2], {})
    assert "the network takes 1 channel; subjects have 3" in text


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("stitch.overlap_mode=gausian",), "Did you mean gaussian?"),
        (("data.inputs=nothing",), "nothing"),
        (("run.selfcheck=maybe",), "run.selfcheck"),
        (("stitch.class_names=[a,b,c]",), "stitch.class_names has 3 names"),
    ],
)
def test_a_wrong_configuration_is_one_message(
    place: Path, forks: Server, options: tuple[str, ...], message: str
) -> None:
    """And status 2; nothing is checked."""
    done = forks.run(*OURS, "run.selfcheck=true", *options, cwd=place)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("voxquilt: ")


def test_a_kernel_that_is_wrong_in_half_precision_is_found_where_it_is(place: Path, forks: Server) -> None:
    """And the same network in single precision is right."""
    options = (*OURS, "model.net._target_=selfcheck_networks.WrongInHalf")
    statuses, found, text = check(forks, place, *options, "trainer.precision=bf16-mixed", "trainer.accelerator=cpu")
    (wrong,) = (one for one in found["checks"] if not one["ok"])
    assert statuses == [1], text
    assert wrong["check"].startswith("the network, cpu, bf16-mixed")
    assert wrong["voxel"] == [11, 11, 11]
    assert wrong["error"] > 100 * wrong["allowed"] > 0
    statuses, found, text = check(forks, place, *options, "trainer.accelerator=cpu")
    assert (statuses, off(found)) == ([0], []), text


def test_all_processes_end_with_the_status_of_what_was_found(place: Path, forks: Server) -> None:
    """A launcher, or a script behind torchrun, sees any of them."""
    options = (*OURS, "model.net._target_=selfcheck_networks.WrongInHalf", "trainer.precision=bf16-mixed")
    statuses, found, text = check(forks, place, *options, ranks=2)
    assert len(off(found)) == 2  # the network in each process
    assert statuses == [1, 1], text


@pytest.mark.parametrize("selfcheck", ["true", "false"])
def test_ctrl_c_before_anything_runs_is_a_line_and_its_status(place: Path, forks: Server, selfcheck: str) -> None:
    """No traceback, and nothing is left behind."""
    options = (*OURS, "model.net._target_=selfcheck_networks.Interrupted", f"run.selfcheck={selfcheck}")
    done = forks.run(*options, "output_dir=out", cwd=place, env={"TMPDIR": str(place)})
    assert (done.returncode, done.stdout, done.stderr) == (130, "", "voxquilt: stopped by SIGINT\n")
    assert not [path.name for path in place.iterdir() if path.name not in ("in", "net.pt")]


def test_half_precision_itself_is_no_error(place: Path, forks: Server) -> None:
    """A network of several layers is off by less than rounding explains, and by more than nothing."""
    options = (
        "model.net={_target_: monai.networks.nets.UNet, spatial_dims: 3, in_channels: 1, out_channels: 3, "
        "channels: [8, 16, 16], strides: [2, 2], num_res_units: 1}",
        "ckpt_path=null", "trainer.precision=bf16-true", "trainer.accelerator=cpu",
    )  # fmt: skip
    kept = [text for text in OURS if not text.startswith(("model.", "ckpt_path"))]
    statuses, found, text = check(forks, place, *kept, *options)
    (network,) = (one for one in found["checks"] if one["check"].startswith("the network"))
    assert statuses == [0], text
    assert 0 < network["error"] <= network["allowed"] < 20 * network["error"]


def test_a_network_that_draws_random_numbers_is_not_compared(place: Path, forks: Server) -> None:
    """Which is said."""
    statuses, found, _ = check(forks, place, *OURS, "model.net._target_=selfcheck_networks.Noisy")
    assert statuses == [0]
    assert "the network: it gives other numbers when it is run again" in found["not_checked"]


def test_a_folder_of_nnunet_passes_and_so_do_several_as_parts(place: Path, forks: Server) -> None:
    """With its own grids, per-slice interpolation, cubic splines, folds and mirroring."""
    labels = {"channel_names": {"0": "CT"}, "labels": {"background": 0, "organ": 1, "lesion": 2}}
    plans = {**ONE, f"{MAIN}spacing": [1.5, 1.3, 1.2], f"{MAIN}patch_size": [16, 16, 16]}
    for name in "ab":
        make_model(place / name, plans, labels, folds=(0, 1), fill=balanced, inference_allowed_mirroring_axes=(0, 2))
    write_case(place / "cases", "s0", (12, 10, 14), AFFINE)
    options = ("data.inputs=cases", "model=nnunet", "trainer.accelerator=cpu")
    statuses, found, text = check(forks, place, *options, "model.folder=a")
    assert (statuses, off(found)) == ([0], []), text
    assert any(line.startswith("preprocess.intensity") for line in found["not_checked"])
    statuses, found, text = check(forks, place, *options, "model.parts=[{folder: a}, {folder: b}]")
    assert (statuses, off(found)) == ([0], []), text
    assert {one["model"] for one in found["checks"]} == {"model.parts[0]", "model.parts[1]", ""}
    assert [one["check"] for one in found["checks"] if not one["model"]] == ["the models together: their labels"]


def test_a_cropped_subject_of_two_images_passes(place: Path, forks: Server) -> None:
    """What lies outside of the crop is the background of an image there, and not that of two classes."""
    make_model(place / "two", fill=balanced)
    write_case(place / "pairs", "s0", (12, 10, 14), AFFINE, 2)
    options = ("data.inputs=pairs", "model=nnunet", "model.folder=two", "trainer.accelerator=cpu")
    statuses, found, text = check(forks, place, *options)
    assert (statuses, off(found)) == ([0], []), text


def test_a_bundle_and_an_onnx_file_pass(place: Path, forks: Server) -> None:
    """Whose networks are run on the patch by MONAI's classes and by onnxruntime."""
    make_bundle(place / "bundle")
    make_image(place / "images/s.nii.gz")
    statuses, found, text = check(
        forks, place, "data.inputs=images", "model=bundle", "model.folder=bundle", "trainer.accelerator=cpu"
    )
    assert (statuses, off(found)) == ([0], []), text
    export(place / "net.onnx", Over50(), (1, 1, 12, 12, 12))
    statuses, found, text = check(
        forks, place, "data.inputs=in", "ckpt_path=net.onnx", "data.patch_overlap=6", "trainer.accelerator=cpu"
    )
    assert (statuses, off(found)) == ([0], []), text


def test_a_rough_model_is_checked_by_itself(place: Path, forks: Server) -> None:
    """Its labels are not there, so that the other model is checked on whole volumes."""
    run = forks.start(
        *OURS, "+data.within={ckpt_path: net.pt}", "run.selfcheck=true", "output_dir=out", cwd=place
    )  # fmt: skip
    assert run.wait(120) == [2]  # the rough model's patch size is not in its file
    assert "the stage of net.pt was not started" in run.text
