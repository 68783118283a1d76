"""Tests the wheel: an installation of it alone must predict and train."""

import os
import subprocess
import sys
import sysconfig
import venv
import zipfile
from pathlib import Path

import nibabel as nib
import pytest

from voxquilt.data.discovery import stem
from voxquilt.datasets import MNI152
from voxquilt.filesystem import checksum
from voxquilt.report.niivue import SHA256

ROOT = Path(__file__).parents[1]


@pytest.fixture(scope="module")
def installed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The wheel's files in a folder that precedes the checkout on PYTHONPATH."""
    folder = tmp_path_factory.mktemp("wheel")
    command = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(folder / "dist"), str(ROOT)]
    subprocess.run(command, check=True, capture_output=True)
    (wheel,) = (folder / "dist").glob("*.whl")
    zipfile.ZipFile(wheel).extractall(folder / "site")
    return folder / "site"


def run(installed: Path, script: str, *arguments: str) -> subprocess.CompletedProcess[str]:
    """Run the console script as pip installs it, away from the checkout."""
    start = f"from voxquilt.commands.entry_points import {script}; {script}()"
    code = f"import sys; sys.argv[0] = 'voxquilt-{script}'; {start}"
    environment = os.environ | {"PYTHONPATH": str(installed)}
    command = [sys.executable, "-c", code, *arguments]
    return subprocess.run(command, capture_output=True, text=True, env=environment, cwd=installed, check=False)


def test_the_wheel_holds_the_whole_configuration(installed: Path) -> None:
    """Every file of conf/ is in the wheel, at voxquilt/conf/."""
    wanted = {path.relative_to(ROOT / "conf") for path in (ROOT / "conf").rglob("*.yaml")}
    assert wanted
    assert {
        path.relative_to(installed / "voxquilt/conf") for path in (installed / "voxquilt/conf").rglob("*")
    } >= wanted


@pytest.mark.parametrize("script", ["predict", "train"])
def test_a_console_script_of_the_wheel_prints_its_help(installed: Path, script: str) -> None:
    """--help exits with 0 and names the keys, from the installed configuration."""
    result = run(installed, script, "--help")
    assert (result.returncode, "data.patch_size" in result.stdout) == (0, True), result.stderr


def test_a_console_script_of_the_wheel_checks_its_configuration(installed: Path) -> None:
    """The wheel's own code names what is missing, with status 2."""
    result = run(installed, "predict", "data.inputs=nowhere")
    assert result.returncode == 2
    assert "ckpt_path" in result.stderr
    assert "data.patch_size" in result.stderr
    assert "Traceback" not in result.stderr


def test_the_wheel_names_its_console_scripts(installed: Path) -> None:
    """entry_points.txt refers to functions that exist."""
    (points,) = installed.glob("voxquilt-*.dist-info/entry_points.txt")
    text = points.read_text()
    assert "voxquilt-export = voxquilt.commands.entry_points:export" in text
    assert "voxquilt-predict = voxquilt.commands.entry_points:predict" in text
    assert "voxquilt-report = voxquilt.commands.entry_points:report" in text
    assert "voxquilt-train = voxquilt.commands.entry_points:train" in text


def test_the_wheel_holds_the_report_and_its_viewer_with_their_licences(installed: Path) -> None:
    """Templates, styles, and NiiVue, which the build has fetched and compared with its checksum."""
    report = installed / "voxquilt/report"
    source = ROOT / "src/voxquilt/report"
    for folder in ("templates", "static"):
        assert {path.name for path in (report / folder).iterdir()} == {
            path.name for path in (source / folder).iterdir()
        }
    assert checksum(report / "vendor/niivue.umd.js") == SHA256
    assert {path.name for path in (report / "vendor").glob("*.txt")} == {
        "NIIVUE_LICENSE.txt", "THIRD_PARTY_LICENSES.txt",
    }  # fmt: skip


@pytest.mark.slow
def test_the_wheel_trains_and_predicts_by_its_console_scripts(installed: Path, tmp_path: Path) -> None:
    """In an environment with nothing but the wheel installed; its dependencies are borrowed from here."""
    venv.create(tmp_path / "env")
    python = tmp_path / "env/bin/python"
    (wheel,) = (installed.parent / "dist").glob("*.whl")
    pip = [sys.executable, "-m", "pip", "--python", str(python), "--disable-pip-version-check", "install", "--no-deps"]
    subprocess.run([*pip, str(wheel)], check=True, capture_output=True)
    site = next((tmp_path / "env/lib").glob("python*/site-packages"))
    # Folders named by a .pth are searched, but their own .pth files, such as that of this checkout, are not read.
    borrowed = [path for path in sys.path if path.endswith("site-packages")] or [sysconfig.get_path("purelib")]
    (site / "borrowed.pth").write_text("\n".join(borrowed) + "\n")
    where = subprocess.run([python, "-c", "import voxquilt; print(voxquilt.__file__)"], capture_output=True, text=True)
    assert Path(where.stdout.strip()).is_relative_to(site)

    def script(name: str, *arguments: str) -> str:
        command = [str(tmp_path / "env/bin" / f"voxquilt-{name}"), *arguments]
        done = subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    script("train", "experiment=tissue", "trainer.max_epochs=1", "data.patches_per_volume=4", "data.folds=null",
           "trainer.limit_val_batches=2", "trainer.accelerator=cpu")  # fmt: skip
    image = str(MNI152()["t1"].path)
    script("predict", f"data.inputs={image}", "ckpt_path=outputs/tissue/checkpoints/last.ckpt", "data.patch_size=96",
           "data.patch_overlap=8", "trainer.accelerator=cpu")  # fmt: skip
    labels = nib.load(tmp_path / f"outputs/{stem(image)}_labels.nii.gz")
    assert labels.shape == nib.load(image).shape
