"""The command line: compose the configuration, check it, build, run, and say how it ended.

Heavy imports stand inside functions, so that a wrong configuration is answered in a second.
"""

import io
import os
import sys
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, TextIO

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from voxquilt.cli.inherited_settings import inherit
from voxquilt.cli.overrides import to_overrides
from voxquilt.cli.predict_config import check_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.cli.shard_status import print_status
from voxquilt.cli.suggestions import check_script, check_typed, explain
from voxquilt.cli.sweeps import give_folder, with_names
from voxquilt.cli.train_config import check_train
from voxquilt.data.discovery import find_cases
from voxquilt.distributed.environment import end_with_parent, is_first
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.reporting.progress import only_json
from voxquilt.text import forgive

DONE, FAILED, NOT_STARTED = 0, 1, 2

# Of the runs of this command: one, or those of a sweep.
_statuses: list[int] = []
# stderr, while Hydra composes. Not in a closure, since launchers pickle what they run.
_real: list[TextIO] = []


def conf_dir() -> Path:
    """The configuration's folder: inside the package in a wheel, at the top of a checkout."""
    inside = Path(__file__).parents[1] / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[3] / "conf"


def predict() -> None:
    """`voxquilt-predict`, `python predict.py`: exits 0 if every subject is done, 1 if some failed, 2 if none began."""
    _main("predict", run_predict)


def train() -> None:
    """`voxquilt-train` and `python train.py`: exits 0 if training ended, 2 if it did not begin."""
    _main("train", run_train)


class _Status(int):
    """A run's exit status. Where a launcher such as submitit ran it elsewhere, it is heard of as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _heard, (int(self),)


def _heard(status: int) -> _Status:
    _statuses.append(status)
    return _Status(status)


def _main(name: str, task: Callable[[DictConfig], int]) -> None:
    def guarded(cfg: DictConfig) -> _Status:
        _release()
        return _guarded(task, cfg)

    forgive()
    _statuses.clear()
    try:
        # Hydra wants --multirun and the like before or behind all overrides, not between them.
        sys.argv[1:] = sorted(to_overrides(sys.argv[1:]), key=lambda text: "=" in text and not text.startswith("-"))
        check_typed(sys.argv[1:], name, conf_dir(), *_own_folders(sys.argv[1:]))
        sys.argv[1:] = with_names(sys.argv[1:])
        register_resolvers()
        with _held():
            hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(guarded)()
    except ValueError as error:  # ours of what was typed, or Hydra's of options that do not go together
        if _statuses and not isinstance(error, ConfigError):
            raise
        print(f"voxquilt: {error}", file=sys.stderr)
        sys.exit(NOT_STARTED)
    except SystemExit as error:
        if error.code in (0, None):
            raise
        # Hydra exits with 1 where it cannot compose, which means 'some subject failed' here. What else it exits for is
        # an error in a run, or a run that a cluster ended.
        cause = error.__context__
        if not _statuses and isinstance(cause, HydraException | OmegaConfBaseException):
            print(f"voxquilt: {explain(cause, name, conf_dir())}", file=sys.stderr)
        began = _statuses or not isinstance(cause, HydraException | OmegaConfBaseException | None)
        sys.exit(max([error.code if isinstance(error.code, int) else FAILED, *_statuses]) if began else NOT_STARTED)
    sys.exit(max(_statuses, default=0))  # none after --help or --cfg


def _own_folders(arguments: Sequence[str]) -> list[Path]:
    """The user's folder of configurations, as Hydra is told it."""
    found = []
    for text, after in pairwise([*arguments, ""]):
        option, _, value = text.partition("=")
        if option in ("--config-dir", "-cd"):
            found.append(Path(value or after))
    return found


def _checked_script(cfg: DictConfig, script: str) -> None:
    """Refuse an experiment of the other script, whichever way it came; what it says of itself is no setting."""
    if "script" in cfg:
        chosen = HydraConfig.get().runtime.choices.get("experiment") if HydraConfig.initialized() else None
        check_script(cfg.script, script, f"experiment={chosen}", conf_dir())
        with open_dict(cfg):
            del cfg["script"]


@contextmanager
def _held() -> Iterator[None]:
    """Keep what Hydra writes to stderr back until a run begins: what it says of an error is said better."""
    _real.append(sys.stderr)
    sys.stderr = io.StringIO()
    try:
        yield
    except SystemExit as error:
        if isinstance(error.__context__, HydraException | OmegaConfBaseException) and _real:
            sys.stderr = _real.pop()
        raise
    finally:
        _release()


def _release() -> None:
    while _real:
        kept, sys.stderr = sys.stderr, _real.pop()
        sys.stderr.write(kept.getvalue() if isinstance(kept, io.StringIO) else "")


def _guarded(task: Callable[[DictConfig], int], cfg: DictConfig) -> _Status:
    register_resolvers()  # a launcher's process has not come through _main
    forgive()
    # Read by torch when it first allocates: a network's outputs are large and new for every batch, and with huge pages
    # the operating system hands them out in a third less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.path.append(str(Path.cwd()))  # the user's own classes; last, so that they hide nothing that is installed
    _statuses.append(FAILED)  # of an error that is none of ours
    try:
        give_folder(cfg)
        _statuses[-1] = task(cfg)
    except VoxquiltError as error:
        if is_first():  # of many processes that all say the same
            print(f"voxquilt: {error}", file=sys.stderr)
        _statuses[-1] = NOT_STARTED
    return _Status(_statuses[-1])


def run_train(cfg: DictConfig) -> int:
    """Check, build, train; the exit status. Imported here, since it imports torch."""
    _checked_script(cfg, "train")
    plain = check_train(cfg)
    from voxquilt.cli.train_run import fit

    return fit(plain)


def run_predict(cfg: DictConfig) -> int:
    """Check, build, predict; the exit status.

    Raises:
        VoxquiltError: the configuration is wrong, and nothing was started.
    """
    end_with_parent()
    _checked_script(cfg, "predict")
    if OmegaConf.select(cfg, "run.log") == "json" and OmegaConf.select(cfg, "run.status") is not True:
        only_json()  # before anything is logged
    inherited = inherit(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else (), conf_dir())
    plain = check_predict(cfg)
    if plain["run"].get("status"):
        folder = Path(plain["output_dir"]).expanduser().resolve()
        cases = find_cases(plain["data"].get("inputs"), plain["data"].get("images"), output_dir=folder)
        return print_status(cases, folder, plain["shard"]["count"])
    from voxquilt.cli.predict_run import run

    return run(plain, inherited)
