"""Knows versions of cuDNN whose 3-D convolutions are wrong, or are left out by torch for that reason."""

# cuDNN 9.8 to 9.10 computes large outputs in bfloat16 wrongly, without an error (pytorch#163539). From 2.9 on torch
# convolves in bfloat16 without cuDNN below 9.15, which takes several times the memory and is slow (pytorch#166643).
_FIRST, _MENDED = 90800, 91500


def cudnn_warning(version: int | None, precision: str) -> str | None:
    """A warning for a run on CUDA; None where nothing is known to be wrong.

    Args:
        version: Of cuDNN, such as 91002 for 9.10.2; None without it.
        precision: The trainer's, such as 'bf16-mixed'.
    """
    if version is None or not _FIRST <= version < _MENDED or not precision.startswith("bf16"):
        return None
    return (
        f"cuDNN {version // 10000}.{version // 100 % 100}.{version % 100}: from 9.8 to 9.10 bfloat16 3-D convolutions "
        f"of large outputs are wrong, and below 9.15 torch computes them without cuDNN, slowly and with several times "
        f"the memory. Install a later one, such as by pip install 'nvidia-cudnn-cu12>=9.15'."
    )
