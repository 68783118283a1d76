"""Records which patches of a grid have come and which are missing."""

from collections.abc import Iterable, Sequence

import numpy as np

from voxquilt.errors import LedgerError
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part, all_rows


class Ledger:
    """Records the patches of a grid that have come, one bit per patch.

    Args:
        grid: Where patches lie.
        skipped: Numbers of patches that will not come and do not count as missing.
        part: The rows whose patches come; None for all.

    Raises:
        ConfigError: (a ValueError) the grid has fewer rows than the part.
    """

    def __init__(self, grid: Grid, skipped: Iterable[int] = (), part: Part | None = None) -> None:
        self.grid = grid
        self.part = part or all_rows(grid, 0)
        self.skipped = frozenset(map(int, skipped))
        own = self.part.patches(grid)
        self.total = len(own)
        self._own = np.zeros(len(grid), dtype=bool)
        self._own[own] = True
        self.arrived = ~self._own
        self.arrived[list(self.skipped)] = True
        self.missing = int(np.count_nonzero(~self.arrived))

    def enter(self, numbers: Sequence[int]) -> None:
        """Note that patches have come; either all of them are entered or, on an error, none.

        Args:
            numbers: Numbers of the patches in the grid.

        Raises:
            LedgerError: a patch has come before, is skipped, or belongs to another part.
        """
        wrong = [number for n, number in enumerate(numbers) if self.arrived[number] or number in numbers[:n]]
        others = [number for number in wrong if not self._own[number]]
        if others:
            raise LedgerError(f"a patch of another part came: {self._locations(others)}. This one is {self.part}.")
        skipped = [number for number in wrong if number in self.skipped]
        if skipped:
            raise LedgerError(f"a patch that is skipped came: {self._locations(skipped)}.")
        if wrong:
            raise LedgerError(f"a patch came twice: {self._locations(wrong)}. Each patch is added once.")
        self.arrived[list(numbers)] = True
        self.missing -= len(numbers)

    def missing_in_rows(self, axis: int) -> list[int]:
        """The number of missing patches in each row along an axis."""
        rows = np.moveaxis(~self.arrived.reshape(self.grid.counts), axis, 0)
        return rows.reshape(self.grid.counts[axis], -1).sum(1).tolist()

    def check_complete(self) -> None:
        """Raises LedgerError, naming the first locations, when a patch is missing."""
        if self.missing:
            holes = np.flatnonzero(~self.arrived)[:4].tolist()
            raise LedgerError(
                f"{self.missing} of {self.total} patches are missing, among them {self._locations(holes)}. "
                f"Add every patch of the sampler before asking for the output."
            )

    def _locations(self, numbers: Sequence[int]) -> str:
        return ", ".join(str(self.grid.location(number)) for number in numbers[:4])
