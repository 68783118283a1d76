"""Tests that every experiment of conf/ passes its self-check; one for train.py by the checkpoint that it would make."""

import json
from pathlib import Path
from time import perf_counter

import hydra
import numpy as np
import pytest
import torch
from forks import Server
from hydra import initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from synthetic import noise, save

from voxquilt.cli.conf_options import script_of
from voxquilt.cli.instantiate import build
from voxquilt.cli.main import _prepare_arguments, conf_dir
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.train_config import check_train
from voxquilt.models.weights.stored_settings import KEY, to_carry

EXPERIMENTS = sorted((conf_dir() / "experiment").glob("*.yaml"))
AFFINE = np.array([[-1.1, 0.2, 0, 4], [0.2, 1.2, 0, 9], [0, 0, 1.4, -7], [0, 0, 0, 1.0]])
COHORT = ("data.inputs=in", "data.labels=labels/{subject}.nii.gz", "data.folds=null")
# What each leaves open; patches are smaller, since the test is of the way of a voxel.
OPEN = {
    "ct": (*COHORT, "model.net.out_channels=3", "data.patch_size=32"),
    "denoising": (*COHORT, "data.patch_size=32"),
    "mr_t1": (*COHORT, "model.net.out_channels=3", "data.patch_size=32"),
    "multimodal": (*COHORT, "data.patch_size=32"),
    "slices_2d": (*COHORT, "model.net.out_channels=3"),
    "tissue": (),
}

pytestmark = pytest.mark.slow


def check(forks: Server, folder: Path, *options: str) -> None:
    """Run predict.py run.selfcheck=true, and assert that all checks are right."""
    run = forks.start(*options, "run.selfcheck=true", "run.log=json", cwd=folder)
    assert run.wait(300) == [0], run.text
    found = json.loads(next(line for line in run.text.splitlines() if line.startswith('{"event": "selfcheck"')))
    assert found["ok"]
    assert len(found["checks"]) > 9


def test_the_experiments_are_those_of_conf() -> None:
    """None is left out below."""
    assert {path.stem for path in EXPERIMENTS if script_of(path, conf_dir()) == "train"} == OPEN.keys()


@pytest.mark.parametrize("name", OPEN)
def test_what_an_experiment_of_training_makes_passes(
    name: str, tmp_path: Path, forks: Server, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its network with random weights, and the settings that its checkpoint carries: model space, patches, blend."""
    monkeypatch.chdir(tmp_path)
    several = ["t1", "t1c", "t2", "flair"] if name == "multimodal" else []
    for n, path in enumerate([f"s/{image}" for image in several] or ["s"]):
        save(tmp_path / "in" / f"{path}.nii.gz", noise((40, 36, 30), n), AFFINE)
    save(tmp_path / "labels/s.nii.gz", noise((40, 36, 30)) // 50, AFFINE)
    register_resolvers()
    GlobalHydra.instance().clear()
    typed = _prepare_arguments([f"experiment={name}", *OPEN[name], f"output_dir={tmp_path}"], "train")
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = check_train(hydra.compose("train", typed))
    net = {f"net.{key}": value for key, value in build(plain["model"]["net"], "model.net").state_dict().items()}
    content = {"state_dict": net, "pytorch-lightning_version": "2.6.6", KEY: to_carry(plain, several or ["image"])}
    torch.save(content, tmp_path / "best.ckpt")
    images = [f"data.images.{image}={{subject}}/{image}.nii.gz" for image in several]
    check(forks, tmp_path, "data.inputs=in", *images, "ckpt_path=best.ckpt", "trainer.accelerator=cpu")


@pytest.mark.parametrize(
    "path", [p for p in EXPERIMENTS if script_of(p, conf_dir()) == "predict"], ids=lambda p: p.stem
)
def test_an_experiment_of_predicting_passes_in_seconds(path: Path, tmp_path: Path, forks: Server) -> None:
    """With its own network, image and patches; 21 s on two cores, of which tests that run beside it take some."""
    began = perf_counter()
    check(forks, tmp_path, f"experiment={path.stem}")
    assert perf_counter() - began < 90
