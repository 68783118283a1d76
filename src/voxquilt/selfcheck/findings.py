"""Holds what a self-check found, and prints it."""

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from math import isfinite
from typing import Any

import numpy as np
from rich.console import Console
from rich.markup import escape
from rich.table import Table


@dataclass(frozen=True)
class Finding:
    """A check and what it found.

    Args:
        check: What was checked.
        error, allowed: The largest error, and what rounding explains there.
        unit: Of both, such as 'mm'.
        voxel, mm: Where the largest error is.
        problem: What is wrong where there is no number for it; such a check has failed.
        model: Which of several models it is of.
    """

    check: str
    error: float = 0.0
    allowed: float = 0.0
    unit: str = ""
    voxel: tuple[float, ...] = ()
    mm: tuple[float, ...] = ()
    problem: str = ""
    model: str = ""

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return not self.problem and self.error <= self.allowed


@dataclass
class Findings:
    """What a self-check found.

    Args:
        found: The checks.
        unchecked: What the check does not cover, each with the reason.
        setup: What was sent through, on what.
    """

    found: list[Finding] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    setup: list[str] = field(default_factory=list)

    @property
    def ok(self) -> bool:
        """Whether nothing is off."""
        return all(finding.ok for finding in self.found)

    def as_json(self) -> dict[str, Any]:
        """As plain values; what is infinite is text."""
        checks = [asdict(finding) | {"ok": finding.ok} for finding in self.found]
        for check in checks:
            if not isfinite(check["error"]):
                check["error"] = str(check["error"])
        return {"ok": self.ok, "checks": checks, "not_checked": self.unchecked, "setup": self.setup}


def worst_of(
    check: str,
    error: np.ndarray,
    allowed: np.ndarray | float,
    affine: np.ndarray,
    unit: str = "",
    scale: float = 1.0,
    first: int = 0,
) -> Finding:
    """The finding of errors over an (I, J, K) volume; NaN counts as infinite.

    Args:
        check: What was checked.
        error, allowed: What is compared.
        affine: From voxels to mm.
        unit: Of the numbers once they are divided by `scale`.
        scale: See `unit`.
        first: The volume's plane along i that is the first of these.
    """
    error = np.nan_to_num(error, nan=np.inf, posinf=np.inf)
    limit = np.broadcast_to(np.asarray(allowed, dtype=np.float64), error.shape)
    if not error.size:
        return Finding(check, problem="there is no voxel to compare")
    worst = np.unravel_index((error / np.maximum(limit, 1e-300)).argmax(), error.shape)
    voxel = int(worst[0]) + first, int(worst[1]), int(worst[2])
    return Finding(
        check, float(error[worst]) / scale, float(limit[worst]) / scale, unit, voxel, world(affine, voxel)
    )  # fmt: skip


def world(affine: np.ndarray, voxel: Sequence[float]) -> tuple[float, ...]:
    """mm of a voxel."""
    return tuple(round(float(x), 2) for x in affine[:3, :3] @ np.array(voxel, dtype=float) + affine[:3, 3])


def print_findings(findings: Findings) -> None:
    """Print a line per check, what is not checked, and the verdict."""
    console = Console(highlight=False, soft_wrap=True)
    table = Table(title="voxquilt: self-check")
    several = any(finding.model for finding in findings.found)
    for heading in (*(("model",) if several else ()), "check"):
        table.add_column(heading)
    for heading in ("largest error", "allowed"):
        table.add_column(heading, justify="right")
    for heading in ("at voxel", escape("at [mm]"), "verdict"):
        table.add_column(heading)
    for finding in findings.found:
        cells = [*((finding.model,) if several else ()), escape(finding.check)]
        if finding.problem:
            cells += ["", "", "", ""]
        else:
            cells += [_number(finding.error, finding.unit), _number(finding.allowed, finding.unit)]
            cells += [", ".join(f"{x:g}" for x in finding.voxel), ", ".join(f"{x:g}" for x in finding.mm)]
        table.add_row(*cells, "ok" if finding.ok else "OFF", style=None if finding.ok else "red")
    if not console.is_terminal:
        console.width = max(console.width, 140)
    console.print(table)
    for finding in findings.found:
        if finding.problem:
            console.print(f"[red]{escape(finding.check)}[/red]: {escape(finding.problem)}")
    for line in findings.setup:
        console.print(escape(line))
    if findings.unchecked:
        console.print("not checked:")
        for line in findings.unchecked:
            console.print(f"  {escape(line)}")
    wrong = sum(not finding.ok for finding in findings.found)
    count = len(findings.found)
    verdict = f"all {count} checks are right" if not wrong else f"{wrong} of {count} checks are off"
    console.print(f"voxquilt: self-check: {verdict}")


def _number(value: float, unit: str) -> str:
    return f"{value:.2g}{f' {unit}' if unit else ''}"
