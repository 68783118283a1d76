"""The command line: compose the configuration, check it, build, run, and say how it ended.

Heavy imports stand inside functions, so that a wrong configuration is answered in a second.
"""

import io
import os
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import hydra
from hydra.core.hydra_config import HydraConfig
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from voxquilt.build import build, check_classes
from voxquilt.cases import LABEL, find_cases
from voxquilt.config import check_predict
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.explain import explain
from voxquilt.fetch import fetch
from voxquilt.inherit import check_images, inherit
from voxquilt.launch import end_with_parent, is_external, is_first
from voxquilt.lock import locked
from voxquilt.manifest import of_shard, read_json, read_rows
from voxquilt.overrides import to_overrides
from voxquilt.resume import Resume
from voxquilt.status import print_status
from voxquilt.trainconfig import check_train

DONE, FAILED, NOT_STARTED = 0, 1, 2

# Of the runs of this command: one, or those of a sweep.
_statuses: list[int] = []


def conf_dir() -> Path:
    """The configuration's folder: inside the package in a wheel, at the top of a checkout."""
    inside = Path(__file__).parent / "conf"
    return inside if inside.is_dir() else Path(__file__).parents[2] / "conf"


def predict() -> None:
    """`voxquilt-predict`, `python predict.py`: exits 0 if every subject is done, 1 if some failed, 2 if none began."""
    _main("predict", run_predict)


def train() -> None:
    """`voxquilt-train` and `python train.py`: exits 0 if training ended, 2 if it did not begin."""
    _main("train", run_train)


def register_resolvers() -> None:
    """What conf/ uses in interpolations: `${example:name}` is the path of an example file, fetched once."""
    OmegaConf.register_new_resolver("example", _example, replace=True, use_cache=True)
    OmegaConf.register_new_resolver("if_averaged", _scores_activation, replace=True)
    OmegaConf.register_new_resolver("half", _half, replace=True)


class _Status(int):
    """A run's exit status. Where a launcher such as submitit ran it elsewhere, it is heard of as it is unpickled."""

    def __reduce__(self) -> tuple[Any, ...]:
        return _heard, (int(self),)


def _heard(status: int) -> _Status:
    _statuses.append(status)
    return _Status(status)


def _main(name: str, task: Callable[[DictConfig], int]) -> None:
    def guarded(cfg: DictConfig) -> _Status:
        release()
        return _guarded(task, cfg)

    _statuses.clear()
    try:
        # Hydra wants --multirun and the like before or behind all overrides, not between them.
        sys.argv[1:] = sorted(to_overrides(sys.argv[1:]), key=lambda text: "=" in text and not text.startswith("-"))
        register_resolvers()
        with _held() as release:
            hydra.main(config_path=str(conf_dir()), config_name=name, version_base="1.3")(guarded)()
    except ConfigError as error:
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


@contextmanager
def _held() -> Iterator[Callable[[], None]]:
    """Keep what Hydra writes to stderr back: what it says of an error is said better. What is yielded ends it."""
    real, kept = sys.stderr, io.StringIO()

    def release() -> None:
        if sys.stderr is kept:
            sys.stderr = real
            real.write(kept.getvalue())

    sys.stderr = kept
    try:
        yield release
    except SystemExit as error:
        if isinstance(error.__context__, HydraException | OmegaConfBaseException):
            sys.stderr = real
        raise
    finally:
        release()


def _guarded(task: Callable[[DictConfig], int], cfg: DictConfig) -> _Status:
    register_resolvers()  # a launcher's process has not come through _main
    # Read by torch when it first allocates: a network's outputs are large and new for every batch, and with huge pages
    # the operating system hands them out in a third less time.
    os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
    sys.path.append(str(Path.cwd()))  # the user's own classes; last, so that they hide nothing that is installed
    _statuses.append(FAILED)  # of an error that is none of ours
    try:
        _statuses[-1] = task(cfg)
    except VoxquiltError as error:
        if is_first():  # of many processes that all say the same
            print(f"voxquilt: {error}", file=sys.stderr)
        _statuses[-1] = NOT_STARTED
    return _Status(_statuses[-1])


def _scores_activation(average: str | None, activation: str | None) -> str | None:
    """What turns scores into probabilities, unless the network averaged probabilities: then they are that already."""
    if average != "probabilities":
        return activation
    return "applied_sigmoid" if activation == "sigmoid" else "applied"


def _example(name: str) -> str:
    if name != "tissue":
        return str(fetch(name))
    from voxquilt.datasets import tissue_table  # which imports torch, and this name is train.py's alone

    return str(tissue_table())


def _half(size: Any) -> Any:
    """The even number of voxels that is about half of a patch; along each axis, if they differ."""
    return [_half(one) for one in size] if isinstance(size, Iterable) else size // 4 * 2


def run_train(cfg: DictConfig) -> int:
    """Check, build, train; the exit status. Imported here, since it imports torch."""
    plain = check_train(cfg)
    from voxquilt.fit import fit

    return fit(plain)


def run_predict(cfg: DictConfig) -> int:
    """Check, build, predict; the exit status.

    Raises:
        VoxquiltError: the configuration is wrong, and nothing was started.
    """
    end_with_parent()
    inherited = inherit(cfg, HydraConfig.get().overrides.task if HydraConfig.initialized() else (), conf_dir())
    plain = check_predict(cfg)
    shard = plain["shard"]["index"], plain["shard"]["count"]
    folder = Path(plain["output_dir"]).expanduser().resolve()
    if plain["run"].get("status"):
        cases = find_cases(plain["data"].get("inputs"), plain["data"].get("images"), [LABEL])
        return print_status(cases, folder, shard[1])
    from voxquilt.processes import SpawnedLogging, attended, quiet

    quiet()
    run = plain["run"]
    as_json = run["log"] == "json"
    if as_json:
        from voxquilt.progress import only_json

        only_json()
    if run.get("seed") is not None:
        from lightning.pytorch import seed_everything

        seed_everything(run["seed"], verbose=False)
    dry = run["dry_run"]
    locks = ExitStack()
    claim = partial(locks.enter_context, locked(folder, shard))
    # Where a launcher started all processes, rank 0 claims the folder when it can tell the others that it could not.
    later = claim if is_external() and not dry else None
    resume = Resume(folder, plain, run["resume"], run["overwrite"], run["content_hash"], later)
    check_classes(inherited, run["checkpoint_targets"])
    preprocess = build(plain["preprocess"], "preprocess")
    data = build(plain["data"], "data", preprocess=preprocess, shard=shard, distribute=run["distribute"], resume=resume)
    if is_first() and not is_external():
        check_images(inherited.get("images", []), data.cases)
    model = build(plain["model"], "model")
    if is_first() and not is_external():
        _check_fits(model, data, plain["stitch"].get("class_names"))
    stitch = build(plain["stitch"], "stitch")
    writer = build(plain["callbacks"]["writer"], "callbacks.writer", stitch=stitch, configuration=plain)
    others = {name: node for name, node in plain["callbacks"].items() if node and name != "writer"}
    sink = _dry_run(data, writer, timed=dry == "time", as_json=as_json) if dry else writer
    callbacks = [
        sink,
        SpawnedLogging(to_stderr=as_json),
        *(build(node, f"callbacks.{name}") for name, node in others.items()),
    ]
    logger = build(plain["logger"], "logger") if plain.get("logger") and not dry else False
    trainer = build(plain["trainer"], "trainer", callbacks=callbacks, logger=logger)
    if dry:
        with attended(trainer):
            trainer.predict(model, datamodule=data, return_predictions=False)
        return DONE
    with locks:
        if is_first() and not is_external():
            claim()
        return _predict(trainer, model, data, writer, run["surface_tolerance"], table=not as_json)


def _check_fits(model: Any, data: Any, class_names: Any) -> None:
    """Of the first subject whose headers can be read; the run finds out what is wrong with the others."""
    from voxquilt.fits import check_fits
    from voxquilt.subject import ScalarImage

    for case in data.cases:
        try:
            channels = sum(ScalarImage(path).shape[0] for path in case.images.values())
        except VoxquiltError:
            continue
        check_fits(model, list(case.images), channels, data.patch_size, class_names)
        return


def _dry_run(data: Any, writer: Any, *, timed: bool, as_json: bool) -> Any:
    from voxquilt.dryrun import DryRun

    data.detailed = True
    return DryRun(writer, timed=timed, as_json=as_json)


def _predict(trainer: Any, model: Any, data: Any, writer: Any, tolerance: float, *, table: bool) -> int:
    """Run, and say how it ended; what is on disk tells it, also where the run was in other processes than this."""
    from voxquilt.processes import attended
    from voxquilt.report import print_table

    try:
        with attended(trainer):
            trainer.predict(model, datamodule=data, return_predictions=False)
    except ConfigError:
        raise
    except VoxquiltError as error:
        writer.status = FAILED
        if is_first():
            print(f"voxquilt: {error}", file=sys.stderr)
    if not is_first():
        return writer.status
    outcome = read_json(writer.output_dir / of_shard("run.json", data.shard))
    rows = read_rows([writer.output_dir / of_shard("manifest.csv", data.shard)])
    ours = [rows[case.subject] for case in data.cases if case.subject in rows]
    status = max(writer.status, outcome.get("exit_status") or 0)
    if table:
        print_table(ours, writer.output_dir, outcome.get("subjects", len(ours)))
    if outcome.get("status") == "stopped":
        left = f"{outcome['missing']} subjects are left: the same command goes on."
        # Where the run broke off, the reason was printed as the error that it was.
        print(f"voxquilt: stopped by {outcome['reason']}; {left}" if status > FAILED else left, file=sys.stderr)
    elif data.labels is not None or any(LABEL in case.values for case in data.cases):
        status = max(status, _evaluate(data, writer, ours, tolerance))
    return status


def _evaluate(data: Any, writer: Any, rows: list[Any], tolerance: float) -> int:
    """Compare what is on disk with the true labels: metrics.csv, metrics.png, a table; 1 if some subject cannot be."""
    from voxquilt.charts import write_boxes
    from voxquilt.evaluation import Evaluation, write_scores
    from voxquilt.report import print_scores

    evaluation = Evaluation(writer.output_dir, data.cases, data.labels, writer.stitch.class_names, tolerance)
    scores = evaluation.scores(rows)
    print_scores(scores, writer.output_dir)
    try:
        write_scores(writer.output_dir / of_shard("metrics.csv", data.shard), scores)
        write_boxes(writer.output_dir / of_shard("metrics.png", data.shard), scores)
    except VoxquiltError as error:  # the run itself was started, and its outputs are there
        print(f"voxquilt: {error}", file=sys.stderr)
        return FAILED
    return FAILED if any(score.failed for score in scores) else DONE
