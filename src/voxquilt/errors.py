"""What can go wrong, as the few kinds that a caller would want to tell apart."""


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
