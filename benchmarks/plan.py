"""What do 100,000 volumes on 256 processes cost beside the forward passes? Measured parts of a run that is not made.

    python benchmarks/plan.py [--subjects 100000] [--ranks 256] [--seconds 10] [--job find scan send ...]

    find    looking for the subjects, and at each file for its fingerprint
    scan    headers
    send    what rank 0 tells the others, by gloo between two processes; to many it goes along a tree
    deal    who does what, for log-normal sizes
    keep    rows of the manifest: appended with fsync, read for a resumed run
    talk    all other ranks' connections to rank 0, which keeps the manifest
    files   system calls on files for each subject, counted by strace where there is one

Files are hard links to a few volumes in a temporary folder, warm in memory: on a network's file system each look takes
longer, so multiply `calls` by what yours takes.
"""

import argparse
import json
import os
import pickle
import re
import resource
import shutil
import subprocess
import sys
import tempfile
import threading
import time
from collections import Counter
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import asdict
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import torch.distributed as dist
import torch.multiprocessing as mp

from voxquilt import GridDataModule
from voxquilt.data.discovery import SubjectFiles, find_cases
from voxquilt.data.subject_size import SubjectCost
from voxquilt.data.subject_task import SubjectTask
from voxquilt.distributed.assignment import distributed
from voxquilt.distributed.load_balancing import deal
from voxquilt.distributed.tcp_channel import Hub, Spoke
from voxquilt.prediction.fingerprint import inputs
from voxquilt.prediction.resume import Resume
from voxquilt.reporting.manifest import Manifest, Row, read_rows

ROOT = Path(__file__).resolve().parent.parent
LINKS = 20_000  # to one file; file systems have limits


def seconds(action: Callable[[], Any]) -> tuple[float, Any]:
    """How long it takes, and what it gives."""
    began = time.perf_counter()
    value = action()
    return time.perf_counter() - began, value


def cohort(folder: Path, count: int, suffix: str) -> Path:
    """A folder with so many scans."""
    folder.mkdir()
    volume = np.random.default_rng(0).integers(0, 1000, (64, 64, 48)).astype(np.int16)
    for n in range(count):
        path = folder / f"sub-{n:06}_T1w{suffix}"
        if n % LINKS == 0:
            nib.save(nib.Nifti1Image(volume, np.eye(4)), source := path)
        else:
            os.link(source, path)
    return folder


def row(case: SubjectFiles) -> Row:
    """As a run leaves it."""
    name = f"{case.subject}_labels.nii.gz"
    fingerprint = f"0123456789abcdef-{hash(case.subject):016x}"
    return Row(case.subject, "done", (name,), 343, 10.123, volume_ml=1234.567, fingerprint=fingerprint)


def find(folder: Path, subjects: int, ranks: int) -> None:
    scans = cohort(folder / "find", subjects, ".nii.gz")
    took, cases = seconds(lambda: find_cases(str(scans)))
    say("a folder's subjects found, a stat each", f"{took:.2f} s", "rank 0")
    table = folder / "table.csv"
    table.write_text("image\n" + "".join(f"{case.images['image']}\n" for case in cases))
    took, _ = seconds(lambda: find_cases(str(table)))
    say("... of a .csv, no stat", f"{took:.2f} s", "rank 0")
    took, _ = seconds(lambda: inputs(cases))
    say("a stat each for the fingerprints, 16 threads", f"{took:.2f} s", "rank 0")
    share = cases[: subjects // ranks]
    data = GridDataModule(str(scans), 64, 32)
    took, _ = seconds(lambda: data._sizes(share, ranks))
    say(f"headers of its share, {len(share)}", f"{took:.2f} s", "each rank")
    if ranks > 1:
        few = cases[:: max(1, subjects // 4000)]
        took, _ = seconds(lambda: data._sizes(few))
        say("all headers, from those of 4000", f"{took / len(few) * subjects:.0f} s", "one shard of an array")
        keyed = GridDataModule(str(scans), 64, 32, shard=(1, ranks), resume=Resume(folder / "outputs", {}))
        keyed._sizes = lambda cases, ranks=1: [SubjectCost(1)] * len(cases)  # type: ignore[method-assign]
        keyed._of_shard(cases)
        took, _ = seconds(lambda: keyed._of_shard(cases))
        say("... read from the plan, and dealt", f"{took:.2f} s", "each other shard")


def scan(folder: Path, subjects: int, ranks: int) -> None:
    for suffix in (".nii", ".nii.gz"):
        scans = cohort(folder / f"scan{suffix}", 4000, suffix)
        data = GridDataModule(str(scans), 64, 32)
        cases = data.cases
        for threads in (1, 8):
            with ThreadPoolExecutor(threads) as pool:
                took, _ = seconds(lambda pool=pool, size=data.size, cases=cases: list(pool.map(size, cases)))
            say(f"a header, {suffix}, {threads} threads", f"{took / len(cases) * 1e6:.0f} us", "")


def made(subjects: int) -> list[SubjectFiles]:
    return [
        SubjectFiles(f"sub-{n:06}_T1w", {"image": Path(f"/data/cohort/scans/sub-{n:06}_T1w.nii.gz")})
        for n in range(subjects)
    ]


def send(folder: Path, subjects: int, ranks: int) -> None:
    cases = made(subjects)
    fingerprints = [f"0123456789abcdef-{n:016x}" for n in range(subjects)]
    for name, value in (
        ("cases", cases),
        ("fingerprints", fingerprints),
        ("rows of a run that is done", [row(case) for case in cases]),
    ):
        took, packed = seconds(lambda value=value: pickle.dumps(value))
        back, _ = seconds(lambda packed=packed: pickle.loads(packed))
        say(f"{name}, pickled", f"{len(packed) / 2**20:.1f} MiB, {took:.2f} s, back {back:.2f} s", "")
        hop = folder / "hop.json"
        mp.spawn(_hop, (str(folder / "meet"), packed, str(hop)), nprocs=2)
        (folder / "meet").unlink(missing_ok=True)
        once = json.loads(hop.read_text())
        say(
            "... one hop of gloo",
            f"{once * 1000:.0f} ms, {np.ceil(np.log2(ranks)):.0f} hops {once * np.ceil(np.log2(ranks)):.2f} s",
            "all",
        )


def _hop(rank: int, meet: str, packed: bytes, result: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{meet}", rank=rank, world_size=2)
    took = []
    for _ in range(5):
        dist.barrier()
        value = [packed if rank == 0 else None]
        took.append(seconds(lambda value=value: (dist.broadcast_object_list(value, src=0), dist.barrier()))[0])
    if rank == 0:
        Path(result).write_text(json.dumps(float(np.median(took))))
    dist.destroy_process_group()


def deals(folder: Path, subjects: int, ranks: int) -> None:
    for sigma in (0.5, 1.0, 1.5):
        costs = (np.random.default_rng(0).lognormal(5, sigma, subjects).round() + 1).tolist()
        took, dealt = seconds(lambda costs=costs: deal(costs, ranks))
        loads = np.array([sum(costs[n] for n in part) for part in dealt])
        bound = max(sum(costs) / ranks, max(costs))
        say(f"deal, sigma {sigma}", f"{took:.2f} s, busiest {loads.max() / bound:.5f} of the bound", "each rank")
    tasks = [SubjectTask(case, "x" * 33, n) for n, case in enumerate(made(subjects))]
    sizes = [SubjectCost(int(cost), 8) for cost in costs]
    for distribute in ("subject", "auto", "slab"):
        took, _ = seconds(lambda distribute=distribute: distributed(tasks, sizes, ranks, distribute))
        say(f"distributed, {distribute}", f"{took:.2f} s", "each rank")
    values = [sizes[rank::ranks] for rank in range(ranks)]
    packed = len(pickle.dumps(values[0]))
    say("sizes that each rank gathers", f"{packed * ranks / 2**20:.2f} MiB", "all")


def keep(folder: Path, subjects: int, ranks: int) -> None:
    cases = made(subjects)
    rows = [row(case) for case in cases]
    outputs = folder / "outputs"
    outputs.mkdir()
    manifest = Manifest(outputs / "manifest.csv")
    took, _ = seconds(lambda: [manifest.add(each) for each in rows[:2000]])
    manifest.close()
    size = (outputs / "manifest.csv").stat().st_size / 2000
    say("a row appended and put on disk", f"{took / 2000 * 1e6:.0f} us, {size:.0f} bytes", "rank 0")
    took, manifest = seconds(lambda: Manifest(outputs / "manifest.csv", rows))
    manifest.close()
    say(f"a manifest of {subjects} rows written", f"{took:.2f} s", "rank 0")
    took, _ = seconds(lambda: read_rows([outputs / "manifest.csv"]))
    say("... read", f"{took:.2f} s", "rank 0")
    for each in rows:
        (outputs / each.outputs[0]).touch()
    resume = Resume(outputs, {}, overwrite=True)
    took, _ = seconds(lambda: resume.todo(cases))
    say("resume: everything compared, files that are there", f"{took:.2f} s", "rank 0")
    say(
        "memory of that",
        f"{resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**10:.0f} MiB, torch and all",
        "rank 0",
    )


def talk(folder: Path, subjects: int, ranks: int) -> None:
    manifest = Manifest(folder / "manifest.csv")
    got: list[Row] = []

    def take(message: dict[str, Any]) -> None:
        got.append(Row(**{**message, "outputs": tuple(message["outputs"])}))
        manifest.add(got[-1])

    hub = Hub(ranks, take)
    began = time.perf_counter()
    accepting = threading.Thread(target=hub.accept)
    accepting.start()
    _, port, key = hub.address
    with ThreadPoolExecutor(64) as pool:
        spokes = list(pool.map(lambda rank: Spoke(rank, ("127.0.0.1", port, key)), range(1, ranks)))
    accepting.join()
    say(f"{ranks - 1} connections made", f"{time.perf_counter() - began:.2f} s", "rank 0")
    rows = [asdict(row(case)) for case in made(20 * len(spokes))]
    began = time.perf_counter()
    for n, each in enumerate(rows):
        spokes[n % len(spokes)].report(each)
    while len(got) < len(rows):
        time.sleep(0.01)
    took = time.perf_counter() - began
    say("rows from all of them, with fsync", f"{len(rows) / took:.0f} a second", "rank 0")
    began = time.perf_counter()
    for spoke in spokes:
        spoke.gather({"rank": 1})
    hub.gather({"rank": 0})
    hub.settle(0)
    for spoke in spokes:
        spoke.settle(0)
    say("the end agreed on", f"{time.perf_counter() - began:.2f} s", "all")
    manifest.close()


_CALLS = re.compile(r"^\d+ +(\w+)\((.*)")
_DATA = {"read", "pread64", "write", "lseek", "close", "mmap"}


def files(folder: Path, subjects: int, ranks: int) -> None:
    if shutil.which("strace") is None:
        say("system calls on files", "strace is not installed", "")
        return
    counts = []
    for number in (10, 30):
        scans, trace = cohort(folder / f"scans{number}", number, ".nii.gz"), folder / "trace"
        command = [sys.executable, str(ROOT / "predict.py"), f"data.inputs={scans}", "model=state_dict",
                   "model.net._target_=torch.nn.Conv3d", "model.net.in_channels=1", "model.net.out_channels=2",
                   "model.net.kernel_size=1", "data.patch_size=64", f"output_dir={folder / f'out{number}'}",
                   "trainer.accelerator=cpu", "ckpt_path=null"]  # fmt: skip
        strace = [
            "strace",
            "-f",
            "-qq",
            "-e",
            "signal=none",
            "-e",
            "trace=%file,%desc,fsync",
            "-o",
            str(trace),
            *command,
        ]
        subprocess.run(strace, check=True, capture_output=True, cwd=folder)
        found: Counter[str] = Counter()
        for line in trace.read_text(errors="replace").splitlines():
            match = _CALLS.match(line)
            if match and (str(folder) in line or match[1] == "fsync"):
                found[match[1]] += 1
        counts.append(found)
    names = sorted(counts[0] | counts[1])
    each = {name: (counts[1][name] - counts[0][name]) / 20 for name in names}
    for name, count in each.items():
        if count:
            say(f"calls for a subject: {name}", f"{count:g}", "its rank, or rank 0")
    total = sum(each.values())
    say("... all", f"{total:g}", "")
    say(f"... of {ranks} ranks with {PACE:g} s a subject", f"{total * ranks / PACE:.0f} a second", "the file system")


JOBS = {"find": find, "scan": scan, "send": send, "deal": deals, "keep": keep, "talk": talk, "files": files}
PACE = 10.0


def say(what: str, figure: str, who: str) -> None:
    """A line of the table."""
    print(f"| {what} | {figure} | {who} |", flush=True)


def main() -> None:
    global PACE
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--subjects", type=int, default=100_000)
    parser.add_argument("--ranks", type=int, default=256)
    parser.add_argument("--seconds", type=float, default=PACE, help="that a process takes for a subject")
    parser.add_argument("--job", nargs="+", choices=list(JOBS), default=list(JOBS))
    arguments = parser.parse_args()
    PACE = arguments.seconds
    print("| what | measured | by whom |\n|---|---|---|")
    for job in arguments.job:
        with tempfile.TemporaryDirectory() as folder:
            JOBS[job](Path(folder), arguments.subjects, arguments.ranks)


if __name__ == "__main__":
    main()
