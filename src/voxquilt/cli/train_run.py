"""Trains, from a checked configuration to the exit status."""

import logging
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from lightning.pytorch import LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from monai.data.meta_obj import set_track_meta

from voxquilt.cli.collector import paused_collector
from voxquilt.cli.exit_status import DONE, FAILED, ExitStatus
from voxquilt.cli.instantiate import build
from voxquilt.cli.loggers import build_loggers
from voxquilt.cli.train_callbacks import EpochLines, RemoveCheckpoints
from voxquilt.data.subject import ScalarImage
from voxquilt.distributed.child_processes import SpawnedLogging, attended, quiet
from voxquilt.distributed.environment import is_first
from voxquilt.distributed.signals import interrupts_raised
from voxquilt.errors import ConfigError, InputError, RunError, VoxquiltError
from voxquilt.geometry.frame import to_triple
from voxquilt.models.nnunet.checkpoint import load_weights
from voxquilt.models.weights.stored_settings import to_carry
from voxquilt.planning.network_check import check_network, try_zeros
from voxquilt.reporting.run_logs import open_loggers
from voxquilt.text import of_subjects
from voxquilt.training.checkpoint_files import write_complete_checkpoints
from voxquilt.vocabulary import BEST

log = logging.getLogger("voxquilt")


def fit(plain: Mapping[str, Any], weights: Mapping[str, Any] | None = None) -> ExitStatus:
    """Build and train.

    Args:
        plain: The checked configuration.
        weights: The checkpoint of nnU-Net to begin with, `path`, and whether it is trusted, `trust`; None for none.

    Returns:
        The exit status: 0 if training ended, 1 if it broke off, 130 or 143 if it was stopped. One of 0 has the score by
        which a sweeper compares trainings.

    Raises:
        ConfigError: something cannot be built, or an image or label cannot be used; nothing was trained.
    """
    quiet()
    set_track_meta(False)  # MONAI would carry affines along with patches, which are of no use here
    seed_everything(plain["run"]["seed"], verbose=False, workers=True)
    plain, checked = _split_configuration(plain)
    with paused_collector():  # classes that the configuration names may import much
        data = _build_data(plain)
        model = _build_model(plain, checked)
        trainer = _build_trainer(plain, checked["replaced"])
    write_complete_checkpoints(trainer)
    if weights is not None:
        load_weights(weights["path"], model.net, trust=weights["trust"], other_heads=True)
    _check_network(plain, data, model)
    if is_first():
        _log_subjects(data)
    status, can_go_on = _train(trainer, model, data, plain["ckpt_path"])
    if is_first():
        _print_checkpoints(trainer, status, can_go_on=can_go_on)
    return ExitStatus(status, None if status else _objective(trainer, plain["run"]["objective"]))


def _split_configuration(plain: Mapping[str, Any]) -> tuple[dict[str, Any], dict[str, Any]]:
    """The configuration, and what its check added: names of images, the record, checkpoints to be replaced."""
    added = ("images", "record", "replaced")
    return {key: value for key, value in plain.items() if key not in added}, {key: plain[key] for key in added}


def _build_data(plain: Mapping[str, Any]) -> Any:
    preprocess = build(plain["preprocess"], "preprocess")
    numbers = {"label_values": values} if (values := plain["stitch"].get("label_values")) else {}
    return build(plain["data"], "data", preprocess=preprocess, output_dir=plain["output_dir"], **numbers)


def _build_model(plain: Mapping[str, Any], checked: Mapping[str, Any]) -> Any:
    stitch = build(plain["stitch"], "stitch")
    settings = to_carry(plain, checked["images"])
    return build(plain["model"], "model", stitch=stitch, settings=settings, record=checked["record"])


def _build_trainer(plain: Mapping[str, Any], replaced: list[Path]) -> Trainer:
    callbacks = [_build_callback(name, node, plain) for name, node in plain["callbacks"].items() if node]
    arguments = dict(plain["trainer"])
    if arguments.get("enable_progress_bar") is None:
        arguments["enable_progress_bar"] = sys.stdout.isatty()
    callbacks += [EpochLines(), RemoveCheckpoints(replaced), SpawnedLogging()]
    return build(arguments, "trainer", callbacks=callbacks, logger=build_loggers(plain.get("logger")))


def _build_callback(name: str, node: Mapping[str, Any], plain: Mapping[str, Any]) -> Any:
    configuration = {"configuration": plain} if node["_target_"] == "voxquilt.TensorBoardImages" else {}
    return build(node, f"callbacks.{name}", **configuration)


def _check_network(plain: Mapping[str, Any], data: Any, model: Any) -> None:
    """Refuse a network that cannot take the patches of training and validation; tell the data how many classes it has.

    Raises:
        ConfigError: channels, patch size or classes do not fit, with those that would.
    """
    case = data.training_cases[0]
    channels = sum(ScalarImage(path).shape[0] for path in case.images.values())
    names = plain["stitch"].get("class_names")
    inference_size = to_triple(plain["data"]["inference_patch_size"], "data.inference_patch_size")
    probe = None
    for size in dict.fromkeys((data.patch_size, inference_size)):
        probe = check_network(model.network, list(case.images), channels, size, names, layout="equal")
        if probe is None:
            try_zeros(model.network, channels, size)
    if probe is not None:
        data.classes = next(iter(probe.outputs.values()))[1]


def _train(trainer: Trainer, model: LightningModule, data: Any, ckpt_path: str | None) -> tuple[int, bool]:
    """The exit status, and whether the same command could go on: not where it would end in the same way.

    Raises:
        ConfigError: nothing was trained.
    """
    try:
        with open_loggers(trainer, is_first=is_first()), attended(trainer), interrupts_raised():
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except VoxquiltError as error:
        if isinstance(error, ConfigError | InputError) and not trainer.global_step:
            raise ConfigError(str(error)) from error
        print(f"voxquilt: {error}", file=sys.stderr)
        is_of_disk = isinstance(error.__cause__, OSError)
        return FAILED, is_of_disk or isinstance(error, RunError)
    except (SystemExit, KeyboardInterrupt):  # Lightning's, after Ctrl-C or SIGTERM, or of Ctrl-C before it listens
        return 143 if trainer.received_sigterm else 130, True
    return 143 if trainer.received_sigterm else DONE, True


def _log_subjects(data: Any) -> None:
    for purpose, cases in (("train", data.training_cases), ("validate", data.validation_cases)):
        names = ", ".join(case.subject for case in cases[:5]) + ", ..." * (len(cases) > 5)
        log.info("%s on %s%s", purpose, of_subjects(len(cases)), names and f": {names}")


def _objective(trainer: Trainer, name: str) -> float | None:
    """The best validation's score, or the last value of a metric; None where there is none."""
    if name != BEST:
        metrics = trainer.callback_metrics
        if name not in metrics:
            log.warning("run.objective=%s: the training has %s.", name, ", ".join(metrics) or "no metrics")
            return None
        return float(metrics[name])
    for saver in trainer.checkpoint_callbacks:
        if isinstance(saver, ModelCheckpoint) and saver.monitor and saver.best_model_path:
            score = saver.best_model_score
            if score is None:  # known to the process of ddp_spawn that has ended
                states = torch.load(saver.best_model_path, map_location="cpu", weights_only=True)["callbacks"]
                score = states[saver.state_key]["best_model_score"]
            return float(score)
    return None


def _print_checkpoints(trainer: Trainer, status: int, *, can_go_on: bool) -> None:
    """Print the best checkpoint and how to predict with it, or the last one and how to go on."""
    savers = [callback for callback in trainer.checkpoint_callbacks if isinstance(callback, ModelCheckpoint)]
    last = next((Path(str(saver.dirpath)) / f"{saver.filename}.ckpt" for saver in savers if not saver.monitor), None)
    if status:
        more = f"; the same command with ckpt_path={last} goes on." if can_go_on and last and last.is_file() else "."
        print(f"voxquilt: stopped{more}", file=sys.stderr)
    elif savers and savers[0].best_model_path:
        best, score = savers[0].best_model_path, savers[0].best_model_score
        print(f"voxquilt: {best}" + ("" if score is None else f", score {float(score):.4f}"))
        print(f"voxquilt: predict with it: python predict.py ckpt_path={best} data.inputs=...")
