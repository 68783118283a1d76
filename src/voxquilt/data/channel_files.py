"""Puts together the images of a subject whose files' names differ only in their ends, as case_0000 and case_0001."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path

from voxquilt.data.formats.registry import stem
from voxquilt.data.subject_files import SubjectFiles
from voxquilt.errors import ConfigError

log = logging.getLogger("voxquilt")


def group_images(cases: Sequence[SubjectFiles], suffixes: Mapping[str, str]) -> list[SubjectFiles]:
    """One subject for all files whose names differ only in their ends.

    A subject that lacks an image is known by its others, and fails alone. Subjects that a table names, or with several
    images, stay as they are; files with other ends are left out, and named once.

    Args:
        cases: Subjects as they were found.
        suffixes: The end of the files' names, before the extension, of each image.

    Raises:
        ConfigError: several images are wanted, and no file has such an end.
    """
    if not isinstance(suffixes, Mapping) or not all(isinstance(s, str) and s for s in suffixes.values()):
        raise ConfigError(f"data.suffixes has the end of a file's name for each image; it is {suffixes!r}.")
    whole = [case for case in cases if not _is_named_by_file(case)]
    single = [case for case in cases if _is_named_by_file(case)]
    found: dict[str, tuple[Path, str]] = {}
    others: list[SubjectFiles] = []
    for case in single:
        path = next(iter(case.images.values()))
        end = next((end for end in suffixes.values() if stem(path).endswith(end) and stem(path) != end), None)
        if end is None:
            others.append(case)
        else:
            found.setdefault(stem(path).removesuffix(end), (path, end))
    if not found and single:
        if len(suffixes) > 1:
            ends = ", ".join(f"{name} {end}" for name, end in suffixes.items())
            raise ConfigError(
                f"data.inputs: a subject has {len(suffixes)} images, whose files' names end in {ends}; none of "
                f"{len(single)} files does, such as {next(iter(single[0].images.values()))}. Rename them, or name them "
                f"by data.images or the columns of a .csv."
            )
        return [*whole, *others]
    if others:
        shown = ", ".join(str(next(iter(case.images.values())).name) for case in others[:3])
        ends = " or ".join(suffixes.values())
        log.warning(
            "data.inputs: %d files whose names do not end in %s are left out: %s%s",
            len(others), ends, shown, ", ..." * (len(others) > 3),
        )  # fmt: skip
    return [*whole, *(_subject(name, path, end, suffixes) for name, (path, end) in found.items())]


def _is_named_by_file(case: SubjectFiles) -> bool:
    """Whether a subject is one file that was found, and not named by a table."""
    return len(case.images) == 1 and not case.values and case.subject == stem(next(iter(case.images.values())))


def _subject(name: str, path: Path, end: str, suffixes: Mapping[str, str]) -> SubjectFiles:
    extension = path.name.removeprefix(f"{name}{end}")
    return SubjectFiles(name, {image: path.with_name(f"{name}{own}{extension}") for image, own in suffixes.items()})
