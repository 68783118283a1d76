"""Defines the errors that voxquilt raises on purpose.

VoxquiltError
|-- ConfigError (ValueError)
|   `-- ChannelsError, in planning.network_check
|-- InputError (ValueError)
|-- GridError (ValueError)
|   `-- PaddingModeError (KeyError)
|-- BatchError (ValueError)
|-- PatchShapeError (RuntimeError)
|-- LedgerError (RuntimeError, AssertionError)
|-- OutputError (RuntimeError)
|   `-- ElsewhereError, in distributed.slab_exchange
|-- RunError (RuntimeError)
`-- FetchError (RuntimeError)
"""


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


class FetchError(VoxquiltError, RuntimeError):
    """A file could not be fetched, or what came is not the file that was wanted. The cache is as it was."""
