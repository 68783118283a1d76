"""A slip on the command line is one message, with the nearest name that there is, in a moment."""

import subprocess
import sys
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("script", "argument", "message"),
    [
        ("predict", "data.inptus=x", "there is no key data.inptus. Did you mean data.inputs?"),
        ("predict", "patch_size=3", "there is no key patch_size. Did you mean data.patch_size?"),
        ("predict", "trainer.acelerator=cpu", "Did you mean trainer.accelerator?"),
        ("predict", "stich.overlap_mode=crop", "Did you mean stitch.overlap_mode?"),
        ("predict", "experimnt=tissue", "there is no key experimnt. Did you mean experiment?"),
        ("predict", "model=torchscrpt", "state_dict, torchscript. Did you mean model=torchscript?"),
        ("predict", "model/net=unett", "Did you mean model/net=unet?"),
        ("predict", "trainer=gpuu", "there are cpu, ddp, default, gpu, slurm. Did you mean trainer=gpu?"),
        ("predict", "experiment=tissue", "brain_extraction for predict.py"),
        ("predict", "data.wholly_unknown=1", "there is no key data.wholly_unknown; data has batch_size, "),
        ("predict", "src", "src: a setting is written with =, without blanks around it, such as data.inputs=src."),
        ("predict", "data.inputs", "such as data.inputs=value."),
        ("predict", "ckpt_path=nowhere.ckpt", "ckpt_path: there is no file nowhere.ckpt (looked from "),
        ("predict", "--multirun --cfg job", "Only one of --run, --multirun, --cfg, "),
        ("train", "experiment=brain_extraction", "slices_2d, tissue for train.py"),
        ("train", "model.lr=3", "there is no key model.lr. Did you mean model.optimizer.lr?"),
        ("train", "callbacks=[train,emma]", "there is no callbacks=emma; there are early_stopping, ema, train."),
        ("train", "task=segmentatoin", "Did you mean task=segmentation?"),
        ("train", "data.fodl=1", "Did you mean data.fold?"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_what_was_meant(script: str, argument: str, message: str) -> None:
    """On one line of stderr, with status 2; nothing of Hydra's own words."""
    began = time.monotonic()
    command = [sys.executable, str(ROOT / f"{script}.py"), *argument.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=ROOT)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("voxquilt: ")
    assert done.stderr.count("\n") == 1
    assert "Hydra" not in done.stderr
    assert time.monotonic() - began < 10  # it takes half a second where nothing else runs
