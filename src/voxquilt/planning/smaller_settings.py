"""Lists settings by which a run takes less memory or disk."""

from collections.abc import Iterator
from dataclasses import replace
from math import prod

from voxquilt.planning.resource_estimate import MIB, RunSettings


def smaller_settings(settings: RunSettings) -> Iterator[tuple[str, RunSettings]]:
    """Settings that take less, the smallest changes first: those that change no output, then those that do.

    Yields:
        Words for the command line, and the settings.
    """
    if settings.num_workers:
        yield "data.num_workers=0", replace(settings, num_workers=0)
    size = settings.batch_size
    while size > 1:
        size //= 2
        yield f"data.batch_size={size}", replace(settings, batch_size=size)
    for limit in (256, 0):
        if limit * MIB < settings.in_memory:
            yield f"callbacks.writer.in_memory={limit}", replace(settings, in_memory=limit * MIB)
    least = replace(settings, num_workers=0, batch_size=1)
    if settings.num_workers and settings.batch_size > 1:
        yield "data.num_workers=0 data.batch_size=1", least
    yield "stitch.products=null", replace(settings, stitch=replace(settings.stitch, products=None))
    for share in (4, 2):
        patch = [n - n * share // 8 for n in settings.patch_size]
        smaller = (patch[0] // 8 * 8 or 8, patch[1] // 8 * 8 or 8, patch[2] // 8 * 8 or 8)
        if prod(smaller) < prod(settings.patch_size):
            text = f"data.patch_size=[{','.join(map(str, smaller))}]"
            yield text, replace(settings, patch_size=smaller)
            yield f"{text} data.num_workers=0 data.batch_size=1", replace(least, patch_size=smaller)
