"""Which patches of a grid are in, and which are missing?"""

from collections.abc import Iterable

import numpy as np

from voxquilt.errors import LedgerError
from voxquilt.geometry.frame import Triple
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part, whole


class Ledger:
    """Which patches of a grid are in: one bit a patch.

    Args:
        grid: Where patches lie.
        skipped: Numbers of patches that will not come and are not missed.
        part: The rows whose patches come; None for all.

    Raises:
        ConfigError: (a ValueError) the grid has fewer rows than the part.
    """

    def __init__(self, grid: Grid, skipped: Iterable[int] = (), part: Part | None = None) -> None:
        self.grid = grid
        self.part = part or whole(grid, 0)
        self.skipped = frozenset(grid.place(int(n)) for n in skipped)
        own = self.part.patches(grid)
        self.total = len(own)
        self.arrived = np.ones(grid.counts, dtype=bool)
        self.arrived.flat[own] = False
        for place in self.skipped:
            self.arrived[place] = True
        self.missing = int(np.count_nonzero(~self.arrived))

    def enter(self, places: list[Triple]) -> None:
        """Note that patches have come; either all of them are entered or, on an error, none.

        Raises:
            LedgerError: one has come before, or was not to come.
        """
        again = [place for n, place in enumerate(places) if self.arrived[place] or place in places[:n]]
        others = [place for place in again if place not in self.part]
        if others:
            raise LedgerError(f"a patch of another part came: {self._names(others)}. This one is {self.part}.")
        unasked = [place for place in again if place in self.skipped]
        if unasked:
            raise LedgerError(f"a patch that is skipped came: {self._names(unasked)}.")
        if again:
            raise LedgerError(f"a patch came twice: {self._names(again)}. Each patch is added once.")
        for place in places:
            self.arrived[place] = True
        self.missing -= len(places)

    def check_complete(self) -> None:
        """Raises LedgerError, naming the first locations, when a patch is missing."""
        if self.missing:
            holes = [(int(i), int(j), int(k)) for i, j, k in np.argwhere(~self.arrived)[:4]]
            raise LedgerError(
                f"{self.missing} of {self.total} patches are missing, among them {self._names(holes)}. "
                f"Add every patch of the sampler before asking for the output."
            )

    def _names(self, places: list[Triple]) -> str:
        _, nj, nk = self.grid.counts
        return ", ".join(str(self.grid.location((i * nj + j) * nk + k)) for i, j, k in places[:4])
