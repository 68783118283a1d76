"""Imports MONAI in a third of the time: modules of SciPy, scikit-image and Matplotlib are loaded when it uses them."""

import sys
from collections.abc import Callable, Sequence
from functools import wraps
from importlib import import_module
from importlib.abc import MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder, SourceFileLoader
from importlib.util import LazyLoader
from inspect import signature
from types import ModuleType
from typing import Any

from voxquilt.cli.collector import paused_collector

_LATE = frozenset({"scipy", "skimage", "matplotlib"})


def import_monai_quickly() -> None:
    """Have MONAI imported quickly by whoever imports it first.

    Where it is imported already, or is not in a folder on the path, nothing changes.
    """
    if "monai" not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


class _Finder(MetaPathFinder):
    """Finds MONAI and, while it is imported, the modules that it imports late."""

    def __init__(self) -> None:
        self.loaders: dict[str, Callable[[SourceFileLoader], Any]] = {"monai": self._monai}

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        """The specification that Python finds itself, with a loader of ours."""
        change = self.loaders.get(fullname)
        spec = change and PathFinder.find_spec(fullname, path, target)
        if not change or not spec or type(spec.loader) is not SourceFileLoader:
            return None
        spec.loader = change(spec.loader)
        return spec

    def _monai(self, loader: SourceFileLoader) -> "_Loader":
        del self.loaders["monai"]
        self.loaders |= {"monai.utils.module": _OptionalLoader.of, "matplotlib.pyplot": LazyLoader}
        return _Loader(loader.name, loader.path, self)


class _Loader(SourceFileLoader):
    """Loads MONAI, all of it."""

    def __init__(self, fullname: str, path: str, finder: MetaPathFinder) -> None:
        super().__init__(fullname, path)
        self._finder = finder

    def exec_module(self, module: ModuleType) -> None:
        try:
            with paused_collector():
                super().exec_module(module)
        finally:
            sys.meta_path.remove(self._finder)


class _OptionalLoader(SourceFileLoader):
    """Loads the module whose `optional_import` is MONAI's way to whatever need not be installed."""

    @classmethod
    def of(cls, loader: SourceFileLoader) -> "_OptionalLoader":
        return cls(loader.name, loader.path)

    def exec_module(self, module: ModuleType) -> None:
        super().exec_module(module)
        vars(module)["optional_import"] = _late(vars(module)["optional_import"])


def _late(optional_import: Callable[..., tuple[Any, bool]]) -> Callable[..., tuple[Any, bool]]:
    """An `optional_import` that finds some packages' modules without importing them."""
    parameters = signature(optional_import)

    @wraps(optional_import)
    def late_import(*args: Any, **kwargs: Any) -> tuple[Any, bool]:
        bound = parameters.bind(*args, **kwargs)
        bound.apply_defaults()
        wanted = bound.arguments
        module, name = wanted["module"], wanted["name"]
        is_plain = wanted["as_type"] == "default" and not wanted["version_args"]
        if not is_plain or not _is_there(module):
            return optional_import(*args, **kwargs)
        top = import_module(module.partition(".")[0])
        if wanted["version_checker"](top, wanted["version"]):
            return _Late(module, name), True
        return optional_import(*args, **kwargs)

    return late_import


def _is_there(module: str) -> bool:
    """Whether a module of a package whose modules wait exists; only the package itself is imported."""
    top, *rest = module.split(".")
    if top not in _LATE or not rest:
        return False
    try:
        path = import_module(top).__path__
    except ImportError:
        return False
    for part in rest:
        top = f"{top}.{part}"
        spec = PathFinder.find_spec(top, path)
        if spec is None:
            return False
        path = spec.submodule_search_locations
    return True


class _Late:
    """Stands for a module, or for what has this name in it, until it is used."""

    def __init__(self, module: str, name: str) -> None:
        self._module, self._name = module, name

    def _loaded(self) -> Any:
        module = import_module(self._module)
        return getattr(module, self._name) if self._name else module

    def __reduce__(self) -> tuple[Any, ...]:
        return _Late, (self._module, self._name)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loaded(), name)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._loaded()(*args, **kwargs)
