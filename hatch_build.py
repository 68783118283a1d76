"""Puts NiiVue, the script of the report's viewer, into wheels: see src/voxquilt/report/niivue.py."""

import importlib.util
import os
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface


class NiiVueHook(BuildHookInterface):
    """Fetches the script before a wheel is built, but not for an editable installation, which `make` fetches it for."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Fetch; VOXQUILT_NO_VIEWER=1 builds a wheel without the viewer, where there is no registry.

        Raises:
            OSError: it cannot be fetched.
        """
        if version == "editable" or os.environ.get("VOXQUILT_NO_VIEWER"):
            return
        # From its path, since the package's own dependencies are not here.
        path = Path(self.root) / "src/voxquilt/report/niivue.py"
        spec = importlib.util.spec_from_file_location("niivue", path)
        assert spec is not None
        assert spec.loader is not None
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
        module.fetch()
