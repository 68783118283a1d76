"""Is what a plan predicts what a run takes? Memory and seconds of five configurations, each in processes of its own.

    python benchmarks/planned.py [--memory] [--rounds 3] [--only NAME ...] [--check 0.15]

--memory leaves out seconds, which other work on the machine disturbs: plan and run take turns, and medians are shown.
--check exits with 1 if a prediction of memory is further off than that share, also as the median of two rounds more.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np

ROOT = Path(__file__).resolve().parent.parent

_UNET = ("model=state_dict", "model/net=unet", "ckpt_path=null")
# Shape and spacing of a subject, how many, and what is said on the command line.
CONFIGURATIONS: dict[str, tuple[tuple[int, int, int], int, tuple[str, ...]]] = {
    "labels": ((160, 160, 128), 3, (*_UNET, "data.patch_size=96", "data.patch_overlap=32", "data.batch_size=2")),
    "100 classes": (
        (96, 112, 96), 2,
        (*_UNET, "model.net.out_channels=100", "data.patch_size=64", "data.patch_overlap=16", "data.batch_size=2"),
    ),
    "probabilities, 1.5 mm": (
        (200, 220, 180), 3,
        (*_UNET, "model.net.out_channels=8", "data.patch_size=[96,96,64]", "data.patch_overlap=[32,32,16]",
         "preprocess.spacing=1.5", "stitch.products=[labels,probabilities]"),
    ),
    "flips, disagreement": (
        (128, 128, 112), 3,
        (*_UNET, "model.net.out_channels=4", "model.flips=[0]", "data.patch_size=96", "data.patch_overlap=48",
         "stitch.products=[labels,entropy,disagreement]", "data.num_workers=2"),
    ),
    "wide network": (
        (144, 144, 128), 2,
        (*_UNET, "model.net.channels=[32,64,128,256]", "model.net.strides=[2,2,2]", "model.net.num_res_units=2",
         "data.patch_size=96", "data.patch_overlap=32", "stitch.compare=[crop]"),
    ),
}  # fmt: skip


def subjects(folder: Path, shape: tuple[int, int, int], count: int) -> None:
    """Smooth heads of noise, int16."""
    folder.mkdir()
    for n in range(count):
        draw = np.random.default_rng(n)
        coarse = draw.normal(size=tuple(s // 16 for s in shape))
        volume = np.kron(coarse, np.ones((16, 16, 16)))[: shape[0], : shape[1], : shape[2]]
        pads = [(0, s - v) for s, v in zip(shape, volume.shape, strict=True)]
        volume = np.pad(volume, pads) * 300 + draw.normal(size=shape) * 20
        nib.save(nib.Nifti1Image(volume.astype(np.int16), np.eye(4)), folder / f"s{n}.nii.gz")


def predict(folder: Path, *arguments: str) -> None:
    command = [sys.executable, str(ROOT / "predict.py"), "data.inputs=in", "trainer=cpu", *arguments]
    environment = os.environ | {"OMP_NUM_THREADS": "2"}
    subprocess.run(command, cwd=folder, check=True, capture_output=True, env=environment)


def one_round(folder: Path, words: tuple[str, ...], timed: bool, number: int) -> dict[str, float]:
    """A plan, then the run."""
    out = f"output_dir=out{number}"
    predict(folder, *words, out, f"run.dry_run={'time' if timed else 'true'}")
    plan: dict[str, Any] = json.loads((folder / f"out{number}/plan.json").read_text())
    predict(folder, *words, out)
    run: dict[str, Any] = json.loads((folder / f"out{number}/run.json").read_text())
    (rank,) = run["ranks"]
    sizes = sum(path.stat().st_size for path in (folder / f"out{number}").glob("*.nii.gz"))
    return {
        "predicted MiB": plan["memory"]["host_total"] / 2**20,
        "peak MiB": rank["peak_memory_mib"],
        "predicted s": plan["seconds"] or 0.0,
        "seconds": run["seconds"],
        "disk expected MiB": plan["disk"]["expected"] / 2**20,
        "disk MiB": sizes / 2**20,
    }


def median(rounds: list[dict[str, float]]) -> dict[str, float]:
    """Of each number."""
    return {key: statistics.median(one[key] for one in rounds) for key in rounds[0]}


def off(found: dict[str, float]) -> float:
    """The share by which memory is over what it was."""
    return found["predicted MiB"] / found["peak MiB"] - 1


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--memory", action="store_true")
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--only", nargs="+", choices=list(CONFIGURATIONS), default=list(CONFIGURATIONS))
    parser.add_argument("--check", type=float)
    arguments = parser.parse_args()
    print("| configuration | predicted [MiB] | peak RSS [MiB] | | predicted [s] | run [s] | | outputs [MiB] |")
    print("|---|---|---|---|---|---|---|---|", flush=True)
    worst = 0.0
    for name in arguments.only:
        shape, count, words = CONFIGURATIONS[name]
        with tempfile.TemporaryDirectory() as place:
            folder = Path(place)
            subjects(folder / "in", shape, count)
            rounds = [one_round(folder, words, not arguments.memory, n) for n in range(arguments.rounds)]
            if arguments.check is not None and abs(off(median(rounds))) > arguments.check:
                # Peaks differ by a tenth from run to run.
                rounds += [one_round(folder, words, not arguments.memory, len(rounds) + n) for n in range(2)]
        found = median(rounds)
        memory = off(found)
        worst = max(worst, abs(memory))
        timed = ("", "", "") if arguments.memory else (
            f"{found['predicted s']:.1f}", f"{found['seconds']:.1f}",
            f"{found['predicted s'] / found['seconds'] - 1:+.0%}",
        )  # fmt: skip
        print(
            f"| {name} | {found['predicted MiB']:.0f} | {found['peak MiB']:.0f} | {memory:+.0%} | {' | '.join(timed)} "
            f"| {found['disk MiB']:.1f} of {found['disk expected MiB']:.1f} |",
            flush=True,
        )
    sys.exit(arguments.check is not None and worst > arguments.check)


if __name__ == "__main__":
    main()
