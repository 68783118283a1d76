"""Turns arguments as users type them into overrides of Hydra's grammar: adds the quotes and the ++ that it wants."""

import os
import re
from collections.abc import Sequence

from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.errors import HydraException

from voxquilt.errors import ConfigError

# Below these, keys are the user's: arguments of a class that only the user knows, names of images.
_FREE = re.compile(r"(model\.net|model\.module_args|data\.images)\.")


# Groups that may be left out, which Hydra writes with a ~.
_NONE = re.compile(r"(logger|experiment|data/augment)=null")


def to_overrides(arguments: Sequence[str]) -> list[str]:
    """Command-line arguments that Hydra understands; options such as --help are left as they are.

    Raises:
        ConfigError: an override that Hydra cannot read, with a hint at quoting, or an argument without a key.

    >>> to_overrides(["data.labels=labels/{subject}.nii.gz", "ckpt_path=epoch=3-step=10.ckpt", "data.batch_size=2"])
    ['data.labels="labels/{subject}.nii.gz"', 'ckpt_path="epoch=3-step=10.ckpt"', 'data.batch_size=2']
    >>> to_overrides(["model.net._target_=my.Net", "--cfg", "job"])
    ['++model.net._target_=my.Net', '--cfg', 'job']
    """
    parser = OverridesParser.create()
    for before, text in zip(["", *arguments], arguments, strict=False):
        if "=" not in text and not text.startswith(("-", "~")) and not before.startswith("-"):
            key = "data.inputs" if os.path.exists(os.path.expanduser(text)) else "key"
            example = f"{text}=value" if re.fullmatch(r"[a-z_./]+", text) and key == "key" else f"{key}={text}"
            raise ConfigError(f"{text}: a setting is written with =, without blanks around it, such as {example}.")
    return [_to_override(parser, text) if "=" in text and not text.startswith("-") else text for text in arguments]


def _to_override(parser: OverridesParser, text: str) -> str:
    if _NONE.fullmatch(text):
        return f"~{text.partition('=')[0]}"
    key, _, value = text.partition("=")
    key = f"{'++' if _FREE.match(key) else ''}{key}"
    problem = _syntax_error(parser, f"{key}={value}")
    if problem is None:
        return f"{key}={value}"
    # What Hydra cannot read is a path with a ~, a second =, {subject}, letters that are not ASCII, ... Lists and
    # dictionaries are left alone: quoted they would be something else.
    if not re.match(r"""["'\[]|\{(?!subject\})""", value) and _syntax_error(parser, f'{key}="{value}"') is None:
        return f'{key}="{value}"'
    raise ConfigError(
        f"{text}: {problem}. A value with = , {{ }} ( ) [ ] or letters beyond ASCII in it needs quotes inside quotes, "
        f"such as 'ckpt_path=\"epoch=3.ckpt\"'."
    )


def _syntax_error(parser: OverridesParser, override: str) -> str | None:
    try:
        parser.parse_override(override)
    except HydraException as error:
        return str(error).split("\n")[0]
    return None
