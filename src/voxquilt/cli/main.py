"""Runs a command: composes the configuration, checks it, predicts or trains, and exits with the highest status.

Heavy imports stand inside functions, so that a wrong configuration is answered in a second.
"""

import logging
import os
import signal
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from importlib.metadata import version
from itertools import pairwise
from pathlib import Path

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cli.conf_options import of_script
from voxquilt.cli.exit_status import (
    DONE,
    FAILED,
    NOT_STARTED,
    ExitStatus,
    forget_statuses,
    has_run,
    highest_status,
    prepare_quick_end,
)
from voxquilt.cli.first_subject import first_subject_read_ahead
from voxquilt.cli.inherited_settings import inherit
from voxquilt.cli.model_parts import has_parts, take_parts
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.predict_config import check_predict, find_subjects
from voxquilt.cli.quick_hydra import quick_hydra
from voxquilt.cli.quick_imports import quick_imports
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.shard_status import print_status
from voxquilt.cli.stages import predict_stages_before
from voxquilt.cli.suggestions import check_script, check_typed, explain
from voxquilt.cli.sweeps import give_folder, with_names
from voxquilt.cli.train_config import check_train
from voxquilt.cli.training_plans import has_plans, take_plans
from voxquilt.data.discovery import find_cases
from voxquilt.distributed.environment import end_with_parent, is_first
from voxquilt.distributed.signals import ended_at_once, ended_by
from voxquilt.errors import VoxquiltError
from voxquilt.filesystem import conf_dir
from voxquilt.text import escape_streams, leave_stdout

_FULL_ERROR = "HYDRA_FULL_ERROR"


def predict() -> None:
    """`voxquilt-predict`, `python predict.py`: exits 0 if every subject is done, 1 if some failed, 2 if none began."""
    with ended_by(signal.SIGINT):
        _main("predict", run_predict)


def train() -> None:
    """`voxquilt-train` and `python train.py`: exits 0 if training ended, 2 if it did not begin."""
    with ended_by(signal.SIGINT):
        _main("train", run_train)


def run_predict(cfg: DictConfig) -> int:
    """Check the configuration and predict; the exit status.

    Raises:
        VoxquiltError: the configuration is wrong, and nothing was started.
    """
    end_with_parent()
    _drop_script(cfg, "predict")
    _leave_stdout_to_json(cfg)
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    before = predict_stages_before(cfg, typed)
    take = take_parts if has_parts(cfg) else inherit
    inherited = take(cfg, typed, conf_dir())
    plain = check_predict(cfg)
    cases = find_subjects(plain)
    if plain["run"]["status"]:
        folder = Path(plain["output_dir"]).expanduser().resolve()
        if cases is None:
            data = plain["data"]
            cases = find_cases(
                data.get("inputs"), data.get("images"), output_dir=folder,
                suffixes=data.get("suffixes"), extra=data.get("extra_images"),
            )  # fmt: skip
        return print_status(cases, folder, plain["shard"]["count"])
    with first_subject_read_ahead(cases, plain):
        with ended_at_once(), quick_imports():
            from voxquilt.cli.predict_run import run  # imports torch

        return max(before, run(plain, inherited, cases))


def run_train(cfg: DictConfig) -> int:
    """Check the configuration and train; the exit status.

    Raises:
        VoxquiltError: the configuration is wrong, and nothing was started.
    """
    _drop_script(cfg, "train")
    typed = HydraConfig.get().overrides.task if HydraConfig.initialized() else ()
    weights = take_plans(cfg, typed, conf_dir()) if has_plans(cfg) else None
    plain = check_train(cfg)
    with ended_at_once(), quick_imports():
        from voxquilt.cli.train_run import fit  # imports torch

    return fit(plain, weights)


def _main(name: str, task: Callable[[DictConfig], int]) -> None:
    leave = prepare_quick_end()
    logging.getLogger("alembic").setLevel(logging.WARNING)  # by which MLflow and Optuna keep their databases
    escape_streams()
    forget_statuses()
    leave(_status_of(name, task))


def _status_of(name: str, task: Callable[[DictConfig], int]) -> int:
    try:
        if sys.argv[1:] == ["--version"]:  # which Hydra would answer with its own
            print(f"voxquilt {version('voxquilt')}")
            return DONE
        sys.argv[1:] = _prepare_arguments(sys.argv[1:], name)
        register_resolvers()
        _run_hydra(name, task)
    except (HydraException, OmegaConfBaseException) as error:
        return _answer(explain(error, name, conf_dir()))
    except ValueError as error:  # ours of what was typed, or Hydra's of options that do not go together
        return _answer(str(error))
    except SystemExit as error:
        return highest_status(error.code if isinstance(error.code, int) else FAILED) if error.code else DONE
    except BrokenPipeError:  # nobody reads on, as with --help | head; the interpreter says so when it ends
        return highest_status(FAILED)
    except Exception:  # of a launcher; runs report their own
        traceback.print_exc()
        return highest_status(FAILED)
    return highest_status()


def _prepare_arguments(typed: Sequence[str], name: str) -> list[str]:
    """What was typed as Hydra takes it, once options of the other script are refused."""
    # Hydra wants --multirun and the like before or behind all overrides, not between them.
    arguments = sorted(
        to_overrides(typed), key=lambda text: text.startswith("~") or ("=" in text and not text.startswith("-"))
    )
    arguments = of_script(arguments, name, conf_dir())
    check_typed(arguments, name, conf_dir(), *_config_folders(arguments))
    return with_names(arguments)


def _config_folders(arguments: Sequence[str]) -> list[Path]:
    """The user's own folders of configurations (--config-dir)."""
    folders = []
    for text, after in pairwise([*arguments, ""]):
        option, _, value = text.partition("=")
        if option in ("--config-dir", "-cd"):
            folders.append(Path(value or after))
    return folders


def _run_hydra(name: str, task: Callable[[DictConfig], int]) -> None:
    """Compose the configuration and run the task, once or for each job of a sweep.

    Raises:
        HydraException: (or OmegaConfBaseException) no configuration can be composed. Without HYDRA_FULL_ERROR Hydra
            would print it and exit, with the status of a run in which a subject failed.
    """
    wanted = os.environ.get(_FULL_ERROR)

    def guarded(cfg: DictConfig) -> ExitStatus:
        with _environment(_FULL_ERROR, wanted):  # in a run, and in processes that it starts, it is the user's
            return _run_task(task, cfg)

    with _environment(_FULL_ERROR, "1"), quick_hydra():
        hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(guarded)()


@contextmanager
def _environment(name: str, value: str | None) -> Iterator[None]:
    """Set an environment variable, or remove it, until the block ends."""
    before = os.environ.get(name)
    try:
        _set_variable(name, value)
        yield
    finally:
        _set_variable(name, before)


def _set_variable(name: str, value: str | None) -> None:
    if value is None:
        os.environ.pop(name, None)
    else:
        os.environ[name] = value


def _run_task(task: Callable[[DictConfig], int], cfg: DictConfig) -> ExitStatus:
    """Run a job, and answer every error with a message and a status, so that other jobs of a sweep go on."""
    register_resolvers()  # a launcher's process has not come through _main
    escape_streams()
    # Read by torch when it first allocates: a network's outputs are large and new for every batch, and with huge pages
    # the operating system hands them out in a third less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.path.append(str(Path.cwd()))  # the user's own classes; last, so that they hide nothing that is installed
    try:
        give_folder(cfg)
        status = task(cfg)
        return status if isinstance(status, ExitStatus) else ExitStatus(status)
    except VoxquiltError as error:
        if is_first():  # of many processes that all have the same message
            print(f"voxquilt: {error}", file=sys.stderr)
        return ExitStatus(NOT_STARTED)
    except Exception:
        traceback.print_exc()
        return ExitStatus(FAILED)


def _answer(message: str) -> int:
    """Print why a command was not understood; the exit status."""
    print(f"voxquilt: {message}", file=sys.stderr)
    return highest_status(FAILED) if has_run() else NOT_STARTED


def _drop_script(cfg: DictConfig, script: str) -> None:
    """Refuse an experiment of the other script, however it was chosen; the key that says so is not a setting."""
    if "script" in cfg:
        chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
        check_script(cfg.script, script, f"experiment={chosen}", conf_dir())
        with open_dict(cfg):
            del cfg["script"]


def _leave_stdout_to_json(cfg: DictConfig) -> None:
    """With run.log=json stdout is for objects alone, before anything is logged."""
    if OmegaConf.select(cfg, "run.log") == "json" and OmegaConf.select(cfg, "run.status") is not True:
        leave_stdout()
