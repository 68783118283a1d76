"""Reads the label files of a training and turns them into what the network learns."""

from collections.abc import Iterable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import torch
from jaxtyping import Shaped
from torch import Tensor

from voxquilt.data.discovery import LABEL, SubjectFiles, label_files
from voxquilt.data.listing import meant
from voxquilt.data.subject import Image, LabelMap, ScalarImage, Subject
from voxquilt.errors import ConfigError, InputError, VoxquiltError
from voxquilt.stitching.label_values import beyond, to_classes


@dataclass(frozen=True)
class TrainingLabels:
    """The labels of subjects.

    Args:
        pattern: See TrainingDataModule, `labels`.
        task: 'segmentation', 'multilabel' or 'image'.
        label_values: See TrainingDataModule.
    """

    pattern: str | Mapping[str, str] | None
    task: str
    label_values: Sequence[int] | None = None

    def files(self, case: SubjectFiles) -> dict[str, Path]:
        """The label files of a subject by channel; whether they exist is not checked.

        Raises:
            ConfigError: data.labels is not set, and the table has no column for labels.
        """
        files = label_files(case, self.pattern)
        if not files:
            raise ConfigError(
                f"{case.subject}: there is no column {LABEL!r}; set data.labels=labels/{{subject}}.nii.gz."
            )
        return files

    def check_files(self, cases: Iterable[SubjectFiles]) -> None:
        """Check that every label file exists.

        Raises:
            ConfigError: one is missing; the closest existing path is suggested.
        """
        for case in cases:
            for path in self.files(case).values():
                if not path.is_file():
                    raise ConfigError(
                        f"{case.subject}: its label {path} does not exist (relative to {Path.cwd()}).{meant(path)}"
                    )

    def with_images(self, case: SubjectFiles) -> Subject:
        """A subject with its images and then its labels, whose names differ from theirs; only headers are read.

        Raises:
            InputError: they do not share one grid, or a file cannot be read.
        """
        kind = ScalarImage if self.task == "image" else LabelMap
        labels: dict[str, Image] = {_image_name(name): kind(path) for name, path in self.files(case).items()}
        subject = Subject({name: ScalarImage(path) for name, path in case.images.items()} | labels)
        try:
            _ = subject.frame
        except InputError as error:
            raise InputError(f"{case.subject}: {error}") from error
        return subject

    def read(self, case: SubjectFiles, classes: int | None) -> Shaped[Tensor, "l i j k"]:
        """The label of a subject in native space; classes and masks are integers.

        Args:
            case: The subject.
            classes: How many classes the network has; None where that is not known yet.

        Raises:
            InputError: a file cannot be read, or holds values that are not labels.
        """
        images = self.with_images(case).images
        labels = [image for name, image in images.items() if name not in case.images]
        return self.to_target([image.stored() for image in labels], classes)

    def to_target(self, channels: Sequence[Shaped[Tensor, "_ i j k"]], classes: int | None) -> Tensor:
        """What the network is to output for the voxels of a subject's label files: classes, masks, or an image.

        Raises:
            InputError: they hold values that are not labels, or classes that the network does not have.
        """
        label = torch.cat(list(channels))
        if self.task == "image":
            return label.float()
        if self.task == "segmentation" and len(label) > 1:
            raise InputError(
                f"its label has {len(label)} channels; segmentation needs one channel of classes. For several masks "
                f"set task=multilabel."
            )
        self.check_values(label)
        if self.task == "multilabel":
            return (label > 0).to(torch.uint8)
        if self.label_values is not None:
            label = to_classes(label, self.label_values)
        highest = int(label.max())
        if classes is not None and highest >= classes:
            raise InputError(beyond(highest, classes))
        return label.to(torch.uint8 if highest < 256 else torch.int32)

    @staticmethod
    def check_values(label: Shaped[Tensor, "_ i j k"]) -> None:
        """Raises InputError where voxels of classes or masks are not whole numbers from 0."""
        invalid = (label < 0) | (label != label.round()) if label.is_floating_point() else label < 0
        if invalid.any():
            raise InputError(f"its label holds {float(label[invalid][0]):g}; classes are whole numbers from 0.")

    def first_problem(self, cases: Sequence[SubjectFiles], classes: int | None) -> str | None:
        """Read the labels of subjects, and describe the first that cannot be used; None if all can."""

        def problem(case: SubjectFiles) -> str | None:
            try:
                self.read(case, classes)
            except VoxquiltError as error:
                return f"{case.subject}: {str(error).removeprefix(f'{case.subject}: ')}"
            return None

        with ThreadPoolExecutor(2) as pool:
            return next(filter(None, pool.map(problem, cases)), None)


def _image_name(channel: str) -> str:
    # With a space, which no image name of a configuration or a table has.
    return "its label" if channel == LABEL else f"label {channel}"
