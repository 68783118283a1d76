"""Says which versions of what voxquilt needs are installed, and which of them are too old."""

import os
import platform
import sys
from collections.abc import Iterator
from importlib.metadata import PackageNotFoundError, requires, version

import torch
from packaging.requirements import Requirement
from torch.cuda import nccl

from voxquilt.doctor.line import Line
from voxquilt.models.cudnn_check import cudnn_warning

# Which of the packages that are needed are said by name; the others only if something is wrong with them.
_NAMED = ("voxquilt", "torch", "lightning", "hydra-core", "monai", "nibabel", "isal", "numpy")
_DEVELOPMENT = ("dev", "docs", "peers")


def check_versions() -> Iterator[Line]:
    """A line each for Python, packages, CUDA and optional packages."""
    python = platform.python_version()
    yield Line.of(
        "python", f"{python} on {platform.system()} {platform.machine()}",
        problem="voxquilt needs Python 3.11 or newer." if sys.version_info < (3, 11) else "",
    )  # fmt: skip
    needed = [Requirement(text) for text in requires("voxquilt") or ()]
    found = {name: installed(name) or "missing" for name in _NAMED}
    wrong = [text for one in needed if _applies(one) and (text := _wrong(one))]
    yield Line.of(
        "packages", ", ".join(f"{name} {number}" for name, number in found.items()),
        problem=f"{', '.join(wrong)}: pip install {' '.join(repr(text.split(' (')[0]) for text in wrong)}"
        if wrong else "",
    )  # fmt: skip
    yield _check_cuda()
    yield from _check_extras(needed)


def installed(package: str) -> str | None:
    """The version of a package; None if it is not installed."""
    try:
        return version(package)
    except PackageNotFoundError:
        return None


def _applies(requirement: Requirement, extra: str = "") -> bool:
    return requirement.marker is None or requirement.marker.evaluate({"extra": extra})


def _wrong(requirement: Requirement) -> str:
    number = installed(requirement.name)
    if number is not None and requirement.specifier.contains(number, prereleases=True):
        return ""
    return f"{requirement.name}{requirement.specifier} (it is {number or 'missing'})"


def _check_cuda() -> Line:
    if torch.version.cuda is None:
        seen = os.path.exists("/dev/nvidiactl")
        note = "there is an NVIDIA device, which this build cannot use: install torch for CUDA, see pytorch.org."
        return Line.of("cuda", "torch is a build without CUDA", note=note if seen else "")
    cudnn = torch.backends.cudnn.version()
    number = nccl.version() if torch.distributed.is_nccl_available() else None
    text = f"CUDA {torch.version.cuda}, cuDNN {_dotted(cudnn)}, NCCL {'.'.join(map(str, number or ())) or 'missing'}"
    warning = cudnn_warning(cudnn, "bf16-mixed")
    if warning and torch.cuda.is_available():
        return Line.of("cuda", text, problem=f"{warning} Other precisions are right; run.selfcheck=true compares.")
    return Line.of("cuda", text, note=warning or "")


def _dotted(cudnn: int | None) -> str:
    return "missing" if cudnn is None else f"{cudnn // 10000}.{cudnn // 100 % 100}.{cudnn % 100}"


def _check_extras(needed: list[Requirement]) -> Iterator[Line]:
    """Optional packages: which are there, and whether those are new enough."""
    extras: dict[str, list[Requirement]] = {}
    for requirement in needed:
        name = str(requirement.marker).rpartition("extra == ")[2].strip("\"' )") if requirement.marker else ""
        if name and name not in _DEVELOPMENT:
            extras.setdefault(name, []).append(requirement)
    there, lacking, wrong = [], [], []
    for extra, requirements in extras.items():
        numbers = {one.name: installed(one.name) for one in requirements}
        if all(numbers.values()):
            there.append(f"{extra} ({', '.join(f'{name} {number}' for name, number in numbers.items())})")
            wrong += [text for one in requirements if (text := _wrong(one))]
        else:
            lacking.append(extra)
    absent = f"not installed: {', '.join(lacking)}" if lacking else ""
    text = "; ".join(filter(None, [*there, absent]))
    yield Line.of("extras", text, note=f"too old: {', '.join(wrong)}" if wrong else "")
    triton = installed("triton")
    yield Line.of("triton", triton or "not installed: its kernels are used on CUDA only")
    runtime = next((name for name in ("onnxruntime-gpu", "onnxruntime") if installed(name)), None)
    if runtime is not None:
        yield _check_onnx(runtime)


def _check_onnx(package: str) -> Line:
    try:
        import onnxruntime
    except Exception as error:  # a library that it misses, say
        return Line.of("onnxruntime", package, problem=f"it cannot be imported: {error}")
    providers = [name.removesuffix("ExecutionProvider") for name in onnxruntime.get_available_providers()]
    note = ""
    if torch.cuda.is_available() and "CUDA" not in providers:
        note = ".onnx files would run on the host: pip uninstall onnxruntime, then pip install onnxruntime-gpu."
    return Line.of("onnxruntime", f"{package} {installed(package)} with {', '.join(providers)}", note=note)
