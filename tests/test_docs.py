"""Tests the documents: every block of code in them is run, or states why not.

The first line of a fence gives the kind of the block:

| fence | block |
|---|---|
| sh | commands, run one after the other; each must end with status 0 |
| console | typed commands (`$ ...`) and their output; compared line by line, `...` matches anything |
| python | run; the blocks of a document share their names, and `network` |
| python file=x.py, yaml file=x.yaml | written to that file |
| text | no code: a layout, a formula |

The blocks of a document run in a folder of its own with a small cohort. A block after `<!-- not run: why -->` is not,
but the overrides of its commands must compose all the same.
"""

import os
import re
import shlex
import shutil
import subprocess
import sys
import warnings
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import hydra
import numpy as np
import pytest
import torch
from forks import Server
from hydra import initialize_config_dir
from monai.networks.nets import UNet
from onnx_files import export
from scipy.ndimage import gaussian_filter
from synthetic import ROOT, Over50, save

from voxquilt.cli.conf_options import keys_of
from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir, register_resolvers
from voxquilt.cli.train_config import check_train
from voxquilt.models.weights.stored_settings import KEY, to_carry

DOCUMENTS = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
WALK = ROOT / "docs/walkthrough.md"
LANGUAGES = {"sh", "console", "python", "yaml", "text", "bash"}
NETWORK = UNet(3, 1, 2, channels=(4, 8), strides=(2,))
"""Of from-monai.md: `network` there, and the state dict unet.pt."""


@dataclass(frozen=True)
class Block:
    """A fenced block: its options, its text, and the reason in the comment before it if it is not run."""

    document: Path
    line: int
    language: str
    options: dict[str, str]
    text: str
    why_not: str | None

    def __str__(self) -> str:
        return f"{self.document.name}, line {self.line}"


def blocks_of(document: Path, text: str | None = None) -> list[Block]:
    """The blocks of a document in order.

    Raises:
        ValueError: the kind of a block is not declared, or the block does not end.
    """
    lines = (document.read_text() if text is None else text).split("\n")
    found, start = [], None
    for n, line in enumerate(lines):
        if not line.startswith("```"):
            continue
        if start is None:
            start = n
            continue
        language, *words = lines[start][3:].split() or [""]
        before = next((one for one in reversed(lines[:start]) if one.strip()), "")
        comment = re.fullmatch(r"<!-- not run: (.+) -->", before.strip())
        options = dict(word.split("=", 1) for word in words if "=" in word)
        block = Block(document, start + 1, language, options, "\n".join(lines[start + 1 : n]), comment and comment[1])
        if language not in LANGUAGES or (language == "bash" and not comment):
            raise ValueError(f"{block}: {language!r} is no language that is run; say sh, console, python or text")
        if not comment and language in ("sh", "python") and "..." in block.text:
            raise ValueError(f"{block}: '...' cannot be run")
        found.append(block)
        start = None
    if start is not None:
        raise ValueError(f"{document.name}, line {start + 1}: a block that does not end")
    return found


def commands_of(text: str) -> list[str]:
    """Commands, one per line; lines continued with a backslash are joined."""
    joined = re.sub(r"\\\n\s*", "", text)
    return [line.strip() for line in joined.split("\n") if line.strip() and not line.lstrip().startswith("#")]


def ours(command: str) -> tuple[str, list[str]] | None:
    """'predict' or 'train' and the arguments, if a command runs one of them in any way."""
    words = shlex.split(command, comments=True)
    for n, word in enumerate(words):
        script = re.fullmatch(r"(?:voxquilt-)?(predict|train)(?:\.py)?", word.rpartition("/")[2])
        if script and (word.endswith(".py") or word.startswith("voxquilt-")):
            return script[1], words[n + 1 :]
    return None


@pytest.fixture(scope="module")
def cohort(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All files that documents name: images with labels, scans in several layouts, and weights."""
    folder = tmp_path_factory.mktemp("cohort")
    rng = np.random.default_rng(0)
    for n in range(5):
        smooth = gaussian_filter(rng.normal(size=(40, 36, 24 + n)), 3)
        smooth /= smooth.std()
        image = (smooth + 0.3 * rng.normal(size=smooth.shape)).astype(np.float32)
        label = (smooth > 0.7).astype(np.uint8)
        affine = np.diag([-1.0, 1, 1.5, 1])
        for name in (f"images/s{n}", f"noisy/s{n}", *(f"imagesTr/case{n}_000{c}" for c in range(2))):
            save(folder / f"{name}.nii.gz", image, affine)
        for name in (f"labels/s{n}", f"labelsTr/case{n}", f"raw/s{n}/seg"):
            save(folder / f"{name}.nii.gz", label, affine)
        save(folder / f"clean/s{n}.nii.gz", smooth.astype(np.float32), affine)
        for name in ("t1", "flair", "t1c", "t2"):
            save(folder / f"raw/s{n}/{name}.nii.gz", image, affine)
        if n < 2:
            for name in (f"scans/{'ab'[n]}", f"imagesTs/new{n}_0000", f"imagesTs/new{n}_0001"):
                save(folder / f"{name}.nii.gz", image, affine)
            save(folder / f"labels/{'ab'[n]}.nii.gz", label, affine)
    shutil.copy(folder / "scans/a.nii.gz", folder / "head.nii.gz")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch.jit is deprecated, and used
        torch.jit.save(torch.jit.script(Over50()), folder / "network.pt")
    export(folder / "network.onnx", Over50(), (1, 1, 32, 32, 32))
    torch.save(NETWORK.state_dict(), folder / "unet.pt")
    return folder


@pytest.fixture
def folder(cohort: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A copy of the cohort as the working folder."""
    shutil.copytree(cohort, tmp_path, dirs_exist_ok=True)
    monkeypatch.chdir(tmp_path)
    monkeypatch.syspath_prepend(tmp_path)  # as it is for whoever starts Python there
    return tmp_path


@pytest.fixture
def fresh(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """The working folder of walkthrough.md after its training, here with random weights."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = check_train(hydra.compose("train", ["experiment=tissue", f"output_dir={tmp_path}"]))
    net = {f"net.{key}": value for key, value in build(plain["model"]["net"], "model.net").state_dict().items()}
    content = {"state_dict": net, "pytorch-lightning_version": "2.6.6", KEY: to_carry(plain, plain["images"])}
    (tmp_path / "outputs/tissue/checkpoints").mkdir(parents=True)
    torch.save(content, tmp_path / "outputs/tissue/checkpoints/best.ckpt")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_shell(block: Block, folder: Path, forks: Server) -> None:
    """Run every command of a block with bash, or in a fork if it is one of ours."""
    for command in commands_of(block.text):
        status, said = run_command(command, folder, forks)
        assert status == 0, f"{block}: {command}\nended with status {status}:\n{said}"


def run_command(command: str, folder: Path, forks: Server) -> tuple[int, str]:
    """Run a command; returns its exit status and output."""
    program = ours(command)
    if program is None:
        path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"  # where `python` is this one
        done = subprocess.run(
            ["bash", "-ec", command],
            cwd=folder,
            capture_output=True,
            text=True,
            env=os.environ | {"PATH": path},
            check=False,
        )
        return done.returncode, done.stdout + done.stderr
    script, arguments = program
    run = forks.start(*arguments, cwd=folder, script=script, env={"COLUMNS": "100"})
    (status,) = run.wait(120)
    text = run.text
    run.logs[0].unlink()
    return status, text


def check_keys(block: Block, folder: Path, forks: Server) -> None:
    """Assert that the keys in a block that is not run exist."""
    typed = [one for one, _ in transcript(block)] if block.language == "console" else commands_of(block.text)
    for command in typed:
        program = ours(command)
        if program:
            script, arguments = program
            arguments = [a.replace("range(16)", "0") for a in arguments if a not in ("...", "--multirun")]
            run = forks.start(*arguments, "--cfg", "job", cwd=folder, script=script)
            assert run.wait() == [0], f"{block}: {command}\n{run.text}"


def transcript(block: Block) -> Iterator[tuple[str, list[str]]]:
    """Each typed command with the lines that follow it."""
    for part in re.split(r"^\$ ", block.text, flags=re.M)[1:]:
        command, _, said = part.partition("\n")
        while command.endswith("\\"):
            more, _, said = said.partition("\n")
            command = f"{command[:-1]}{more.lstrip().removeprefix('> ')}"
        yield command, said.strip("\n").split("\n") if said.strip() else []


def agrees(shown: Sequence[str], said: str) -> bool:
    """Whether the lines shown equal the output, except for `...`, which matches anything, seconds and white space."""

    def plain(text: str) -> str:
        return re.sub(r"\d+\.\d(?= s\b|\s*│)", "0.0", " ".join(text.split()))

    pattern = r".*".join(re.escape(plain(part)).replace(r"\ ", r"\s*") for part in "\n".join(shown).split("..."))
    return re.fullmatch(rf"\s*{pattern}\s*", plain(said), re.S) is not None


def run_transcript(block: Block, folder: Path, forks: Server) -> None:
    """Run the typed commands and compare their output."""
    status = 0
    for command, shown in transcript(block):
        if command == "echo $?":
            assert shown == [str(status)], f"{block}: the status is {status}"
            continue
        status, said = run_command(command, folder, forks)
        assert agrees(shown, said), f"{block}: {command}\nsays (status {status}):\n{said}"


@pytest.mark.parametrize("document", [d for d in DOCUMENTS if d != WALK], ids=lambda path: path.name)
def test_every_block_of_a_document_runs(document: Path, folder: Path, forks: Server) -> None:
    """In order, in one folder; a block that is not run has a reason, and its keys exist."""
    run_document(document, folder, forks)


def test_the_mistakes_of_the_walkthrough_are_answered_as_it_shows(fresh: Path, forks: Server) -> None:
    """With the same status and text, on the real brain."""
    run_document(WALK, fresh, forks)


def run_document(document: Path, folder: Path, forks: Server) -> None:
    """Run every block that is not exempt."""
    names: dict[str, Any] = {"network": NETWORK, "__name__": "__main__"}
    for block in blocks_of(document):
        if block.why_not:
            check_keys(block, folder, forks)
        elif "file" in block.options:
            path = folder / block.options["file"]
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_text(block.text + "\n")
        elif block.language == "sh":
            run_shell(block, folder, forks)
        elif block.language == "console":
            run_transcript(block, folder, forks)
        elif block.language == "python":
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # Lightning's advice
                exec(compile(block.text, str(block), "exec"), names)


def test_keys_that_documents_and_help_name_exist() -> None:
    """Words such as data.patch_size, in back quotes or in the help, are keys of an option in conf/."""
    known = {key for script in ("predict", "train") for key in keys_of(conf_dir(), script)}
    sections = {key.partition(".")[0] for key in known if "." in key}
    free = ("model.net.", "model.module_args.", "data.images.", "hydra.")  # whose keys are the user's
    for path in (*DOCUMENTS, *(conf_dir() / "hydra/help").glob("*.yaml")):
        text = path.read_text()
        spans = [text] if path.suffix == ".yaml" else re.findall(r"(?<!`)`([^`\n]+)`(?!`)", text)
        for span in spans:
            for key in re.findall(rf"(?<![\w./$'\-])((?:{'|'.join(sorted(sections))})\.[a-z_]+(?:\.[a-z_]+)*)", span):
                if key.endswith((".yaml", ".py", ".csv", ".png", ".json", ".md", ".pt", ".cases")):
                    continue
                assert key in known or key.startswith(free), f"{path.name}: {key}"


def test_links_between_documents_lead_to_existing_files() -> None:
    """For every relative link."""
    for document in [*DOCUMENTS, ROOT / "CHANGELOG.md", ROOT / "CONTRIBUTING.md"]:
        for target in re.findall(r"\]\(([^)#\s]+)", document.read_text()):
            if "://" not in target:
                assert (document.parent / target).exists(), f"{document.name}: {target}"


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("```\nls\n```", "'' is no language"),
        ("```bash\nls\n```", "'bash' is no language"),
        ("```sh\npython predict.py ...\n```", "cannot be run"),
        ("```sh\nls\n", "does not end"),
    ],
)
def test_a_block_of_an_undeclared_kind_is_an_error(text: str, message: str) -> None:
    """A control of this file: blocks that would not be checked are refused."""
    with pytest.raises(ValueError, match=message):
        blocks_of(Path("x.md"), text)


@pytest.mark.parametrize("comment", ["", "<!-- not run: no time -->\n"])
def test_an_unknown_key_in_a_document_is_an_error(comment: str, folder: Path, forks: Server) -> None:
    """A control of this file, also for blocks that are not run."""
    (block,) = blocks_of(Path("x.md"), f"{comment}```sh\npython predict.py data.inptus=scans\n```")
    with pytest.raises(AssertionError, match=r"Did you mean data\.inputs"):
        (check_keys if comment else run_shell)(block, folder, forks)


def test_the_output_in_a_transcript_is_compared() -> None:
    """A control of this file: '...' matches anything, other words do not."""
    assert agrees(["a ... c", "...", "e"], "a b c\nd\ne\n")
    assert agrees(["took 1.5 s"], "took 2.0 s\n")
    assert not agrees(["a ... c"], "a b d\n")
    assert not agrees(["a"], "a\nb\n")
