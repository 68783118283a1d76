"""Laws of the code's own shape: imports point one way, the core knows no framework, and nothing heavy comes unasked."""

import ast
import subprocess
import sys
from pathlib import Path

import pytest

import voxquilt

SOURCE = Path(voxquilt.__file__).parent
# The one-way flow: a module imports only modules before it. A new module takes its place here.
ORDER = [
    *("errors", "atomic", "names", "streams", "foreign", "geometry", "grid", "blend", "parts", "ledger", "buffers"),
    *("sums", "blended", "stream", "aggregator", "space", "output_layout"),
    *("packed", "nifti", "image", "subject", "conversion", "sampler", "skip", "inference", "preprocess", "products"),
    *("recipes", "volumes", "finish", "stitch", "label_volumes", "quilt", "predict", "outline"),
    *(
        "launch",
        "listing",
        "cases",
        "manifest",
        "fingerprint",
        "resume",
        "lock",
        "agreed",
        "status",
        "dealing",
        "tasks",
        "group",
        "line",
    ),
    *("signals", "meter", "batch", "loader", "assignment", "chunks", "members", "network", "probe"),
    *("fits", "filetype", "carried", "archive", "exported", "states", "weights", "module", "datamodule"),
    *("room", "needs", "plan", "settle"),
    *("overlay", "metrics", "validation", "splits", "patches", "traindata", "training", "board"),
    *("files", "team", "cohort", "record", "tally", "progress", "events", "writer", "timing", "dryrun"),
    *("processes", "evaluation", "charts", "report", "fetch", "datasets"),
    *(
        "overrides",
        "sweeps",
        "explain",
        "sections",
        "config",
        "continuing",
        "trainconfig",
        "inherit",
        "build",
        "fit",
        "run",
        "resolvers",
        "app",
    ),
]
CORE = ORDER[: ORDER.index("output_layout") + 1]
FRAMEWORKS = ["lightning", "hydra", "omegaconf", "nibabel", "monai", "scipy", "rich"]


def imported(module: str) -> set[str]:
    """Everything that a module's imports name, also inside its functions, as dotted paths."""
    found: set[str] = set()
    for node in ast.walk(ast.parse((SOURCE / f"{module}.py").read_text("utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{module} has a relative import, which this test cannot follow"
            found |= {f"{node.module}.{alias.name}" for alias in node.names}
    return found


def loaded(*modules: str) -> set[str]:
    """The top-level packages that are in memory after an import in a fresh interpreter."""
    program = f"import {', '.join(modules)}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


def test_every_module_has_its_place_in_the_flow() -> None:
    """The order lists all modules, each once, the core first."""
    assert sorted(ORDER) == sorted(path.stem for path in SOURCE.glob("*.py") if path.stem != "__init__")
    assert ORDER[: len(CORE)] == CORE


@pytest.mark.parametrize("module", ORDER)
def test_a_module_imports_only_modules_before_it(module: str) -> None:
    """Imports point one way, those inside functions too."""
    ours = {name.split(".")[1] for name in imported(module) if name.startswith("voxquilt.")}
    assert ours <= set(ORDER[: ORDER.index(module)])


@pytest.mark.parametrize("module", CORE)
def test_the_core_names_no_framework(module: str) -> None:
    """Grids, blends, sums and spaces know torch and numpy."""
    outside = {name.split(".")[0] for name in imported(module)} - set(sys.stdlib_module_names)
    assert outside <= {"voxquilt", "torch", "numpy", "jaxtyping"}


def test_importing_the_core_imports_no_framework() -> None:
    """Not by way of other modules either."""
    packages = loaded("voxquilt.aggregator", "voxquilt.space")
    assert "torch" in packages
    assert not packages & set(FRAMEWORKS)


@pytest.mark.parametrize(
    "module", ["voxquilt", "voxquilt.config", "voxquilt.errors", "voxquilt.cases", "voxquilt.names"]
)
def test_a_wrong_command_line_is_answered_before_torch_has_loaded(module: str) -> None:
    """The package itself and the checks of a configuration import nothing heavy."""
    assert not loaded(module) & {"torch", "lightning", "nibabel", "monai", "scipy", "torchio"}


@pytest.mark.parametrize("module", ["__init__", *ORDER])
def test_no_module_imports_a_peer(module: str) -> None:
    """TorchIO is an oracle of the tests, not a dependency."""
    assert not {name.split(".")[0] for name in imported(module)} & {"torchio", "patchly", "tiler", "nnunetv2"}


def test_what_a_configuration_names_is_made_in_one_place() -> None:
    """Only `build` instantiates; only the application and the checks of a configuration know Hydra."""
    assert [module for module in ORDER if "hydra.utils.instantiate" in imported(module)] == ["build"]
    known = {
        module for module in ORDER if any(name.split(".")[0] in ("hydra", "omegaconf") for name in imported(module))
    }
    assert known <= {"overrides", "sweeps", "config", "trainconfig", "inherit", "build", "resolvers", "app"}


def test_every_public_name_is_there() -> None:
    """Names are looked up when they are first used; each leads somewhere, and a wrong one is an AttributeError."""
    for name in voxquilt.__all__:
        assert getattr(voxquilt, name) is not None
    with pytest.raises(AttributeError, match="module 'voxquilt' has no attribute 'GridSampl'"):
        _ = voxquilt.GridSampl


@pytest.mark.parametrize("module", ["__init__", *ORDER])
def test_a_module_is_small_and_says_which_question_it_answers(module: str) -> None:
    """At most 300 lines, and a docstring."""
    text = (SOURCE / f"{module}.py").read_text("utf-8")
    assert len(text.splitlines()) <= 300
    assert ast.get_docstring(ast.parse(text))
