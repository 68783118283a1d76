"""Reads a subject to train on: its images and its label in model space, large enough for a patch."""

from dataclasses import dataclass, replace

import torch

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.grid_sampler import GridSampler
from voxquilt.data.preprocess import Preprocess
from voxquilt.data.subject import Image, Subject
from voxquilt.errors import InputError, VoxquiltError
from voxquilt.geometry.frame import Triple
from voxquilt.training.labels import TrainingLabels
from voxquilt.training.random_patches import centres_of
from voxquilt.training.volume_cache import LabelledVolume


@dataclass(frozen=True)
class VolumeLoader:
    """Reads subjects to train on.

    Args:
        labels: The labels of the subjects.
        preprocess: Takes images to model space.
        patch_size: Voxels along i, j, k; smaller volumes are padded to it.
        divisible_by: Volumes are padded to a multiple of so many voxels along i, j, k.
        label_interpolation: 0 takes the nearest voxel's label; 1 interpolates each label linearly and takes the one of
            the largest share. An image to learn is always interpolated linearly.
    """

    labels: TrainingLabels
    preprocess: Preprocess
    patch_size: Triple
    divisible_by: Triple
    label_interpolation: int = 0

    def load(self, case: SubjectFiles, classes: int | None) -> LabelledVolume:
        """Read a subject.

        Args:
            case: The subject.
            classes: How many classes the network has; None where that is not known yet.

        Raises:
            InputError: an image or label cannot be used.
        """
        subject = self.labels.with_images(case)
        images = {name: image for name, image in subject.images.items() if name in case.images}
        labels = {name: image for name, image in subject.images.items() if name not in case.images}
        try:
            in_model = self._to_model(images, labels)
            sampler = GridSampler(in_model, self.patch_size, fit=True, divisible_by=self.divisible_by)
            label = self.labels.to_target([sampler.volume(name) for name in labels], classes)
        except VoxquiltError as error:
            raise InputError(f"{case.subject}: {error}") from error
        image = torch.cat([sampler.volume(name) for name in images])
        centres = centres_of(label) if self.labels.task != "image" else []
        return LabelledVolume(case.subject, image, label, centres)

    def _to_model(self, images: dict[str, Image], labels: dict[str, Image]) -> Subject:
        if self.label_interpolation and self.labels.task != "image":
            for image in labels.values():
                self.labels.check_values(image.stored())
            return self.preprocess(Subject(images | labels), labels=labels).subject
        in_model, space = self.preprocess(Subject(images))
        # Intensity transforms and the check for finite voxels do not apply to labels.
        to_model = replace(self.preprocess, intensity=None, crop=None, one_hot=None, interpolation=1, per_slice=None)
        labels_in_model, _ = to_model(Subject(labels), box=space.box)
        return Subject(in_model.images | labels_in_model.images)
