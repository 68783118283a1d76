"""Leaves torch's compiler out until something is compiled; Lightning and every optimizer import it, for a second.

All that they want of it is to keep functions out of compiled code and to recognise a compiled network. A module that
has the three names for this stands in its place until anything else is asked of it.
"""

import importlib
import sys
from collections.abc import Callable, Sequence
from functools import partial, wraps
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import FunctionType, ModuleType
from typing import Any

_NAME = "torch._dynamo"


def import_dynamo_late() -> None:
    """Have torch._dynamo imported when it is used, however it is imported; nothing changes where it is already."""
    if _NAME not in sys.modules and not any(isinstance(finder, _Finder) for finder in sys.meta_path):
        sys.meta_path.insert(0, _Finder())


def is_dynamo_loaded() -> bool:
    """Whether torch._dynamo is there as such, all of it."""
    module = sys.modules.get(_NAME)
    if module is None or isinstance(module, _Unloaded):
        return False
    return not getattr(module.__spec__, "_initializing", False)


def _load() -> ModuleType:
    """torch._dynamo as such; a second thread waits for the first in Python's own import."""
    if isinstance(sys.modules.get(_NAME), _Unloaded):
        sys.meta_path[:] = [finder for finder in sys.meta_path if not isinstance(finder, _Finder)]
        sys.modules.pop(_NAME, None)
    return importlib.import_module(_NAME)


class _Finder(MetaPathFinder):
    """Finds what stands for torch._dynamo, which is loaded before any of its own modules."""

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == _NAME:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = _UnloadedLoader()
            return spec
        if fullname.startswith(f"{_NAME}."):
            _load()
            module = sys.modules.get(fullname)
            if module is not None:  # imported meanwhile; Python would run it again, by the loader of its __spec__
                # Not set as an attribute: modules of settings refuse that.
                spec = vars(module)["__spec__"] = ModuleSpec(fullname, _KeptLoader(module))
                return spec
        return None


class _UnloadedLoader(Loader):
    def create_module(self, spec: ModuleSpec) -> "_Unloaded":
        return _Unloaded(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module).update(disable=_disable, graph_break=_graph_break, OptimizedModule=_OptimizedModule)


class _KeptLoader(Loader):
    """Answers with a module that is loaded."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


class _Unloaded(ModuleType):
    """Stands for torch._dynamo."""

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):  # asked of every module by inspect, warnings and others
            raise AttributeError(name)
        return getattr(_load(), name)


def _disable(function: Any = None, recursive: bool = True, **options: Any) -> Any:
    """What torch._dynamo.disable does: functions that it returns are not compiled. Until it is loaded, nothing is."""
    if function is None:
        return partial(_disable, recursive=recursive, **options)
    if is_dynamo_loaded() or not isinstance(function, FunctionType):
        return _load().disable(function, recursive, **options)
    disabled: list[Callable[..., Any]] = []

    @wraps(function)
    def call(*args: Any, **kwargs: Any) -> Any:
        if not disabled:
            if not is_dynamo_loaded():
                return function(*args, **kwargs)
            disabled.append(_load().disable(function, recursive, **options))
        return disabled[0](*args, **kwargs)

    return call


def _graph_break(*_: Any) -> None:
    """Does nothing outside of compiled code, as torch's own."""


class _OfCompiled(type):
    def __instancecheck__(cls, instance: Any) -> bool:
        return is_dynamo_loaded() and isinstance(instance, _load().OptimizedModule)


class _OptimizedModule(metaclass=_OfCompiled):
    """Stands for the class of compiled networks: there are none before torch._dynamo is loaded."""
