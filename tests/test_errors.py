"""Tests that the tree of errors in the docstring of errors.py is that of the classes."""

import pkgutil
from collections.abc import Iterator
from importlib import import_module

import voxquilt
from voxquilt import errors
from voxquilt.errors import PaddingModeError, VoxquiltError


def tree(cls: type, before: str = "", branch: str = "") -> Iterator[str]:
    """Lines of a class and its subclasses in order of definition, with the module where it is another one."""
    others = [base.__name__ for base in cls.__bases__ if not issubclass(base, VoxquiltError)]
    module = cls.__module__.removeprefix("voxquilt.")
    more = f", in {module}" if module != "errors" else f" ({', '.join(others)})" if branch else ""
    yield f"{before}{branch}{cls.__name__}{more}"
    children = [child for child in cls.__subclasses__() if child.__module__.startswith("voxquilt.")]
    below = before + {"": "", "|-- ": "|   ", "`-- ": "    "}[branch]
    for child in children:
        yield from tree(child, below, "`-- " if child is children[-1] else "|-- ")


def test_the_tree_in_the_docstring_is_that_of_the_classes() -> None:
    """Of every module, so that no error is defined without a place in the tree."""
    for module in pkgutil.walk_packages(voxquilt.__path__, "voxquilt."):
        import_module(module.name)
    assert errors.__doc__ is not None
    assert errors.__doc__.splitlines()[2:] == list(tree(VoxquiltError))


def test_an_error_prints_its_message() -> None:
    """Also a KeyError, which would print the message's repr."""
    assert str(PaddingModeError("no mode 'x'")) == "no mode 'x'"
