"""Lists blends by name, without importing them."""

from voxquilt.vocabulary import Registry

BLENDS = Registry(
    "blend",
    {
        "crop": "voxquilt.stitching.blend:CROP",
        "average": "voxquilt.stitching.blend:AVERAGE",
        "hann": "voxquilt.stitching.blend:HANN",
        "gaussian": "voxquilt.stitching.blend:GAUSSIAN",
        "nnunet": "voxquilt.stitching.blend:NNUNET",
        "monai": "voxquilt.stitching.blend:MONAI",
    },
    "voxquilt.blends",
)
"""Objects with the interface of `voxquilt.stitching.blend.Blend`."""
