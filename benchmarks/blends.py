"""How much does the blend matter? Dice of brain extraction on Colin27 at 1 mm, for the table of the README.

python benchmarks/blends.py
"""

import nibabel as nib
import numpy as np
from hydra import compose, initialize_config_dir
from omegaconf import OmegaConf

from voxquilt import ScalarImage, Stitch, Subject, predict_volume
from voxquilt.cli.instantiate import build
from voxquilt.cli.main import conf_dir
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.example_files import fetch
from voxquilt.stitching.blend_registry import BLENDS

GRIDS = ((192, 96), (160, 80), (128, 64), (96, 48))
MODES = tuple(reversed([*BLENDS]))


def main() -> None:
    """Print the table."""
    register_resolvers()
    with initialize_config_dir(str(conf_dir()), version_base="1.3"):
        plain = OmegaConf.to_container(compose("predict", ["experiment=brain_extraction"]), resolve=True)
    assert isinstance(plain, dict)
    network = build(plain["model"], "model").eval()
    preprocess = build(plain["preprocess"], "preprocess")
    postprocess = build(plain["stitch"], "stitch").postprocess
    reference = np.asarray(nib.load(fetch("colin27_brain")).dataobj) > 0
    print(f"| patch / overlap | {' | '.join(MODES)} |\n|---|{'---|' * len(MODES)}")
    for patch, overlap in GRIDS:
        scores = []
        for mode in MODES:
            stitch = Stitch(mode, activation="none", postprocess=postprocess)
            subject = Subject(t1=ScalarImage(fetch("colin27_t1")))
            volumes = predict_volume(network, subject, patch, overlap, preprocess=preprocess, stitch=stitch)
            mask = volumes["labels"][0] > 0
            scores.append(2 * (mask & reference).sum() / (mask.sum() + reference.sum()))
        print(f"| {patch} / {overlap} | {' | '.join(f'{score:.3f}' for score in scores)} |", flush=True)


if __name__ == "__main__":
    main()
