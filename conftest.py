"""Leaves out the examples in modules that need Triton, where it is not installed."""

from importlib.util import find_spec

collect_ignore_glob = [] if find_spec("triton") else [
    f"src/voxquilt/stitching/kernels/{name}.py" for name in ("blend_add", "probe", "restore_labels")
]  # fmt: skip
