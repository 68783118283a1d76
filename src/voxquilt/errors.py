"""What can go wrong, as the few kinds that a caller would want to tell apart."""

import re


class VoxquiltError(Exception):
    """Base of every error that voxquilt raises on purpose."""

    def __str__(self) -> str:
        # KeyError, from which some kinds also derive, would print the repr of its message.
        return Exception.__str__(self)


class ConfigError(VoxquiltError, ValueError):
    """The configuration is wrong, or names inputs that are not there: nothing was started (exit status 2)."""


class InputError(VoxquiltError, ValueError):
    """An image cannot be used: its file, its header, its voxels, or its geometry beside the subject's other images."""


class GridError(VoxquiltError, ValueError):
    """Patch size, overlap and volume do not make a grid."""


class PaddingModeError(GridError, KeyError):
    """A padding mode that is neither a number nor one of numpy.pad's."""


class BatchError(VoxquiltError, ValueError):
    """A batch and its locations do not belong together."""


class PatchShapeError(VoxquiltError, RuntimeError):
    """A patch does not have the shape, the channels or the place that the grid wants."""


class LedgerError(VoxquiltError, RuntimeError, AssertionError):
    """A patch is missing at the end, or came twice."""


class OutputError(VoxquiltError, RuntimeError):
    """A network's output, or the file made of it, cannot be what was asked for."""


class RunError(VoxquiltError, RuntimeError):
    """A run of several processes broke off: one of them died or stopped."""


def of_subjects(count: int) -> str:
    """'1 subject', or more of them."""
    return f"{count} subject{'s' * (count != 1)}"


def plain_text(error: object) -> str:
    """An error's text without a terminal's codes for colours and bold letters, which torch puts into its own."""
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", str(error)).strip()


def first_line(error: BaseException) -> str:
    """Of an error's text; its kind where it has none."""
    return (plain_text(error) or type(error).__name__).splitlines()[0]


def reason_of(error: Exception) -> str:
    """An error as a row of the manifest tells it."""
    return str(error) if isinstance(error, VoxquiltError) else f"{type(error).__name__}: {_gist(error)}"


def _gist(error: Exception) -> str:
    """TorchScript puts its own traceback before the message; other messages are kept as they are."""
    text = plain_text(error)
    return text.splitlines()[-1] if "TorchScript" in text.split("\n")[0] else text
