"""Which patches of a grid are in, and which are missing?"""

import numpy as np

from voxquilt.errors import LedgerError
from voxquilt.geometry import Triple
from voxquilt.grid import Grid


class Ledger:
    """Which patches of a grid are in: one bit a patch."""

    def __init__(self, grid: Grid) -> None:
        self.grid = grid
        self.arrived = np.zeros(grid.counts, dtype=bool)
        self.missing = len(grid)

    def enter(self, places: list[Triple]) -> None:
        """Note that patches have come; either all of them are entered or, on an error, none.

        Raises:
            LedgerError: one has come before.
        """
        again = [place for n, place in enumerate(places) if self.arrived[place] or place in places[:n]]
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
                f"{self.missing} of {len(self.grid)} patches are missing, among them {self._names(holes)}. "
                f"Add every patch of the sampler before asking for the output."
            )

    def _names(self, places: list[Triple]) -> str:
        _, nj, nk = self.grid.counts
        return ", ".join(str(self.grid.location((i * nj + j) * nk + k)) for i, j, k in places[:4])
