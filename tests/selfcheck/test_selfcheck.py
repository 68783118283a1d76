"""Tests run.selfcheck: it is right where a run is right, and finds each of the faults that a run could have."""

import os
import signal
import tempfile
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import nibabel as nib
import numpy as np
import pytest
import torch
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from synthetic import Over50, noise, save
from torch import Tensor

import voxquilt.cli.selfcheck_run as selfcheck_run
import voxquilt.data.formats.nifti as nifti
import voxquilt.data.preprocess as preprocess_module
import voxquilt.geometry.space as space_module
import voxquilt.models.patch_network as patch_network
import voxquilt.prediction.class_files as class_files
import voxquilt.prediction.output_files as output_files
from voxquilt.cli.main import _prepare_arguments, conf_dir, run_predict
from voxquilt.cli.resolvers import register_resolvers
from voxquilt.data import grid_loader
from voxquilt.data.foreground import box_of_mask
from voxquilt.geometry import axis_map, streamed_resample
from voxquilt.models.ensemble import Ensemble
from voxquilt.prediction.open_subjects import OpenSubjects
from voxquilt.selfcheck.findings import Finding, Findings
from voxquilt.stitching import patch_shares
from voxquilt.stitching.accumulator import Accumulator
from voxquilt.stitching.combination import Combination, MeanProbabilities, OrderedLabels
from voxquilt.stitching.products.entropy import Entropy
from voxquilt.stitching.sum_type import SumType

pytestmark = [
    pytest.mark.timeout(120),
    pytest.mark.filterwarnings("ignore::UserWarning:lightning"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning"),
]
# Permuted, flipped and oblique, with three spacings.
AFFINE = np.array([[0.1, 0.0, -1.3, 40], [-0.9, 0.1, 0.0, 9], [0.0, 2.0, 0.1, -7], [0, 0, 0, 1.0]])
BASE = (
    "data.inputs=in", "ckpt_path=net.pt", "model.net._target_=synthetic.Over50", "data.patch_size=12",
    "data.patch_overlap=6", "trainer.accelerator=cpu",
)  # fmt: skip
RESAMPLED = ("preprocess.spacing=1.6",)
ALL = ("stitch.products=[labels,probabilities,entropy,disagreement]",)

TWO_OUTPUTS = (
    "model.net._target_=selfcheck_networks.TwoOutputs", "ckpt_path=null", "stitch.products={a: [labels], b: [labels]}",
)  # fmt: skip

Check = Callable[..., Findings]


def forget_tables() -> None:
    """What is kept for volumes that are alike is made anew: faults are planted in what makes it."""
    for tables in (axis_map._neighbours, streamed_resample._tables, patch_shares._shares):
        tables.cache_clear()


@pytest.fixture
def check(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs predict.py with run.selfcheck=true in this process; gives what it printed, which fits its exit status."""
    save(tmp_path / "in/a.nii.gz", noise((30, 19, 26)), AFFINE)
    torch.save(Over50().state_dict(), tmp_path / "net.pt")
    printed: list[Findings] = []
    monkeypatch.setattr(selfcheck_run, "print_findings", printed.append)
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tmp").mkdir()
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path / "tmp"))

    def run(*overrides: str) -> Findings:
        settings = dict(text.partition("=")[::2] for text in (*BASE, *overrides, "run.selfcheck=true"))
        typed = _prepare_arguments([f"{key}={value}" for key, value in settings.items()], "predict")
        register_resolvers()
        GlobalHydra.instance().clear()
        with initialize_config_dir(str(conf_dir()), version_base="1.3"):
            cfg = compose("predict", typed)
        forget_tables()
        try:
            status = run_predict(cfg)
        finally:
            forget_tables()
        findings = printed.pop()
        assert status == (0 if findings.ok else 1)
        assert sorted(path.name for path in tmp_path.iterdir()) == ["in", "net.pt", "tmp"]
        assert list((tmp_path / "tmp").iterdir()) == []
        return findings

    return run


def off(findings: Findings) -> list[str]:
    """The checks that found something."""
    return [finding.check for finding in findings.found if not finding.ok]


def named(findings: Findings, check: str) -> Finding:
    (found,) = (finding for finding in findings.found if finding.check == check)
    return found


@pytest.mark.parametrize(
    "settings",
    [
        (),
        RESAMPLED,
        (*RESAMPLED, *ALL),
        (*ALL, "stitch.overlap_mode=crop", "stitch.compare=[hann,gaussian]"),
        (*RESAMPLED, "stitch.order=3", "preprocess.interpolation=3"),
        (*RESAMPLED, "stitch.restore=probabilities", "stitch.products=[labels,probabilities]"),
        (*RESAMPLED, "stitch.restore=labels"),
        ("model.flips=[0,2]", "model.average=probabilities", "stitch.products=[labels,probabilities]"),
        ("preprocess.orientation=LPI", "preprocess.transpose=[2,0,1]", "data.padding_mode=reflect"),
        ("data.divisible_by=8", "preprocess.orientation=null", "stitch.overlap_mode=average"),
        (*RESAMPLED, "preprocess.grid=ends", "data.patch_overlap=0", "data.placement=even", "data.step=0.5"),
        (*RESAMPLED, *ALL, "stitch.dtype=uint8", "stitch.files=per_class", "stitch.temperature=2"),
        (*RESAMPLED, *ALL, "stitch.dtype=float16", "model.activation=none"),
        ("trainer.precision=bf16-mixed", *RESAMPLED),
        ("trainer.precision=bf16-true", *ALL),
        ("stitch.label_values=[0,700]", "stitch.class_names=[background,lesion]", "stitch.classes=[lesion]"),
        ("stitch.overlap_mode=monai", "preprocess.crop=nonzero", "data.batch_size=3", *RESAMPLED),
        ("preprocess.interpolation=0", "stitch.order=0", *RESAMPLED),
    ],
    ids=" ".join,
)  # fmt: skip
def test_a_right_configuration_passes(check: Check, settings: tuple[str, ...]) -> None:
    """Whatever it resamples, flips, blends, rounds and writes."""
    findings = check(*settings)
    assert off(findings) == [], findings.found
    assert {"ramp along x comes back", "a constant comes back", "labels: its labels"} <= {
        finding.check for finding in findings.found
    }


def test_rounding_each_class_by_itself_is_no_fault(check: Check) -> None:
    """A probability is stationary where its class wins, and scores that are rounded in bfloat16 change it there."""
    products = "stitch.products={a: [labels,probabilities,entropy], b: [labels]}"
    findings = check(*TWO_OUTPUTS[:2], products, "trainer.precision=bf16-true")
    assert off(findings) == [], findings.found
    assert named(findings, "a_probabilities: its values").error > 1e-5


def raw_windows(monkeypatch: pytest.MonkeyPatch) -> None:
    """Windows that are not normalised: weights that sum to what they happen to sum to."""

    def weights(blend: Any, grid: Any, axis: int) -> Tensor:
        return blend.window(grid.patch_size[axis]).expand(grid.counts[axis], -1)

    monkeypatch.setattr(patch_shares, "checked_weights", weights)


def summed_in(dtype: torch.dtype) -> Callable[[pytest.MonkeyPatch], None]:
    """Sums in another type."""

    def plant(monkeypatch: pytest.MonkeyPatch) -> None:
        monkeypatch.setattr(
            SumType, "of_patches", classmethod(lambda cls, *_: cls(dtype, torch.float32, rounds=False, wanted=None))
        )

    return plant


def dropped_patch(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last patch is counted, and not added."""
    add = Accumulator._add_patch

    def most(self: Accumulator, patch: Tensor, number: int) -> None:
        if number < len(self.grid) - 1:
            add(self, patch, number)

    monkeypatch.setattr(Accumulator, "_add_patch", most)


def half_a_voxel(monkeypatch: pytest.MonkeyPatch) -> None:
    """Images are resampled half a voxel beside where the affine of model space says, and scores likewise."""
    make = space_module.AxisMap

    def shifted(axis: int, count: int, scale: float, offset: float, *rest: Any, **more: Any) -> Any:
        return make(axis, count, scale, offset + 0.5 * (abs(scale) != 1), *rest, **more)

    monkeypatch.setattr(space_module, "AxisMap", shifted)


def half_a_voxel_on_the_way_back(monkeypatch: pytest.MonkeyPatch) -> None:
    """As if a voxel's position were its corner."""
    in_scores = space_module.Space.in_scores

    def shifted(self: Any, *arguments: Any) -> Any:
        from dataclasses import replace

        return tuple(replace(m, offset=m.offset + 0.5) for m in in_scores(self, *arguments))

    monkeypatch.setattr(space_module.Space, "in_scores", shifted)


def half_a_voxel_in_the_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """The header of outputs."""
    write = output_files.write

    def shifted(path: Path, *arguments: Any, **more: Any) -> None:
        write(path, *arguments, **more)
        image: Any = nib.load(path)
        voxels, affine = np.asarray(image.dataobj), image.affine.copy()
        affine[:3, 3] += affine[:3, 0] / 2
        nib.save(nib.Nifti1Image(voxels, affine, image.header), path)

    monkeypatch.setattr(output_files, "write", shifted)


def flipped_file(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs are written from the other end of an axis."""
    write = output_files.write
    monkeypatch.setattr(
        output_files, "write", lambda path, data, *rest, **more: write(path, data[:, :, ::-1], *rest, **more)
    )


def unflipped_augmentation(monkeypatch: pytest.MonkeyPatch) -> None:
    """Outputs of flipped patches are not flipped back."""
    monkeypatch.setattr(patch_network, "flip_back", lambda output, axes: output)


def weights_of_the_next_axis(monkeypatch: pytest.MonkeyPatch) -> None:
    """Patches get the weights of another axis, where there are as many."""

    def weights(blend: Any, grid: Any, axis: int) -> Tensor:
        other = original(blend, grid, (axis + 1) % 3)
        right = original(blend, grid, axis)
        return other if other.shape == right.shape else right

    original = patch_shares.checked_weights
    monkeypatch.setattr(patch_shares, "checked_weights", weights)


def slope_ignored(monkeypatch: pytest.MonkeyPatch) -> None:
    """Voxels of files are taken for intensities as they are stored."""
    monkeypatch.setattr(nifti, "_scaling", lambda header: (1.0, 0.0))


def spacing_of_other_axes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The wanted voxel sizes are those of the axes in reverse."""
    make = preprocess_module.make_space
    monkeypatch.setattr(
        preprocess_module,
        "make_space",
        lambda frame, orientation, spacing, **more: make(frame, orientation, spacing[::-1], **more),
    )


def another_qform(monkeypatch: pytest.MonkeyPatch) -> None:
    """One of the two orientations in the header is another."""
    header_of = nifti._new_header

    def moved(*arguments: Any, **more: Any) -> Any:
        header = header_of(*arguments, **more)
        affine = header.get_best_affine()
        affine[:3, 3] += 5
        header.set_qform(affine, 1)
        return header

    monkeypatch.setattr(nifti, "_new_header", moved)


def first_member_only(monkeypatch: pytest.MonkeyPatch) -> None:
    """All members of an ensemble are the first."""
    ready = Ensemble.ready
    monkeypatch.setattr(Ensemble, "ready", lambda self, n: ready(self, 0))


def outputs_exchanged(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two outputs of the network are taken for each other."""
    forward = patch_network.PatchNetwork.forward

    def exchanged(self: Any, *arguments: Any) -> Any:
        outputs = forward(self, *arguments)
        return dict(zip(outputs, reversed(list(outputs.values())), strict=True))

    monkeypatch.setattr(patch_network.PatchNetwork, "forward", exchanged)


def names_of_other_classes(monkeypatch: pytest.MonkeyPatch) -> None:
    """The files of classes have each other's names."""
    monkeypatch.setattr(class_files, "file_names", lambda names: list(reversed(names)))


def cropped_too_far(monkeypatch: pytest.MonkeyPatch) -> None:
    """The first plane of what is not 0 is left out."""
    mask = preprocess_module.inside_mask

    def smaller(images: Any) -> Any:
        inside, ((first, stop), *others) = mask(images)
        return inside, ((first + 1, stop), *others)

    monkeypatch.setattr(preprocess_module, "inside_mask", smaller)


FAULTS = {
    "windows": (raw_windows, (), ["a constant comes back", "noise comes back", "ramp along x comes back"]),
    "uint8": (summed_in(torch.uint8), (), ["a constant comes back", "noise comes back"]),
    "float16": (summed_in(torch.float16), (), ["noise comes back", "ramp along y comes back"]),
    "float16 resampled": (summed_in(torch.float16), RESAMPLED, ["noise comes back"]),
    "last patch": (dropped_patch, (), ["a constant comes back", "noise comes back"]),
    "last patch cropped": (dropped_patch, (*RESAMPLED, "stitch.overlap_mode=crop"), ["noise comes back"]),
    "half a voxel": (half_a_voxel, RESAMPLED, [f"ramp along {axis} as the network sees it" for axis in "xyz"]),
    "half a voxel back": (half_a_voxel_on_the_way_back, RESAMPLED, [f"ramp along {axis} comes back" for axis in "xyz"]),
    "half a voxel in the file": (half_a_voxel_in_the_file, RESAMPLED, ["the files' affine"]),
    "flipped": (flipped_file, (), ["ramp along z comes back", "noise comes back", "labels: its labels"]),
    "flips": (unflipped_augmentation, ("model.flips=[1]",), ["noise comes back"]),
    "weights": (weights_of_the_next_axis, (), ["noise comes back"]),
    "slope": (slope_ignored, (), ["a constant comes back", "ramp along x as the network sees it"]),
    "spacing": (spacing_of_other_axes, ("preprocess.spacing=[1.1,1.6,2.2]",), ["the voxel size of model space"]),
    "qform": (another_qform, (), ["the files' header"]),
    "crop": (cropped_too_far, ("preprocess.crop=nonzero",), ["what preprocess.crop leaves"]),
    "members": (first_member_only, ("ckpt_path=[net.pt,net.pt,net.pt]",), ["a constant comes back"]),
    "outputs": (outputs_exchanged, TWO_OUTPUTS, ["a_labels: its labels", "b_labels: its labels"]),
    "names": (
        names_of_other_classes,
        ("stitch.products=[labels,probabilities]", "stitch.files=per_class", "stitch.class_names=[none,lesion]"),
        ["probabilities: the files' names"],
    ),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_a_fault_is_found(check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path, fault: str) -> None:
    """Each of them in a run that is right otherwise."""
    plant, settings, wanted = FAULTS[fault]
    if fault == "slope":
        image = nib.Nifti1Image(noise((30, 19, 26)).astype(np.int16), AFFINE)
        image.header.set_slope_inter(2, -100)
        nib.save(image, tmp_path / "in/a.nii.gz")
        assert off(check(*settings)) == []
    plant(monkeypatch)
    assert set(wanted) <= set(off(check(*settings)))


OF_VALUES = [name for name in FAULTS if "float16" not in name][: list(FAULTS).index("weights") - 2]


@pytest.mark.parametrize("fault", OF_VALUES)
def test_half_precision_hides_no_fault_that_is_larger_than_its_rounding(
    check: Check, monkeypatch: pytest.MonkeyPatch, fault: str
) -> None:
    """The ramps are 0 in the middle of the volume, where bfloat16 is fine enough for half a voxel."""
    plant, settings, wanted = FAULTS[fault]
    plant(monkeypatch)
    assert set(wanted) <= set(off(check(*settings, "trainer.precision=bf16-mixed")))


def linear_splines(monkeypatch: pytest.MonkeyPatch) -> None:
    """Linear interpolation where a cubic spline is asked for, of which ramps know nothing."""

    def linear(x: Tensor, first: int, stop: int, size: int) -> Any:
        below = x.floor().long().clamp(first, stop - 1)
        share = x - below
        weights = torch.zeros(len(x), size, dtype=torch.float64)
        weights.scatter_add_(1, below[:, None], 1 - share[:, None].double())
        weights.scatter_add_(1, (below + 1).clamp(max=stop - 1)[:, None], share[:, None].double())
        return spline(x, first, stop, size)._replace(weights=weights)

    spline = axis_map._spline
    monkeypatch.setattr(axis_map, "_spline", linear)


@pytest.mark.parametrize("settings", [("preprocess.interpolation=3",), ("stitch.order=3",)])
def test_noise_comes_back_through_cubic_splines(
    check: Check, monkeypatch: pytest.MonkeyPatch, settings: tuple[str, ...]
) -> None:
    """As a reference of matrices has it; other interpolation in their place is off."""
    findings = check(*RESAMPLED, *settings)
    assert off(findings) == []
    found = named(findings, "noise comes back")
    assert 100 * found.error < found.allowed < 1  # of about 1000
    linear_splines(monkeypatch)
    assert off(check(*RESAMPLED, *settings)) == ["noise comes back"]


WITHIN = ("data.inputs=in/a.nii.gz", "data.within='in/{subject}_mask.nii'", "data.margin=3.5")


@pytest.fixture
def masked(check: Check, tmp_path: Path) -> Check:
    """Runs the check with a mask of the subject."""
    mask = np.zeros((30, 19, 26), np.uint8)
    mask[8:20, 5:9, 12:14] = 1
    save(tmp_path / "in/a_mask.nii", mask, AFFINE)
    return lambda *overrides: check(*WITHIN, *overrides)


@pytest.mark.parametrize(
    "settings", [(), (*RESAMPLED, *ALL), ("data.margin=0",), ("data.margin=500", "stitch.overlap_mode=crop")]
)
def test_the_box_of_a_mask_is_checked(masked: Check, settings: tuple[str, ...]) -> None:
    """Its voxels, and what comes back in it and beside it."""
    findings = masked(*settings)
    assert off(findings) == [], findings.found
    assert named(findings, "what data.within leaves").ok
    assert not [line for line in findings.unchecked if "within" in line]


def test_the_box_of_a_mask_is_left_to_crop_where_both_are_set(masked: Check) -> None:
    """And this is said."""
    findings = masked("preprocess.crop=nonzero")
    assert off(findings) == []
    assert named(findings, "what preprocess.crop leaves").ok
    assert [line for line in findings.unchecked if line.startswith("data.within: ")]


@pytest.mark.parametrize("fault", ["twice the margin", "one voxel less", "another axis"])
def test_a_fault_in_the_box_of_a_mask_is_found(masked: Check, monkeypatch: pytest.MonkeyPatch, fault: str) -> None:
    """By the voxels that are left."""

    def wrong(mask: Any, subject: Any, margin: float = 0.0) -> Any:
        if fault == "twice the margin":
            return box_of_mask(mask, subject, 2 * margin)
        i, j, k = box_of_mask(mask, subject, margin)
        return ((i[0], i[1] - 1), j, k) if fault == "one voxel less" else ((i[0] + 1, i[1] + 1), j, k)

    monkeypatch.setattr(grid_loader, "box_of_mask", wrong)
    assert "what data.within leaves" in off(masked())


PARTS = (
    "model.parts=[{ckpt_path: in/two.ckpt, labels: {1: 5}}, {ckpt_path: in/four.ckpt, labels: {1: 9, 2: 0, 3: 2}}, "
    "{ckpt_path: in/three.ckpt, labels: {1: 7, 2: 300}}]",
)  # fmt: skip
MEAN = (
    "model.parts=[{ckpt_path: in/three.ckpt}, {ckpt_path: in/other.ckpt}, {ckpt_path: in/three.ckpt, step: 0.7}]",
    "stitch.combine=mean", "stitch.products=[labels,probabilities]",
)  # fmt: skip


@pytest.fixture
def several(check: Check, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Check:
    """Runs the check with several models, of which the files have no classes' names."""
    folder = tmp_path / "in"
    for name, classes in (("two", 2), ("three", 3), ("four", 4), ("other", 3)):
        network = {"in_channels": 1, "out_channels": classes, "kernel_size": 1}
        # Grids of their own, too.
        grid = {"patch_size": 8 + 2 * classes, "patch_overlap": 4}
        settings = {"format": 1, "images": ["image"], "data": grid, "preprocess": {}, "stitch": {}} | {
            "model": {"net": {"_target_": "torch.nn.Conv3d", **network}}
        }
        weights = {f"net.{key}": tensor for key, tensor in torch.nn.Conv3d(**network).state_dict().items()}
        torch.save({"state_dict": weights, "voxquilt": settings}, folder / f"{name}.ckpt")
    (folder / "a.nii.gz").rename(folder / "image.nii.gz")

    monkeypatch.setitem(
        globals(), "BASE", [text for text in BASE if not text.startswith(("ckpt_path", "model.", "data."))]
    )
    return lambda *overrides: check("data.inputs=in/*.nii.gz", "model=nnunet", *overrides)


@pytest.mark.parametrize(
    "settings",
    [
        (*PARTS, *RESAMPLED, "stitch.classes=[7,9]"),
        (*MEAN, *RESAMPLED, "stitch.dtype=uint8"),
        (*MEAN, "stitch.products=[labels,entropy,probabilities]"),
        (*MEAN, "model.activation=sigmoid", "stitch.products=[labels,entropy]", "stitch.dtype=float16"),
    ],
    ids=["ordered", "mean", "entropy", "entropy of masks"],
)
def test_several_models_pass_together(several: Check, settings: tuple[str, ...]) -> None:
    """Their labels one after the other, or the mean of their probabilities."""
    findings = several(*settings)
    assert off(findings) == [], findings.found
    assert named(findings, "the models together: their labels").ok
    assert not [line for line in findings.unchecked if "combine" in line or "several models" in line]
    if "entropy" in str(settings):
        assert 0 < named(findings, "the models together: their entropy").allowed < 0.05


def reversed_order(monkeypatch: pytest.MonkeyPatch) -> None:
    """Earlier labels replace later ones."""

    def add(self: OrderedLabels, model: int, volumes: Any) -> None:
        before = None if self._labels is None else self._labels.copy()
        original(self, model, volumes)
        if before is not None and self._labels is not None:
            np.copyto(self._labels, before, where=before != 0)

    original = OrderedLabels.add
    monkeypatch.setattr(OrderedLabels, "add", add)


def another_models_numbers(monkeypatch: pytest.MonkeyPatch) -> None:
    """Two labels of the second model are taken for each other."""
    begin = Combination.begin

    def shifted(self: Combination) -> Any:
        numbers = (self.numbers[0], (0, *reversed(self.numbers[1][1:])), *self.numbers[2:])
        return begin(replace(self, numbers=numbers))

    monkeypatch.setattr(Combination, "begin", shifted)


def divided_by_the_others(monkeypatch: pytest.MonkeyPatch) -> None:
    """The sum of three models' probabilities is divided by two."""
    finish = MeanProbabilities.finish

    def fewer(self: MeanProbabilities) -> Any:
        self._count -= 1
        return finish(self)

    monkeypatch.setattr(MeanProbabilities, "finish", fewer)


def in_bits(monkeypatch: pytest.MonkeyPatch) -> None:
    """The entropy is that of other units."""
    entropy = Entropy.__call__
    monkeypatch.setattr(Entropy, "__call__", lambda self, scores: entropy(self, scores) * 1.4427)


def without_the_last(monkeypatch: pytest.MonkeyPatch) -> None:
    """The last model is left out."""
    add = MeanProbabilities.add
    monkeypatch.setattr(MeanProbabilities, "add", lambda self, model, v: None if model == 2 else add(self, model, v))


@pytest.mark.parametrize(
    ("fault", "settings", "wanted"),
    [
        (reversed_order, PARTS, "their labels"),
        (another_models_numbers, PARTS, "their labels"),
        (divided_by_the_others, MEAN, "mean probabilities"),
        (without_the_last, MEAN, "their labels"),
        (in_bits, (*MEAN, "stitch.products=[labels,entropy]"), "their entropy"),
    ],
)
def test_a_fault_of_putting_models_together_is_found(
    several: Check, monkeypatch: pytest.MonkeyPatch, fault: Any, settings: tuple[str, ...], wanted: str
) -> None:
    """And nothing else is off: each model by itself is right."""
    fault(monkeypatch)
    found = off(several(*settings))
    assert f"the models together: {wanted}" in found
    assert all(check.startswith("the models together") for check in found)


def test_a_run_that_a_signal_stops_ends_the_check(
    check: Check, monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """With the status of the signal, and not with subjects that have not come back."""
    begin = OpenSubjects.begin_batch
    monkeypatch.setattr(OpenSubjects, "begin_batch", lambda self: (os.kill(os.getpid(), signal.SIGTERM), begin(self)))
    with pytest.raises(SystemExit) as ended:
        check()
    assert ended.value.code == 128 + signal.SIGTERM
    assert list((tmp_path / "tmp").iterdir()) == []
