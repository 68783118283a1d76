"""Checks and builds the loggers of a run: one, or several by name, as in logger=[csv,mlflow]."""

import logging
from collections.abc import Iterator, Mapping
from importlib.util import find_spec
from typing import Any

from voxquilt.cli.instantiate import build
from voxquilt.distributed.environment import is_first
from voxquilt.errors import ConfigError
from voxquilt.reporting.database_turns import turn

log = logging.getLogger("voxquilt")

# The options of the group.
_NAMES = ("csv", "mlflow", "tensorboard", "wandb")
# Packages whose errors are of a server or a database, not of a setting.
_BACKENDS = ("mlflow", "sqlalchemy", "sqlite3", "wandb", "requests")
# The package that a logger of Lightning's needs, which is also the name of the extra that brings it.
_PACKAGES = {"MLFlowLogger": "mlflow", "WandbLogger": "wandb"}


def check_loggers(node: Any) -> None:
    """Refuse loggers that cannot be built, before torch is imported.

    Raises:
        ConfigError: a node without a _target_, or one whose package is not installed.
    """
    for key, logger in _nodes(node):
        if not isinstance(logger, Mapping) or "_target_" not in logger:
            raise ConfigError(f"{key} must be a logger with a _target_, such as logger=csv; it is {logger!r}.")
        module, _, name = str(logger["_target_"]).rpartition(".")
        package = _PACKAGES.get(name) if module.startswith("lightning.") else None
        if package is not None and not _is_installed(package):
            raise ConfigError(
                f"{key} needs the package {package}, which is not installed: pip install 'voxquilt[{package}]'. "
                f"Nothing was started."
            )


def _is_installed(package: str) -> bool:
    spec = find_spec(package)
    return spec is not None and spec.origin is not None  # a folder of that name, where runs were logged, has no origin


def build_loggers(node: Any) -> Any:
    """The loggers, as Lightning's Trainer takes them: a list, or False for none.

    Raises:
        ConfigError: one cannot be built, or is not a logger of Lightning's.
    """
    return [_build(key, logger) for key, logger in _nodes(node)] or False


def _build(key: str, node: Mapping[str, Any]) -> Any:
    # Here, since they import torch.
    from lightning.pytorch.loggers import Logger
    from lightning.pytorch.loggers.logger import DummyLogger

    if not is_first() and str(node["_target_"]).startswith("lightning."):
        return DummyLogger()  # they log on rank 0 only, and MLflow's would make its database in each process
    try:
        with turn(node.get("tracking_uri")):
            logger = build(node, key)
    except ConfigError as error:
        cause = error.__cause__ and (error.__cause__.__cause__ or error.__cause__)
        if not isinstance(cause, OSError) and type(cause).__module__.partition(".")[0] not in _BACKENDS:
            raise
        log.warning("nothing is logged by %s: %s", key, error)
        return DummyLogger()
    if not isinstance(logger, Logger):
        raise ConfigError(f"{key} is a {type(logger).__name__}, which is not a logger of Lightning's.")
    return logger


def _nodes(node: Any) -> Iterator[tuple[str, Any]]:
    """Each logger by its key; those that are null are left out."""
    if not isinstance(node, Mapping) or "_target_" in node:
        named = [name for name in _NAMES if isinstance(node, Mapping) and node.get(name)]
        if named:
            raise ConfigError(
                f"logger has a _target_ beside logger.{named[0]}: give that one a name too, such as "
                f"+logger.mine._target_={node['_target_']}, or take the other out by ~logger.{named[0]}."
            )
        yield from [("logger", node)] if node else ()
        return
    yield from ((f"logger.{name}", logger) for name, logger in node.items() if logger)
