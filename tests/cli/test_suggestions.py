"""Tests suggestions: a slip on the command line is one message with the nearest existing name, without delay."""

import subprocess
import sys
import time
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from voxquilt.cli.conf_options import keys_of
from voxquilt.cli.main import conf_dir
from voxquilt.cli.suggestions import explain, no_key
from voxquilt.data.listing import meant
from voxquilt.errors import ConfigError
from voxquilt.text import question
from voxquilt.vocabulary import check_name

ROOT = Path(__file__).parents[2]


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
        (
            "predict", "experiment=tissue",
            "experiment=tissue is for train.py: python train.py experiment=tissue ...; predict.py has brain_extrac",
        ),
        ("predict", "experiment=ct", "experiment=ct is for train.py: python train.py experiment=ct ...; "),
        ("predict", "-m experiment=brain_extraction,ct", "experiment=ct is for train.py"),
        ("predict", "model=train", "model=train is for train.py; predict.py has auto, bundle, exported, lightning, "),
        ("predict", "callbacks=[predict,ema]", "callbacks=ema is for train.py; predict.py has predict."),
        ("predict", "model/loss=l1", "model/loss=l1 is for train.py."),
        ("train", "model=torchscript", "model=torchscript is for predict.py; train.py has nnunet, train."),
        ("train", "trainer=gpuu", "there are cpu, ddp, default, gpu, slurm. Did you mean trainer=gpu?"),
        ("predict", "data.wholly_unknown=1", "there is no key data.wholly_unknown; data has batch_size, "),
        ("predict", "model.module_class=a.B", "model.module_class as things are: it comes with model=lightning."),
        ("predict", "trainer.max_epochs=3", "no key trainer.max_epochs in predict.py: it is one of train.py's."),
        ("predict", "model/loss=mse", "model/loss=mse is for train.py."),
        ("train", "model.flips=[0]", "there is no key model.flips in train.py: it is one of predict.py's."),
        ("predict", "src", "src: a setting is written with =, without blanks around it, such as data.inputs=src."),
        ("predict", "data.inputs", "such as data.inputs=value."),
        ("predict", "ckpt_path=nowhere.ckpt", "ckpt_path: there is no file nowhere.ckpt (relative to "),
        ("predict", "--multirun --cfg job", "Only one of --run, --multirun, --cfg, "),
        (
            "train", "experiment=brain_extraction",
            "is for predict.py: python predict.py experiment=brain_extraction ...; train.py has ct, denoising, mr_t1, ",
        ),
        ("train", "model.lr=3", "there is no key model.lr. Did you mean model.optimizer.lr?"),
        ("train", "callbacks=[train,emma]", "there is no callbacks=emma; there are early_stopping, ema, train."),
        ("train", "task=segmentatoin", "Did you mean task=segmentation?"),
        ("train", "data.fodl=1", "Did you mean data.fold?"),
    ],
)  # fmt: skip
def test_a_slip_is_answered_with_the_nearest_name(script: str, argument: str, message: str) -> None:
    """In one line of stderr, with status 2 and none of Hydra's own text."""
    began = time.monotonic()
    told(script, argument, message)
    assert time.monotonic() - began < 10  # it takes half a second where nothing else runs


def told(script: str, argument: str, message: str, cwd: Path = ROOT) -> None:
    """Run the script and assert that it prints exactly one line on stderr."""
    command = [sys.executable, str(ROOT / f"{script}.py"), *argument.split()]
    done = subprocess.run(command, capture_output=True, text=True, check=False, cwd=cwd)
    assert (done.returncode, done.stdout) == (2, "")
    assert message in done.stderr
    assert done.stderr.startswith("voxquilt: ")
    assert done.stderr.count("\n") == 1
    assert "Hydra" not in done.stderr


WORDS = st.lists(st.text("abc_", min_size=1, max_size=4), min_size=1, max_size=6)


@given(WORDS, st.data())
def test_a_suggestion_is_never_what_was_typed(words: list[str], data: st.DataObject) -> None:
    """Whether that is a known word or not, and for values of other types that print alike."""
    typed = data.draw(st.sampled_from(words) | st.text("abc_", max_size=4))
    assert f"Did you mean {typed}?" not in question(typed, words)
    near = question(typed, words)
    assert near == "" or near.removeprefix(" Did you mean ").removesuffix("?") in words
    for value in (Path(words[0]), words[:1], words[0].encode()):
        with pytest.raises(ConfigError) as caught:
            check_name(value, words, "key")
        assert f"it is {value!r}. Did you mean {value}?" not in str(caught.value)


@pytest.mark.parametrize("script", ["predict", "train"])
def test_an_unknown_key_is_never_answered_with_itself(script: str) -> None:
    """For every key of either script, asked in both."""
    keys = {key for name in ("predict", "train") for key in keys_of(conf_dir(), name)}
    assert len(keys) > 100
    for key in keys:
        answer = no_key(key, script, conf_dir())
        assert f"Did you mean {key}?" not in answer
        assert key in answer


def test_no_suggestion_is_made_for_an_existing_path(tmp_path: Path) -> None:
    """Its name is not the mistake."""
    for name in ("ct", "ct2"):
        (tmp_path / name).mkdir()
    (tmp_path / "ct3").symlink_to(tmp_path / "nowhere")
    assert meant(tmp_path / "ct") == ""
    assert meant(tmp_path / "ct1") in {f" Did you mean {tmp_path / name}?" for name in ("ct", "ct2", "ct3")}
    assert meant(tmp_path / "ct3") == ""  # where the link leads is what is wrong


def test_messages_of_hydra_lose_their_terminal_codes() -> None:
    """In whatever they quote."""
    assert explain(ValueError("\x1b[1mno\x1b[0m such thing"), "predict", conf_dir()) == "no such thing"


def test_an_experiment_belongs_to_the_script_that_it_declares(tmp_path: Path) -> None:
    """Also a user's own, or one in its defaults; comments that mention the other script do not count."""
    (tmp_path / "more/experiment").mkdir(parents=True)
    for name, text in {
        "mine": "# made from train.py's\nscript: predict\ndata: {batch_size: 3}\n",
        "theirs": "# see predict.py\nscript: train\ndata: {batch_size: 3}\n",
        "over": "defaults:\n  - theirs\n",
        "wrong": "script: trian\n",
        "both": "data: {batch_size: 3}\n",
    }.items():
        (tmp_path / f"more/experiment/{name}.yaml").write_text(f"# @package _global_\n{text}")
    own = "--config-dir more experiment="
    told("train", f"{own}mine", "experiment=mine is for predict.py: python predict.py experiment=mine ...", tmp_path)
    told("predict", f"{own}theirs", "experiment=theirs is for train.py: python train.py", tmp_path)
    told("predict", f"{own}over", "experiment=over is for train.py: python train.py experiment=over ...", tmp_path)
    told("train", f"{own}wrong", "experiment=wrong: its script is predict or train (or left out, for both)", tmp_path)
    for script, name in (("predict", "mine"), ("train", "over"), ("train", "both"), ("predict", "both")):
        missing = subprocess.run(
            [sys.executable, str(ROOT / f"{script}.py"), *f"{own}{name}".split()],
            capture_output=True, text=True, check=False, cwd=tmp_path,
        )  # fmt: skip
        assert missing.returncode == 2
        assert missing.stderr.startswith("voxquilt: these keys need a value:"), missing.stderr
