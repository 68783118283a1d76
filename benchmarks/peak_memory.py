"""How much memory does one volume take, file to label file? voxquilt beside TorchIO and MONAI, each in its own process.

    python benchmarks/peak_memory.py [--repeats 5]

The job: Colin27 at 0.5 mm (301 x 370 x 316, uint8), a 1x1x1 convolution to two classes, patch 96, overlap 48, labels to
.nii.gz. Peak resident memory as the operating system reports it, and how much of it came after the imports.
"""

import argparse
import json
import platform
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from importlib.metadata import version
from pathlib import Path

PATCH, OVERLAP, THRESHOLD = 96, 48, 60.0
Job = Callable[[Path, Path], None]


def network():
    """A convolution whose second score is above its first where the voxel is above THRESHOLD."""
    import torch

    conv = torch.nn.Conv3d(1, 2, 1)
    with torch.no_grad():
        conv.weight.copy_(torch.tensor([-1.0, 1.0]).reshape(2, 1, 1, 1, 1))
        conv.bias.copy_(torch.tensor([THRESHOLD, -THRESHOLD]))
    return conv.eval()


def voxquilt(mode: str) -> Job:
    """predict_volume and the file writer."""
    from voxquilt import ScalarImage, Subject, predict_volume
    from voxquilt.nifti import write
    from voxquilt.stitch import Stitch

    def job(source: Path, target: Path) -> None:
        subject = Subject(t1=ScalarImage(source))
        volumes = predict_volume(network(), subject, PATCH, OVERLAP, stitch=Stitch(mode))
        write(target, volumes["labels"], subject.frame, header=subject["t1"].file.header)

    return job


def torchio(mode: str) -> Job:
    """TorchIO's sampler and aggregator in the loop of its documentation."""
    import torch
    import torchio as tio

    def job(source: Path, target: Path) -> None:
        subject, net = tio.Subject(t1=tio.ScalarImage(source)), network()
        sampler = tio.GridSampler(subject, PATCH, OVERLAP)
        aggregator = tio.GridAggregator(sampler, overlap_mode=mode)
        with torch.inference_mode():
            for batch in tio.SubjectsLoader(sampler, batch_size=1):
                aggregator.add_batch(net(batch["t1"][tio.DATA].float()), batch[tio.LOCATION])
        labels = aggregator.get_output_tensor().argmax(0, keepdim=True).to(torch.uint8)
        tio.LabelMap(tensor=labels, affine=subject["t1"].affine).save(target)

    return job


def monai(mode: str) -> Job:
    """MONAI's sliding window."""
    import nibabel as nib
    import numpy as np
    import torch
    from monai.inferers import sliding_window_inference

    def job(source: Path, target: Path) -> None:
        image = nib.load(source)
        volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None, None]
        with torch.inference_mode():
            scores = sliding_window_inference(volume, (PATCH,) * 3, 1, network(), overlap=0.5, mode=mode)
        nib.save(nib.Nifti1Image(scores[0].argmax(0).to(torch.uint8).numpy(), image.affine), target)

    return job


CONTENDERS = {
    "voxquilt crop": lambda: voxquilt("crop"),
    "voxquilt gaussian": lambda: voxquilt("gaussian"),
    "TorchIO crop": lambda: torchio("crop"),
    "TorchIO hann": lambda: torchio("hann"),
    "MONAI gaussian": lambda: monai("gaussian"),
}


def measure(name: str, source: Path) -> None:
    """Run one contender here and print what it took, as JSON."""
    import nibabel as nib
    import numpy as np
    import torch

    warnings.simplefilter("ignore")
    torch.set_num_threads(2)
    job = CONTENDERS[name]()
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with tempfile.TemporaryDirectory() as folder:
        target, start = Path(folder) / "labels.nii.gz", time.perf_counter()
        job(source, target)
        seconds = time.perf_counter() - start
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
        right = np.array_equal(np.asarray(nib.load(target).dataobj), np.asarray(nib.load(source).dataobj) > THRESHOLD)
    print(json.dumps({"peak": peak / 1024, "above": (peak - before) / 1024, "seconds": seconds, "right": bool(right)}))


def main() -> None:
    """Print a table of medians."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contender")
    arguments = parser.parse_args()
    from voxquilt.fetch import fetch

    source = fetch("colin27_large")
    if arguments.contender:
        measure(arguments.contender, source)
        return
    results: dict[str, list[dict[str, float]]] = {name: [] for name in CONTENDERS}
    for _ in range(arguments.repeats):  # interleaved, so that a slow minute of the machine meets all of them
        for name, runs in results.items():
            command = [sys.executable, __file__, "--contender", name]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
            runs.append(json.loads(output.splitlines()[-1]))
    versions = ", ".join(f"{p} {version(p)}" for p in ("torch", "torchio", "monai"))
    print(f"{platform.processor() or platform.machine()}, 2 threads, {versions}, medians of {arguments.repeats}\n")
    print("| | peak RSS [MB] | above imports [MB] | seconds | labels right |\n|---|---|---|---|---|")
    for name, runs in results.items():
        peak, above, seconds = (statistics.median(run[key] for run in runs) for key in ("peak", "above", "seconds"))
        right = "yes" if all(run["right"] for run in runs) else "NO"
        print(f"| {name} | {peak:.0f} | {above:.0f} | {seconds:.1f} | {right} |")


if __name__ == "__main__":
    main()
