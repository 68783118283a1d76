"""What does a whole run cost, from the command to the prompt? Peers beside voxquilt, processes from start to end.

    python benchmarks/startup.py [--job help train 64 24 14] [--repeats 5] [--base CHECKOUT] [--json results.json]

Volumes and network are those of files.py. A peer's process is the shortest script that does the job; voxquilt's is
`predict.py` with its defaults, TensorBoard and the check of memory included. All take turns.

    help, wrong    `predict.py --help`, and a key that does not exist
    train          `train.py` until its first step begins, with one small volume and the default network
    64             one volume of 64^3, two classes, beside `import torch` alone
    24             one volume of 128 x 128 x 150, 24 classes
    14             one volume of 181 x 217 x 181, 14 classes
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import ROOT, THREADS, Run, failure, interpreter, machine, median, network, rounds, save, table
from files import ONE, OVERLAP, PATCH, make_volumes, wrong_share

VOLUMES = {"64": ((64, 64, 64), 2), "24": ((128, 128, 150), 24), "14": ((181, 217, 181), 14)}
PEERS = ("TorchIO crop", "TorchIO hann", "MONAI gaussian", "KonfAI gaussian")
FIRST_STEP = 77
# A callback that ends the process where a training's first step begins.
CLOCK = f"""
import os
from lightning.pytorch import Callback
class Clock(Callback):
    def on_train_batch_start(self, *arguments):
        os._exit({FIRST_STEP})
"""


def timed(command: Sequence[object], folder: Path, path: Path | None = None, status: int = 0) -> Run:
    """A process from its start to its end."""
    environment = os.environ | {"OMP_NUM_THREADS": str(THREADS)}
    environment.pop("PYTHONDONTWRITEBYTECODE", None)  # modules are compiled once, in the run that does not count
    if path is not None:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), str(folder)])
    before, start = os.times(), time.perf_counter()
    done = subprocess.run([str(word) for word in command], cwd=folder, env=environment, capture_output=True, text=True)
    seconds, after = time.perf_counter() - start, os.times()
    if done.returncode != status:
        return {
            "error": f"exit status {done.returncode}: {(done.stderr.strip() or 'no output').splitlines()[-1][:200]}"
        }
    cpu = sum(after[2:4]) - sum(before[2:4])
    return {"seconds": seconds, "cpu": cpu}


def voxquilt(checkout: Path, script: str, *arguments: object, status: int = 0) -> Callable[[Path], Run]:
    """A command of a checkout; it is imported from there."""
    return lambda folder: timed([sys.executable, checkout / script, *arguments], folder, checkout / "src", status)


def peer(name: str, classes: int, source: Path) -> Callable[[Path], Run]:
    """A peer's script of files.py."""
    options = ["--job", "one", "--classes", classes, "--source", source, "--target", "."]
    python = interpreter(ONE[name].environment)
    command = [python, ROOT / "benchmarks" / "files.py", "--contender", name, "--report", "report.json", *options]
    if not python.exists():
        return lambda folder: {"error": f"not installed: python benchmarks/environments.py {ONE[name].environment}"}
    return lambda folder: timed(command, folder)


def prediction(checkout: Path, weights: Path, source: Path) -> Callable[[Path], Run]:
    """predict.py, whose labels are checked afterwards."""
    images = f"data.images={{t1: '{source}/{{subject}}/image.nii.gz'}}"
    grid = (f"data.patch_size={PATCH}", f"data.patch_overlap={OVERLAP}", "trainer=cpu", "output_dir=out")
    command = voxquilt(checkout, "predict.py", images, f"ckpt_path={weights}", *grid)

    def run(folder: Path) -> Run:
        result = command(folder)
        if "error" not in result and wrong_share(source, [str(folder / "out" / "sub-00_labels.nii.gz")]):
            return {"error": "wrong labels"}
        return result

    return run


def training(checkout: Path, source: Path) -> Callable[[Path], Run]:
    """train.py until its first step."""
    import nibabel as nib
    import numpy as np

    for path in source.glob("*/image.nii.gz"):
        image = nib.load(path)
        nib.save(
            nib.Nifti1Image((np.asarray(image.dataobj) > 1).astype(np.uint8), image.affine), path.with_name("label.nii")
        )
    data = (f"data.images={{t1: '{source}/{{subject}}/image.nii.gz'}}", f"data.labels={source}/{{subject}}/label.nii")
    options = ("data.folds=null", "data.patch_size=32", "trainer=cpu", "+callbacks.clock._target_=clock.Clock")
    command = voxquilt(checkout, "train.py", *data, *options, status=FIRST_STEP)

    def run(folder: Path) -> Run:
        (folder / "clock.py").write_text(CLOCK)
        return command(folder)

    return run


def contenders(job: str, root: Path, base: Path | None) -> dict[str, Callable[[Path], Run]]:
    """Everybody who takes part in a job, and voxquilt's earlier checkout."""
    checkouts = {"voxquilt": ROOT} | ({} if base is None else {"voxquilt before": base})
    if job in ("help", "wrong"):
        arguments, status = (["--help"], 0) if job == "help" else (["data.inptus=scans"], 2)
        return {name: voxquilt(path, "predict.py", *arguments, status=status) for name, path in checkouts.items()}
    classes = 2 if job == "train" else VOLUMES[job][1]
    source = make_volumes(root / job, (64, 64, 64) if job == "train" else VOLUMES[job][0], 1, classes)
    if job == "train":
        return {name: training(path, source) for name, path in checkouts.items()}
    weights = root / f"{classes}.ts"
    torch.jit.script(network(classes)).save(str(weights))
    taking_part = {name: prediction(path, weights, source) for name, path in checkouts.items()}
    if job == "64":
        bare: Callable[[Path], Run] = lambda folder: timed([sys.executable, "-c", "import torch"], folder)  # noqa: E731
        return taking_part | {"import torch": bare}
    return taking_part | {name: peer(name, classes, source) for name in PEERS}


def report(job: str, runs: dict[str, list[Run]]) -> None:
    """Print seconds, and their ratio to voxquilt's run by run."""

    def row(name: str, done: list[Run]) -> list[str]:
        figures = [f"{median(done, key):.2f}" for key in ("seconds", "cpu")]
        if failure(runs["voxquilt"]):
            return [*figures, ""]
        pairs = zip(runs["voxquilt"], done, strict=True)
        ratio = median([{"ratio": ours["seconds"] / theirs["seconds"]} for ours, theirs in pairs], "ratio")
        return [*figures, f"{ratio:.2f}"]

    print(f"{job}:\n\n{table(('seconds', 'CPU seconds', 'voxquilt / this'), runs, row)}\n", flush=True)


def main() -> None:
    """Print a table for each job."""
    parser = argparse.ArgumentParser()
    jobs = ["help", "wrong", "train", *VOLUMES]
    parser.add_argument("--job", nargs="+", default=jobs, choices=jobs)
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--base", type=Path, help="an earlier checkout of voxquilt")
    parser.add_argument("--contenders", nargs="+", help="names as in the tables")
    parser.add_argument("--json", type=Path, help="save every run")
    arguments = parser.parse_args()
    print(f"{machine(arguments.repeats, 'cpu')}\n", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for job in arguments.job:
            taking_part = contenders(job, Path(root), arguments.base and arguments.base.resolve())
            names = [name for name in taking_part if arguments.contenders is None or name in arguments.contenders]

            def once(name: str, repeat: int, taking_part: dict[str, Callable[[Path], Run]] = taking_part) -> Run:
                with tempfile.TemporaryDirectory() as folder:
                    return taking_part[name](Path(folder))

            done = rounds(names, arguments.repeats + 1, once)
            runs = {name: found[1:] or found for name, found in done.items()}  # the first warms up
            report(job, runs)
            save(arguments.json, job, runs)


if __name__ == "__main__":
    main()
