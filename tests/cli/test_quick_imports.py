"""Tests the start: what a run imports, and that what is left out meanwhile is there when it is used."""

import gc
import json
import os
import subprocess
import sys
import threading
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from synthetic import ROOT, noise, save
from torch.fx.experimental import symbolic_shapes

from voxquilt.cli.collector import paused_collector
from voxquilt.cli.first_subject import first_subject_read_ahead
from voxquilt.cli.quick_shapes import _stand_ins
from voxquilt.data.discovery import find_cases
from voxquilt.data.formats.image_file import _AHEAD, ImageFile, open_image, read_ahead
from voxquilt.errors import InputError

# Slow to import, and of no use to a run without true labels and MONAI's classes. nibabel imports scipy itself.
SLOW = {"scipy.signal", "scipy.ndimage", "scipy.stats", "scipy.spatial", "matplotlib", "monai", "skimage", "pandas"}
SLOW |= {"torch._dynamo.eval_frame", "torch.distributed.tensor", "sympy.core", "mpmath", "triton"}


def printed(script: str) -> list[str]:
    """What a script prints in a process of its own, line by line."""
    done = subprocess.run(
        [sys.executable, "-W", "error::UserWarning", "-c", script], cwd=ROOT, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.splitlines()


def test_a_run_imports_nothing_that_it_does_not_use(tmp_path: Path) -> None:
    """From the first line of predict.py to the last file."""
    save(tmp_path / "in" / "a.nii.gz", noise((12, 10, 9)))
    done = subprocess.run(
        [
            sys.executable, "-X", "importtime", "predict.py", f"data.inputs={tmp_path}/in",
            f"output_dir={tmp_path}/out", "ckpt_path=null", "model=state_dict",
            "model.net._target_=torch.nn.Conv3d", "model.net.in_channels=1", "+model.net.out_channels=2",
            "+model.net.kernel_size=1", "data.patch_size=8", "trainer=cpu",
        ],
        cwd=ROOT, capture_output=True, text=True,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert (tmp_path / "out" / "a_labels.nii.gz").exists()
    lines = [line for line in done.stderr.splitlines() if line.startswith("import time:")]
    modules = {line.rsplit("|", 1)[1].strip() for line in lines}
    assert {"torch", "lightning.fabric", "torchmetrics.metric", "nibabel"} <= modules
    assert not modules & SLOW


NAMES = """
import json, sys
if {quick}:
    from voxquilt.cli.quick_imports import quick_imports
    with quick_imports():
        pass
import lightning.pytorch, torchmetrics, torchmetrics.segmentation
names = {{
    name: sorted(n for n in getattr(module, "__all__", dir(module)) if not n.startswith("__"))
    for name, module in list(sys.modules.items())
    if name.startswith(("torchmetrics", "lightning")) and module is not None
}}
print(json.dumps(names))
"""


def test_lightning_and_torchmetrics_have_the_same_names_as_ever() -> None:
    """Whatever they import only where SciPy and Matplotlib are installed, except for these two themselves."""
    plain, quick = (json.loads(printed(NAMES.format(quick=quick))[-1]) for quick in (False, True))
    plot = "torchmetrics.utilities.plot"
    assert plain.keys() == quick.keys()
    assert {name for name in plain if quick[name] != plain[name]} <= {"torchmetrics", plot}
    assert {*plain["torchmetrics"]} - {*quick["torchmetrics"]} <= {"scipy"}
    assert {*plain[plot]} - {*quick[plot]} == {"matplotlib"}


USE = """
import sys
from voxquilt.cli.quick_imports import quick_imports
with quick_imports():
    assert not {"scipy", "matplotlib"} & {name.split(".")[0] for name in sys.modules}
import torch
from torchmetrics.classification import MulticlassConfusionMatrix, BinaryAccuracy
from torchmetrics.functional.audio import permutation_invariant_training, scale_invariant_signal_distortion_ratio
from torchmetrics.functional.segmentation import hausdorff_distance
accuracy = BinaryAccuracy()
accuracy.update(torch.ones(4), torch.ones(4))
figure, axes = accuracy.plot()
print(type(figure).__module__)
confusion = MulticlassConfusionMatrix(3)
confusion.update(torch.tensor([0, 1, 2]), torch.tensor([0, 1, 1]))
print(type(confusion.plot()[0]).__name__)
signals = torch.randn(1, 4, 20)
# By SciPy, where it is found, for three speakers and more; otherwise there is a warning.
_, order = permutation_invariant_training(signals[:, [2, 0, 1, 3]], signals, scale_invariant_signal_distortion_ratio)
print(order.tolist())
import scipy.signal
import matplotlib.pyplot
"""


def test_torchmetrics_plots_and_uses_scipy_after_a_quick_import() -> None:
    """It has not remembered that they were missing; a warning would be an error here."""
    assert printed(USE) == ["matplotlib.figure", "Figure", "[[1, 2, 0, 3]]"]


SUMMARY = """
import sys
if {quick}:
    from voxquilt.cli.quick_imports import quick_imports
    with quick_imports():
        pass
import lightning.pytorch as pl, torch
from lightning.pytorch.utilities.model_summary import summarize
if {quick}:
    assert "triton" not in sys.modules

class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.example_input_array = torch.ones(2, 4)
        self.layer = torch.nn.Linear(4, 3)
    def forward(self, x):
        return self.layer(x)

print(summarize(Network()))
from torch.utils.flop_counter import FlopCounterMode
with FlopCounterMode(display=False) as counter:
    Network()(torch.ones(2, 4))
print(counter.get_total_flops(), type(counter).__name__)
"""


def test_layers_are_counted_as_ever() -> None:
    """In Lightning's table of a network, without Triton until then."""
    plain = printed(SUMMARY.format(quick=False))
    assert printed(SUMMARY.format(quick=True)) == plain
    assert plain[-1] == "48 FlopCounterMode"


MONAI = """
import json, sys
from voxquilt.cli.quick_imports import quick_imports
if {quick}:
    with quick_imports():
        pass
import monai
late = {{"scipy.signal", "scipy.ndimage", "scipy.sparse", "skimage.measure", "matplotlib.figure"}}
loaded = sorted(late & {{*sys.modules}})
modules = {{name: vars(module) for name, module in list(sys.modules.items()) if name.startswith("monai")}}
names = {{name: sorted(n for n in found if not n.startswith("__")) for name, found in modules.items()}}
flags = {{
    f"{{name}}.{{key}}": value for name, found in modules.items() for key, value in found.items() if type(value) is bool
}}
from monai.utils import optional_import
asked = [
    ("scipy.nothing",), ("scipy.ndimage.nothing",), ("scipy.ndimage", "999"), ("scipy",), ("nothing.ndimage",),
    ("skimage.measure", "0.14.2"), ("scipy.sparse.linalg",),
]
found = [optional_import(*options)[1] for options in asked]
print(json.dumps([loaded, names, flags, found]))
"""


def test_monai_finds_the_same_but_imports_it_later() -> None:
    """Its names, what it believes to be installed, and its answers afterwards, about versions and what is missing."""
    (plain, *as_ever), (quick, *same) = (json.loads(printed(MONAI.format(quick=quick))[-1]) for quick in (False, True))
    assert len(plain) == 5
    assert quick == []
    assert same == as_ever
    assert same[-1] == [False, False, False, True, False, True, True]


MONAI_USE = """
import pickle, sys
from voxquilt.cli.quick_imports import quick_imports
with quick_imports():
    pass
from monai.transforms import FillHoles, KeepLargestConnectedComponent
assert not any(type(finder).__module__ == "voxquilt.cli.quick_monai" for finder in sys.meta_path)
assert "scipy.ndimage" not in sys.modules
import numpy as np, torch
import monai.metrics.utils as metrics
from monai.metrics import compute_hausdorff_distance
from monai.visualize import matshow3d
mask = torch.zeros(1, 6, 6, 6)
mask[0, :3, :3, :3] = 1
mask[0, 1, 1, 1] = mask[0, 5, 5, 5] = 0
mask[0, 5, 5, 4] = 1
print(int(KeepLargestConnectedComponent()(mask).sum()), int(FillHoles()(mask).sum()))
there = torch.roll(mask, 1, 2)
print(float(compute_hausdorff_distance(mask[None], there[None], include_background=True)))
print(metrics.KDTree([[0.0, 1], [5, 5]]).query([4, 4])[1], type(metrics.KDTree([[0.0, 1]])).__module__)
print(pickle.loads(pickle.dumps(metrics.distance_transform_edt))(np.ones((2, 2))).shape, metrics.scipy_ndimage.__name__)
print(type(matshow3d(mask[0].numpy(), show=False)[0]).__name__)
"""


def test_monai_uses_scipy_skimage_and_matplotlib_after_a_quick_import() -> None:
    """Functions, classes and modules that it holds are the real ones once they are used."""
    plain = printed(MONAI_USE.replace("with quick_imports():\n    pass\n", "").replace("assert", "0 and"))
    assert printed(MONAI_USE) == plain
    assert plain[:2] == ["26 27", "1.0"]


DYNAMO = """
import inspect, sys, threading, types
if {quick}:
    from voxquilt.cli.quick_imports import quick_imports
    with quick_imports():
        pass
import lightning.pytorch as pl, torch
from lightning.fabric.wrappers import OptimizedModule

class Network(pl.LightningModule):
    def __init__(self):
        super().__init__()
        self.layer = torch.nn.Linear(1, 1)
    def training_step(self, batch, index):
        loss = self.layer(batch).sum()
        self.log("loss", loss)
        return loss
    def configure_optimizers(self):
        optimizer = torch.optim.AdamW(self.parameters())
        return [optimizer], [torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 4)]

trainer = pl.Trainer(accelerator="cpu", max_epochs=1, logger=False, enable_checkpointing=False,
                     enable_progress_bar=False, enable_model_summary=False)
trainer.fit(Network(), torch.utils.data.DataLoader(torch.ones(4, 1)))

@torch.compiler.disable
def outside(x):
    calls.append(torch.compiler.is_compiling())
    return x + 1

@torch.compiler.disable(recursive=False)
def shallow(x):
    return x * 2

calls = []
outside(torch.ones(1))
assert outside.__name__ == "outside" and not isinstance(outside, OptimizedModule)
inspect.getmodule(types.SimpleNamespace())  # looks at every module
if {quick}:
    assert "torch._dynamo.utils" not in sys.modules
{use}
torch.utils.checkpoint.checkpoint(torch.nn.Linear(1, 1), torch.ones(1, 1), use_reentrant=False)
from torch._dynamo.testing import CompileCounter
counter = CompileCounter()
network = torch.compile(torch.nn.Linear(1, 1), backend=counter)
whole = torch.compile(lambda x: shallow(outside(x * 3) * 4), backend=counter)
print(isinstance(network, OptimizedModule), isinstance(network.forward, OptimizedModule))
print(network(torch.ones(1, 1)).shape)
print(whole(torch.ones(1)).item(), calls, counter.frame_count, counter.op_count)
import torch._dynamo
names = sorted(name for name in sys.modules if name.startswith("torch._dynamo"))
print(names)
print(all(sys.modules[n].__spec__.name == n and sys.modules[n].__spec__.origin.endswith(".py") for n in names))
modules = [sys.modules[name] for name in names]
classes = [value for module in modules for value in vars(module).values() if type(value) is type]
own = [c for c in classes if c.__module__ in names]
print(all(getattr(sys.modules[c.__module__], c.__name__, c) is c for c in own), len(classes))
parents = [name.rpartition(".") for name in names if name != "torch._dynamo"]
print(all(getattr(sys.modules[parent], child) is sys.modules[f"{{parent}}.{{child}}"] for parent, _, child in parents
          if isinstance(getattr(sys.modules[parent], child), types.ModuleType)))
print(torch._dynamo is sys.modules["torch._dynamo"], torch._dynamo.disable.__module__)
print(torch.export.export(torch.nn.Linear(1, 1), (torch.ones(1, 1),)).module()(torch.ones(1, 1)).shape)
"""


@cache
def with_dynamo_at_once() -> list[str]:
    """As Python imports it."""
    return printed(DYNAMO.format(quick=False, use=""))


@pytest.mark.parametrize(
    "use",
    [
        "",
        "import torch._dynamo.source",
        "import torch._dynamo.config as config; assert config.recompile_limit",
        "import torch._dynamo.variables.builder",
        "from torch._dynamo import config, utils; assert config.recompile_limit and utils.counters is not None",
        "early = torch._dynamo; assert early.utils.counters is not None and early.config.recompile_limit",
        "threads = [threading.Thread(target=lambda: torch._dynamo.utils.counters.clear()) for _ in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
    ],
    ids=["compile", "module", "settings", "deep", "names", "attribute", "threads"],
)
def test_torchs_compiler_waits_until_it_is_used(use: str) -> None:
    """A whole training does without it; then all of it is there, however it is asked for, as after a plain import.

    What was kept out of compiled code before is kept out of it then.
    """
    plain = with_dynamo_at_once()
    assert printed(DYNAMO.format(quick=True, use=use)) == plain
    assert plain[2] == "32.0 [False, False] 3 3"


SHAPES = """
import sys, threading
if {quick}:
    from voxquilt.cli.quick_imports import quick_imports
    with quick_imports():
        pass
import torch
from torch.utils._python_dispatch import TorchDispatchMode

class Mode(TorchDispatchMode):
    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        return func(*args, **(kwargs or {{}}))

network = torch.nn.Sequential(
    torch.nn.Conv3d(1, 4, 3, padding=1), torch.nn.InstanceNorm3d(4), torch.nn.LeakyReLU(),
    torch.nn.Upsample(scale_factor=2, mode="trilinear"), torch.nn.BatchNorm3d(4), torch.nn.Softmax(1),
).to("meta")
with Mode(), torch.inference_mode():
    x = network(torch.zeros(1, 1, 8, 8, 8, device="meta"))
    print(((x + x[..., :1]) / 2 * (x > 0) - x.mean()).shape)
if {quick}:
    assert "sympy.core" not in sys.modules
{use}
from torch.export import Dim, export
made = export(torch.nn.Conv3d(1, 2, 3), (torch.ones(2, 1, 4, 4, 4),), dynamic_shapes=({{0: Dim("batch")}},))
print(made.range_constraints, made.module()(torch.ones(5, 1, 4, 4, 4)).shape)
import sympy
import sympy as again, torch.fx.experimental.symbolic_shapes as shapes
print(sympy is again is sys.modules["sympy"], sympy.Basic is sympy.core.Basic, len(sympy.__all__), sympy.__version__)
print(shapes.ShapeEnv.__module__, shapes is torch.fx.experimental.symbolic_shapes, shapes.sym_eq((1, 2), [1, 2]))
"""


@cache
def with_sympy_at_once() -> list[str]:
    """As Python imports it."""
    return printed(SHAPES.format(quick=False, use=""))


@pytest.mark.parametrize(
    "use",
    [
        "",
        "import sympy; assert str(sympy.Symbol('x') + 1) == 'x + 1'",
        "from sympy import Basic\nclass Own(Basic): pass\nassert issubclass(Own, __import__('sympy').core.Basic)",
        "from sympy import *; assert str(integrate(Symbol('x'))) == 'x**2/2'",
        "import sympy.core.symbol as symbol; assert symbol.Symbol('x').name == 'x'",
        "import sympy; assert isinstance(sympy.Symbol('x'), sympy.Basic) and not isinstance(1, sympy.Basic)",
        "import sympy; assert sympy.__version__",
        "assert torch._prims_common.elementwise_dtypes.__globals__['__name__'] == 'torch._prims_common'\n"
        "import sympy\nkind = torch._prims_common.ELEMENTWISE_TYPE_PROMOTION_KIND.DEFAULT\n"
        "assert torch._prims_common.elementwise_dtypes(sympy.Symbol('x'), type_promotion_kind=kind)",
        "import sympy; threads = [threading.Thread(target=lambda: sympy.Symbol('x')) for _ in range(8)]\n"
        "[thread.start() for thread in threads]; [thread.join() for thread in threads]",
    ],
    ids=["export", "module", "subclass", "star", "deep", "instance", "version", "symbol", "threads"],
)
def test_sympy_waits_until_there_are_symbols(use: str) -> None:
    """A pass without data does without it; then all of it is there, however it is asked for."""
    assert printed(SHAPES.format(quick=True, use=use)) == with_sympy_at_once()


PLAIN = st.one_of(st.booleans(), st.integers(-2, 3), st.floats(allow_nan=False), st.lists(st.integers(0, 2)))


@given(st.sampled_from(sorted(_stand_ins())), st.lists(PLAIN | st.lists(st.integers(0, 2)).map(tuple), max_size=3))
def test_numbers_of_shapes_are_compared_as_torch_does(name: str, values: list[Any]) -> None:
    """By a function that stands for torch's: the same answer, or the same kind of error."""
    answers = []
    for function in (_stand_ins()[name], getattr(symbolic_shapes, name)):
        try:
            answers.append((type(answer := function(*values)), answer))
        except Exception as error:
            answers.append((type(error), None))
    assert answers[0] == answers[1]


STATE = """
import gc, sys
from voxquilt.cli.quick_imports import quick_imports
import lightning_utilities.core.imports as imports
before = imports.RequirementCache.__bool__, imports.package_available
try:
    with quick_imports():
        assert not gc.isenabled()
        raise KeyError
except KeyError:
    pass
print(gc.isenabled(), (imports.RequirementCache.__bool__, imports.package_available) == before, gc.get_freeze_count())
with quick_imports():  # Lightning is there
    print(gc.isenabled())
"""


def test_an_error_leaves_everything_as_it_was() -> None:
    """And with Lightning imported already nothing is done."""
    assert printed(STATE) == ["True True 0", "True"]


def test_modules_are_never_looked_at_again() -> None:
    """They are frozen once they are imported."""
    script = "import gc; from voxquilt.cli.quick_imports import quick_imports\nwith quick_imports(): pass\n"
    frozen, enabled = printed(script + "print(gc.get_freeze_count(), gc.isenabled())")[0].split()
    assert int(frozen) > 100_000
    assert enabled == "True"


@pytest.mark.parametrize("enabled", [True, False])
def test_the_collector_is_paused_only_within_the_block(enabled: bool) -> None:
    """Where it was off before, it stays off."""
    try:
        (gc.enable if enabled else gc.disable)()
        with paused_collector():
            assert not gc.isenabled()
        assert gc.isenabled() is enabled
    finally:
        gc.enable()


def test_the_first_subject_is_read_ahead_once(tmp_path: Path) -> None:
    """The next read takes the voxels over, the one after it reads again; errors are those of reading."""
    path = tmp_path / "a.nii.gz"
    voxels = save(path, noise((40, 30, 20)))
    file, reads = open_image(path), list[str]()

    def read(path: Path) -> Any:
        reads.append(threading.current_thread().name)
        return file.read_voxels(path)

    read_ahead(replace(file, read_voxels=read))
    for _ in range(2):
        assert np.array_equal(open_image(path).read()[0].numpy(), voxels)
    assert len(reads) == 1
    assert reads[0].startswith("voxquilt-reader")

    # A file that has changed meanwhile is read again.
    read_ahead(open_image(path))
    other = save(path, noise((40, 30, 20), seed=1))
    os.utime(path, ns=(1, 1))
    assert np.array_equal(open_image(path).read()[0].numpy(), other)

    path.write_bytes(path.read_bytes()[:-2000])
    with pytest.raises(InputError, match="reading its voxels failed"):
        open_image(path).read()
    read_ahead(open_image(path))
    with pytest.raises(InputError, match="reading its voxels failed"):
        open_image(path).read()


FRESH: dict[str, Any] = {
    "output_dir": "out",
    "trainer": {"devices": 1, "num_nodes": 1},
    "run": {"dry_run": False},
    "shard": {"count": 1},
}


@pytest.mark.parametrize(
    ("changed", "is_read"),
    [
        ({}, True),
        ({"trainer": {"devices": "1", "num_nodes": "1"}}, True),
        ({"trainer": {"devices": 2, "num_nodes": 1}}, False),  # another process may have it
        ({"trainer": {"devices": "auto", "num_nodes": 1}}, False),
        ({"run": {"dry_run": True}}, False),
        ({"shard": {"count": 2}}, False),
        ({"output_dir": "begun"}, False),  # it may be done
    ],
)
def test_nothing_is_read_that_may_not_be_needed(
    changed: dict[str, object], is_read: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Only in a single process of a run that begins anew; a file that cannot be opened is left to the run."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.nii.gz", noise((6, 5, 4)))
    (tmp_path / "begun").mkdir()
    (tmp_path / "begun" / "manifest.csv").touch()
    read = list[ImageFile]()
    monkeypatch.setattr("voxquilt.data.formats.image_file.read_ahead", read.append)
    cases = find_cases(str(tmp_path / "a.nii.gz"))
    with first_subject_read_ahead(cases, FRESH | changed):
        assert [file.path.name for file in read] == ["a.nii.gz"] * is_read
    (tmp_path / "a.nii.gz").write_bytes(b"no image")
    with first_subject_read_ahead(cases, FRESH | changed):
        assert len(read) == is_read
    with first_subject_read_ahead(None, FRESH):  # in a process that rank 0 tells of the subjects
        assert len(read) == is_read


def test_what_nobody_asked_for_is_given_up(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """When the run is over, as it may be before it has read anything."""
    monkeypatch.chdir(tmp_path)
    save(tmp_path / "a.nii.gz", noise((6, 5, 4)))
    with first_subject_read_ahead(find_cases("a.nii.gz"), FRESH):
        assert len(_AHEAD) == 1
    assert not _AHEAD
