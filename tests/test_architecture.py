"""Tests the structure of the code: imports point one way, the core knows no framework, and startup loads little."""

import ast
import re
import subprocess
import sys
from functools import cache
from graphlib import TopologicalSorter
from pathlib import Path
from statistics import median

import pytest

import voxquilt

SOURCE = Path(voxquilt.__file__).parent
# A folder imports only from folders in lines above its own; two in one line do not import each other.
FOLDERS = [
    ["errors"],
    ["text", "old_names"],
    ["vocabulary", "filesystem"],
    ["geometry", "example_files"],
    ["data", "stitching"],
    ["datasets", "inference", "predict"],
    ["models", "distributed", "reporting"],
    ["planning", "training"],
    ["prediction"],
    ["report", "selfcheck", "doctor"],
    ["cli"],
    ["export"],
    ["commands"],
]
LEVEL = {folder: level for level, line in enumerate(FOLDERS) for folder in line}
CORE = ("geometry", "stitching")
MORE = {"stitching.largest_component": {"scipy"}}  # inside a function
FRAMEWORKS = {"lightning", "hydra", "omegaconf", "nibabel", "monai", "scipy", "rich"}
PEERS = {"torchio", "patchly", "tiler", "nnunetv2"}
# Modules that answer a wrong command line.
LIGHT = [
    "", ".errors", ".vocabulary", ".data.discovery", ".cli.main", ".cli.predict_config", ".cli.train_config",
    ".cli.schema", ".models.weights.detect", ".models.weights.torchscript", ".models.weights.exported",
    ".models.weights.lightning",    ".models.weights.state_dict", ".models.weights.stored_settings",
]  # fmt: skip


def name_of(path: Path) -> str:
    """A module's name below voxquilt, such as 'geometry.grid'."""
    return ".".join(path.relative_to(SOURCE).with_suffix("").parts)


# What Python wants at the top by these names.
NO_MODULES = ("__init__", "__main__")
MODULES = {
    name_of(path): path
    for path in sorted(SOURCE.rglob("*.py"))
    if path.stem != "__init__" and path != SOURCE / "__main__.py"
}


@cache
def imported(path: Path) -> frozenset[str]:
    """Dotted paths of everything that a file imports, also inside functions."""
    names: set[str] = set()
    for node in ast.walk(ast.parse(path.read_text("utf-8"))):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path} has a relative import, which this test cannot follow"
            names |= {f"{node.module}.{alias.name}" for alias in node.names}
    return frozenset(names)


def ours(path: Path) -> set[str]:
    """Modules of voxquilt that a file imports."""
    parts = [name.removeprefix("voxquilt.") for name in imported(path) if name.startswith("voxquilt.")]
    return {part if part in MODULES else part.rpartition(".")[0] for part in parts}


def packages(path: Path) -> set[str]:
    """Top-level packages that a file imports."""
    return {name.split(".")[0] for name in imported(path)}


def loaded(*modules: str) -> set[str]:
    """Top-level packages in memory after an import in a fresh interpreter."""
    program = f"import {', '.join(modules)}, sys; print(*{{name.split('.')[0] for name in sys.modules}})"
    return set(
        subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True).stdout.split()
    )


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_folders_above_its_own(module: str) -> None:
    """Imports inside functions count too."""
    folder = module.split(".")[0]
    others = {name.split(".")[0] for name in ours(MODULES[module])} - {folder}
    assert {name for name in others if LEVEL[name] >= LEVEL[folder]} == set()


def test_no_modules_import_each_other_in_a_circle() -> None:
    """Including modules of one folder."""
    TopologicalSorter({module: ours(path) for module, path in MODULES.items()}).prepare()


def test_the_folder_table_lists_the_whole_top_level() -> None:
    """And at most ten files lie there."""
    top = [path for path in SOURCE.iterdir() if path.suffix == ".py" or (path / "__init__.py").exists()]
    top = [path for path in top if path.stem not in NO_MODULES]
    assert sorted(LEVEL) == sorted(path.stem for path in top)
    assert sum(path.is_file() for path in top) <= 9


def test_init_files_of_sub_packages_are_empty() -> None:
    """Else a wrong command line would load torch first. The exception, `voxquilt.data`, keeps a name of TorchIO's."""
    filled = [path for path in SOURCE.rglob("__init__.py") if path.read_text("utf-8").strip()]
    assert {path.parent for path in filled} == {SOURCE, SOURCE / "data"}
    assert packages(SOURCE / "data" / "__init__.py") == {"importlib", "typing"}


@pytest.mark.parametrize("module", [module for module in MODULES if module.startswith(CORE)])
def test_the_core_imports_only_torch_and_numpy(module: str) -> None:
    """For all modules of geometry and stitching, but for those of `MORE`.

    Kernels also import Triton, which comes with torch's CUDA builds.
    """
    outside = packages(MODULES[module]) - set(sys.stdlib_module_names)
    more = {"triton"} if ".kernels." in module else MORE.get(module, set())
    assert outside <= {"voxquilt", "torch", "numpy", "jaxtyping"} | more


def test_importing_the_core_imports_no_framework() -> None:
    """Including imports by way of other modules. Triton is imported only once there is a CUDA device."""
    packages = loaded("voxquilt.stitching.subject_stitcher", "voxquilt.geometry.space")
    assert "torch" in packages
    assert not packages & (FRAMEWORKS | {"triton"})


@pytest.mark.parametrize("module", LIGHT)
def test_a_wrong_command_line_is_answered_before_torch_has_loaded(module: str) -> None:
    """The package itself and the checks of a configuration import no heavy package."""
    assert not loaded(f"voxquilt{module}") & {"torch", "lightning", "nibabel", "monai", "scipy", "torchio"}


@pytest.mark.parametrize("path", [SOURCE / "__init__.py", *MODULES.values()], ids=name_of)
def test_no_module_imports_a_peer(path: Path) -> None:
    """TorchIO is a reference for tests, not a dependency."""
    assert not packages(path) & PEERS


def test_only_one_module_instantiates_configurations() -> None:
    """And only the command line knows Hydra."""
    making = [module for module, path in MODULES.items() if "hydra.utils.instantiate" in imported(path)]
    assert making == ["cli.instantiate"]
    knowing = {module.split(".")[0] for module, path in MODULES.items() if packages(path) & {"hydra", "omegaconf"}}
    assert knowing == {"cli"}


def test_every_public_name_resolves() -> None:
    """Names are imported on first use; an unknown one is an AttributeError."""
    for name in voxquilt.__all__:
        assert getattr(voxquilt, name) is not None
    with pytest.raises(AttributeError, match="module 'voxquilt' has no attribute 'GridSampl'"):
        _ = voxquilt.GridSampl


@pytest.mark.parametrize("module", MODULES)
def test_a_module_has_at_most_300_lines_and_a_docstring(module: str) -> None:
    """The docstring begins with a statement of what the module provides, not with a question."""
    text = MODULES[module].read_text("utf-8")
    assert len(text.splitlines()) <= 300
    docstring = ast.get_docstring(ast.parse(text)) or ""
    assert docstring.partition("\n")[0].endswith((".", ":")), docstring


def test_modules_and_classes_are_small() -> None:
    """Half of the modules have at most 130 lines; no class has more than 200, no constructor more than 12 arguments."""
    assert median(len(path.read_text("utf-8").splitlines()) for path in MODULES.values()) <= 130
    large: list[str] = []
    for module, path in MODULES.items():
        for node in ast.walk(ast.parse(path.read_text("utf-8"))):
            if isinstance(node, ast.ClassDef) and (node.end_lineno or 0) - node.lineno >= 200:
                large.append(f"{module}.{node.name}")
            if isinstance(node, ast.FunctionDef) and node.name == "__init__":
                given = node.args
                count = len(given.args) - 1 + len(given.kwonlyargs) + bool(given.vararg) + bool(given.kwarg)
                large += [f"{module}: a constructor with {count} arguments"] if count > 12 else []
    assert large == []


def test_every_target_in_conf_is_a_public_name() -> None:
    """So that moving a module breaks no configuration and no checkpoint."""
    targets = {
        target
        for path in (Path(__file__).parents[1] / "conf").rglob("*.yaml")
        for target in re.findall(r"_target_[:=]\s*(voxquilt[\w.]*)", path.read_text("utf-8"))
    }
    assert len(targets) > 10
    assert {target.removeprefix("voxquilt.") for target in targets} <= set(voxquilt.__all__)
