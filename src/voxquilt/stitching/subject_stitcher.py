"""Turns the outputs for one subject's patches into its finished volumes in native space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from voxquilt.errors import BatchError, ConfigError, LedgerError, OutputError, PatchShapeError
from voxquilt.geometry.grid import Grid
from voxquilt.geometry.slab_split import Part, all_rows
from voxquilt.geometry.space import Space, Where
from voxquilt.stitching.aggregator import Placed
from voxquilt.stitching.finished_volume import FinishedVolume
from voxquilt.stitching.ledger import Ledger
from voxquilt.stitching.output_rings import Averaged, Memory, Ring, RingOpener
from voxquilt.stitching.output_volumes import OutputVolumes
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import SlabStream
from voxquilt.vocabulary import LABELS

Outputs = Mapping[str, Tensor]
"""A network's outputs for a batch: (B, C, ...) by name; the only output of a network has the name ''."""


class SubjectStitcher:
    """Stitches the outputs of one subject while its patches come in the grid's `streaming_order`.

    Several processes may share a subject, each with a `part` of its rows (`voxquilt.geometry.slab_split.split_rows`),
    whose patches come in the part's order. They finish it together:

        part n + 1:  head()     the sums that part n needs, once they are complete, often long before the end
        part n:      join()     adds them; then this part is finished
        part n:      parts()    this part of the products, which are sent to the owner
        owner:       place()    puts the parts in their places; then it has volumes()

    Args:
        stitch: How patches become volumes.
        placed: The subject's GridSampler, or its grid and padding.
        space: The mapping back to native space.
        memory: Where sums and volumes are kept.
        skipped: Numbers of patches, in all parts, that are not predicted. If no patches remain, add any one patch
            nonetheless: it shows the outputs' channels and is otherwise not used.
        part: The rows whose patches come here; None for all.
        holds_all: Whether this process is the owner, which holds whole volumes.
        layout: How outputs lie in patches; see `voxquilt.geometry.output_layout.factor_of`.

    Raises:
        ConfigError: (a ValueError) the grid has fewer rows than the part, or scores of a part are to be interpolated by
            cubic splines.
    """

    def __init__(
        self,
        stitch: Stitch,
        placed: Placed,
        space: Space,
        *,
        memory: Memory | None = None,
        skipped: Iterable[int] = (),
        part: Part | None = None,
        holds_all: bool = True,
        layout: str = "auto",
    ) -> None:
        self.stitch = stitch
        self.part = part or all_rows(placed.grid, placed.grid.streaming_axis)
        _check_order(stitch, self.part, placed.grid)
        self.holds_all = holds_all
        self._ledger = Ledger(placed.grid, skipped, self.part)
        self._opener = RingOpener(stitch, placed.padding, space, self._ledger, memory or Memory(), holds_all, layout)
        self._is_empty = self._ledger.missing == 0
        self._rings: dict[str, list[Ring]] = {}
        self._labels: dict[str, np.ndarray] = {}

    def add(self, outputs: Outputs, numbers: Sequence[int]) -> None:
        """Add a network's outputs for patches with these numbers in the grid.

        Raises:
            PatchShapeError: an output of another shape than the grid wants, or other outputs than before.
            BatchError: another number of patches than of numbers, or complex numbers.
            LedgerError: a patch came twice or too early.
            OutputError: outputs that are not finite (on a device: when finished), or that a product cannot be made of.
        """
        if not self._rings:
            _check_names(self.stitch.products, outputs)
            self._rings = {name: self._opener.open(name, patches) for name, patches in outputs.items()}
        if outputs.keys() != self._rings.keys():
            raise PatchShapeError(f"the network's outputs are {list(outputs)} after {list(self._rings)}.")
        for name, patches in outputs.items():
            if len(patches) != len(numbers):
                raise BatchError(f"output {name!r} has {len(patches)} patches for {len(numbers)} numbers.")
        numbers = [] if self._is_empty else [int(number) for number in numbers]
        batches: list[tuple[SlabStream, Tensor]] = []
        for name, patches in outputs.items():
            # Without the graph, which would hold every activation of a network that is called without no_grad.
            averages: dict[Averaged, Tensor] = {None: patches[: len(numbers)].detach()}
            for ring in self._rings[name]:
                if ring.averaged is not None and ring.averaged not in averages:
                    averages[ring.averaged] = ring.averaged(averages[None])
                batches.append((ring.stream, averages[ring.averaged]))
        for stream, patches in batches:
            stream.check(patches.shape, patches.dtype, numbers)
        self._ledger.enter(numbers)
        for stream, patches in batches:
            stream.add(patches, numbers)

    @property
    def complete(self) -> bool:
        """Whether every patch, of the part if there are several, has come."""
        return bool(self._rings) and self._ledger.missing == 0

    def head(self) -> list[Tensor] | None:
        """The sums that the part before needs for its `join`.

        Returns:
            Tensors on the host; None until they are complete; [] if no part is before this one.
        """
        if self.part.first == 0:
            return []
        heads = [ring.stream.head() for ring in self._all_rings]
        ready = [head for head in heads if head is not None]
        return [planes for head in ready for planes in head] if heads and len(ready) == len(heads) else None

    def join(self, head: list[Tensor]) -> None:
        """Add the `head` of the part that follows.

        Raises:
            BatchError: no part follows.
            PatchShapeError: the head is not that of the part that follows.
            LedgerError: a patch of this part is missing, or a head came before.
        """
        rings = self._require_rings()
        sizes = [ring.stream.head_size for ring in rings]
        if len(head) != sum(sizes):
            raise PatchShapeError(f"the head of the next part has {len(head)} tensors; wanted are {sum(sizes)}.")
        tensors = iter(head)
        for ring, size in zip(rings, sizes, strict=True):
            ring.stream.join([next(tensors) for _ in range(size)])

    def parts(self) -> Iterator[tuple[str, Where, np.ndarray]]:
        """This part of every product, one after the other: its name, native slices and a contiguous (C, I, J, K) array.

        Raises:
            LedgerError: a patch is missing, or the head of the part that follows.
            OutputError: outputs are not finite.
        """
        self._finish()
        yield from ((name, *volumes.part(product)) for name, (product, volumes) in self._products.items())

    def place(self, name: str, where: Where, array: np.ndarray) -> None:
        """Put another part's planes of a product in their place.

        Raises:
            BatchError: this process does not hold whole volumes, or has no such product.
            PatchShapeError: an array of another shape or type.
            LedgerError: some of the planes are here already.
        """
        if not self.holds_all or name not in self._products:
            raise BatchError(f"{self.part} has no room for planes of {name!r}; it has products {list(self._products)}.")
        product, volumes = self._products[name]
        volumes.place(product, where, array)

    def volumes(self) -> dict[str, np.ndarray]:
        """The finished products in native space, (C, I, J, K), by '<product>' or '<output>_<product>'.

        Raises:
            BatchError: this process does not hold whole volumes.
            LedgerError: a patch is missing, or another part's planes.
            OutputError: outputs are not finite, or post-processing gave another shape or numbers that are not labels.
        """
        if not self.holds_all:
            raise BatchError(f"{self.part} keeps no whole volumes: its planes are in parts().")
        self._finish()
        finished: dict[str, np.ndarray] = {}
        for name, (product, volumes) in self._products.items():
            volumes.check_complete()
            volume = volumes.arrays[product]
            if volumes.kind(product) == LABELS and name not in self._labels:
                # Once, since classes are replaced in place.
                self._labels[name] = self.stitch.to_labels(volume)
            finished[name] = self._labels.get(name, volume)
        return finished

    def finished(self) -> dict[str, FinishedVolume]:
        """The `volumes`, each with what its file says of it; raises what `volumes` does."""
        described = {name: volumes.described(product) for name, (product, volumes) in self._products.items()}
        return {name: FinishedVolume(array, *described[name]) for name, array in self.volumes().items()}

    def to(self, device: torch.device) -> None:
        """Move all sums to another device, and keep those to come there; products go to the host."""
        self._opener = replace(self._opener, memory=replace(self._opener.memory, device=device))
        for ring in self._all_rings:
            ring.stream.to(device)
            ring.products.to_host()

    def close(self) -> None:
        """Release the memory of an unfinished subject for the next one."""
        for ring in self._all_rings:
            ring.stream.close()

    @property
    def _all_rings(self) -> list[Ring]:
        return [ring for rings in self._rings.values() for ring in rings]

    @property
    def _products(self) -> dict[str, tuple[str, OutputVolumes]]:
        """By the full names of products: the product's name within its output, and where it is kept."""
        return {
            "_".join(filter(None, (output, product))): (product, volumes)
            for output, rings in self._rings.items()
            for ring in rings
            for product, volumes in ring.products.volumes.items()
        }

    def _finish(self) -> None:
        for ring in self._require_rings():
            ring.stream.check_finished()
        for ring in self._all_rings:
            ring.products.finish()

    def _require_rings(self) -> list[Ring]:
        if not self._rings:
            raise LedgerError("no patch has come, so the outputs are unknown; add one patch even if all are skipped.")
        return self._all_rings


def _check_names(wanted: object, outputs: Outputs) -> None:
    unknown = sorted(set(wanted) - outputs.keys()) if isinstance(wanted, Mapping) else []
    if unknown:
        raise OutputError(f"stitch.products names {unknown}; the network's outputs are {list(outputs)}.")


def _check_order(stitch: Stitch, part: Part, grid: Grid) -> None:
    if stitch.order == 3 and (part.first, part.stop) != (0, grid.counts[part.axis]):
        raise ConfigError(
            "stitch.order=3 goes with whole volumes: a cubic spline of scores needs more planes of the part that "
            "follows than parts exchange."
        )
