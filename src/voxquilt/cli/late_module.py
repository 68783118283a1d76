"""Imports a module when it is used: a stand-in with a few of its names is in its place until anything else is asked."""

import importlib
import sys
from collections.abc import Callable, Mapping, Sequence
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec, PathFinder
from types import ModuleType
from typing import Any

# Names of this form that import the module; others are asked of every module by inspect, warnings and others.
_LOADING = ("__all__", "__version__")

StandIns = Callable[[], Mapping[str, Any]]


def import_late(name: str, stand_ins: StandIns, user: str | None = None) -> None:
    """Have a module imported when it is used, however it is imported; nothing changes where it is already.

    Args:
        name: The module or package.
        stand_ins: Makes values of some of its names, which do not import it.
        user: The only module that gets these; whatever others ask imports the module as such. None: all do.
    """
    if name not in sys.modules and not any(isinstance(f, _Finder) and f.name == name for f in sys.meta_path):
        sys.meta_path.insert(0, _Finder(name, stand_ins, user))


def is_loaded(name: str) -> bool:
    """Whether a module is there as such, all of it."""
    module = sys.modules.get(name)
    if module is None or isinstance(module, _Unloaded):
        return False
    return not getattr(module.__spec__, "_initializing", False)


def load(name: str) -> ModuleType:
    """A module as such; a second thread waits for the first in Python's own import."""
    if isinstance(sys.modules.get(name), _Unloaded):
        sys.meta_path[:] = [
            finder for finder in sys.meta_path if not (isinstance(finder, _Finder) and finder.name == name)
        ]
        sys.modules.pop(name, None)
    return importlib.import_module(name)


class _Finder(MetaPathFinder):
    """Finds what stands for a module, which is loaded before any of its own modules."""

    def __init__(self, name: str, stand_ins: StandIns, user: str | None) -> None:
        self.name, self._loader = name, _UnloadedLoader(stand_ins, user)

    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> ModuleSpec | None:
        if fullname == self.name:
            spec = PathFinder.find_spec(fullname, path, target)
            if spec is not None:
                spec.loader = self._loader
            return spec
        if fullname.startswith(f"{self.name}."):
            load(self.name)
            module = sys.modules.get(fullname)
            if module is not None:  # imported meanwhile; Python would run it again, by the loader of its __spec__
                # Not set as an attribute: modules of settings refuse that.
                spec = vars(module)["__spec__"] = ModuleSpec(fullname, _KeptLoader(module))
                return spec
        return None


class _UnloadedLoader(Loader):
    def __init__(self, stand_ins: StandIns, user: str | None) -> None:
        self._stand_ins, self._user = stand_ins, user

    def create_module(self, spec: ModuleSpec) -> "_Unloaded":
        return _Unloaded(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["_stand_ins"] = self._stand_ins(), self._user


class _KeptLoader(Loader):
    """Answers with a module that is loaded."""

    def __init__(self, module: ModuleType) -> None:
        self._module, self._spec = module, module.__spec__

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return self._module

    def exec_module(self, module: ModuleType) -> None:
        vars(module)["__spec__"] = self._spec


class _Unloaded(ModuleType):
    """Stands for a module."""

    _stand_ins: tuple[Mapping[str, Any], str | None]

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__") and name not in _LOADING:
            raise AttributeError(name)
        stand_ins, user = self._stand_ins
        if name in stand_ins and user in (None, sys._getframe(1).f_globals.get("__name__")):
            return stand_ins[name]
        return getattr(load(self.__name__), name)
