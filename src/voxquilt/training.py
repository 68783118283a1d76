"""How is a patch network trained? On random patches of images and their labels, several per volume."""

from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from lightning.pytorch import LightningDataModule, LightningModule
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset

from voxquilt.cases import Case, find_cases
from voxquilt.errors import ConfigError, InputError
from voxquilt.geometry import Triple, to_triple
from voxquilt.preprocess import Preprocess
from voxquilt.sampler import GridSampler
from voxquilt.subject import LabelMap, ScalarImage, Subject

LABEL = "label"
Pair = tuple[Tensor, Tensor]


class PatchTrainer(LightningModule):
    """Trains a network on (image, label) patches; logs train_loss and val_loss.

    Its checkpoints hold plain tensors under 'net.', so that `model=state_dict model.prefix=net.` predicts with them.

    Args:
        net: (B, C, I, J, K) to (B, classes, I, J, K).
        loss: Of the network's output and labels (B, 1, I, J, K), such as MONAI's DiceCELoss.
        learning_rate: Of AdamW.
        weight_decay: Of AdamW.
    """

    def __init__(
        self,
        net: nn.Module,
        loss: Callable[[Tensor, Tensor], Tensor],
        *,
        learning_rate: float = 1e-3,
        weight_decay: float = 1e-5,
    ) -> None:
        super().__init__()
        self.net = net
        self.loss = loss
        self._learning_rate = learning_rate
        self._weight_decay = weight_decay

    def forward(self, patches: Tensor) -> Tensor:
        """The network's output."""
        return self.net(patches)

    def training_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The loss of a batch."""
        return self._logged("train_loss", batch)

    def validation_step(self, batch: Pair, batch_idx: int) -> Tensor:
        """The loss of a batch of patches that training does not see."""
        return self._logged("val_loss", batch)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        """AdamW."""
        return torch.optim.AdamW(self.parameters(), lr=self._learning_rate, weight_decay=self._weight_decay)

    def _logged(self, name: str, batch: Pair) -> Tensor:
        patches, labels = batch
        loss = self.loss(self(patches), labels)
        self.log(name, loss, on_step=False, on_epoch=True, prog_bar=True, batch_size=len(patches))
        return loss


class RandomPatches(Dataset[Pair]):
    """Random patches of subjects in memory; patch n is the same in every run with the same seed and epoch order.

    Args:
        samplers: One per subject, of its images and its label.
        per_volume: Patches of each subject an epoch.
        balanced: The share of patches that are centred on a voxel of a class drawn evenly from those present.
        generator: Where random numbers come from.
    """

    def __init__(
        self, samplers: list[GridSampler], per_volume: int, balanced: float, generator: torch.Generator
    ) -> None:
        self._samplers = samplers
        self._per_volume = per_volume
        self._balanced = balanced
        self._generator = generator
        # Voxel numbers by class, of at most some thousands each: enough to draw from, and small.
        self._voxels = [_voxels_by_class(sampler.volume(LABEL)[0]) for sampler in samplers]

    def __len__(self) -> int:
        return len(self._samplers) * self._per_volume

    def __getitem__(self, index: int) -> Pair:
        n = index % len(self._samplers)
        sampler = self._samplers[n]
        start = self._start(sampler.grid.shape, sampler.patch_size, self._voxels[n])
        where = (slice(None), *(slice(s, s + p) for s, p in zip(start, sampler.patch_size, strict=True)))
        images = [name for name in sampler.subject.images if name != LABEL]
        patch = torch.cat([sampler.volume(name)[where] for name in images]).float()
        return patch, sampler.volume(LABEL)[where].clone()

    def _start(self, shape: Triple, patch: Triple, voxels: list[Tensor]) -> list[int]:
        room = [n - p for n, p in zip(shape, patch, strict=True)]
        if self._random() >= self._balanced:
            return [self._below(r + 1) for r in room]
        choice = voxels[self._below(len(voxels))]
        centre = choice[self._below(len(choice))].tolist()
        return [min(max(c - p // 2, 0), r) for c, p, r in zip(centre, patch, room, strict=True)]

    def _random(self) -> float:
        return float(torch.rand((), generator=self._generator))

    def _below(self, limit: int) -> int:
        return int(torch.randint(limit, (), generator=self._generator))


class TrainingDataModule(LightningDataModule):
    """Images and labels for training, taken to model space once and kept in memory.

    Args:
        inputs, images: See `voxquilt.cases.find_cases`.
        labels: A path with {subject}, from the working folder: the label map of each subject.
        patch_size: Voxels in model space, an integer or three.
        batch_size: Patches a batch.
        patches_per_volume: Patches of each training subject an epoch.
        balanced: The share of patches that are centred on a voxel of a class drawn evenly.
        validation: The share of subjects that are kept for validation, at least one; 0 for none.
        seed: Of the split and of the patches.
        preprocess: To model space; RAS with the file's spacing by default.

    Raises:
        ConfigError: nothing found, too few subjects, or a label that is not there.
    """

    def __init__(
        self,
        inputs: object,
        labels: str,
        patch_size: int | Iterable[int],
        *,
        images: Mapping[str, str] | None = None,
        batch_size: int = 2,
        patches_per_volume: int = 8,
        balanced: float = 0.5,
        validation: float = 0.2,
        seed: int = 0,
        preprocess: Preprocess | None = None,
    ) -> None:
        super().__init__()
        self.patch_size = to_triple(patch_size, "data.patch_size", minimum=1)
        self.batch_size = batch_size
        self.patches_per_volume = patches_per_volume
        self.balanced = balanced
        self.seed = seed
        self.preprocess = preprocess or Preprocess()
        self._labels = labels
        cases = find_cases(inputs, images)
        order = torch.randperm(len(cases), generator=torch.Generator().manual_seed(seed)).tolist()
        kept = max(1, round(validation * len(cases))) if validation else 0
        if kept >= len(cases):
            raise ConfigError(
                f"{len(cases)} subject(s) and data.validation={validation} leave none to train on; add subjects, or "
                f"set data.validation=0."
            )
        self.validation_cases = [cases[n] for n in order[:kept]]
        self.training_cases = [cases[n] for n in order[kept:]]
        for case in cases:
            if not self._label_path(case).is_file():
                raise ConfigError(f"{case.subject}: data.labels names {self._label_path(case)}, which is not there.")

    def setup(self, stage: str) -> None:
        """Read and preprocess every subject.

        Raises:
            InputError: an image or label that cannot be used; training on what is left would be another training.
        """
        if not hasattr(self, "_training"):
            self._training = [self._load(case) for case in self.training_cases]
            self._validating = [self._load(case) for case in self.validation_cases]

    def train_dataloader(self) -> DataLoader[Pair]:
        """Random patches, drawn anew each epoch."""
        return self._loader(self._training, self.seed)

    def val_dataloader(self) -> DataLoader[Pair] | list[DataLoader[Pair]]:
        """Random patches of the validation subjects."""
        return self._loader(self._validating, self.seed + 1) if self._validating else []

    def _loader(self, samplers: list[GridSampler], seed: int) -> DataLoader[Pair]:
        generator = torch.Generator().manual_seed(seed)
        patches = RandomPatches(samplers, self.patches_per_volume, self.balanced, generator)
        return DataLoader(patches, self.batch_size)

    def _label_path(self, case: Case) -> Path:
        return Path(self._labels.replace("{subject}", case.subject)).expanduser()

    def _load(self, case: Case) -> GridSampler:
        images = {name: ScalarImage(path) for name, path in case.images.items()}
        subject = Subject({**images, LABEL: LabelMap(self._label_path(case))})
        try:
            model_subject, _ = self.preprocess(subject)
            return GridSampler(model_subject, self.patch_size, fit=True)
        except InputError as error:
            raise InputError(f"{case.subject}: {error}") from error


def _voxels_by_class(labels: Tensor, most: int = 4096) -> list[Tensor]:
    """For each class that is present, positions (n, 3) of at most about `most` of its voxels, evenly spread."""
    found = []
    for value in labels.unique():
        positions = (labels == value).nonzero()
        found.append(positions[:: max(1, len(positions) // most)])
    return found
