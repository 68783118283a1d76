"""Finds the subjects of a run in folders, patterns and tables, without opening image files."""

import glob
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import replace
from pathlib import Path

from voxquilt.data.channel_files import group_images
from voxquilt.data.formats.registry import stem
from voxquilt.data.formats.registry import suffixes as image_suffixes
from voxquilt.data.formats.unsupported import counted
from voxquilt.data.listing import Listing, OutputFolder, in_folder, instead, matching, root_of
from voxquilt.data.subject_files import SEMICOLON, SubjectFiles, expanded
from voxquilt.data.tables import read_table
from voxquilt.errors import ConfigError, InputError

log = logging.getLogger("voxquilt")

LABEL = "label"
"""The column of a table that names label files, which are not images of the subject."""
_NOT_IMAGES = (LABEL, "split", "fold")
# Messages that have been logged: inputs are searched more than once.
_logged: set[str] = set()


def find_cases(
    inputs: object,
    images: object = None,
    apart: Collection[str] = (),
    output_dir: object = None,
    *,
    suffixes: Mapping[str, str] | None = None,
    extra: Mapping[str, str] | None = None,
) -> list[SubjectFiles]:
    """The subjects that `data.inputs` and `data.images` name, in the order of their ids.

    A broken link is a subject too, which fails alone. Files in the output folder are never inputs: folders and patterns
    leave them out, and naming one is an error.

    Args:
        inputs: An image file, a folder, a glob, a .csv (a column per image, an optional column `subject`), or a list of
            these or of SubjectFiles. With `images`, the folder that their patterns start from; None is the working one.
        images: A mapping from names to patterns with `{subject}`, one per image of a subject.
        apart: Further columns of tables that are not images, like `label`, `split` and `fold`. Their cells become
            `values`; a cell that names a file relative to the table becomes the file's path.
        output_dir: The run's output folder, if it has one.
        suffixes: The images of a subject by the ends of their files' names, such as {'t1': '_0000', 't2': '_0001'}; the
            id is what comes before. Inputs of which no file ends so are taken as they are, if it is one image.
        extra: Further images of each subject: a path with `{subject}` for each name.

    Raises:
        ConfigError: no subject, a path that does not exist, two subjects with one id, an entry that is not a string, or
            a file in the output folder.
    """
    apart = {*_NOT_IMAGES, *apart}
    outputs = OutputFolder(output_dir if isinstance(output_dir, str | Path) else None)
    if inputs == "" or (isinstance(inputs, list | tuple) and "" in inputs):
        # Path("") would be the folder one stands in, which nobody asked for: mostly a shell variable that is not set.
        raise ConfigError(f"data.inputs names no file or folder; it is {inputs!r}. The folder you are in is '.'.")
    if images:
        cases = _from_patterns(inputs, images, outputs)
    elif inputs is None:
        raise ConfigError(
            "data.inputs is missing: set it to an image file, a folder, a glob or a .csv; or set data.images."
        )
    else:
        entries = inputs if isinstance(inputs, Iterable) and not isinstance(inputs, str) else [inputs]
        cases = [case for entry in entries for case in _from_entry(entry, apart, outputs)]
        cases = group_images(cases, suffixes) if suffixes else cases
    if not cases:
        raise ConfigError("data.inputs is an empty list: it names no image.")
    if extra:
        cases = [_with_extra(case, extra) for case in cases]
    seen: dict[str, SubjectFiles] = {}
    for case in cases:
        if not case.subject or Path(case.subject).name != case.subject:
            raise ConfigError(
                f"{case.subject!r} cannot be an id, since output files are named by it ({_paths_of(case)})."
            )
        if case.subject in seen:
            raise ConfigError(
                f"two subjects have the id {case.subject!r}: {_paths_of(seen[case.subject])} and {_paths_of(case)}; "
                f"outputs would overwrite each other. Rename a file, or use the `subject` column of a .csv."
            )
        seen[case.subject] = case
    return sorted(cases, key=lambda case: case.subject)


def check_id(case: SubjectFiles) -> None:
    """Check that a manifest can hold a subject's id.

    Raises:
        InputError: the id has a semicolon; only this subject fails.
    """
    if ";" in case.subject:
        raise InputError(f"{_paths_of(case)}: {case.subject!r} cannot be an id: {SEMICOLON}. Rename the file.")


def label_files(case: SubjectFiles, labels: str | Mapping[str, str] | None) -> dict[str, Path]:
    """The paths of a subject's true labels by channel, or by LABEL for a single file; empty if nothing names them.

    Args:
        case: The subject.
        labels: A pattern with `{subject}`, or one per channel; None for the table's column.
    """
    if labels is None:
        return {LABEL: Path(case.values[LABEL])} if LABEL in case.values else {}
    patterns = {LABEL: labels} if isinstance(labels, str) else labels
    return {name: expanded(pattern.replace("{subject}", case.subject)) for name, pattern in patterns.items()}


def _from_entry(entry: object, apart: Collection[str], outputs: OutputFolder) -> list[SubjectFiles]:
    if isinstance(entry, SubjectFiles):
        return [entry]
    if not isinstance(entry, str | Path):
        raise ConfigError(f"data.inputs: {entry!r} is {type(entry).__name__}, not a path; quote it: '\"{entry}\"'.")
    path = expanded(entry)
    if os.path.isdir(path):
        return _from_listing(path, _list_folder(path, outputs), outputs)
    if os.path.isfile(path) and path.suffix.lower() == ".csv":
        return [_outside_outputs(case, outputs, f"{path}: ") for case in read_table(path, apart)]
    if os.path.lexists(path):  # a broken link too
        return [_outside_outputs(case, outputs, "data.inputs: ") for case in _single_images([path])]
    if glob.has_magic(str(path)):
        return _from_listing(path, matching(str(path)), outputs)
    raise ConfigError(f"data.inputs: there is no file or folder {path} (relative to {Path.cwd()}).{instead(path)}")


def _list_folder(path: Path, outputs: OutputFolder) -> Listing:
    if outputs.is_folder(path):
        raise ConfigError(
            f"output_dir={outputs.name} is the folder of data.inputs: outputs would be inputs of the next run. Choose "
            f"another output_dir."
        )
    try:
        return in_folder(path)
    except OSError as error:
        raise ConfigError(f"data.inputs: the folder {path} cannot be read: {error.strerror}.") from error


def _from_listing(path: Path, listing: Listing, outputs: OutputFolder) -> list[SubjectFiles]:
    """One subject per file of a listing, outputs left out."""
    root = root_of(path)
    written = {image for image in listing.images if outputs.holds(image, root=root, link=image in listing.links)}
    images = [image for image in listing.images if image not in written]
    if not images:
        if written:
            raise ConfigError(
                f"output_dir={outputs.name} is the folder of data.inputs={path}, and its files are never inputs, or "
                f"outputs would be inputs of the next run. Choose another output_dir."
            )
        if listing.of_runs:
            raise ConfigError(
                f"data.inputs: {path} matches only outputs of runs, whose folders ** does not enter: name the folder "
                f"itself, such as data.inputs={listing.of_runs[0].parent}."
            )
        no_image = f"the folder {path} has no image file ({', '.join(image_suffixes())})"
        problem = no_image if os.path.isdir(path) else f"no image file matches {path}"
        raise ConfigError(f"data.inputs: {problem} (relative to {Path.cwd()}).{instead(path)}")
    if written:
        names = ", ".join(sorted(image.name for image in written)[:3]) + ", ..." * (len(written) > 3)
        files = f"{len(written)} file{'s' * (len(written) > 1)}"
        _log_once(
            f"data.inputs={path}: {files} in output_dir={outputs.name} left out, since outputs are not inputs: {names}"
        )
    if listing.of_runs:
        _log_once(
            f"data.inputs={path}: ** does not enter folders that runs have written to: {_folders(listing.of_runs)}"
        )
    if listing.foreign:
        _log_once(f"data.inputs={path}: files of other formats are left out: {counted(listing.foreign)}")
    return _single_images(images)


def _outside_outputs(case: SubjectFiles, outputs: OutputFolder, where: str) -> SubjectFiles:
    """A subject whose files were named one by one, none of which may lie in the output folder."""
    for image in case.images.values():
        if outputs.holds(image):
            raise ConfigError(
                f"{where}{image} lies in output_dir={outputs.name}, whose files are never inputs, since outputs are "
                f"written there. Choose another output_dir, or move the file."
            )
    return case


def _folders(paths: Iterable[Path]) -> str:
    names = sorted({str(path.parent) for path in paths})
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _log_once(text: str) -> None:
    if text not in _logged:
        _logged.add(text)
        log.warning("%s", text)


def _single_images(paths: Iterable[Path]) -> list[SubjectFiles]:
    paths = list(paths)
    # A .hdr and its .img are one NIfTI volume, which the header stands for.
    headers = {p.with_name(stem(p)) for p in paths if p.name.lower().endswith((".hdr", ".hdr.gz"))}
    single = [
        p for p in paths if not (p.name.lower().endswith((".img", ".img.gz")) and p.with_name(stem(p)) in headers)
    ]
    return [SubjectFiles(stem(path), {"image": path}) for path in single]


def _from_patterns(inputs: object, images: object, outputs: OutputFolder) -> list[SubjectFiles]:
    if not isinstance(images, Mapping):
        raise ConfigError(f"data.images must be a mapping from names to patterns with {{subject}}; it is {images!r}.")
    if not isinstance(inputs, str | Path | None) or not os.path.isdir(expanded("." if inputs is None else inputs)):
        raise ConfigError(
            f"with data.images, data.inputs must be the folder that they lie in, or null; it is {inputs!r}."
        )
    root = expanded("." if inputs is None else inputs)
    subjects: set[str] = set()
    for name, pattern in images.items():
        if not isinstance(pattern, str) or "{subject}" not in pattern:
            raise ConfigError(
                f"data.images.{name} needs {{subject}} in place of the subjects' names; it is {pattern!r}."
            )
        files = _subjects_of(str(root / expanded(pattern)))
        kept = {subject for subject, file in files.items() if not outputs.holds(file, root=root)}
        if files and not kept:
            raise ConfigError(
                f"data.images.{name}={pattern} names files in output_dir={outputs.name}, whose files are never inputs, "
                f"since outputs are written there. Choose another output_dir."
            )
        subjects |= kept
    if not subjects:
        raise ConfigError(f"data.images: no file matches {dict(images)} in {root.resolve()}.")
    # A subject that lacks an image is known by its others, and fails alone.
    return [
        _outside_outputs(
            SubjectFiles(
                subject, {n: Path(str(root / expanded(p)).replace("{subject}", subject)) for n, p in images.items()}
            ),
            outputs,
            "data.images: ",
        )
        for subject in sorted(subjects)
    ]


def _subjects_of(pattern: str) -> dict[str, Path]:
    """The ids that match a pattern, each with its file."""
    first, second, *others = (re.escape(part) for part in pattern.split("{subject}"))
    regex = re.compile(first + "(?P<subject>[^/]+?)" + second + "".join("(?P=subject)" + part for part in others))
    files = glob.glob("*".join(glob.escape(part) for part in pattern.split("{subject}")))
    return {match["subject"]: Path(match[0]) for match in map(regex.fullmatch, files) if match}


def _with_extra(case: SubjectFiles, extra: Mapping[str, str]) -> SubjectFiles:
    if isinstance(extra, Mapping) and all(isinstance(p, str) and "{subject}" in p for p in extra.values()):
        more = {name: expanded(pattern.replace("{subject}", case.subject)) for name, pattern in extra.items()}
        return replace(case, images={**case.images, **more})
    raise ConfigError(f"data.extra_images has a path with {{subject}} for each name; it is {extra!r}.")


def _paths_of(case: SubjectFiles) -> str:
    return ", ".join(map(str, case.images.values()))
