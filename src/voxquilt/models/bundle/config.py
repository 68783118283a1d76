"""Reads the configuration of a MONAI bundle as text: references are followed, and nothing is evaluated or imported."""

import json
import re
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import yaml

from voxquilt.errors import ConfigError
from voxquilt.models.bundle.expressions import NOT_READ, read_expression
from voxquilt.text import first_line

SEPARATOR = "#"
MOST_BYTES, _MOST_VALUES, _MOST_DEEP = 16 * 2**20, 100_000, 40
_REFERENCE = re.compile(r"@((?:#|::)*\w+(?:(?:#|::)\w+)*)")
# What templates of bundles have in the place of such values.
_MISSING = "???"
_FILL_IN = "Write it there, or into a copy of this file beside it, and name the copy by model.config."
TRUST = "If you trust the bundle's code, set model.trust_bundle=true."


@dataclass(frozen=True)
class BundleConfig:
    """The configuration of a bundle.

    Args:
        file: The file, for messages.
        root: What it holds.
        evaluate: With trust, gives the value of an id that cannot be read; None refuses it.
    """

    file: Path
    root: Mapping[str, Any]
    evaluate: Callable[[str], Any] | None = field(default=None, compare=False)

    @property
    def is_trusted(self) -> bool:
        """Whether code of the bundle may run."""
        return self.evaluate is not None

    def __contains__(self, key: str) -> bool:
        return key in self.root

    def refusal(self, key: str, why: str, advice: str = TRUST) -> ConfigError:
        """An error about the value of an id: what it says, what is wrong, and what to do."""
        try:
            shown = repr(self._walk(key)[1])
        except ConfigError:
            shown = "missing"
        shown = shown if len(shown) <= 120 else f"{shown[:117]}..."
        return ConfigError(f"{self.file}: {key} is {shown}: {why} {advice}".rstrip())

    def raw(self, key: str) -> tuple[str, Any]:
        """What stands at an id, references followed: the id where it stands, and the value as it is written.

        Raises:
            ConfigError: there is nothing, or a value that is to be filled in, or references lead in a circle.
        """
        seen: list[str] = []
        key, value = self._walk(key)
        while isinstance(value, str) and (target := _REFERENCE.fullmatch(value.strip())):
            if key in seen:
                raise ConfigError(f"{self.file}: references lead in a circle: {' -> '.join([*seen, key])}.")
            seen.append(key)
            key, value = self._walk(absolute(key, target[1]))
        if isinstance(value, str) and value.strip() == _MISSING:
            raise self.refusal(key, "its value is missing, and is to be filled in by who uses the bundle.", _FILL_IN)
        return key, value

    def value(self, key: str) -> Any:
        """The plain value of an id: lists, mappings, text and numbers, references followed.

        Raises:
            ConfigError: it is not plain.
        """
        return self._plain(key, iter(range(_MOST_VALUES)), ())

    def _walk(self, key: str) -> tuple[str, Any]:
        node: Any = self.root
        done: list[str] = []
        for part in key.split(SEPARATOR):
            if isinstance(node, str) and _REFERENCE.fullmatch(node.strip()):
                at, node = self.raw(SEPARATOR.join(done))
                done = at.split(SEPARATOR)
            if isinstance(node, Mapping) and part in node:
                node = node[part]
            elif isinstance(node, list) and part.isdecimal() and int(part) < len(node):
                node = node[int(part)]
            else:
                raise ConfigError(f"{self.file} has no {key}, which is needed or referred to.")
            done.append(part)
            if len(done) > _MOST_DEEP:
                raise ConfigError(f"{self.file}: {key[:100]} is nested too deeply.")
        return SEPARATOR.join(done), node

    def _plain(self, key: str, budget: Iterator[int], within: tuple[str, ...]) -> Any:
        key, node = self.raw(key)
        if key in within or len(within) > _MOST_DEEP or next(budget, None) is None:
            raise ConfigError(f"{self.file}: {key[:100]} refers to itself, or holds too many values.")
        within = (*within, key)
        if isinstance(node, list):
            return [self._plain(f"{key}{SEPARATOR}{n}", budget, within) for n in range(len(node))]
        if isinstance(node, Mapping):
            for name in node:
                if name.startswith("_"):
                    raise self.refusal(key, f"{name} makes it an object; wanted are plain values.")
            return {name: self._plain(f"{key}{SEPARATOR}{name}", budget, within) for name in node}
        if isinstance(node, str):
            return self._text(key, node)
        if node is None or isinstance(node, bool | int | float):
            return node
        raise self.refusal(key, "it is not a plain value.", "")

    def _text(self, key: str, text: str) -> Any:
        stripped = text.strip()
        if stripped.startswith("$") and not stripped.startswith("${"):
            value = read_expression(stripped, lambda name: self.value(absolute(key, name)))
            if value is not NOT_READ:
                return value
            if self.evaluate is not None:
                return self.evaluate(key)
            raise self.refusal(key, "it is an expression, which voxquilt does not evaluate.")
        if stripped.startswith("%"):
            raise self.refusal(key, "it is a macro, a text of another place or file.", "Put that text there.")
        if "${" in text:
            raise self.refusal(key, "it is not a plain text.", "")
        return text


def absolute(key: str, name: str) -> str:
    """The id that a reference means, which may be relative: '#A' is A beside the key, '##A' beside its parent."""
    name = name.replace("::", SEPARATOR)
    ups = len(name) - len(name.lstrip(SEPARATOR))
    return SEPARATOR.join([*key.split(SEPARATOR)[:-ups], name[ups:]]) if ups else name


def read_config(file: Path) -> BundleConfig:
    """A configuration in JSON or YAML.

    Raises:
        ConfigError: the file cannot be read, is too large, or holds something else.
    """
    try:
        if file.stat().st_size > MOST_BYTES:
            raise ConfigError(f"{file} has {file.stat().st_size} bytes; no configuration of a bundle is that large.")
        text = file.read_text("utf-8")
        root = json.loads(text) if file.suffix == ".json" else yaml.safe_load(text)
    except OSError as error:
        raise ConfigError(f"{file} cannot be read: {error.strerror or error}.") from error
    except yaml.YAMLError as error:
        raise ConfigError(f"{file} is not plain YAML, and nothing else is read: {first_line(error)}.") from error
    except (ValueError, RecursionError) as error:
        raise ConfigError(f"{file} is not {file.suffix[1:].upper()}: {first_line(error)}.") from error
    if not isinstance(root, dict):
        raise ConfigError(f"{file} holds {type(root).__name__}; wanted is an object.")
    return BundleConfig(file, _with_text_keys(root))


def _with_text_keys(node: Any, depth: int = 0, done: dict[int, Any] | None = None) -> Any:
    """The same with keys that are text. What aliases of YAML share stays shared, or few lines could fill memory."""
    done = {} if done is None else done
    if depth > 2 * _MOST_DEEP or not isinstance(node, dict | list):
        return node
    if id(node) not in done:
        if isinstance(node, list):
            done[id(node)] = [_with_text_keys(child, depth + 1, done) for child in node]
        else:
            done[id(node)] = {str(key): _with_text_keys(child, depth + 1, done) for key, child in node.items()}
    return done[id(node)]
