"""Spares Hydra work that it does twice or for nothing: a second composition, and lists that no help text shows."""

from argparse import ArgumentParser
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from hydra._internal import hydra as hydra_module
from hydra._internal.hydra import Hydra
from hydra.types import RunMode
from omegaconf import DictConfig


class _QuickHydra(Hydra):
    """Composes once for a run, where Hydra composes first to learn whether it is one, and then to run."""

    _composed: tuple[str | None, list[str], DictConfig] | None = None

    def get_mode(self, config_name: str | None, overrides: list[str]) -> Any:
        """RunMode.RUN or MULTIRUN if the configuration says so, else None."""
        # What cannot be composed so, such as a sweep, is left to Hydra, and so are its messages.
        with suppress(Exception):
            cfg = super().compose_config(config_name, overrides, RunMode.RUN, with_log_configuration=True)
            if cfg.hydra.mode is None:
                self._composed = config_name, [*overrides, "hydra.mode=RUN"], cfg
                return None
        return super().get_mode(config_name, overrides)

    def compose_config(self, config_name: str | None, overrides: list[str], *args: Any, **options: Any) -> DictConfig:
        """The configuration, which may be the one that `get_mode` composed."""
        if self._composed is not None and self._composed[:2] == (config_name, overrides):
            cfg, self._composed = self._composed[2], None
            cfg.hydra.mode = RunMode.RUN
            cfg.hydra.overrides.hydra.append(overrides[-1])
            return cfg
        return super().compose_config(config_name, overrides, *args, **options)

    def get_help(self, help_cfg: DictConfig, cfg: DictConfig, args_parser: ArgumentParser, resolve: bool) -> str:
        """The text of a template; groups of options are listed only if it shows them, since that takes long."""
        if "CONFIG_GROUPS" not in help_cfg.template:
            self.format_config_groups = lambda predicate, compact=True: ""
        return super().get_help(help_cfg, cfg, args_parser, resolve)


@contextmanager
def quick_hydra() -> Iterator[None]:
    """Have `hydra.main` take the shorter ways in the block."""
    hydra_module.Hydra = _QuickHydra
    try:
        yield
    finally:
        hydra_module.Hydra = Hydra
