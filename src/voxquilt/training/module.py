"""Provides the LightningModule that trains a patch network; its checkpoints hold what predicting with them needs."""

from collections.abc import Callable, Iterable, Mapping
from dataclasses import replace
from typing import Any

from lightning.pytorch import LightningModule
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import LRScheduler

from voxquilt.data.batch import PatchBatch
from voxquilt.distributed.process_group import Group
from voxquilt.errors import ConfigError, InputError, OutputError
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.weights.stored_settings import KEY, TRAINING
from voxquilt.stitching.label_values import beyond
from voxquilt.stitching.stitch import Stitch
from voxquilt.training.datamodule import TrainingDataModule
from voxquilt.training.validation import Validated, Validator, mean_metrics

Schedule = Callable[[Optimizer, int], LRScheduler]


class PatchTrainer(LightningModule):
    """Trains a network on (image, label) patches, and validates it on whole volumes.

    Logs train_loss, and after each validation val_dice, val_dice_<class> (or val_mae and val_psnr) and val_score, where
    higher is better. Each is the mean over the subjects of all processes; every subject counts once.

    Checkpoints hold the network's weights under 'net.', and `settings` under 'voxquilt'.

    >>> import torch
    >>> from monai.losses import DiceCELoss
    >>> module = PatchTrainer(nn.Conv3d(1, 2, 3, padding=1), DiceCELoss(to_onehot_y=True, softmax=True))
    >>> module(torch.rand(1, 1, 8, 8, 8)).shape
    torch.Size([1, 2, 8, 8, 8])

    Args:
        net: (B, C, I, J, K) to (B, classes, I, J, K).
        loss: Takes the network's output and labels (B, L, I, J, K), such as MONAI's DiceCELoss.
        optimizer: Makes an optimizer of parameters; AdamW with a learning rate of 1e-3 by default.
        schedule: Makes a schedule of an optimizer and the number of steps; None keeps the learning rate.
        stitch: How validation volumes are stitched from patches.
        squeeze_axis: The axis that a 2-D network does not have; see PatchNetwork.
        pictures: Number of validation subjects per process of which pictures are drawn.
        settings: What predicting with the weights needs; plain values.
        record: How the network is trained, for comparison when the training is resumed; plain values.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        optimizer: Callable[[Iterable[nn.Parameter]], Optimizer] | None = None,
        schedule: Schedule | None = None,
        stitch: Stitch | None = None,
        squeeze_axis: int | None = None,
        pictures: int = 4,
        settings: Mapping[str, Any] | None = None,
        record: Mapping[str, Any] | None = None,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self.validated: list[Validated] = []
        """Results of the last validation: those of every subject, on every rank."""
        self._optimizer = optimizer or (lambda parameters: AdamW(parameters, lr=1e-3))
        self._schedule = schedule
        # Labels are compared as classes, whatever numbers classes have in files.
        self._stitch = replace(stitch or Stitch(), label_values=None)
        self._squeeze = None if squeeze_axis is None else squeeze_axis + 2
        # In a list, or its parameters would be counted and saved twice.
        self._networks = [PatchNetwork([net], squeeze_axis=squeeze_axis)]
        self._pictures = pictures
        self._settings, self._record = dict(settings or {}), dict(record or {})

    def setup(self, stage: str) -> None:
        """Connect the processes, and prepare validation."""
        data = getattr(self.trainer, "datamodule", None)
        if not isinstance(data, TrainingDataModule):
            raise ConfigError(f"PatchTrainer needs a TrainingDataModule; the trainer has {type(data).__name__}.")
        self._data = data
        self._group = Group(self.trainer)
        self._validator = Validator(data.task, self._stitch, data.truth, self._pictures)

    @property
    def network(self) -> PatchNetwork:
        """The network as it is used to predict: outputs by name."""
        return self._networks[0]

    def forward(self, patches: Tensor) -> Tensor:
        """The network's output."""
        if self._squeeze is None:
            return self.net(patches)
        return self.net(patches.squeeze(self._squeeze)).unsqueeze(self._squeeze)

    def on_before_batch_transfer(self, batch: Any, dataloader_idx: int) -> Any:
        """Note the highest class of each label while they are on the host."""
        if not isinstance(batch, PatchBatch) and self._data.task == "segmentation":
            self._highest_classes = batch["label"].flatten(1).amax(dim=1).tolist()
        return batch

    def training_step(self, batch: Mapping[str, Any], batch_idx: int) -> Tensor:
        """The loss of a batch.

        Raises:
            InputError: a label holds a class that the network does not have.
            OutputError: the loss is not finite.
        """
        output = self(batch["image"])
        subjects = ", ".join(dict.fromkeys(batch["subject"]))
        if self._data.task == "segmentation":
            # TrainingDataModule has checked this, unless it does not know how many classes the network has.
            for subject, highest in zip(batch["subject"], self._highest_classes, strict=True):
                if highest >= output.shape[1]:
                    raise InputError(f"{subject}: {beyond(int(highest), output.shape[1])}")
        loss = self.loss(output, batch["label"])
        if not loss.isfinite():
            raise OutputError(
                f"the loss is {float(loss)} in epoch {self.current_epoch}, step {self.global_step} (patches of "
                f"{subjects}): lower model.optimizer.lr, set trainer.gradient_clip_val=1, or look for odd intensities."
            )
        size = len(batch["image"])
        self.log("train_loss", loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=size, sync_dist=True)
        return loss

    def on_validation_epoch_start(self) -> None:
        """Set the time that pictures are captioned with."""
        self._validator.when = f"epoch {self.current_epoch + 1}, step {self.global_step}"

    def validation_step(self, batch: PatchBatch, batch_idx: int) -> None:
        """Predict a batch of the patches of whole volumes."""
        self._validator.take(self.network(batch.data.to(self.dtype)), batch)

    def on_validation_epoch_end(self) -> None:
        """Log the means over the subjects of all processes."""
        of_ranks = self._group.gather(self._validator.close())
        self.validated = sorted((result for results in of_ranks for result in results), key=lambda r: r.subject)
        for name, value in mean_metrics(self.validated, self._data.task).items():
            self.log(f"val_{name}", value, prog_bar=name == "score")

    def configure_optimizers(self) -> Any:
        """The optimizer, and its schedule per step."""
        optimizer = self._optimizer(self.parameters())
        if self._schedule is None:
            return optimizer
        steps = self.trainer.estimated_stepping_batches
        if steps == float("inf"):
            raise ConfigError("model.schedule needs the number of steps: set trainer.max_epochs or trainer.max_steps.")
        return [optimizer], [{"scheduler": self._schedule(optimizer, int(steps)), "interval": "step"}]

    def on_load_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Refuse weights of another network, of which torch would list every parameter.

        Raises:
            ConfigError: a parameter is missing or has another shape; the first such is named.
        """
        states = self.state_dict(), checkpoint["state_dict"]
        ours, theirs = ({name: tuple(value.shape) for name, value in state.items()} for state in states)
        different = next((name for name in {**ours, **theirs} if ours.get(name) != theirs.get(name)), None)
        if different is not None:
            raise ConfigError(
                f"ckpt_path is of another network: its {different} is {theirs.get(different, 'missing')}, and that of "
                f"model.net is {ours.get(different, 'missing')}."
            )

    def on_save_checkpoint(self, checkpoint: dict[str, Any]) -> None:
        """Add the settings and the record to a checkpoint."""
        checkpoint[KEY], checkpoint[TRAINING] = self._settings, self._record
