"""Writes names and colours of labels for viewers: ITK-SNAP's label description, and a colour table of 3D Slicer."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from voxquilt.filesystem import replacing
from voxquilt.reporting.colours import colours_of
from voxquilt.text import escaped

_ITK_SNAP = """\
################################################
# ITK-SnAP Label Description File
# File format:
# IDX   -R-  -G-  -B-  -A--  VIS MSH  LABEL
# Fields:
#    IDX:   Zero-based index
#    -R-:   Red color component (0..255)
#    -G-:   Green color component (0..255)
#    -B-:   Blue color component (0..255)
#    -A-:   Label transparency (0.00 .. 1.00)
#    VIS:   Label visibility (0 or 1)
#    MSH:   Label mesh visibility (0 or 1)
#  LABEL:   Label description
################################################
"""


def write_label_tables(
    folder: Path,
    name: str,
    numbers: Sequence[int],
    names: Mapping[int, str],
    label_values: Sequence[int] | None = None,
) -> None:
    """Write `<name>.txt`, which ITK-SNAP loads, and `<name>.ctbl`, which 3D Slicer loads.

    Args:
        folder: Where the label files are.
        name: Name of the label files' product, such as 'labels'.
        numbers: The labels above 0.
        names: Their names; a label without one is called after its number.
        label_values: See `voxquilt.reporting.colours.colours_of`; None: labels are numbered as classes are.

    Raises:
        OutputError: a file cannot be written.
    """
    entries = [
        (number, " ".join(names.get(number, "").split()) or f"label {number}", colour)
        for number, colour in zip(numbers, colours_of(numbers, label_values), strict=True)
    ]
    snap, slicer = [_ITK_SNAP, '    0     0    0    0        0  0  0    "Clear Label"\n'], ["0 background 0 0 0 0\n"]
    for number, text, (red, green, blue) in entries:
        quoted, word = text.replace('"', "'"), "_".join(text.split())
        snap.append(f'{number:5d} {red:5d} {green:4d} {blue:4d}        1  1  1    "{quoted}"\n')
        slicer.append(f"{number} {word} {red} {green} {blue} 255\n")
    head = f"# Color table file {name}.ctbl\n# {len(entries) + 1} values\n"
    for suffix, lines in {".txt": snap, ".ctbl": [head, *slicer]}.items():
        with replacing(folder / f"{name}{suffix}") as file:
            file.write(escaped("".join(lines)).encode())
