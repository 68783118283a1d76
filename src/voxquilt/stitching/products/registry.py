"""Lists products by name, without importing them."""

from voxquilt.vocabulary import Registry

PRODUCTS = Registry(
    "product",
    {
        "labels": "voxquilt.stitching.products.labels:make_labels",
        "probabilities": "voxquilt.stitching.products.maps:make_probabilities",
        "logits": "voxquilt.stitching.products.maps:make_logits",
        "entropy": "voxquilt.stitching.products.entropy:make_entropy",
        "disagreement": "voxquilt.stitching.products.disagreement:make_disagreement",
        "image": "voxquilt.stitching.products.maps:make_image",
    },
    "voxquilt.products",
)
"""Functions from a NetworkOutput to a ProductSpec; see `voxquilt.stitching.products.spec`."""
