"""Reads the subjects of a .csv table."""

import csv
from collections.abc import Collection
from pathlib import Path

from voxquilt.data.formats.registry import stem
from voxquilt.data.subject_files import SEMICOLON, SubjectFiles, expanded
from voxquilt.errors import ConfigError


def read_table(table: Path, apart: Collection[str]) -> list[SubjectFiles]:
    """The subjects of a table, one per row.

    Args:
        table: The .csv.
        apart: Columns that are not images.

    Raises:
        ConfigError: the file is not a table of subjects.
    """
    try:
        with open(table, newline="", encoding="utf-8-sig") as file:
            reader = csv.reader(file, skipinitialspace=True)
            rows = [(reader.line_num, [cell.strip() for cell in row]) for row in reader if row]
    except (UnicodeDecodeError, csv.Error) as error:
        raise ConfigError(f"{table} is not a .csv in UTF-8: {error}.") from error
    columns = rows[0][1] if rows else []
    if len(columns) == 1 and any(sign in columns[0] for sign in ";\t"):
        raise ConfigError(
            f"{table}: the columns of a .csv are separated by commas here; its first line is {columns[0]!r}."
        )
    if len(rows) < 2 or not {*columns} - {"subject", *apart} or len({*columns}) < len(columns):
        raise ConfigError(
            f"{table}: a table needs a header, a column per image and a row per subject; it has the columns {columns}."
        )
    return [_from_row(table, line, row, columns, apart) for line, row in rows[1:]]


def _from_row(table: Path, line: int, row: list[str], columns: list[str], apart: Collection[str]) -> SubjectFiles:
    if len(row) != len(columns) or not all(row):
        raise ConfigError(f"{table}, line {line}: it needs a value for each of {', '.join(columns)}; it has {row}.")
    # Paths in a table are relative to the table.
    cells = dict(zip(columns, row, strict=True))
    images = {name: table.parent / expanded(cell) for name, cell in cells.items() if name not in ("subject", *apart)}
    values = {name: cells[name] for name in apart if name in cells}
    values = {
        name: str(path) if (path := table.parent / expanded(cell)).is_file() else cell for name, cell in values.items()
    }
    case = SubjectFiles(cells.get("subject") or stem(next(iter(images.values()))), images, values)
    if ";" in case.subject:
        raise ConfigError(f"{table}, line {line}: {case.subject!r} cannot be an id: {SEMICOLON}.")
    return case
