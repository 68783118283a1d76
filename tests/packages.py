"""Installs the packages that docs/extending.md shows, as an installer leaves them."""

import re
import tomllib
from pathlib import Path

from synthetic import ROOT


def install_documented(file: str, folder: Path) -> Path:
    """Install the package of a section of docs/extending.md.

    Args:
        file: Name of the section's Python file, such as 'margin.py'.
        folder: Where it is installed, for PYTHONPATH; made if it is missing.

    Returns:
        The folder.
    """
    text = (ROOT / "docs/extending.md").read_text("utf-8")
    section = next(part for part in text.split("\n## ") if f"```python file={file}\n" in part)
    code = re.search(rf"```python file={re.escape(file)}\n(.*?)```", section, re.DOTALL)
    lines = re.search(r"```text\n(\[project\.entry-points.*?)```", section, re.DOTALL)
    assert code
    assert lines
    name = file.removesuffix(".py")
    info = folder / f"{name}-1.0.dist-info"
    info.mkdir(parents=True)
    (folder / file).write_text(code[1])
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
    points = tomllib.loads(lines[1])["project"]["entry-points"]
    tables = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in table.items()) for group, table in points.items()]
    (info / "entry_points.txt").write_text("".join(tables))
    return folder
