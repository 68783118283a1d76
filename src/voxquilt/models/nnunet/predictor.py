"""Makes a PatchPredictor from a model folder of nnU-Net: one network per fold."""

from collections.abc import Sequence
from pathlib import Path
from typing import TypedDict, Unpack

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.checkpoint import load_weights
from voxquilt.models.nnunet.folder import Folds, NnunetFolder, read_folder
from voxquilt.models.nnunet.networks import build_network
from voxquilt.models.predictor import PatchPredictor
from voxquilt.vocabulary import CHECKPOINT


class NnunetOptions(TypedDict, total=False):
    """The options of PatchNetwork that a model folder leaves open."""

    average: str
    activation: str | None
    output: str
    offload: bool | str
    compile: bool
    channels_last: bool


def predictor_from_nnunet(
    folder: str | Path,
    *,
    folds: Folds = None,
    checkpoint: str = "checkpoint_final.pth",
    flips: str | Sequence[int] = CHECKPOINT,
    trust_checkpoint: bool = False,
    **options: Unpack[NnunetOptions],
) -> PatchPredictor:
    """A predictor from a model folder, whose output is the mean of the folds' logits.

    Patches lie in the model's axes, which are those of nnU-Net's reader after its transposition. A 2-D network gets
    patches of one voxel along the first of them.

    Args:
        folder: The folder, or the zip that nnU-Net exported; see `voxquilt.models.nnunet.folder.read_folder`.
        folds: Which folds; by default all that are there.
        checkpoint: Name of the file in each fold's folder.
        flips: The model's axes 0, 1, 2 along which patches are also predicted flipped; 'checkpoint' takes those that
            training allowed, and an empty list is what nnU-Net calls --disable_tta.
        trust_checkpoint: Unpickle anything that a checkpoint holds, which can run its code.
        options: See `voxquilt.models.patch_network.PatchNetwork`.

    Raises:
        ConfigError: the folder or a checkpoint is incomplete, wrong or not supported.
    """
    model = read_folder(folder, checkpoint=checkpoint, folds=folds)
    return make_predictor(model, flips=flips, trust_checkpoint=trust_checkpoint, **options)


def make_predictor(
    model: NnunetFolder,
    *,
    flips: str | Sequence[int] = CHECKPOINT,
    trust_checkpoint: bool = False,
    **options: Unpack[NnunetOptions],
) -> PatchPredictor:
    """A predictor from a model folder that has been read; see `predictor_from_nnunet`.

    Raises:
        ConfigError: a checkpoint is wrong or not supported, or `flips` is.
    """
    if isinstance(flips, str) and flips != CHECKPOINT:
        raise ConfigError(f"flips is {flips!r}; wanted is {CHECKPOINT!r}, or a list of axes out of 0, 1, 2.")
    networks = [load_weights(file, build_network(model), trust=trust_checkpoint).eval() for file in model.checkpoints]
    axes = model.flips if isinstance(flips, str) else flips
    return PatchPredictor(networks, flips=axes, squeeze_axis=0 if model.is_2d else None, **options)
