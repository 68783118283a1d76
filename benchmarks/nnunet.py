"""What does a trained nnU-Net folder cost beyond its forwards? nnU-Net's own predictor beside `model=nnunet`.

    python benchmarks/environments.py nnunet
    python benchmarks/nnunet.py [--job volume classes parts usual] [--repeats 3] [--json results.json]

nnU-Net's environment makes the folder: its own U-Net with random weights, of 3 stages with 8 to 32 features unless it
says otherwise, and a random CT. Both predict the same files from start to end, nnU-Net in one process, without
mirroring; imports are not counted.

    volume     252 x 270 x 240 voxels of 1.2 mm, 3 classes, patches of 32 x 28 x 24 at 1.5 mm
    classes    200 x 200 x 160 voxels of 0.8 mm, 105 classes, patches of 64 x 64 x 64 at 1.5 mm
    parts      the volume again, by two networks whose labels become one map, without nnU-Net
    usual      the same with 150 x 150 x 150 voxels and networks of the size that nnU-Net plans: 6 stages with 32 to 320
               features, 2 convolutions in each, patches of 96 x 96 x 96

CPU seconds are of the process and its children; 'forwards' are the same number of patches through the same network and
nothing else. Labels are compared: nnU-Net sums in half precision.
"""

import argparse
import json
import os
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import numpy as np
import torch
from common import THREADS, Contender, Run, failure, machine, median, peak, rounds, run, save, table

JOBS = {
    "volume": {"shape": (252, 270, 240), "spacing": 1.2, "classes": 3, "patch": [32, 28, 24]},
    "classes": {"shape": (200, 200, 160), "spacing": 0.8, "classes": 105, "patch": [64, 64, 64]},
    "parts": {"shape": (252, 270, 240), "spacing": 1.2, "classes": 3, "patch": [32, 28, 24]},
    "usual": {"shape": (150, 150, 150), "spacing": 1.2, "classes": 3, "patch": [96, 96, 96]},
}
OF_PARTS = ("parts", "usual")
MODEL_SPACING = 1.5
MODEL = "nnUNetTrainer__nnUNetPlans__3d_fullres"
VOXQUILT, NNUNET, FORWARDS = "voxquilt", "nnU-Net", "forwards"


def make_folder(job: str, root: Path) -> None:
    """A model folder and an image, by nnU-Net's environment."""
    import nibabel as nib
    from nnunetv2.utilities.get_network_from_plans import get_network_from_plans

    given = JOBS[job]
    features, convolutions = ([32, 64, 128, 256, 320, 320], 2) if job == "usual" else ([8, 16, 32], 1)
    stages = len(features)
    options = {
        "n_stages": stages, "features_per_stage": features, "conv_op": "torch.nn.modules.conv.Conv3d",
        "kernel_sizes": [[3, 3, 3]] * stages, "strides": [[1, 1, 1], *[[2, 2, 2]] * (stages - 1)],
        "n_conv_per_stage": [convolutions] * stages, "n_conv_per_stage_decoder": [convolutions] * (stages - 1),
        "conv_bias": True,
        "norm_op": "torch.nn.modules.instancenorm.InstanceNorm3d", "norm_op_kwargs": {"eps": 1e-5, "affine": True},
        "dropout_op": None, "dropout_op_kwargs": None,
        "nonlin": "torch.nn.LeakyReLU", "nonlin_kwargs": {"inplace": True},
    }  # fmt: skip
    name, imported = "dynamic_network_architectures.architectures.unet.PlainConvUNet", [
        "conv_op", "norm_op", "dropout_op", "nonlin",
    ]  # fmt: skip
    torch.manual_seed(0)
    network = get_network_from_plans(name, options, imported, 1, given["classes"], deep_supervision=True)
    resampling = {"is_seg": False, "order": 3, "order_z": 0, "force_separate_z": None}
    configuration = {
        "patch_size": given["patch"], "spacing": [MODEL_SPACING] * 3, "batch_size": 2, "batch_dice": False,
        "preprocessor_name": "DefaultPreprocessor", "data_identifier": "x", "median_image_size_in_voxels": [1, 1, 1],
        "normalization_schemes": ["CTNormalization"], "use_mask_for_norm": [False],
        "resampling_fn_data": "resample_data_or_seg_to_shape", "resampling_fn_data_kwargs": resampling,
        "resampling_fn_seg": "resample_data_or_seg_to_shape",
        "resampling_fn_seg_kwargs": resampling | {"is_seg": True, "order": 1},
        "resampling_fn_probabilities": "resample_data_or_seg_to_shape",
        "resampling_fn_probabilities_kwargs": resampling | {"order": 1},
        "architecture": {"network_class_name": name, "arch_kwargs": options, "_kw_requires_import": imported},
    }  # fmt: skip
    plans = {
        "dataset_name": "Dataset001_Bench", "plans_name": "nnUNetPlans", "image_reader_writer": "SimpleITKIO",
        "transpose_forward": [0, 1, 2], "transpose_backward": [0, 1, 2], "label_manager": "LabelManager",
        "original_median_spacing_after_transp": [1, 1, 1], "original_median_shape_after_transp": [1, 1, 1],
        "experiment_planner_used": "ExperimentPlanner", "configurations": {"3d_fullres": configuration},
        "foreground_intensity_properties_per_channel": {
            "0": {"mean": 100.0, "std": 50.0, "percentile_00_5": -100.0, "percentile_99_5": 300.0, "median": 100.0,
                  "min": -100.0, "max": 300.0}
        },
    }  # fmt: skip
    labels = {"background": 0} | {f"class_{n}": n for n in range(1, given["classes"])}
    dataset = {"channel_names": {"0": "CT"}, "labels": labels, "numTraining": 1, "file_ending": ".nii.gz"}
    folder = root / MODEL
    (folder / "fold_0").mkdir(parents=True)
    (folder / "plans.json").write_text(json.dumps(plans))
    (folder / "dataset.json").write_text(json.dumps(dataset))
    settings = {"plans": plans, "configuration": "3d_fullres", "fold": 0, "dataset_json": dataset}
    torch.save(
        {"network_weights": network.state_dict(), "init_args": settings, "trainer_name": "nnUNetTrainer",
         "inference_allowed_mirroring_axes": (0, 1, 2)},
        folder / "fold_0" / "checkpoint_final.pth",
    )  # fmt: skip
    coarse = np.random.default_rng(0).normal(100, 80, [n // 8 + 2 for n in given["shape"]])
    voxels = torch.nn.functional.interpolate(torch.from_numpy(coarse)[None, None], given["shape"], mode="trilinear")
    affine = np.diag([-given["spacing"], -given["spacing"], given["spacing"], 1.0])
    (root / "images").mkdir()
    nib.save(nib.Nifti1Image(voxels[0, 0].numpy().astype(np.int16), affine), root / "images" / "case_0000.nii.gz")


def voxquilt(source: Path, target: Path, job: str) -> Callable[[], Run]:
    """The command, in this process."""
    from voxquilt.cli import main as cli
    from voxquilt.cli import predict_run  # noqa: F401  (imports what the job needs)

    model = f"model.folder={source / MODEL}"
    if job in OF_PARTS:
        model = ",".join(f"{{folder: {source / MODEL}, labels: {{1: {n}, 2: {n + 1}}}}}" for n in (1, 3))
        model = f"model.parts=[{model}]"
    sys.argv = [
        "predict.py", "model=nnunet", model, f"data.inputs={source / 'images'}",
        f"output_dir={target}", "model.flips=[]", "trainer=cpu", "logger=null", "run.log=plain",
    ]  # fmt: skip

    def job() -> Run:
        status = cli._status_of("predict", cli.run_predict)
        lines = (target / "manifest.csv").read_text().splitlines()
        row = dict(zip(lines[0].split(","), lines[1].split(","), strict=True))
        return {"status": status, "patches": int(row["patches"])}

    return job


def nnunet(source: Path, target: Path) -> Callable[[], Run]:
    """nnU-Net's predictor in one process."""
    from nnunetv2.inference.predict_from_raw_data import nnUNetPredictor

    def job() -> Run:
        target.mkdir()
        predictor = nnUNetPredictor(0.5, True, False, False, torch.device("cpu"), allow_tqdm=False)
        predictor.initialize_from_trained_model_folder(str(source / MODEL), (0,))
        predictor.predict_from_files_sequential(str(source / "images"), str(target), False, True)
        return {}

    return job


def forwards(source: Path, target: Path, patches: int) -> Callable[[], Run]:
    """The network alone."""
    import voxquilt

    network = voxquilt.predictor_from_nnunet(source / MODEL, flips=[]).network
    plans = json.loads((source / MODEL / "plans.json").read_text())
    patch = torch.zeros(1, 1, *plans["configurations"]["3d_fullres"]["patch_size"])
    patch.normal_()

    @torch.inference_mode()
    def job() -> Run:
        for _ in range(patches):
            network(patch)
        return {}

    return job


def measure(job: Callable[[], Run]) -> Run:
    """Seconds, CPU seconds and peak memory of a job."""
    before, start = os.times(), perf_counter()
    result = job()
    after = os.times()
    cpu = sum(after[:4]) - sum(before[:4])
    return result | {"seconds": perf_counter() - start, "cpu": cpu, "peak": peak()}


CONTENDERS = {VOXQUILT: None, NNUNET: "nnunet", FORWARDS: None}


def labels_of(folder: Path) -> np.ndarray:
    """The label file of a contender."""
    import nibabel as nib

    (file,) = folder.glob("case*.nii.gz")
    return np.asanyarray(nib.load(file).dataobj)


def compare(job: str, repeats: int, source: Path, root: Path) -> dict[str, list[Run]]:
    """Run every contender in turn."""
    patches: list[int] = []
    labels: dict[str, np.ndarray] = {}

    def once(name: str, repeat: int) -> Run:
        with tempfile.TemporaryDirectory(dir=root) as folder:
            options = ["--job", job, "--source", source, "--target", Path(folder) / "out", "--patches", *patches[-1:]]
            contender = Contender(prepare=print, environment=CONTENDERS[name])
            result = run(__file__, contender, name, *options[: None if patches else -1])
            if "error" not in result and name != FORWARDS:
                labels[name] = labels_of(Path(folder) / "out")
                patches.extend([result["patches"]] if "patches" in result else [])
            return result

    runs = rounds([name for name in CONTENDERS if name != NNUNET or job not in OF_PARTS], repeats, once)
    if len(labels) == 2:
        other = (labels[VOXQUILT] != labels[NNUNET]).mean()
        for result in runs[VOXQUILT]:
            result["differs"] = float(other)
    return runs


def main() -> None:
    """Print a table for each job."""
    parser = argparse.ArgumentParser()
    parser.add_argument("--job", nargs="+", default=list(JOBS), choices=list(JOBS))
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--json", type=Path, help="save every run")
    parser.add_argument("--contender", help=argparse.SUPPRESS)
    parser.add_argument("--patches", type=int, help=argparse.SUPPRESS)
    for hidden in ("--report", "--source", "--target"):
        parser.add_argument(hidden, type=Path, help=argparse.SUPPRESS)
    given = parser.parse_args()
    torch.set_num_threads(THREADS)
    if given.contender == "make":
        make_folder(given.job[0], given.source)
        given.report.write_text(json.dumps({"peak": 0.0}))
        return
    if given.contender:
        if given.contender != NNUNET:  # the huge pages that the command asks for, before torch allocates for others
            os.environ.setdefault("THP_MEM_ALLOC_ENABLE", "1")
        makers = {
            VOXQUILT: lambda s, t: voxquilt(s, t, given.job[0]),
            NNUNET: nnunet,
            FORWARDS: lambda s, t: forwards(s, t, given.patches),
        }
        given.report.write_text(json.dumps(measure(makers[given.contender](given.source, given.target))))
        return
    print(f"{machine(given.repeats, 'cpu')}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        for job in given.job:
            source = Path(folder) / job
            source.mkdir()
            made = run(__file__, Contender(print, "nnunet"), "make", "--job", job, "--source", source)
            if "error" in made:
                sys.exit(made["error"])
            runs = compare(job, given.repeats, source, Path(folder))
            bare = 0.0 if failure(runs[FORWARDS]) else median(runs[FORWARDS], "cpu")

            def row(name: str, done: list[Run], bare: float = bare) -> list[str]:
                share = f"{done[0]['differs']:.4%}" if "differs" in done[0] else ""
                figures = median(done, "seconds"), median(done, "cpu"), median(done, "cpu") - bare, median(done, "peak")
                return [*(f"{figure:.1f}" for figure in figures[:3]), f"{figures[3]:.0f}", share]

            header = ["seconds", "CPU seconds", "beyond forwards", "peak MB", "labels that differ"]
            print(f"### {job}\n\n{table(header, runs, row)}\n", flush=True)
            save(given.json, job, runs)


if __name__ == "__main__":
    main()
