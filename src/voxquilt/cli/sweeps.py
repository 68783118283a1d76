"""Gives each job of a sweep (--multirun) a folder of its own, named by what the sweep varies."""

import re
from collections.abc import Mapping, Sequence

from hydra.core.hydra_config import HydraConfig
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.types import RunMode
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from voxquilt.text import digest

# Hydra's list of keys that are not part of a job's name, which reaches jobs that run elsewhere with all the rest.
_EXCLUDED = "hydra.job.config.override_dirname.exclude_keys"
# Shards are parts of one run, and share its folder.
_SHARED = ("shard.index", "shard.count")
_LONGEST = 120


def with_names(arguments: Sequence[str]) -> list[str]:
    """The arguments of a sweep with a list of the keys that it does not vary; those of a single run as they are.

    >>> with_names(["-m", "data.patch_size=32,48", "output_dir=out"])[-1]
    'hydra.job.config.override_dirname.exclude_keys=["output_dir"]'
    """
    sweeps = any(text in ("-m", "--multirun") or text.startswith("hydra.mode=") for text in arguments)
    if not sweeps or any(_EXCLUDED in text for text in arguments):
        return list(arguments)
    parser = OverridesParser.create()
    typed = [text for text in arguments if not text.startswith("-") and ("=" in text or text.startswith("~"))]
    overrides = [parser.parse_override(text) for text in typed]
    # What is typed twice is varied if one of them is.
    varied = {override.key_or_group for override in overrides if override.is_sweep_override()}
    fixed = [override.key_or_group for override in overrides if override.key_or_group not in varied]
    names = ",".join(f'"{name}"' for name in dict.fromkeys(fixed))
    return [*arguments, f"{_EXCLUDED}=[{names}]"]


def give_folder(cfg: DictConfig) -> None:
    """Put a job of a sweep into a folder of its own inside output_dir; changes `cfg`.

    A sweep over output_dir, or an output_dir that differs by what is varied, is left as it is.
    """
    if not HydraConfig.initialized() or HydraConfig.get().mode != RunMode.MULTIRUN:
        return
    hydra = HydraConfig.get()
    excluded = {*hydra.job.config.override_dirname.exclude_keys, *_SHARED}
    pairs = [text.lstrip("+").partition("=") for text in hydra.overrides.task if not text.startswith("~")]
    varied = {key: value for key, _, value in pairs if key not in excluded}
    text = OmegaConf.to_container(cfg, resolve=False)["output_dir"]  # type: ignore[call-overload]
    if not isinstance(text, str) or "output_dir" in varied or re.search(r"\$\{hydra[:.](job|sweep)\b", text):
        return
    unnamed = {key: value for key, value in varied.items() if not _decides(key, text, cfg)}
    if unnamed:
        with open_dict(cfg):
            cfg.output_dir = f"{cfg.output_dir.rstrip('/')}/{folder_name(unnamed)}"


def folder_name(values: Mapping[str, str]) -> str:
    """A folder's name that shows the values of a job, is valid in any file system, and needs no quotes.

    It does not depend on the order of the keys. A digest replaces characters that cannot be shown, and a long end.

    >>> folder_name({"stitch.overlap_mode": "crop", "data.patch_size": "32"})
    'data.patch_size-32+stitch.overlap_mode-crop'
    """
    pairs = sorted((key.replace("/", "."), value.strip("'\"")) for key, value in values.items())
    whole = "+".join(f"{key}-{value}" for key, value in pairs)
    shown = "+".join(re.sub(r"[^A-Za-z0-9._-]+", "_", f"{key}-{value}").strip("_.") for key, value in pairs)
    if shown == whole and len(shown) <= _LONGEST:
        return shown
    return f"{shown[: _LONGEST - 7].rstrip('._-+')}-{digest(whole, 6)}"


def _decides(key: str, text: str, cfg: DictConfig) -> bool:
    """Whether output_dir, unresolved in `text`, depends on the value of a key."""
    if f"hydra:runtime.choices.{key}" in text:
        return True
    other = cfg.copy()
    try:
        before = other.output_dir
    except OmegaConfBaseException:
        return True  # the check of the configuration reports what is wrong
    if OmegaConf.select(other, key) is None and "/" in key:
        return False
    with open_dict(other):
        OmegaConf.update(other, key, "another value", merge=False, force_add=True)
    try:
        return other.output_dir != before
    except OmegaConfBaseException:
        return True  # something is computed from the value
