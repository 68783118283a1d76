"""Tests that Ctrl-C ends a command with one line, also while its libraries are being imported."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pytest
from synthetic import ROOT, noise, save

# Sends SIGINT to itself as a module is looked for, as somebody's Ctrl-C might come, and then runs a command.
PROGRAM = """
import os, signal, sys
signal.signal(signal.SIGINT, signal.default_int_handler)  # which is ignored where pytest runs in the background
class Finder:
    def find_spec(self, name, path=None, target=None):
        if name == {module!r}:
            os.kill(os.getpid(), signal.SIGINT)
sys.meta_path.insert(0, Finder())
"""
SCRIPT = "import runpy; sys.argv = {arguments!r}; runpy.run_path(sys.argv[0], run_name='__main__')"
MODULE = "import runpy; sys.argv = [''] + {arguments!r}[1:]; runpy.run_module({arguments!r}[0], run_name='__main__')"


def interrupted(module: str, run: str, arguments: Sequence[object], folder: Path) -> tuple[int, list[str]]:
    """The exit status, and the last lines of the output."""
    code = PROGRAM.format(module=module) + run.format(arguments=list(map(str, arguments)))
    path = os.pathsep.join(filter(None, [os.environ.get("PYTHONPATH"), str(ROOT / "tests")]))
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=folder, capture_output=True, text=True, timeout=120, check=False,
        env=os.environ | {"PYTHONPATH": path},
    )  # fmt: skip
    return done.returncode, (done.stdout + done.stderr).splitlines()


@pytest.fixture
def place(tmp_path: Path) -> Path:
    """Images and labels."""
    for name in ("a", "b"):
        save(tmp_path / f"in/{name}.nii", noise((16, 16, 16)))
        save(tmp_path / f"labels/{name}.nii", (noise((16, 16, 16)) > 0).astype(np.uint8))
    return tmp_path


@pytest.mark.parametrize("module", ["voxquilt.cli.main", "hydra", "antlr4", "torch", "lightning.pytorch"])
@pytest.mark.parametrize("script", ["predict.py", "train.py"])
def test_ctrl_c_during_imports_is_one_line(script: str, module: str, place: Path) -> None:
    """Whichever library is being imported."""
    options = ["data.inputs=in", "data.patch_size=16"]
    options += ["data.labels=labels/{subject}.nii", "data.folds=2", "model.net.out_channels=2"] * (script == "train.py")
    options += ["model.net._target_=synthetic.Over50", "ckpt_path=null"] * (script == "predict.py")
    status, lines = interrupted(module, SCRIPT, [ROOT / script, *options], place)
    assert (status, lines) == (130, ["voxquilt: stopped by SIGINT"])
    assert not (place / "outputs").exists()


def test_ctrl_c_before_a_training_begins_is_one_line(place: Path) -> None:
    """While the network is built, after all libraries have been imported."""
    options = ["data.inputs=in", "data.labels=labels/{subject}.nii", "data.folds=2", "data.patch_size=16"]
    options += ["model.net._target_=my_net.Net"]
    status, lines = interrupted("my_net", SCRIPT, [ROOT / "train.py", *options], place)
    assert (status, lines[-1]) == (130, "voxquilt: stopped by SIGINT")
    assert "Traceback" not in "\n".join(lines)


@pytest.mark.parametrize(
    ("command", "module"),
    [
        (["voxquilt", "doctor"], "voxquilt.text"),
        (["voxquilt", "doctor"], "torch"),
        (["voxquilt.export", "a.ckpt", "a.onnx"], "numpy"),
        (["voxquilt.report", "in"], "voxquilt.report.page"),
    ],
)
def test_ctrl_c_ends_the_other_commands_so_too(command: list[str], module: str, place: Path) -> None:
    """As modules; their console scripts are the same functions."""
    (place / "a.ckpt").write_bytes(b"weights")
    assert interrupted(module, MODULE, command, place) == (130, ["voxquilt: stopped by SIGINT"])


STAGE = """
import signal, sys, time
from pathlib import Path
def end(*_):
    time.sleep(1)  # writes what is complete
    Path("ended").touch()
    sys.exit(130)
signal.signal(signal.SIGINT, end)
Path("begun").touch()
signal.pause()
"""
COMMAND = """
import signal, sys
from omegaconf import OmegaConf
from voxquilt.cli import stages
from voxquilt.distributed.signals import ended_by
signal.signal(signal.SIGINT, signal.default_int_handler)
sys.argv[0] = "stage.py"
with ended_by(signal.SIGINT):
    stages._predict_stage(OmegaConf.create(), [], {}, "rough")
"""


def test_ctrl_c_waits_for_the_stage_of_a_cascade_to_end_in_order(tmp_path: Path) -> None:
    """The prompt does not come back while it still writes files; a terminal sends the signal to both."""
    (tmp_path / "stage.py").write_text(STAGE)
    command = subprocess.Popen([sys.executable, "-c", COMMAND], cwd=tmp_path, start_new_session=True)
    deadline = time.monotonic() + 60
    while not (tmp_path / "begun").exists() and time.monotonic() < deadline:
        time.sleep(0.05)
    os.killpg(command.pid, signal.SIGINT)
    assert command.wait(60) == 130
    assert (tmp_path / "ended").exists()
