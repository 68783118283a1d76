"""What do a file and a folder of files cost, from image file to label file? Peers beside voxquilt, each by itself.

    python benchmarks/files.py [--job one cohort length] [--classes 14 105] [--repeats 5] [--json results.json]

The network is a 1x1x1 convolution and the volume is smooth, so the right label of every voxel is known. Patch 96,
overlap 48. Imports are not timed. Peers in environments of their own are left out, with a word, where these are missing
(see environments.py).

    one     181 x 217 x 181 voxels; `bare` are the forwards of the same patches alone
    cohort  six of these, two classes, through each contender's loop for many files
    length  128 x 128 x 150 and x 450 voxels, 24 classes: does memory grow with the volume?
"""

import argparse
import json
import os
import sys
import tempfile
import time
import warnings
from collections.abc import Callable, Sequence
from pathlib import Path

import torch
from common import STEP, THREADS, Contender, Run, machine, median, network, peak, resident, rounds, run, save, table

PATCH, OVERLAP = 96, 48
Shape = tuple[int, int, int]
Job = Callable[[Path, Path], list[Path]]
"""From a folder with <case>/image.nii.gz to files in another, in the cases' order."""


def images(root: Path) -> list[Path]:
    """Every case's image."""
    return sorted(root.glob("*/image.nii.gz"))


def on(device: str, net: torch.nn.Module) -> Callable[[torch.Tensor], torch.Tensor]:
    """A network on a device that takes patches from anywhere."""
    net = net.to(device)
    return lambda patches: net(patches.to(device))


def bare(classes: int, device: str) -> Job:
    """The network alone, on every patch of the grid."""
    import nibabel as nib

    from voxquilt.geometry.grid import make_grid

    def job(source: Path, target: Path) -> list[Path]:
        net = on(device, network(classes))
        for path in images(source):
            volume = torch.zeros(1, 1, *nib.load(path).shape)
            with torch.inference_mode():
                for i0, j0, k0, i1, j1, k1 in make_grid(volume.shape[2:], PATCH, OVERLAP).locations.tolist():
                    net(volume[:, :, i0:i1, j0:j1, k0:k1].contiguous())
        return []

    return job


def voxquilt(mode: str) -> Callable[[int, str], Job]:
    """predict_volume and the file writer."""

    def prepare(classes: int, device: str) -> Job:
        from voxquilt import ScalarImage, Stitch, Subject, predict_volume
        from voxquilt.data.formats.nifti import write

        def job(source: Path, target: Path) -> list[Path]:
            net, made = on(device, network(classes)), []
            for path in images(source):
                subject = Subject(t1=ScalarImage(path))
                volumes = predict_volume(net, subject, PATCH, OVERLAP, stitch=Stitch(mode))
                made.append(target / f"{path.parent.name}.nii.gz")
                write(made[-1], volumes["labels"], subject.frame, header=subject["t1"].file.header)
            return made

        return job

    return prepare


def lightning(mode: str) -> Callable[[int, str], Job]:
    """voxquilt's Lightning loop, as predict.py builds it."""

    def prepare(classes: int, device: str) -> Job:
        from lightning.pytorch import Trainer

        from voxquilt import GridDataModule, PatchPredictor, Stitch, VolumeWriter

        def job(source: Path, target: Path) -> list[Path]:
            data = GridDataModule(None, PATCH, OVERLAP, images={"t1": f"{source}/{{subject}}/image.nii.gz"})
            quiet = {"enable_progress_bar": False, "enable_model_summary": False, "enable_checkpointing": False}
            trainer = Trainer(
                accelerator=device.replace("cuda", "gpu"),
                devices=1,
                logger=False,
                callbacks=[VolumeWriter(target, Stitch(mode), on_error="raise")],
                **quiet,
            )
            trainer.predict(PatchPredictor(network(classes)), datamodule=data, return_predictions=False)
            return [target / f"{path.parent.name}_labels.nii.gz" for path in images(source)]

        return job

    return prepare


def torchio(mode: str) -> Callable[[int, str], Job]:
    """TorchIO's sampler and aggregator in the loop of its documentation."""

    def prepare(classes: int, device: str) -> Job:
        import torchio as tio

        def job(source: Path, target: Path) -> list[Path]:
            net, made = on(device, network(classes)), []
            for path in images(source):
                subject = tio.Subject(t1=tio.ScalarImage(path))
                sampler = tio.GridSampler(subject, PATCH, OVERLAP)
                aggregator = tio.GridAggregator(sampler, overlap_mode=mode)
                with torch.inference_mode():
                    for batch in tio.SubjectsLoader(sampler, batch_size=1):
                        aggregator.add_batch(net(batch["t1"][tio.DATA].float()), batch[tio.LOCATION])
                labels = aggregator.get_output_tensor().argmax(0, keepdim=True).to(torch.uint8)
                made.append(target / f"{path.parent.name}.nii.gz")
                tio.LabelMap(tensor=labels, affine=subject["t1"].affine).save(made[-1])
            return made

        return job

    return prepare


def monai(mode: str, **options: int) -> Callable[[int, str], Job]:
    """MONAI's sliding window, files by nibabel."""

    def prepare(classes: int, device: str) -> Job:
        import nibabel as nib
        import numpy as np
        from monai.inferers import sliding_window_inference

        def job(source: Path, target: Path) -> list[Path]:
            net, made = network(classes).to(device), []
            for path in images(source):
                image = nib.load(path)
                volume = torch.from_numpy(np.asarray(image.dataobj, dtype=np.float32))[None, None].to(device)
                with torch.inference_mode():
                    scores = sliding_window_inference(volume, (PATCH,) * 3, 1, net, overlap=0.5, mode=mode, **options)
                    labels = scores[0].argmax(0).to(torch.uint8).cpu().numpy()
                made.append(target / f"{path.parent.name}.nii.gz")
                nib.save(nib.Nifti1Image(labels, image.affine), made[-1])
            return made

        return job

    return prepare


def nnunet_predictor(net: torch.nn.Module, classes: int, device: str):
    """nnU-Net's predictor around a network, with plans that ask for no resampling and no normalisation."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor
    from nnunetv2.utilities.plans_handling.plans_handler import PlansManager

    linear = {"is_seg": False, "order": 1, "order_z": 0, "force_separate_z": None}
    resampling = {
        f"resampling_fn_{what}{end}": value
        for what in ("data", "seg", "probabilities")
        for end, value in (("", "resample_data_or_seg_to_shape"), ("_kwargs", linear | {"is_seg": what == "seg"}))
    }
    configuration = {
        "preprocessor_name": "DefaultPreprocessor",
        "patch_size": [PATCH] * 3,
        "spacing": [1.0] * 3,
        "normalization_schemes": ["NoNormalization"],
        "use_mask_for_norm": [False],
        "architecture": {},
        **resampling,
    }
    plans = PlansManager(
        {
            "image_reader_writer": "SimpleITKIO",
            "transpose_forward": [0, 1, 2],
            "transpose_backward": [0, 1, 2],
            "foreground_intensity_properties_per_channel": {"0": {}},
            "configurations": {"3d": configuration},
        }
    )
    labels = {"background": 0} | {f"class {n}": n for n in range(1, classes)}
    dataset = {"channel_names": {"0": "t1"}, "labels": labels, "file_ending": ".nii.gz"}
    predictor = nnUNetPredictor(use_mirroring=False, device=torch.device(device), allow_tqdm=False)
    parameters = [net.state_dict()]
    predictor.manual_initialization(net, plans, plans.get_configuration("3d"), parameters, dataset, "none", None)
    return predictor


def nnunet(*, workers: int | None) -> Callable[[int, str], Job]:
    """nnU-Net from files to files: in one process, or with so many to preprocess and as many to export."""

    def prepare(classes: int, device: str) -> Job:
        import nnunetv2.inference.predict_from_raw_data  # noqa: F401

        def job(source: Path, target: Path) -> list[Path]:
            predictor = nnunet_predictor(network(classes), classes, device)
            inputs = [[str(path)] for path in images(source)]
            outputs = [str(target / path.parent.name) for path in images(source)]
            if workers is None:
                predictor.predict_from_files_sequential(inputs, outputs)
            else:
                predictor.predict_from_files(
                    inputs,
                    outputs,
                    num_processes_preprocessing=workers,
                    num_processes_segmentation_export=workers,
                )
            return [Path(f"{output}.nii.gz") for output in outputs]

        return job

    return prepare


def konfai(combine: str | None) -> Callable[[int, str], Job]:
    """KonfAI's prediction workflow; its own choice of blend is a crop, 'Trim'."""

    def prepare(classes: int, device: str) -> Job:
        import konfai.predictor  # noqa: F401, which konfai.api would import while it runs
        from konfai.api import predict

        def job(source: Path, target: Path) -> list[Path]:
            checkpoint = target / "weights.pt"
            weights = {f"Model.{key}": value for key, value in network(classes).state_dict().items()}
            torch.save({"Model": {"network": weights}}, checkpoint)
            config = _konfai_config(source, target, classes, combine)
            gpu = [0] if device == "cuda" else None
            predict(checkpoint, config, gpu=gpu, quiet=True, overwrite=True, predictions_dir=target / "runs")
            return [target / "labels" / path.parent.name / "labels.nii.gz" for path in images(source)]

        return job

    return prepare


def _konfai_config(source: Path, target: Path, classes: int, combine: str | None) -> dict:
    def cast(dtype: str) -> dict:
        return {"TensorCast": {"dtype": dtype, "inverse": False}}

    output = {
        "name_class": "OutputDataset",
        "before_reduction_transforms": None,
        "after_reduction_transforms": None,
        "final_transforms": {"Argmax": {"dim": 0}, **cast("uint8")},
        "dataset_filename": f"{target}/labels:nii.gz",
        "group": "labels",
        "same_as_group": "image:image",
        "patch_combine": combine,
        "reduction": "Mean",
    }
    group = {"transforms": cast("float32"), "patch_transforms": None, "is_input": True}
    model = {"classes": classes, "in_channels": 1, "dim": 3, "outputs_criterions": None, "ModelPatch": None}
    return {
        "Predictor": {
            "Model": {"classpath": "common:network", "network": model},
            "Dataset": {
                "groups_src": {"image": {"groups_dest": {"image": group}}},
                "augmentations": None,
                "Patch": {"patch_size": [PATCH] * 3, "overlap": OVERLAP, "pad_value": 0, "extend_slice": 0},
                "dataset_filenames": [f"{source}:a:nii.gz"],
                "batch_size": 1,
            },
            "outputs_dataset": {"Model": {"OutputDataset": output}},
            "train_name": "bench",
            "combine": "Mean",
        }
    }


PEERS = {
    "TorchIO crop": Contender(torchio("crop")),
    "TorchIO hann": Contender(torchio("hann")),
    "MONAI constant": Contender(monai("constant")),
    "MONAI gaussian": Contender(monai("gaussian")),
    "MONAI gaussian, buffered": Contender(monai("gaussian", buffer_steps=4)),
    "KonfAI trim": Contender(konfai(None), "konfai", half=True),
    "KonfAI gaussian": Contender(konfai("Gaussian"), "konfai", half=True),
}
ONE = {
    "bare": Contender(bare),
    "voxquilt crop": Contender(voxquilt("crop")),
    "voxquilt gaussian": Contender(voxquilt("gaussian")),
    **PEERS,
    "nnU-Net gaussian": Contender(nnunet(workers=None), "nnunet", half=True),
}
COHORT = {
    "bare": Contender(bare),
    "voxquilt crop": Contender(lightning("crop")),
    "voxquilt gaussian": Contender(lightning("gaussian")),
    **PEERS,
    "nnU-Net gaussian, one process": Contender(nnunet(workers=None), "nnunet", half=True),
    "nnU-Net gaussian, 1 + 1 workers": Contender(nnunet(workers=1), "nnunet", half=True),
}
LENGTH = {name: contender for name, contender in ONE.items() if name != "bare"}
JOBS = {"one": ONE, "cohort": COHORT, "length": LENGTH}
BRAIN, CASES, COHORT_CLASSES = (181, 217, 181), 6, 2
LENGTHS, LENGTH_CLASSES = (150, 450), 24


def make_volumes(root: Path, shape: Shape, cases: int, classes: int) -> Path:
    """Smooth int16 volumes that have every class, each another way, and no empty border that could be cropped."""
    import nibabel as nib
    import numpy as np

    i, j, k = np.ogrid[: shape[0], : shape[1], : shape[2]]
    for case in range(cases):
        wave = (np.sin(i / 17 + case) + np.sin(j / 13) + np.sin(k / 11)) / 6 + 0.5
        folder = root / f"sub-{case:02d}"
        folder.mkdir(parents=True)
        voxels = np.rint(wave * STEP * (classes - 1)).astype(np.int16)
        nib.save(nib.Nifti1Image(voxels, np.diag([1.0, 1, 1, 1])), folder / "image.nii.gz")
    return root


def wrong_share(source: Path, outputs: Sequence[str]) -> float:
    """How many of the labels are not the network's arg-max; 1 for a file of another shape or place."""
    import nibabel as nib
    import numpy as np

    shares = []
    for path, output in zip(images(source), outputs, strict=True):
        image, labels = nib.load(path), nib.load(output)
        truth = (np.asarray(image.dataobj) + STEP // 2) // STEP
        same = image.shape == labels.shape and np.allclose(image.affine, labels.affine, atol=1e-4)
        shares.append(float((truth != np.asarray(labels.dataobj)).mean()) if same else 1.0)
    return sum(shares) / len(shares)


def measure(job: Job, source: Path, target: Path) -> Run:
    """Run a job here."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(THREADS)
    before, cpu, start = resident(), sum(os.times()[:4]), time.perf_counter()
    made = job(source, target)
    seconds, cpu = time.perf_counter() - start, sum(os.times()[:4]) - cpu
    return {"seconds": seconds, "cpu": cpu, "imports": before, "peak": peak(), "outputs": [str(path) for path in made]}


def compete(names: Sequence[str], job: str, source: Path, classes: int, arguments: argparse.Namespace):
    """The runs of every contender on the volumes of a folder."""

    def once(name: str, repeat: int) -> Run:
        with tempfile.TemporaryDirectory() as target:
            options = ["--job", job, "--classes", classes, "--device", arguments.device]
            result = run(__file__, JOBS[job][name], name, *options, "--source", source, "--target", target)
            outputs = result.pop("outputs", [])
            if "error" not in result and name != "bare":
                try:
                    result["wrong"] = wrong_share(source, outputs)
                except Exception as error:
                    return {"error": f"no output to check: {type(error).__name__}: {error}"}
            return result

    return rounds(names, arguments.repeats, once)


def verdict(name: str, contender: Contender, runs: list[Run]) -> str:
    """The table's word on the labels."""
    wrong = max(run.get("wrong", 0) for run in runs)
    if name == "bare":
        return ""
    if wrong == 0:
        return "right"
    return f"{wrong:.2%} differ (float16)" if contender.half else f"WRONG: {wrong:.2%}"


def report_one(job: str, title: str, runs: dict[str, list[Run]]) -> None:
    """Print time and memory."""
    base = median(runs["bare"], "seconds") if "bare" in runs and "seconds" in runs["bare"][0] else float("nan")

    def row(name: str, done: list[Run]) -> list[str]:
        seconds, high, imports = (median(done, key) for key in ("seconds", "peak", "imports"))
        beyond = "" if name == "bare" else f"{seconds - base:.1f}"
        return [f"{seconds:.1f}", beyond, f"{high:.0f}", f"{imports:.0f}", verdict(name, JOBS[job][name], done)]

    header = ("seconds", "beyond bare [s]", "peak RSS [MB]", "after imports [MB]", "labels")
    print(f"{title}:\n\n{table(header, runs, row)}\n", flush=True)


def report_length(runs: dict[str, list[Run]]) -> None:
    """Print how memory grows."""

    def row(name: str, done: list[Run]) -> list[str]:
        short, long = (median(done, f"peak {n}") for n in LENGTHS)
        seconds = [f"{median(done, f'seconds {n}'):.1f}" for n in LENGTHS]
        return [f"{short:.0f}", f"{long:.0f}", f"{long - short:.0f}", *seconds, verdict(name, LENGTH[name], done)]

    peaks, seconds = [f"peak RSS at {n} [MB]" for n in LENGTHS], [f"seconds at {n}" for n in LENGTHS]
    print(f"128 x 128 x N, {LENGTH_CLASSES} classes:\n\n{table((*peaks, 'growth', *seconds, 'labels'), runs, row)}\n")


def both_lengths(short: list[Run], long: list[Run]) -> list[Run]:
    """Runs of the two lengths as one run each."""
    failed = [run for run in (*short, *long) if "error" in run]
    return failed or [
        {f"{key} {n}": run[key] for n, run in zip(LENGTHS, pair, strict=True) for key in ("peak", "seconds")}
        | {"wrong": max(run["wrong"] for run in pair)}
        for pair in zip(short, long, strict=True)
    ]


def compare(job: str, arguments: argparse.Namespace, root: Path) -> None:
    """Run a job, print its tables and save its runs."""
    names = [name for name in JOBS[job] if arguments.contenders is None or name in arguments.contenders]
    if job == "length":
        sources = [make_volumes(root / f"length {n}", (128, 128, n), 1, LENGTH_CLASSES) for n in LENGTHS]
        short, long = (compete(names, job, source, LENGTH_CLASSES, arguments) for source in sources)
        runs = {name: both_lengths(short[name], long[name]) for name in names}
        report_length(runs)
        save(arguments.json, "length", runs)
        return
    for classes in arguments.classes if job == "one" else [COHORT_CLASSES]:
        cases = 1 if job == "one" else CASES
        source = make_volumes(root / f"{job} {classes}", arguments.shape, cases, classes)
        runs = compete(names, job, source, classes, arguments)
        report_one(job, f"{cases} x {' x '.join(map(str, arguments.shape))}, {classes} classes", runs)
        save(arguments.json, f"{job} {classes}", runs)


def main() -> None:
    """Print a table for each job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--classes", type=int, nargs="+", default=[14, 105], help="of the job 'one'")
    parser.add_argument("--shape", type=int, nargs=3, default=BRAIN, help="of the jobs 'one' and 'cohort'")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--contenders", nargs="+", help="names as in the tables")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--json", type=Path, help="save every run")
    for hidden in ("--contender", "--report", "--source", "--target"):
        parser.add_argument(hidden, type=str if hidden == "--contender" else Path, help=argparse.SUPPRESS)
    arguments = parser.parse_args()
    if arguments.contender:
        job = JOBS[arguments.job[0]][arguments.contender].prepare(arguments.classes[0], arguments.device)
        arguments.report.write_text(json.dumps(measure(job, arguments.source, arguments.target)))
        return
    print(f"{machine(arguments.repeats, arguments.device)}\n", flush=True)
    with tempfile.TemporaryDirectory() as root:
        for job in arguments.job:
            compare(job, arguments, Path(root))


if __name__ == "__main__":
    sys.exit(main())
