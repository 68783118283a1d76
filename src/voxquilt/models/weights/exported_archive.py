"""Makes a torch.export archive safe to load: copies numbers and a program of allowed operators into a new archive.

`torch.export.load` unpickles records, evaluates symbolic sizes, executes guards and loads compiled libraries, and torch
has no switch against it. Without this module every .pt2 would need model.trust_checkpoint=true, and people would learn
to set it for files of others. It is bound to names of torch's own records; where a later torch changes them, an archive
is refused, and never loaded unchecked.
"""

import ast
import io
import json
import pickle
import re
import zipfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

_PLAIN = ("archive_format", "archive_version", "byteorder", ".data/version")
_MODEL, _SAMPLES = "models/model.json", "data/sample_inputs/model.pt"
_PAYLOADS = {"data/weights/": "weight_", "data/constants/": "tensor_"}
_CONFIGS = {"data/weights/": "model_weights_config.json", "data/constants/": "model_constants_config.json"}

_ARITHMETIC = "add|sub|mul|truediv|floordiv|mod|pow|neg|eq|ne|lt|le|gt|ge|and_|or_|getitem"
# Those of torch's operators that compute; aten.from_file would read and make files.
_TARGET = re.compile(
    r"torch\.ops\.aten\.(?!from_file)\w+\.\w+|torch\.ops\.higher_order\.wrap_with_(set_grad_enabled|autocast)"
    rf"|_operator\.({_ARITHMETIC})|math\.(ceil|floor|trunc|sqrt)|torch\.sym_\w+"
)
_NAME = re.compile(r"(?!(.*\.)?__\w*__(\.|$))[\w.-]*")
_TREES = ("builtins.tuple", "builtins.list", "builtins.dict", "collections.OrderedDict", None)
_SYMPY = "Symbol Integer Float Rational Add Mul Pow Max Min Eq Ne Lt Le Gt Ge And Or Not FloorDiv CleanDiv CeilDiv Mod "
_SYMPY += "PythonMod ModularIndexing Where FloorToInt CeilToInt TruncToInt RoundToInt ToFloat IntTrueDiv FloatTrueDiv "
_SYMPY += "PowByNatural FloatPow Identity"
_FUNCTIONS = frozenset(_SYMPY.split())
_TEXT = ("as_string", "torch_version")  # only ever printed as literals, or not used


def copy_allowed(path: Path) -> io.BytesIO:
    """A copy of an archive, made of what is allowed.

    Raises:
        ValueError: the archive holds something that is not allowed, which is named; or it is not such an archive.
    """
    try:
        with zipfile.ZipFile(path) as old:
            return _copy_records({name.partition("/")[2]: old.read(name) for name in old.namelist()})
    except (zipfile.BadZipFile, KeyError, RecursionError, TypeError, AttributeError, NotImplementedError) as error:
        raise ValueError(f"not a torch.export archive of torch 2.8 or later: {error}") from error


def _copy_records(records: Mapping[str, bytes]) -> io.BytesIO:
    compiled = [name for name in records if name.startswith("data/aotinductor/")]
    if compiled:
        raise ValueError(f"it holds compiled code: {compiled[0]}")
    kept = {name: records[name] for name in _PLAIN if name in records}
    model = _from_json(records[_MODEL])
    kept[_MODEL] = _to_json(_strip_program(model))
    kept[_SAMPLES] = _repickle(records[_SAMPLES], _SAMPLES)
    for folder, prefix in _PAYLOADS.items():
        config = _from_json(records[folder + _CONFIGS[folder]])
        kept[folder + _CONFIGS[folder]] = _to_json(_check_strings(config))
        for payload in config["config"].values():
            name = payload["path_name"]
            if not name.startswith(prefix):
                raise ValueError(f"it holds an object that is not a tensor: {folder}{name}")
            content = records[folder + name]
            kept[folder + name] = _repickle(content, folder + name) if payload["use_pickle"] else content
    new = io.BytesIO()
    with zipfile.ZipFile(new, "w") as file:
        for name, content in kept.items():
            file.writestr(f"checked/{name}", content)
    new.seek(0)
    return new


def _strip_program(model: Any) -> Any:
    """A program without what is executed (guards) and what only explains (metadata)."""
    model["guards_code"] = []
    _drop_metadata(model["graph_module"])
    return _check_strings(model)


def _drop_metadata(node: Any) -> None:
    if isinstance(node, dict):
        if isinstance(node.get("metadata"), dict):
            node["metadata"] = {}
        for child in node.values():
            _drop_metadata(child)
    elif isinstance(node, list):
        for child in node:
            _drop_metadata(child)


def _check_strings(node: Any, key: str = "") -> Any:
    """The same node, once every key and string in it is of the kind that belongs there."""
    if isinstance(node, dict):
        for name, child in node.items():
            _check_name(name, key)
            _check_strings(child, name)
    elif isinstance(node, list):
        for child in node:
            _check_strings(child, key)
    elif isinstance(node, str):
        _check_string(node, key)
    return node


def _check_string(text: str, key: str) -> None:
    if key in ("target", "as_operator"):
        if not _TARGET.fullmatch(text):
            raise ValueError(f"its program calls {text!r}, which is not one of the operators that are allowed")
    elif key == "expr_str":
        _check_expression(ast.parse(text, mode="eval").body, text)
    elif key in ("in_spec", "out_spec"):
        _check_tree(_from_json(text.encode())[1])
    elif key not in _TEXT:
        _check_name(text, key)


def _check_name(text: str, key: str) -> None:
    # Names become Python source when the program is built.
    if not _NAME.fullmatch(text):
        raise ValueError(f"its program has {text[:80]!r} under {key!r}, where a name is wanted")


def _check_expression(node: ast.AST, text: str) -> None:
    """A sympy expression as torch writes it: calls of a few functions with numbers, names and each other."""
    if isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id in _FUNCTIONS:
        for child in [*node.args, *(keyword.value for keyword in node.keywords)]:
            _check_expression(child, text)
        return
    if isinstance(node, ast.Constant):
        if isinstance(node.value, str):
            _check_name(node.value, "expr_str")
        return
    if isinstance(node, ast.UnaryOp) and isinstance(node.operand, ast.Constant):
        return
    if isinstance(node, ast.Name) and re.fullmatch(r"[su]\d+|oo|int_oo", node.id):
        return
    raise ValueError(f"its program has the symbolic size {text[:80]!r}, which would be evaluated")


def _check_tree(tree: Any) -> None:
    context = tree["context"]
    if tree["type"] not in _TREES or "{" in str(context):
        raise ValueError(f"its inputs or outputs are of a type that would be imported: {tree['type']}, {context}")
    for child in tree["children_spec"]:
        _check_tree(child)


def _repickle(content: bytes, name: str) -> bytes:
    """The tensors and plain values of a pickle, pickled by this process."""
    try:
        loaded = torch.load(io.BytesIO(content), map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError, OSError, zipfile.BadZipFile) as error:
        raise ValueError(f"{name} holds more than tensors and plain values: {str(error).splitlines()[0]}") from error
    buffer = io.BytesIO()
    torch.save(loaded, buffer)
    return buffer.getvalue()


def _from_json(content: bytes) -> Any:
    return json.loads(content.decode())


def _to_json(node: Any) -> bytes:
    return json.dumps(node).encode()
