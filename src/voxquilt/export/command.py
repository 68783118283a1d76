"""Exports a checkpoint from the command line: reads the arguments, and answers with a message and an exit status.

torch is imported once the arguments are right.
"""

import argparse
import sys
from collections.abc import Sequence
from pathlib import Path

from voxquilt.distributed.signals import ended_at_once
from voxquilt.errors import ConfigError, VoxquiltError
from voxquilt.geometry.frame import to_triple
from voxquilt.text import escape_streams

_FORMATS = {".onnx": "ONNX", ".pt2": "an exported program", ".ts": "TorchScript"}


def main(arguments: Sequence[str] | None = None) -> None:
    """`voxquilt-export` and `python -m voxquilt.export`: exits 0 if the file is there and was compared, else 2."""
    escape_streams()
    typed = _parser().parse_args(arguments)
    try:
        source, target = Path(typed.checkpoint).expanduser(), Path(typed.target).expanduser()
        _check_files(source, target, overwrite=typed.overwrite)
        patch_size = None if typed.patch_size is None else _to_patch(typed.patch_size)
        sys.path.append(str(Path.cwd()))  # classes of the user's, as predict.py finds them
        with ended_at_once():
            from voxquilt.export.exporting import export  # imports torch

        print(export(source, target, patch_size, typed.batch_size, typed.allow))
    except (VoxquiltError, OSError) as error:  # such as a folder that may not be written, or a full disk
        print(f"voxquilt: {error}", file=sys.stderr)
        sys.exit(2)


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="voxquilt-export",
        description="Writes the network of a checkpoint, with its settings, as a file that needs no Python class, and "
        "compares the outputs of the two.",
    )
    parser.add_argument("checkpoint", help="a file that brings its network and settings, such as train.py's best.ckpt")
    parser.add_argument("target", help="network.onnx (for onnxruntime), network.pt2 (torch.export) or network.ts "
                        "(TorchScript)")  # fmt: skip
    parser.add_argument("--patch-size", metavar="96 | 96,96,64", help="voxels along i, j, k: the only size that .onnx "
                        "and .pt2 take (the checkpoint's data.patch_size)")  # fmt: skip
    parser.add_argument("--batch-size", type=int, metavar="N", help="patches that .onnx and .pt2 take at a time (any "
                        "number, or 1 where the network cannot be exported so)")  # fmt: skip
    parser.add_argument("--allow", action="append", default=[], metavar="my_package.*",
                        help="classes of yours that the checkpoint may name, as run.checkpoint_targets")  # fmt: skip
    parser.add_argument("--overwrite", action="store_true", help="replace the file if it is there")
    return parser


def _check_files(source: Path, target: Path, *, overwrite: bool) -> None:
    """Raises ConfigError of files that cannot be read from or written to."""
    if not source.is_file():
        raise ConfigError(f"there is no file {source} (relative to {Path.cwd()}).")
    if target.suffix not in _FORMATS:
        ways = ", ".join(f"{suffix} for {what}" for suffix, what in _FORMATS.items())
        raise ConfigError(f"{target}: the suffix says what is written: {ways}.")
    if not target.parent.is_dir():
        raise ConfigError(f"{target} cannot be written: there is no folder {target.parent}.")
    if target.exists() and (not overwrite or not target.is_file() or target.samefile(source)):
        raise ConfigError(f"{target} is there already; choose another name, or --overwrite to replace a file.")


def _to_patch(text: str) -> tuple[int, int, int]:
    try:
        numbers = [int(part) for part in text.strip("[]").split(",")]
    except ValueError as error:
        raise ConfigError(f"--patch-size is an integer or three, such as 96 or 96,96,64; it is {text!r}.") from error
    return to_triple(numbers[0] if len(numbers) == 1 else numbers, "--patch-size", minimum=1)
