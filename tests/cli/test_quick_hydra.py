"""Tests that Hydra, where it is spared work, gives the same configurations, jobs, help and errors as by itself."""

import contextlib
import io
import re
from contextlib import AbstractContextManager, nullcontext
from pathlib import Path
from typing import Any

import hydra
import pytest
from hydra._internal.config_loader_impl import ConfigLoaderImpl
from hydra.core.global_hydra import GlobalHydra
from hydra.core.hydra_config import HydraConfig
from omegaconf import DictConfig, OmegaConf

from voxquilt.cli.main import conf_dir
from voxquilt.cli.quick_hydra import quick_hydra
from voxquilt.cli.resolvers import register_resolvers


class Ran:
    """What `hydra.main` did with a command line: configurations of jobs, text, an error, and how often it composed."""

    def __init__(self, arguments: list[str], context: AbstractContextManager[None], patch: pytest.MonkeyPatch) -> None:
        self.jobs: list[tuple[Any, Any]] = []
        self.error = ""
        self.composed = 0
        load = ConfigLoaderImpl.load_configuration

        def counted(loader: ConfigLoaderImpl, *args: Any, **options: Any) -> DictConfig:
            self.composed += 1
            return load(loader, *args, **options)

        def job(cfg: DictConfig) -> None:
            own = OmegaConf.to_container(OmegaConf.structured(HydraConfig.get()), resolve=False)
            self.jobs.append((OmegaConf.to_container(cfg, resolve=False), own))

        printed = io.StringIO()
        with patch.context() as patched, contextlib.redirect_stdout(printed), context:
            # Hydra names a sweep's folder by the time.
            patched.setattr("sys.argv", ["predict.py", *arguments, "hydra.sweep.dir=jobs"])
            patched.setattr(ConfigLoaderImpl, "load_configuration", counted)
            patched.setenv("HYDRA_FULL_ERROR", "1")
            try:
                hydra.main(config_path=str(conf_dir()), config_name="predict", version_base="1.3")(job)()
            except SystemExit:
                pass
            except Exception as error:
                self.error = f"{type(error).__name__}: {error}"
            finally:
                GlobalHydra.instance().clear()
        self.printed = re.sub(r"\[[-\d]+ [:,\d]+\]", "", printed.getvalue())  # without times


@pytest.fixture(autouse=True)
def _folder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder of the user's with an experiment that is a sweep."""
    register_resolvers()
    monkeypatch.chdir(tmp_path)
    own = tmp_path / "own" / "experiment"
    own.mkdir(parents=True)
    sweep = "hydra:\n  mode: MULTIRUN\n  sweeper:\n    params:\n      stitch.overlap_mode: crop,hann\n"
    (own / "sweep.yaml").write_text("# @package _global_\n" + sweep)
    (own / "run.yaml").write_text("# @package _global_\nhydra:\n  mode: RUN\n")


RUNS = [
    [],
    ["data.inputs=scans", "ckpt_path=a.pt", "data.patch_size=[8,8,8]"],
    ["model=state_dict", "model/net=unet", "+preprocess.intensity=[{_target_: monai.transforms.ScaleIntensity}]"],
    ["experiment=brain_extraction"],
    ["hydra.job.name=mine", "~logger", "stitch.class_names={liver: 1}"],
]
OTHERS = [
    ["hydra.mode=RUN"],
    ["--config-dir", "own", "experiment=run"],
    ["--config-dir", "own", "experiment=sweep"],
    ["-m", "data.patch_size=8,16"],
    ["-m", "data.patch_size=8"],
    ["hydra.mode=MULTIRUN", "data.patch_size=8,16"],
    ["data.patch_size=8,16"],
    ["nothing=1"],
    ["data.patch_size="],
    ["model=none"],
    ["experiment=none"],
    ["--cfg", "job"],
    ["--cfg", "hydra"],
    ["--info", "defaults"],
]


@pytest.mark.parametrize("arguments", [*RUNS, *OTHERS], ids=" ".join)
def test_jobs_text_and_errors_are_hydras(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """For runs, sweeps that are asked for in three ways, what cannot be composed, and what is only shown."""
    plain, quick = (Ran(arguments, context, monkeypatch) for context in (nullcontext(), quick_hydra()))
    assert quick.jobs == plain.jobs
    assert quick.error == plain.error
    assert quick.printed == plain.printed
    assert quick.composed <= plain.composed + bool(arguments in OTHERS)


@pytest.mark.parametrize("arguments", RUNS, ids=" ".join)
def test_a_run_composes_once(arguments: list[str], monkeypatch: pytest.MonkeyPatch) -> None:
    """Hydra by itself does so twice; if that has changed, this shortcut can go."""
    plain, quick = (Ran(arguments, context, monkeypatch) for context in (nullcontext(), quick_hydra()))
    assert (len(quick.jobs), quick.composed, plain.composed) == (1, 1, 2)


@pytest.mark.parametrize("option", ["--help", "--hydra-help"])
def test_help_is_hydras(option: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """Ours lists no groups; Hydra's does."""
    plain, quick = (Ran([option], context, monkeypatch) for context in (nullcontext(), quick_hydra()))
    assert quick.printed == plain.printed
    assert ("hydra/launcher" in quick.printed) == (option == "--hydra-help")
