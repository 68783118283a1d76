"""Checks, from headers alone, that the images and labels of all subjects have equal numbers of channels."""

from collections.abc import Sequence

from voxquilt.data.discovery import SubjectFiles
from voxquilt.data.subject import Subject
from voxquilt.errors import InputError
from voxquilt.text import of_subjects
from voxquilt.training.labels import TrainingLabels


def check_channels(cases: Sequence[SubjectFiles], labels: TrainingLabels, classes: int | None) -> None:
    """Compare the headers of all subjects.

    Args:
        cases: The subjects to train and to validate on.
        labels: Their labels.
        classes: Channels of the network's output; None where they are not known yet.

    Raises:
        InputError: a label with another number of channels than the network's output, images with another number of
            channels than those of most subjects, or a file that cannot be used.
    """
    subjects_by_channels: dict[int, list[str]] = {}
    for case in cases:
        subject = labels.with_images(case)
        channels = sum(subject.images[name].shape[0] for name in case.images)
        subjects_by_channels.setdefault(channels, []).append(case.subject)
        _check_label(case, subject, labels.task, classes)
    if len(subjects_by_channels) > 1:
        (usual, with_usual), *others = sorted(subjects_by_channels.items(), key=lambda item: -len(item[1]))
        channels, subjects = others[-1]
        raise InputError(
            f"{subjects[0]}: its images have {channels} channel{'s' * (channels != 1)}; those of "
            f"{of_subjects(len(with_usual))} have {usual}. All subjects must have the same number of channels."
        )


def _check_label(case: SubjectFiles, subject: Subject, task: str, classes: int | None) -> None:
    channels = sum(image.shape[0] for name, image in subject.images.items() if name not in case.images)
    wanted = 1 if task == "segmentation" else classes
    if wanted in (None, channels):
        return
    if task == "segmentation":
        advice = "segmentation needs one channel of classes. For several masks set task=multilabel."
    else:
        meaning = "one per mask" if task == "multilabel" else "the channels of its image"
        advice = f"the network has {wanted}, {meaning}. Set model.net.out_channels, or change data.labels."
    raise InputError(f"{case.subject}: its label has {channels} channel{'s' * (channels != 1)}; {advice}")
