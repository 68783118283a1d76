"""Which subjects are there? Paths, patterns and tables become cases; no file is opened but a table."""

import csv
import glob
import logging
import os
import re
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

from voxquilt.data.formats.unsupported import counted
from voxquilt.data.listing import SUFFIXES, Listing, OutputFolder, in_folder, instead, matching, root_of
from voxquilt.errors import ConfigError, InputError

log = logging.getLogger("voxquilt")

LABEL = "label"
"""The column of a table that names label files; it is no image."""
_NO_IMAGES = (LABEL, "split", "fold")
# What has been said of files that are left out: inputs are looked for more than once.
_said: set[str] = set()


@dataclass(frozen=True)
class SubjectFiles:
    """A subject before anything is read.

    Args:
        subject: Its id.
        images: The file of each image, in the order of the network's channels.
        values: What a table says of it in columns that are no images, such as the split it belongs to.
    """

    subject: str
    images: Mapping[str, Path]
    values: Mapping[str, str] = field(default_factory=dict)


def find_cases(
    inputs: object, images: object = None, apart: Collection[str] = (), output_dir: object = None
) -> list[SubjectFiles]:
    """The cases that `data.inputs` and `data.images` name, in the order of their ids.

    A link that leads nowhere is a case too, which fails by itself. What lies in the output folder is never an input:
    folders and patterns leave it out, and where it is named it is refused.

    Args:
        inputs: A NIfTI file, a folder, a glob, a .csv (a column per image, an optional column `subject`), or a list of
            these, or of cases. With `images`, the folder that their patterns start from, or None for the working one.
        images: A mapping, name -> pattern with `{subject}`, one per image of a subject.
        apart: Columns of tables that are no images, beside `label`, `split` and `fold`; their cells become the cases'
            values, paths made from where the table lies if a file is there.
        output_dir: The run's output folder, if it has one.

    Raises:
        ConfigError: nothing found, a path that is not there, two subjects with one id, entries that are no strings, a
            file that lies in the output folder.
    """
    apart = {*_NO_IMAGES, *apart}
    outputs = OutputFolder(output_dir if isinstance(output_dir, str | Path) else None)
    if images:
        cases = _from_patterns(inputs, images, outputs)
    elif inputs is None:
        raise ConfigError("data.inputs is missing: name a NIfTI file, a folder, a glob, or a .csv; or set data.images.")
    else:
        entries = inputs if isinstance(inputs, Iterable) and not isinstance(inputs, str) else [inputs]
        cases = [case for entry in entries for case in _from_entry(entry, apart, outputs)]
    if not cases:
        raise ConfigError("data.inputs names no image: the list is empty.")
    seen: dict[str, SubjectFiles] = {}
    for case in cases:
        if not case.subject or Path(case.subject).name != case.subject:
            raise ConfigError(f"{case.subject!r} is no id, since files are to be named by it ({_files(case)}).")
        if case.subject in seen:
            raise ConfigError(
                f"two subjects have the id {case.subject!r}: {_files(seen[case.subject])} and {_files(case)}. "
                f"Outputs would overwrite each other; rename a file, or give ids in the `subject` column of a .csv."
            )
        seen[case.subject] = case
    return sorted(cases, key=lambda case: case.subject)


def check_id(case: SubjectFiles) -> None:
    """Raises InputError where a file's name makes an id that a manifest cannot keep: this subject fails alone."""
    if ";" in case.subject:
        raise InputError(f"{_files(case)}: {case.subject!r} is no id: {_SEMICOLON}. Rename the file.")


_SEMICOLON = "in a manifest, a semicolon stands between the names of files"


def label_files(case: SubjectFiles, labels: str | Mapping[str, str] | None) -> dict[str, Path]:
    """Where the true labels of a subject should be, by channel, or LABEL for a single file; none if nothing names them.

    Args:
        case: The subject.
        labels: A pattern with `{subject}`, or one for each channel; None for the table's column.
    """
    if labels is None:
        return {LABEL: Path(case.values[LABEL])} if LABEL in case.values else {}
    patterns = {LABEL: labels} if isinstance(labels, str) else labels
    return {name: _path(pattern.replace("{subject}", case.subject)) for name, pattern in patterns.items()}


def stem(path: Path | str) -> str:
    """A subject's id: the file's name without its extension.

    >>> stem("scans/ch2.nii.gz")
    'ch2'
    """
    name = Path(path).name
    return next((name[: -len(s)] for s in SUFFIXES if name.lower().endswith(s)), name)


def _from_entry(entry: object, apart: Collection[str], outputs: OutputFolder) -> list[SubjectFiles]:
    if isinstance(entry, SubjectFiles):
        return [entry]
    if not isinstance(entry, str | Path):
        raise ConfigError(f"data.inputs: {entry!r} is {type(entry).__name__}, not a path; quote it: '\"{entry}\"'.")
    path = _path(entry)
    if os.path.isdir(path):
        return _listed(path, _in_folder(path, outputs), outputs)
    if os.path.isfile(path) and path.suffix.lower() == ".csv":
        return [_checked(case, outputs, f"{path}: ") for case in _from_table(path, apart)]
    if os.path.lexists(path):  # a link that leads nowhere too
        return [_checked(case, outputs, "data.inputs: ") for case in _one_image([path])]
    if glob.has_magic(str(path)):
        return _listed(path, matching(str(path)), outputs)
    raise ConfigError(f"data.inputs: there is no file or folder {path} (looked from {Path.cwd()}).{instead(path)}")


def _in_folder(path: Path, outputs: OutputFolder) -> Listing:
    if outputs.is_folder(path):
        raise ConfigError(
            f"output_dir={outputs.name} is the folder of data.inputs: outputs would be inputs of the next run. Choose "
            f"another output_dir."
        )
    try:
        return in_folder(path)
    except OSError as error:
        raise ConfigError(f"data.inputs: the folder {path} cannot be read: {error.strerror}.") from error


def _listed(path: Path, found: Listing, outputs: OutputFolder) -> list[SubjectFiles]:
    """A case for each file that lies in a folder or matches a pattern, outputs left out."""
    root = root_of(path)
    written = {image for image in found.images if outputs.holds(image, root=root, link=image in found.links)}
    images = [image for image in found.images if image not in written]
    if not images:
        if written:
            raise ConfigError(
                f"output_dir={outputs.name} is the folder of data.inputs={path}: what lies there is never an input, or "
                f"outputs would be inputs of the next run. Choose another output_dir."
            )
        if found.of_runs:
            raise ConfigError(
                f"data.inputs: {path} matches only outputs of runs, into whose folders ** does not go: name the folder "
                f"itself, such as data.inputs={found.of_runs[0].parent}."
            )
        holds = f"the folder {path} has no NIfTI file ({', '.join(SUFFIXES)})"
        problem = holds if os.path.isdir(path) else f"no NIfTI file matches {path}"
        raise ConfigError(f"data.inputs: {problem} (looked from {Path.cwd()}).{instead(path)}")
    if written:
        names = ", ".join(sorted(image.name for image in written)[:3]) + ", ..." * (len(written) > 3)
        files = f"{len(written)} file{'s' * (len(written) > 1)}"
        _say(f"data.inputs={path}: {files} in output_dir={outputs.name} left out, which are no inputs: {names}")
    if found.of_runs:
        _say(f"data.inputs={path}: ** does not go into folders that runs have written to: {_folders(found.of_runs)}")
    if found.foreign:
        _say(f"data.inputs={path}: files that are not NIfTI are left out: {counted(found.foreign)}")
    return _one_image(images)


def _checked(case: SubjectFiles, outputs: OutputFolder, where: str) -> SubjectFiles:
    """A case of files that were named one by one."""
    for image in case.images.values():
        if outputs.holds(image):
            raise ConfigError(
                f"{where}{image} lies in output_dir={outputs.name}, where nothing is an input, since outputs are "
                f"written there. Choose another output_dir, or move the file."
            )
    return case


def _folders(paths: Iterable[Path]) -> str:
    names = sorted({str(path.parent) for path in paths})
    return ", ".join(names[:3]) + ", ..." * (len(names) > 3)


def _say(text: str) -> None:
    if text not in _said:
        _said.add(text)
        log.warning("%s", text)


def _one_image(paths: Iterable[Path]) -> list[SubjectFiles]:
    paths = list(paths)
    # A .hdr and its .img are one volume; the header stands for both.
    headers = {p.with_name(stem(p)) for p in paths if p.name.lower().endswith((".hdr", ".hdr.gz"))}
    single = [
        p for p in paths if not (p.name.lower().endswith((".img", ".img.gz")) and p.with_name(stem(p)) in headers)
    ]
    return [SubjectFiles(stem(path), {"image": path}) for path in single]


def _from_table(table: Path, apart: Collection[str]) -> list[SubjectFiles]:
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table} is not a .csv in UTF-8: {error}.") from error
    columns = rows[0][1] if rows else []
    if len(rows) < 2 or not {*columns} - {"subject", *apart} or len({*columns}) < len(columns):
        raise ConfigError(f"{table}: a table needs a header, a column per image and a row per subject; has {columns}.")
    return [_from_row(table, line, row, columns, apart) for line, row in rows[1:]]


def _from_row(table: Path, line: int, row: list[str], columns: list[str], apart: Collection[str]) -> SubjectFiles:
    if len(row) != len(columns) or not all(row):
        raise ConfigError(f"{table}, line {line}: a value for each of {', '.join(columns)} is wanted; it has {row}.")
    # Paths in a table are meant from where the table lies.
    cells = dict(zip(columns, row, strict=True))
    images = {name: table.parent / _path(cell) for name, cell in cells.items() if name not in ("subject", *apart)}
    values = {name: cells[name] for name in apart if name in cells}
    values = {
        name: str(path) if (path := table.parent / _path(cell)).is_file() else cell for name, cell in values.items()
    }
    case = SubjectFiles(cells.get("subject") or stem(next(iter(images.values()))), images, values)
    if ";" in case.subject:
        raise ConfigError(f"{table}, line {line}: {case.subject!r} is no id: {_SEMICOLON}.")
    return case


def _from_patterns(inputs: object, images: object, outputs: OutputFolder) -> list[SubjectFiles]:
    if not isinstance(images, Mapping):
        raise ConfigError(f"data.images is a mapping from names to patterns with {{subject}}; it is {images!r}.")
    if not isinstance(inputs, str | Path | None) or not os.path.isdir(_path(inputs or ".")):
        raise ConfigError(f"with data.images, data.inputs is the folder that they lie in, or null; it is {inputs!r}.")
    root = _path(inputs or ".")
    found: set[str] = set()
    for name, pattern in images.items():
        if not isinstance(pattern, str) or "{subject}" not in pattern:
            raise ConfigError(f"data.images.{name} needs {{subject}} where subjects' names differ; it is {pattern!r}.")
        files = _subjects(str(root / _path(pattern)))
        kept = {subject for subject, file in files.items() if not outputs.holds(file, root=root)}
        if files and not kept:
            raise ConfigError(
                f"data.images.{name}={pattern} names files in output_dir={outputs.name}, where nothing is an input, "
                f"since outputs are written there. Choose another output_dir."
            )
        found |= kept
    if not found:
        raise ConfigError(f"data.images: no file matches {dict(images)} from {root.resolve()}.")
    # A subject that lacks one image is found by its others, and fails alone.
    return [
        _checked(
            SubjectFiles(
                subject, {n: Path(str(root / _path(p)).replace("{subject}", subject)) for n, p in images.items()}
            ),
            outputs,
            "data.images: ",
        )
        for subject in sorted(found)
    ]


def _subjects(pattern: str) -> dict[str, Path]:
    """Ids that fit a pattern, each with its file."""
    first, second, *others = (re.escape(part) for part in pattern.split("{subject}"))
    regex = re.compile(first + "(?P<subject>[^/]+?)" + second + "".join("(?P=subject)" + part for part in others))
    files = glob.glob("*".join(glob.escape(part) for part in pattern.split("{subject}")))
    return {match["subject"]: Path(match[0]) for match in map(regex.fullmatch, files) if match}


def _path(text: str | Path) -> Path:
    # Unlike Path.expanduser, this leaves a ~name that is no user's alone: it may be a file's name.
    return Path(os.path.expanduser(text))


def _files(case: SubjectFiles) -> str:
    return ", ".join(map(str, case.images.values()))
