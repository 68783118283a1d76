"""Says in this project's settings how a bundle cuts volumes into patches and blends them."""

from typing import Any

from voxquilt.models.bundle.config import BundleConfig
from voxquilt.models.bundle.steps import is_numbers, read_step

# Where and how it is computed, and in which order.
_OF_MEMORY = ("sw_device", "progress", "cache_roi_weight_map", "cpu_thresh", "buffer_steps", "buffer_dim")
_PADDING = {"constant": None, "reflect": "fit_reflect", "replicate": "fit_edge", "circular": "fit_wrap"}


def read_inferer(config: BundleConfig) -> dict[str, dict[str, Any]]:
    """The settings of the bundle's `inferer`, by section.

    Raises:
        ConfigError: it is not a sliding window, or has options that are not known.
    """
    step = read_step(config, "inferer")
    if step.name_in("monai.inferers") not in ("SlidingWindowInferer", "SlidingWindowInfererAdapt"):
        raise step.refusal("_target_", "voxquilt predicts in patches, as SlidingWindowInferer does.")
    step.ignore(*_OF_MEMORY)
    step.expect("with_coord", False)
    patch = step.take("roi_size")
    if isinstance(patch, int):
        patch = [patch] * 3
    if not is_numbers(patch, 3) or not all(isinstance(n, int) and n > 0 for n in patch):
        raise step.refusal("roi_size", "wanted are three numbers of voxels.")
    batch = step.take("sw_batch_size", 1)
    if not isinstance(batch, int) or batch < 1:
        raise step.refusal("sw_batch_size", "wanted is a number of patches.")
    padding = str(step.take("padding_mode", "constant"))
    if padding not in _PADDING:
        raise step.refusal("padding_mode", f"voxquilt reads {', '.join(_PADDING)}.")
    if step.take("cval", 0) != 0 and padding == "constant":
        raise step.refusal("cval", "volumes smaller than a patch are padded with 0.")
    overlap = step.take("overlap", 0.25)
    overlaps = overlap if isinstance(overlap, list) else [overlap] * 3
    if not is_numbers(overlaps, 3) or not all(0 <= share < 1 for share in overlaps):
        raise step.refusal("overlap", "wanted is a share of the patch from 0 to below 1, or three.")
    data: dict[str, Any] = {"patch_size": patch, "batch_size": batch, "padding_mode": _PADDING[padding]}
    if len(set(overlaps)) == 1:
        # MONAI's patches are int(roi_size * (1 - overlap)) voxels apart, which is rounded as here.
        data |= {"placement": "monai", "step": 1 - overlaps[0]}
    else:
        shared = [p - max(int(p * (1 - share)), 1) for p, share in zip(patch, overlaps, strict=True)]
        if any(n % 2 for n in shared):
            raise step.refusal("overlap", f"patches would share {shared} voxels; where axes differ these must be even.")
        data["patch_overlap"] = shared
    mode, sigma = str(step.take("mode", "constant")), step.take("sigma_scale", 0.125)
    if mode not in ("constant", "gaussian"):
        raise step.refusal("mode", "wanted is constant or gaussian.")
    blend: Any = "average" if mode == "constant" else "monai"
    if mode == "gaussian" and sigma != 0.125:
        if not isinstance(sigma, int | float):
            raise step.refusal("sigma_scale", "wanted is one number.")
        blend = {"_target_": "voxquilt.MonaiGaussian", "sigma_scale": sigma}
    step.finish()
    return {"data": data, "stitch": {"overlap_mode": blend}}
