"""What do several processes bring, and what does a subject cost beside its forward passes?

    python benchmarks/processes.py [--job subject slab tiny] [--repeats 3]

    subject   eight equal heads on two processes against one, one thread each, with the brain-extraction network
    slab      one head at 0.7 mm, its grid shared by two processes, against one
    tiny      2,000 volumes of 16 x 16 x 16 in one run: memory, seconds a subject beside the forward pass, and the same
              command again
Runs of one and of two processes take turns. Seconds are those of the predict loop, from its first batch to the last
file (`seconds` of the slowest rank in run.json): starting the processes is not in them. Beside them two bare forward
loops, each in its own process, tell what the machine can give.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path

import nibabel as nib
import numpy as np
import psutil

from voxquilt.example_files import fetch

ROOT = Path(__file__).parents[1]
SUBJECTS = 2000
HEAD = ("experiment=brain_extraction", "stitch.postprocess=[]", "callbacks.writer.overlay=false")
BARE = """
import sys, time, torch
torch.set_num_threads(1)
net = torch.jit.load(sys.argv[1]).eval()
x = torch.rand(1, 1, 192, 192, 192)
with torch.inference_mode():
    net(x)
    print('ready', flush=True)
    sys.stdin.readline()
    start = time.perf_counter()
    for _ in range(int(sys.argv[2])):
        net(x)
print(time.perf_counter() - start)
"""


def environment() -> dict[str, str]:
    """One thread a process."""
    return os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1", "PYTHONPATH": str(ROOT / "benchmarks")}


def predict(folder: Path, *options: str) -> dict[str, object]:
    """Run predict.py; its run.json."""
    command = [sys.executable, str(ROOT / "predict.py"), f"output_dir={folder}", *options]
    subprocess.run(command, check=True, env=environment(), stdout=subprocess.DEVNULL)
    return json.loads((folder / "run.json").read_text())


def seconds(record: dict[str, object]) -> float:
    """Of the predict loop: the slowest rank's."""
    return max(rank["seconds"] for rank in record["ranks"])  # type: ignore[attr-defined]


def bare(processes: int, passes: int) -> float:
    """Seconds of so many forward passes in all, dealt to so many processes."""
    command = [sys.executable, "-c", BARE, str(fetch("brain_extraction")), str(passes // processes)]
    started = [
        subprocess.Popen(command, env=environment(), stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)
        for _ in range(processes)
    ]
    for process in started:
        assert process.stdout is not None
        process.stdout.readline()
    for process in started:
        assert process.stdin is not None
        process.stdin.write("go\n")
        process.stdin.flush()
    return max(float(process.communicate()[0]) for process in started)


def compare(name: str, inputs: Path, options: Sequence[str], repeats: int) -> None:
    """Two processes against one, taking turns."""
    found: dict[int, list[float]] = {1: [], 2: []}
    forwards: dict[int, list[float]] = {1: [], 2: []}
    for _ in range(repeats):
        for processes in found:
            with tempfile.TemporaryDirectory() as folder:
                record = predict(
                    Path(folder), *HEAD, f"data.inputs={inputs}", "trainer.accelerator=cpu",
                    f"trainer.devices={processes}", *options,
                )  # fmt: skip
            found[processes].append(seconds(record))
            forwards[processes].append(bare(processes, 8))
    one, two = (statistics.median(found[n]) for n in (1, 2))
    pure = statistics.median(forwards[1]) / statistics.median(forwards[2])
    print(f"| {name} | {one:.1f} | {two:.1f} | {one / two:.2f} | {pure:.2f} |", flush=True)


def tiny() -> None:
    """2,000 small volumes."""
    with tempfile.TemporaryDirectory() as name:
        folder, rng = Path(name), np.random.default_rng(0)
        (folder / "in").mkdir()
        for n in range(SUBJECTS):
            volume = nib.Nifti1Image(rng.integers(0, 100, (16, 16, 16)).astype(np.int16), np.eye(4))
            nib.save(volume, folder / f"in/s{n:04}.nii.gz")
        for again in (False, True):
            wall, record, peaks = watched(folder)
            rank = record["ranks"][0]  # type: ignore[index]
            each = rank["seconds"] / SUBJECTS * 1000
            text = f"{each:.1f} ms a subject; at most {peaks[0]:.0f} MB in the first half, {peaks[1]:.0f} in the second"
            imports = min(_imports() for _ in range(3))
            text = f"{wall - imports:.1f} s beside {imports:.1f} s of imports" if again else text
            print(f"- {'again' if again else 'first'}: {text}", flush=True)


def watched(folder: Path) -> tuple[float, dict[str, object], tuple[float, float]]:
    """Seconds, the record, and the most memory in MB during the first and the second half of the subjects."""
    start = time.perf_counter()
    network = ("_target_=torch.nn.Conv3d", "in_channels=1", "out_channels=2", "kernel_size=1")
    options = ("model=state_dict", *(f"model.net.{argument}" for argument in network), "ckpt_path=null")
    folders = (f"data.inputs={folder}/in", f"output_dir={folder}/out", "data.patch_size=16")
    command = [sys.executable, str(ROOT / "predict.py"), *folders, *options]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.DEVNULL)
    manifest, most, end = folder / "out/manifest.csv", [0.0, 0.0], start
    while process.poll() is None:
        done = manifest.read_bytes().count(b"\n") if manifest.exists() else 0
        memory = psutil.Process(process.pid).memory_info().rss / 1e6
        half = int(done > SUBJECTS / 2)
        most[half] = max(most[half], memory)
        end = time.perf_counter()
        time.sleep(0.05)
    assert process.returncode == 0
    return end - start, json.loads((folder / "out/run.json").read_text()), (most[0], most[1])


def _imports() -> float:
    """Seconds that a process takes to import what predict.py uses, and to build nothing."""
    start = time.perf_counter()
    names = (
        "cli.main",
        "prediction.writer_callback",
        "models.predictor",
        "distributed.child_processes",
        "reporting.tables",
    )
    modules = ", ".join(f"voxquilt.{name}" for name in names)
    subprocess.run([sys.executable, "-c", f"import {modules}"], check=True)
    return time.perf_counter() - start


def main() -> None:
    """Print what was asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--job", nargs="+", default=["subject", "slab", "tiny"], choices=["subject", "slab", "tiny"])
    parser.add_argument("--repeats", type=int, default=3)
    arguments = parser.parse_args()
    if {"subject", "slab"} & set(arguments.job):
        print("| | one process [s] | two [s] | ratio | bare forward passes |\n|---|---|---|---|---|", flush=True)
    with tempfile.TemporaryDirectory() as name:
        for n in range(8):
            (Path(name) / f"head{n}.nii.gz").symlink_to(fetch("mean_head"))
        if "subject" in arguments.job:
            compare("eight heads, dealt", Path(name), (), arguments.repeats)
        if "slab" in arguments.job:
            sliced = ("preprocess.spacing=0.7", "run.distribute=slab")
            compare("one head at 0.7 mm, in slabs", fetch("mean_head"), sliced, arguments.repeats)
    if "tiny" in arguments.job:
        tiny()


if __name__ == "__main__":
    main()
