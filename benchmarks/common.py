"""What benchmarks share: contenders in processes of their own, their peak memory, medians, tables, a network."""

import contextlib
import json
import os
import platform
import resource
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parent.parent
ENVIRONMENTS = ROOT / ".bench"
THREADS = 2
Run = dict[str, Any]


@dataclass(frozen=True)
class Contender:
    """Somebody who does the job.

    Args:
        prepare: Imports what it needs and returns the job; what comes before the job is not measured.
        environment: The folder in .bench whose Python runs it; None is this one.
        half: Whether it keeps scores in float16 by its own choice, so that labels may differ a little.
    """

    prepare: Callable[..., Any]
    environment: str | None = None
    half: bool = False


def interpreter(environment: str | None) -> Path:
    """The Python of an environment; it need not exist."""
    return ENVIRONMENTS / environment / "bin" / "python" if environment else Path(sys.executable)


def run(script: str, contender: Contender, name: str, *arguments: object, timeout: float = 1800) -> Run:
    """What `script --contender name arguments...` reports; {'error': ...} if it cannot run, fails or hangs.

    'peak' [MB] is the highest of its own peak and of what it and its children held together at any time.
    """
    if not interpreter(contender.environment).exists():
        return {"error": f"not installed: python benchmarks/environments.py {contender.environment}"}
    with tempfile.TemporaryDirectory() as folder:
        report, log = Path(folder) / "report.json", Path(folder) / "log.txt"
        command = [interpreter(contender.environment), script, "--contender", name, "--report", report, *arguments]
        with log.open("wb") as output:
            process = subprocess.Popen(
                [str(word) for word in command],
                stdin=subprocess.DEVNULL,
                stdout=output,
                stderr=output,
                env={**os.environ, "nnUNet_def_n_proc": str(THREADS), "OMP_NUM_THREADS": str(THREADS)},
                start_new_session=True,
            )
            together = _watch(process, time.monotonic() + timeout)
        if process.returncode or not report.exists():
            lines = log.read_text(errors="replace").strip().splitlines() or ["no output"]
            return {"error": f"exit status {process.returncode}: {lines[-1][:200]}"}
        result = json.loads(report.read_text())
        return result | {"peak": max(result["peak"], together)}


def _watch(process: subprocess.Popen[bytes], deadline: float) -> float:
    """Wait for a process, killed with its children at the deadline; the most MB they held together, 0 without any."""
    together = 0.0
    while process.poll() is None:
        family = _family(process.pid)
        if len(family) > 1:
            together = max(together, sum(map(_share, family)))
        if time.monotonic() > deadline:
            os.killpg(process.pid, signal.SIGKILL)
        time.sleep(0.05)
    return together


def _family(pid: int) -> list[int]:
    """A process and all that come from it, where the system has /proc."""
    family = [pid]
    for parent in family:
        for file in Path(f"/proc/{parent}/task").glob("*/children"):
            try:
                family += map(int, file.read_text().split())
            except OSError:  # it has ended
                continue
    return family


def _share(pid: int) -> float:
    """A process's resident MB; pages that several share count in parts (Pss)."""
    return _kilobytes(Path(f"/proc/{pid}/smaps_rollup"), "Pss") / 1024


def _kilobytes(file: Path, key: str) -> int:
    try:
        lines = file.read_text().splitlines()
    except OSError:
        return 0
    return next((int(line.split()[1]) for line in lines if line.startswith(f"{key}:")), 0)


def resident() -> float:
    """This process's resident memory now [MB], or its peak where there is no /proc."""
    return _kilobytes(Path("/proc/self/status"), "VmRSS") / 1024 or peak()


def peak() -> float:
    """This process's highest resident memory so far [MB].

    VmHWM first: getrusage's ru_maxrss starts at the size of the process that started this one.
    """
    unit = 2**20 if sys.platform == "darwin" else 1024
    hwm = _kilobytes(Path("/proc/self/status"), "VmHWM")
    return hwm / 1024 or resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / unit


def rounds(names: Iterable[str], repeats: int, once: Callable[[str, int], Run]) -> dict[str, list[Run]]:
    """`once(name, repeat)` for every name, again and again, so that a slow minute of the machine meets all of them.

    Who fails once is not run again.
    """
    runs: dict[str, list[Run]] = {name: [] for name in names}
    for repeat in range(repeats):
        for name, done in runs.items():
            if not failure(done):
                done.append(once(name, repeat))
                print(f"{name}: {done[-1]}", file=sys.stderr, flush=True)
    return runs


def failure(runs: Sequence[Run]) -> str | None:
    """Why a contender failed, if it did."""
    return next((run["error"] for run in runs if "error" in run), None)


def median(runs: Sequence[Run], key: str) -> float:
    """Of one figure."""
    return statistics.median(run[key] for run in runs)


def table(header: Sequence[str], runs: Mapping[str, list[Run]], row: Callable[[str, list[Run]], Sequence[str]]) -> str:
    """A markdown table with a row per contender; one that failed has its error there."""
    lines = [f"| | {' | '.join(header)} |", f"|{'---|' * (len(header) + 1)}"]
    for name, done in runs.items():
        error = failure(done)
        cells = [f"({error})", *[""] * (len(header) - 1)] if error else row(name, done)
        lines.append(f"| {name} | {' | '.join(cells)} |")
    return "\n".join(lines)


def machine(repeats: int, device: str) -> str:
    """One line on where and how was measured."""
    import importlib.metadata as metadata

    here = []
    for package in ("torch", "torchio", "monai"):
        with contextlib.suppress(metadata.PackageNotFoundError):  # TorchIO runs on no GPU, and need not be there
            here.append(f"{package} {metadata.version(package)}")
    text = f"{platform.processor() or platform.machine()}, {THREADS} threads, {device}, {', '.join(here)}"
    for environment, package in (("nnunet", "nnunetv2"), ("konfai", "konfai")):
        found = next(ENVIRONMENTS.glob(f"{environment}/lib/*/site-packages/{package}-*.dist-info"), None)
        text += f", {found.name.removesuffix('.dist-info').replace('-', ' ')}" if found else ""
    return f"{text}, medians of {repeats}"


def save(path: Path | None, name: str, runs: object) -> None:
    """Put raw results under a name into a JSON file, beside those that are there."""
    if path is not None:
        known = json.loads(path.read_text()) if path.exists() else {}
        path.write_text(json.dumps(known | {name: runs}, indent=1))


STEP = 3
"""Values of the volume from one class's to the next's: labels change between whole numbers, so none is undecided."""


def network(classes: int) -> torch.nn.Module:
    """A 1x1x1 convolution whose best class is the one whose value, STEP times its number, is next to the voxel's."""
    conv, middle = torch.nn.Conv3d(1, classes, 1), STEP * (classes - 1) / 2
    with torch.no_grad():
        # x * v - v^2 / 2 is largest for the v that is closest to x; here both are counted from the middle.
        value = (STEP * torch.arange(classes) - middle) / 1000
        conv.weight.copy_(value.reshape(-1, 1, 1, 1, 1))
        conv.bias.copy_(-value * middle - 500 * value**2)
    return conv.eval()
