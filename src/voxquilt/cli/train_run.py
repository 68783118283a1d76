"""How does a training run, from a checked configuration to its exit status?"""

import logging
import shutil
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from lightning.pytorch import Callback, LightningModule, Trainer, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from monai.data.meta_obj import set_track_meta

from voxquilt.cli.instantiate import build
from voxquilt.data.subject import ScalarImage
from voxquilt.distributed.child_processes import SpawnedLogging, attended, quiet
from voxquilt.distributed.environment import is_first
from voxquilt.errors import ConfigError, InputError, RunError, VoxquiltError
from voxquilt.geometry.frame import to_triple
from voxquilt.models.weights.stored_settings import to_carry
from voxquilt.planning.network_check import check_fits
from voxquilt.text import of_subjects

log = logging.getLogger("voxquilt")

DONE, FAILED = 0, 1


class Lines(Callback):
    """A line after each validation, or each epoch without any."""

    def on_train_epoch_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Say what the epoch came to."""
        if not trainer.is_global_zero:
            return
        metrics = {name: float(value) for name, value in trainer.callback_metrics.items()}
        validated = (trainer.current_epoch + 1) % (trainer.check_val_every_n_epoch or 1) == 0
        shown = {n: v for n, v in metrics.items() if n == "train_loss" or (validated and n != "val_score")}
        text = ", ".join(f"{name} {value:.4g}" for name, value in shown.items())
        log.info("epoch %d of %s: %s", trainer.current_epoch + 1, trainer.max_epochs, text)


class Afresh(Callback):
    """Removes what another training left, once this one begins: an old best.ckpt would look like one of its own.

    Args:
        checkpoints: Files or folders.
    """

    def __init__(self, checkpoints: Sequence[Path]) -> None:
        self._checkpoints = checkpoints

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Nothing can be refused any more."""
        for path in self._checkpoints if trainer.is_global_zero else ():
            if path.is_dir() and not path.is_symlink():
                shutil.rmtree(path)
            else:
                path.unlink(missing_ok=True)


def fit(plain: dict[str, Any]) -> int:
    """Build and train.

    Args:
        plain: The checked configuration.

    Returns:
        The exit status: 0 if training ended, 1 if it broke off, 130 or 143 if it was stopped.

    Raises:
        ConfigError: something cannot be built, or an image or label cannot be used; nothing was trained.
    """
    quiet()
    set_track_meta(False)  # MONAI would carry affines along with patches, which are of no use here
    seed_everything(plain["run"]["seed"], verbose=False, workers=True)
    preprocess = build(plain["preprocess"], "preprocess")
    numbers = {"label_values": values} if (values := plain["stitch"].get("label_values")) else {}
    data = build(plain["data"], "data", preprocess=preprocess, output_dir=plain["output_dir"], **numbers)
    settings, record, replaced = to_carry(plain, plain.pop("images")), plain.pop("record"), plain.pop("replaced")
    stitch = build(plain["stitch"], "stitch")
    model = build(plain["model"], "model", stitch=stitch, settings=settings, record=record)
    logger = build(plain["logger"], "logger") if plain.get("logger") else False
    callbacks = [_callback(name, node, plain) for name, node in plain["callbacks"].items() if node]
    options = dict(plain["trainer"])
    if options.get("enable_progress_bar") is None:
        options["enable_progress_bar"] = sys.stdout.isatty()
    callbacks += [Lines(), Afresh(replaced), SpawnedLogging()]
    trainer = build(options, "trainer", callbacks=callbacks, logger=logger)
    case = data.training_cases[0]
    channels = sum(ScalarImage(path).shape[0] for path in case.images.values())
    for size in (data.patch_size, to_triple(plain["data"]["inference_patch_size"], "data.inference_patch_size")):
        names = plain["stitch"].get("class_names")
        found = check_fits(model.network, list(case.images), channels, size, names, layout="equal")
    if found is not None:
        data.classes = next(iter(found.outputs.values()))[1]
    if is_first():
        _say(data)
    status, goes_on = _fit(trainer, model, data, plain["ckpt_path"])
    if is_first():
        _say_where(trainer, status, goes_on=goes_on)
    return status


def _fit(trainer: Trainer, model: Any, data: Any, ckpt_path: str | None) -> tuple[int, bool]:
    """The exit status, and whether the same command could go on: not where it would end alike."""
    try:
        with attended(trainer):
            trainer.fit(model, datamodule=data, ckpt_path=ckpt_path, weights_only=True)
    except VoxquiltError as error:
        if isinstance(error, ConfigError | InputError) and not trainer.global_step:
            raise ConfigError(str(error)) from error
        print(f"voxquilt: {error}", file=sys.stderr)
        return FAILED, isinstance(error, RunError)
    except SystemExit:  # Lightning's, after Ctrl-C or SIGTERM
        return 143 if trainer.received_sigterm else 130, True
    return 143 if trainer.received_sigterm else DONE, True


def _say_where(trainer: Trainer, status: int, *, goes_on: bool) -> None:
    saved = [one for one in trainer.checkpoint_callbacks if isinstance(one, ModelCheckpoint)]
    last = next((Path(str(one.dirpath)) / f"{one.filename}.ckpt" for one in saved if one.monitor is None), None)
    if status:
        more = f"; the same command with ckpt_path={last} goes on." if goes_on and last and last.is_file() else "."
        print(f"voxquilt: stopped{more}", file=sys.stderr)
    elif saved and saved[0].best_model_path:
        best, score = saved[0].best_model_path, saved[0].best_model_score
        print(f"voxquilt: {best}" + ("" if score is None else f", score {float(score):.4f}"))
        print(f"voxquilt: predict with it: python predict.py ckpt_path={best} data.inputs=...")


def _callback(name: str, node: Mapping[str, Any], plain: Mapping[str, Any]) -> Any:
    configuration = {"configuration": plain} if node["_target_"] == "voxquilt.TensorBoardImages" else {}
    return build(node, f"callbacks.{name}", **configuration)


def _say(data: Any) -> None:
    for what, cases in (("train", data.training_cases), ("validate", data.validation_cases)):
        some = ", ".join(case.subject for case in cases[:5]) + ", ..." * (len(cases) > 5)
        log.info("%s on %s%s", what, of_subjects(len(cases)), some and f": {some}")
