"""Tests that the tab key completes keys and options of the installed commands without loading torch."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

# As bash calls a completion function when the tab key is pressed after the last word.
TAB = """
eval "$({program} -sc install=bash)"
complete -p {program}
COMP_LINE="{line}"; COMP_POINT=${{#COMP_LINE}}; COMP_WORDS=($COMP_LINE); COMP_CWORD=$((${{#COMP_WORDS[@]}} - 1))
PYTHONPROFILEIMPORTTIME=1 hydra_bash_completion
printf '%s\\n' "${{COMPREPLY[@]}}"
"""


@pytest.fixture
def path(tmp_path: Path) -> str:
    """PATH with both console scripts, as pip installs them."""
    for name in ("predict", "train"):
        script = tmp_path / f"voxquilt-{name}"
        script.write_text(
            f"#!{sys.executable}\nimport sys\nfrom voxquilt.commands.entry_points import {name}\nsys.exit({name}())\n"
        )
        script.chmod(0o755)
    return f"{tmp_path}{os.pathsep}{os.environ['PATH']}"


@pytest.mark.parametrize(
    ("line", "wanted"),
    [
        ("voxquilt-predict data.patch", {"data.patch_size=", "data.patch_overlap="}),
        (
            "voxquilt-predict trainer=",
            {"trainer=cpu", "trainer=ddp", "trainer=default", "trainer=gpu", "trainer=slurm"},
        ),
        ("voxquilt-predict data.inputs=scans/ run.dry", {"run.dry_run="}),
        ("voxquilt-train model.optimizer.l", {"model.optimizer.lr="}),
        ("voxquilt-train task=", {"task=image", "task=multilabel", "task=segmentation"}),
    ],
)
def test_the_tab_key_completes_keys_and_options(line: str, wanted: set[str], path: str) -> None:
    """bash is offered what the configuration has, without an import of torch."""
    code = TAB.format(program=line.split()[0], line=line)
    done = subprocess.run(
        ["bash", "-c", code], capture_output=True, text=True, env=os.environ | {"PATH": path}, check=True
    )
    installed, *offered = done.stdout.split("\n")
    assert "hydra_bash_completion" in installed
    assert wanted <= {word.strip() for word in offered}
    assert "hydra" in done.stderr  # the control: imports are listed
    assert "torch" not in done.stderr
