"""Tests that every option of every group in conf/ composes a valid configuration for the script that has it."""

import tomllib
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import pytest
import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from lightning.pytorch.callbacks import ModelCheckpoint
from synthetic import noise, save

from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir, run_predict, run_train
from voxquilt.cli.plain_config import to_plain
from voxquilt.cli.predict_config import check_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.suggestions import check_typed
from voxquilt.cli.train_config import check_train
from voxquilt.errors import ConfigError

CONF = conf_dir()
GROUPS = sorted({path.parent.relative_to(CONF).as_posix() for path in CONF.glob("*/**/*.yaml")} - {"hydra/help"})
# Which script has which options; a group that is not listed belongs to both.
OWNERS = {
    "callbacks": {"predict": {"predict"}, "train": {"train", "ema", "early_stopping"}},
    "data": {"predict": {"default"}, "train": {"train"}},
    "data/augment": {"predict": set(), "train": {"default", "none"}},
    "experiment": {
        "predict": {"brain_extraction"},
        "train": {"ct", "denoising", "mr_t1", "multimodal", "slices_2d", "tissue"},
    },
    "hparams": {"predict": set(), "train": {"optuna"}},
    "model": {
        "predict": {"auto", "bundle", "exported", "lightning", "nnunet", "onnx", "state_dict", "torchscript"},
        "train": {"train", "nnunet_train"},
    },
    "model/loss": {"predict": set(), "train": {"dice_ce", "dice_bce", "l1", "mse"}},
    "task": {"predict": set(), "train": {"segmentation", "multilabel", "image"}},
}
# Arguments that an option leaves to the user, and replacements for files that would be fetched.
NEEDS = {
    "model=bundle": ["model.folder=a"],
    "model=lightning": ["model.module_class=a.B"],
    "model=nnunet": ["model.folder=a"],
    "model=nnunet_train": ["model.folder=a", "model/net=unet"],
    "model=state_dict": ["model/net=unet"],
    "experiment=tissue": ["data.split=null"],
    "experiment=multimodal": ["data.images=null"],
}


def options(group: str) -> set[str]:
    """The options of a group, except the parts from which other options are composed."""
    return {path.stem for path in (CONF / group).glob("*.yaml") if not path.stem.startswith("_")}


def owned(group: str, script: str) -> set[str]:
    """The options of a group that a script has."""
    return OWNERS.get(group, {}).get(script, options(group))


CASES = [
    (script, group, name)
    for script in ("predict", "train")
    for group in GROUPS
    for name in sorted(owned(group, script))
]


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Five images with labels."""
    folder = tmp_path_factory.mktemp("conf")
    for n in range(5):
        save(folder / f"in/{n}.nii", noise((4, 4, 4), n))
        save(folder / f"labels/{n}.nii", (noise((4, 4, 4), n) > 50).astype("uint8"))
    return folder


@pytest.fixture(autouse=True)
def _slurm(monkeypatch: pytest.MonkeyPatch) -> None:
    """Environment of a job with one task, which trainer=slurm reads."""
    for name, value in {"NNODES": "1", "NODEID": "0", "PROCID": "0", "LOCALID": "0", "JOB_ID": "1"}.items():
        monkeypatch.setenv(f"SLURM_{name}", value)


def composed(script: str, place: Path, *overrides: str) -> Any:
    """The configuration as the command composes it."""
    register_resolvers()
    GlobalHydra.instance().clear()
    common = [f"data.inputs={place}/in", "ckpt_path=null", f"output_dir={place}/out"]
    if not any(text.startswith("experiment=") for text in overrides):
        common.append("data.patch_size=64")
    labels = [f'data.labels="{place}/labels/{{subject}}.nii"'] * (script == "train")
    with initialize_config_dir(str(CONF), version_base="1.3"):
        return compose(script, [*common, *labels, *overrides])


def chosen(group: str, name: str) -> list[str]:
    """The arguments that choose an option."""
    typed = f"callbacks=[train,{name}]" if name in ("ema", "early_stopping") else f"{group}={name}"
    return [typed, *NEEDS.get(typed, [])]


def test_every_group_and_option_belongs_to_a_script() -> None:
    """A new one needs an entry in the list above unless both scripts have it."""
    assert OWNERS.keys() <= set(GROUPS)
    for group in GROUPS:
        assert owned(group, "predict") | owned(group, "train") == options(group), group


@pytest.mark.parametrize(("script", "group", "name"), CASES)
def test_every_option_of_every_group_composes_a_valid_configuration(
    script: str, group: str, name: str, place: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """For each script that has it: all keys are known, none is missing, and every check of a run passes."""
    if group == "hparams":
        pytest.importorskip("optuna")
    monkeypatch.setattr("voxquilt.cli.loggers._is_installed", lambda package: True)
    cfg = composed(script, place, *chosen(group, name))
    plain = (check_train if script == "train" else check_predict)(cfg)
    node: Any = plain
    for key in group.split("/"):
        node = node.get(key, {}) if group not in ("experiment", "task") else node
    written = yaml.safe_load((CONF / group / f"{name}.yaml").read_text())
    for key, value in written.items():
        if not isinstance(value, Mapping | list) and "${" not in str(value) and value != "???":
            of_command = ("inputs", "labels", "patch_size", "ckpt_path", "output_dir", "script", "module_class", "net")
            assert key in of_command or node[key] == value, key


@pytest.mark.parametrize(("script", "group", "name"), CASES)
def test_an_option_of_one_script_is_refused_by_the_other(script: str, group: str, name: str) -> None:
    """The message names the right script; an option of both is refused by neither."""
    other = "train" if script == "predict" else "predict"
    if name in owned(group, other):
        check_typed([f"{group}={name}"], other, CONF)
    else:
        with pytest.raises(ConfigError, match=rf"^{group}={name} is for {script}\.py"):
            check_typed([f"{group}={name}"], other, CONF)
    check_typed([f"{group}={name}"], script, CONF)


def test_an_experiment_of_the_other_script_is_refused_after_composing_too(place: Path) -> None:
    """Where the command line alone did not show it."""
    with pytest.raises(ConfigError, match=r"is for predict\.py"):
        run_train(composed("train", place, "+script=predict"))
    with pytest.raises(ConfigError, match=r"is for train\.py"):
        run_predict(composed("predict", place, "+script=train"))


@pytest.mark.parametrize("name", sorted(options("trainer")))
def test_every_trainer_of_a_training_keeps_checkpoints(name: str, place: Path) -> None:
    """It works with ModelCheckpoint, and equals the default except for where it runs."""
    node = to_plain(composed("train", place, f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1"))
    default = to_plain(composed("train", place))["trainer"]
    trainer = node["trainer"]
    assert trainer.get("enable_checkpointing", True) is True
    where = {"accelerator", "devices", "num_nodes", "strategy", "plugins"}
    assert {k: v for k, v in trainer.items() if k not in where} == {k: v for k, v in default.items() if k not in where}
    assert (trainer["max_epochs"], trainer["use_distributed_sampler"]) == (100, False)
    keep = ModelCheckpoint(dirpath=place / "checkpoints")
    trainer = {**trainer, "enable_progress_bar": False}
    assert build(trainer, "trainer", callbacks=[keep], logger=False).checkpoint_callback is keep


@pytest.mark.parametrize("name", sorted(options("trainer")))
def test_every_trainer_of_a_prediction_keeps_no_checkpoints(name: str, place: Path) -> None:
    """Otherwise Lightning would create a folder for them."""
    node = to_plain(composed("predict", place, f"trainer={name}", "trainer.accelerator=cpu", "trainer.devices=1"))
    assert (node["trainer"]["enable_checkpointing"], node["trainer"]["inference_mode"]) == (False, True)
    assert build(node["trainer"], "trainer", logger=False).checkpoint_callback is None


def test_minimum_versions_follow_the_security_advisories_in_the_document() -> None:
    """Each row of docs/trust.md is the minimum in pyproject.toml, with a reason."""
    root = Path(__file__).parents[2]
    dependencies = tomllib.loads((root / "pyproject.toml").read_text())["project"]["dependencies"]
    floors = {name: rest.partition(",")[0] for name, _, rest in (text.partition(">=") for text in dependencies)}
    assert {"torch": floors["torch"], "monai": floors["monai"]} == {"torch": "2.10", "monai": "1.6"}
    said = (root / "docs/trust.md").read_text().partition("## The oldest versions")[2]
    rows = [line.split("|")[1:3] for line in said.splitlines() if line.startswith("|")][2:]
    assert [cells[0].strip() for cells in rows] == [
        f"{name} {floors[name]}" for name in ("torch", "lightning", "monai", "hydra-core")
    ]
    assert "CVE-2026-24747" in rows[0][1]
