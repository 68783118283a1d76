"""Reads which components nnU-Net's post-processing keeps; a pickle that says the same is never opened."""

import logging
from collections.abc import Iterator
from pathlib import Path

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.folder import NnunetFolder
from voxquilt.models.nnunet.json_values import USE_NNUNET, Node, is_integer, read_object

log = logging.getLogger("voxquilt")

_FUNCTION = "remove_all_but_largest_component_from_segmentation"
_TEXT, _PICKLE = "postprocessing.json", "postprocessing.pkl"

Unions = tuple[tuple[int, ...], ...]


def read_postprocessing(folder: NnunetFolder) -> Unions:
    """Unions of labels of which only the largest component is kept, in turn; empty where there is no such file.

    As nnU-Net's postprocessing/remove_connected_components.py writes them, into the folder of the cross-validation.

    Raises:
        ConfigError: the file is wrong, names another function, or there are several and none is of these folds.
    """
    file = _find(folder, _TEXT)
    if file is not None:
        return _parse(read_object(file))
    other = _find(folder, _PICKLE)
    if other is not None:
        log.warning("%s is not used, since opening it can run code; %s beside it would be.", other, _TEXT)
    return ()


def _find(folder: NnunetFolder, name: str) -> Path | None:
    suffix = "_".join(map(str, folder.folds))
    crossval = folder.path / f"crossval_results_folds_{suffix}" / name
    for file in (folder.path / name, crossval):
        if file.is_file():
            return file
    others = sorted(folder.path.glob(f"crossval_results_folds_*/{name}"))
    if len(others) > 1:
        lines = "".join(f"\n  {file}" for file in others)
        raise ConfigError(f"{folder.path} has several, none of folds {suffix}; copy one to {folder.path}:{lines}")
    beside = folder.path.parent / name
    return others[0] if others else beside if beside.is_file() else None


def _parse(node: Node) -> Unions:
    functions, arguments = (node.values.get(f"postprocessing_{key}") for key in ("fns", "kwargs"))
    if not isinstance(functions, list) or any(function != _FUNCTION for function in functions):
        raise node.refusal("postprocessing_fns", f"a list of {_FUNCTION}", USE_NNUNET)
    if not isinstance(arguments, list) or len(arguments) != len(functions):
        raise node.refusal("postprocessing_kwargs", f"a list of {len(functions)} objects")
    return tuple(_union(Node(node.file, {str(n): step}).child(str(n))) for n, step in enumerate(arguments))


def _union(step: Node) -> tuple[int, ...]:
    for key in step.values:
        if key not in ("labels_or_regions", "background_label"):
            raise step.refusal(key, f"no such argument of {_FUNCTION}", USE_NNUNET)
    if step.values.get("background_label", 0) != 0:
        raise step.refusal("background_label", "0", USE_NNUNET)
    entries = list(_flat(step.values.get("labels_or_regions")))
    labels = {label for label in entries if is_integer(label) and label > 0}
    if not labels or not labels.issuperset(entries):
        raise step.refusal("labels_or_regions", "a label above 0, or lists of such labels")
    return tuple(sorted(labels))


def _flat(value: object) -> Iterator[object]:
    if isinstance(value, list):
        for item in value:
            yield from _flat(item)
    else:
        yield value
