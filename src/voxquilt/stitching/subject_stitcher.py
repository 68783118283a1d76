"""Turns the outputs for one subject's patches into its finished volumes in native space."""

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor

from voxquilt.errors import BatchError, LedgerError, OutputError, PatchShapeError
from voxquilt.geometry.slab_split import Part
from voxquilt.geometry.slab_split import whole as all_rows
from voxquilt.geometry.space import Space, Where
from voxquilt.stitching.aggregator import Placed
from voxquilt.stitching.label_values import to_labels
from voxquilt.stitching.ledger import Ledger
from voxquilt.stitching.output_rings import Averaged, Memory, Ring, RingOpener
from voxquilt.stitching.output_volumes import OutputVolumes
from voxquilt.stitching.stitch import Stitch
from voxquilt.stitching.streaming import SlabStream
from voxquilt.vocabulary import LABELS

Outputs = Mapping[str, Tensor]
"""What a network gives for a batch: (B, C, ...) by output name; a network with one output names it ''."""


class SubjectStitcher:
    """One subject's outputs while its patches come in, in the grid's `streaming_order`.

    Several processes may share a subject, each with a `part` of its rows (see `voxquilt.geometry.slab_split.split`),
    whose patches come in the part's order. Once they are in,

        n + 1:  head()     what the part before needs, as soon as it is there, which can be long before the end
        n:      join()     takes it in; then this part is finished
        n:      parts()    this part of the products, to be sent to the owner,
        owner:  place()    who puts all of them in their places; then it has volumes()

    Args:
        stitch: How patches become volumes.
        placed: The subject's GridSampler, or its grid and padding.
        space: The way back to native space.
        memory: Where sums and volumes are kept.
        skipped: Numbers of patches, of all parts, that are not predicted; if no others are to come, add any one patch
            nonetheless, which tells the outputs' channels and is otherwise not used.
        part: The rows whose patches come here; None for all.
        whole: Whether this process is the owner, and has room for the whole volumes.
        layout: How outputs lie in patches; see `voxquilt.geometry.output_layout.factor_of`.

    Raises:
        ConfigError: (a ValueError) the grid has fewer rows than the part.
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
        whole: bool = True,
        layout: str = "auto",
    ) -> None:
        self.stitch = stitch
        self.part = part or all_rows(placed.grid, placed.grid.streaming_axis)
        self.whole = whole
        self._ledger = Ledger(placed.grid, skipped, self.part)
        self._opener = RingOpener(stitch, placed.padding, space, self._ledger, memory or Memory(), whole, layout)
        self._is_empty = self._ledger.missing == 0
        self._rings: dict[str, list[Ring]] = {}
        self._labels: dict[str, np.ndarray] = {}

    def add(self, outputs: Outputs, numbers: Sequence[int]) -> None:
        """Add a network's outputs for patches with these numbers in the grid.

        Raises:
            PatchShapeError: an output of another shape than the grid wants, or other outputs than before.
            BatchError: another number of patches than of numbers, or complex numbers.
            LedgerError: a patch came twice or too early.
            OutputError: outputs that are not finite, or a product that an output does not have.
        """
        if not self._rings:
            self._check_names(outputs)
            self._rings = {name: self._opener.open(name, patches) for name, patches in outputs.items()}
        if outputs.keys() != self._rings.keys():
            raise PatchShapeError(f"the network's outputs are {list(outputs)} after {list(self._rings)}.")
        for name, patches in outputs.items():
            if len(patches) != len(numbers):
                raise BatchError(f"output {name!r} has {len(patches)} patches for {len(numbers)} numbers.")
        numbers = [] if self._is_empty else [int(number) for number in numbers]
        batches: list[tuple[SlabStream, Tensor]] = []
        for name, patches in outputs.items():
            averages: dict[Averaged, Tensor] = {None: patches[: len(numbers)]}
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
        """Whether every patch, or every one of the part, is in."""
        return bool(self._rings) and self._ledger.missing == 0

    def head(self) -> list[Tensor] | None:
        """What the part before needs of this one, for its `join`.

        Returns:
            Tensors on the host; None until they are complete; [] if no part is before this one.
        """
        if self.part.first == 0:
            return []
        heads = [ring.stream.head() for ring in self._all]
        ready = [head for head in heads if head is not None]
        return [planes for head in ready for planes in head] if heads and len(ready) == len(heads) else None

    def join(self, head: list[Tensor]) -> None:
        """Take in the `head` of the part that follows.

        Raises:
            BatchError: no part follows.
            PatchShapeError: the head is not of this part's neighbour.
            LedgerError: a patch of this part is missing, or a head came before.
        """
        rings = self._opened()
        each, rest = divmod(len(head), len(rings))
        if rest:
            raise PatchShapeError(f"the head of the next part has {len(head)} tensors for {len(rings)} blends.")
        for n, ring in enumerate(rings):
            ring.stream.join(head[n * each : (n + 1) * each])

    def parts(self) -> Iterator[tuple[str, Where, np.ndarray]]:
        """This part of every product, one after the other: its name, native slices and a contiguous (C, I, J, K) array.

        Raises:
            LedgerError: a patch is missing, or the head of the part that follows.
        """
        self._check_finished()
        for name, (product, volumes) in self._products.items():
            yield name, *volumes.part(product)

    def place(self, name: str, where: Where, array: np.ndarray) -> None:
        """Put another part's planes of a product in their place.

        Raises:
            BatchError: this process has no room for them, or no such product.
            PatchShapeError: an array of another shape or type.
            LedgerError: some of the planes are here already.
        """
        if not self.whole or name not in self._products:
            raise BatchError(f"{self.part} has no room for planes of {name!r}; it has products {list(self._products)}.")
        product, volumes = self._products[name]
        volumes.place(product, where, array)

    def volumes(self) -> dict[str, np.ndarray]:
        """The finished products in native space, (C, I, J, K), by '<product>' or '<output>_<product>'.

        Raises:
            BatchError: this process has no room for them.
            LedgerError: a patch is missing, or what another part made.
            OutputError: post-processing changed a volume's shape, or gave what no label file holds.
        """
        if not self.whole:
            raise BatchError(f"{self.part} keeps no whole volumes: its planes are in parts().")
        self._check_finished()
        finished: dict[str, np.ndarray] = {}
        for name, (product, volumes) in self._products.items():
            volumes.check_whole()
            volume = volumes.arrays[product]
            finished[name] = self._numbered(name, volume) if volumes.kind(product) == LABELS else volume
        return finished

    @property
    def kinds(self) -> dict[str, str]:
        """The kind of each of the volumes: 'labels', 'map' or 'image'."""
        return {name: volumes.kind(product) for name, (product, volumes) in self._products.items()}

    def to(self, device: torch.device) -> None:
        """Keep sums on another device from here on, also those that have come."""
        self._opener = replace(self._opener, memory=replace(self._opener.memory, device=device))
        for ring in self._all:
            ring.stream.to(device)

    def close(self) -> None:
        """Leave the memory of an unfinished subject to the next."""
        for ring in self._all:
            ring.stream.close()

    @property
    def _all(self) -> list[Ring]:
        return [ring for rings in self._rings.values() for ring in rings]

    @property
    def _products(self) -> dict[str, tuple[str, OutputVolumes]]:
        """By full name: a product's name within its output, and where it is kept."""
        return {
            "_".join(filter(None, (output, product))): (product, volumes)
            for output, rings in self._rings.items()
            for ring in rings
            for product, volumes in ring.products.volumes.items()
        }

    def _check_finished(self) -> None:
        for ring in self._opened():
            ring.stream.check_finished()

    def _opened(self) -> list[Ring]:
        if not self._rings:
            raise LedgerError(
                "no patch has come, so there are no outputs; of a part without foreground one comes, too."
            )
        return self._all

    def _check_names(self, outputs: Outputs) -> None:
        wanted = self.stitch.products
        unknown = sorted(set(wanted) - outputs.keys()) if isinstance(wanted, Mapping) else []
        if unknown:
            raise OutputError(f"stitch.products names {unknown}; the network's outputs are {list(outputs)}.")

    def _numbered(self, name: str, classes: np.ndarray) -> np.ndarray:
        """Labels as files hold them; computed once, since the classes are changed in place."""
        if name not in self._labels:
            self._labels[name] = to_labels(classes, self.stitch.postprocess, self.stitch.label_values)
        return self._labels[name]
