"""Says which devices there are, what is free on them, and whether kernels can be compiled for them."""

import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager

import torch

from voxquilt.doctor.line import Line
from voxquilt.stitching.kernels.loading import kernels_run_on
from voxquilt.text import first_line, gib


def check_devices() -> Iterator[Line]:
    """A line for each device, and for what compiles kernels."""
    count = torch.cuda.device_count() if torch.cuda.is_available() else 0
    if not count:
        note = ""
        if torch.version.cuda is not None and os.path.exists("/dev/nvidiactl"):
            note = "there is an NVIDIA device that torch cannot use: is its driver too old for this CUDA (nvidia-smi)?"
        mps = getattr(torch.backends, "mps", None)
        text = "none; the host predicts"
        if mps is not None and mps.is_available():
            text = "Apple's GPU (trainer.accelerator=mps)"
        yield Line.of("gpu", text, note=note)
    for n in range(count):
        yield _check_device(n)
    yield _check_compiler(count)
    if count:
        yield _check_kernels()


def _check_device(n: int) -> Line:
    topic = f"gpu {n}"
    try:
        properties = torch.cuda.get_device_properties(n)
        free, total = torch.cuda.mem_get_info(n)
        torch.ones(2, device=f"cuda:{n}").sum().item()
    except RuntimeError as error:
        advice = f"{first_line(error)} Leave it out by CUDA_VISIBLE_DEVICES."
        return Line.of(topic, "cannot be used", problem=advice)
    text = (
        f"{properties.name}, {gib(free)} of {gib(total)} free, compute capability {properties.major}.{properties.minor}"
    )
    note = ""
    if free < total / 2:
        note = "other processes hold more than half of its memory (nvidia-smi)."
    elif properties.major < 8:
        note = "it computes bfloat16 slowly: use trainer.precision=16-mixed."
    return Line.of(topic, text, note=note)


def _check_compiler(gpus: int) -> Line:
    names = [os.environ["CC"]] if os.environ.get("CC") else ["gcc", "cc", "clang"]
    found = next((os.path.basename(name) for name in names if shutil.which(name)), None)
    if found:
        return Line.of("compiler", found)
    lost = "stitching takes more kernels and more time, and " if gpus else ""
    return Line.of(
        "compiler", "there is none", note=f"{lost}model.compile=true does not work: install gcc, or set CC."
    )  # fmt: skip


def _check_kernels() -> Line:
    with _first_warning() as warnings:
        runs = kernels_run_on(torch.device("cuda", 0))
    reason = warnings[0] if warnings else "Triton is not installed."
    return Line.of("kernels", "Triton's run on gpu 0" if runs else "torch's own", note="" if runs else reason)


@contextmanager
def _first_warning() -> Iterator[list[str]]:
    """The warnings that are logged in the block, which are not shown."""
    log, texts = logging.getLogger("voxquilt"), []

    class Keep(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            texts.append(record.getMessage())

    handler, passes_on = Keep(), log.propagate
    log.addHandler(handler)
    log.propagate = False
    try:
        yield texts
    finally:
        log.removeHandler(handler)
        log.propagate = passes_on
