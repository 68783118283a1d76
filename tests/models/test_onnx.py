"""Tests ONNX files: they predict as their network does, in batches of any size, and no file reads others' files."""

import contextlib
import copy
import json
import pickle
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from monai.networks.nets import UNet
from onnx import TensorProto
from onnx_files import export, graph, with_external, with_settings
from synthetic import noise, save
from torch import Tensor, nn

from voxquilt.data.discovery import SubjectFiles
from voxquilt.errors import ConfigError, OutputError
from voxquilt.models.ensemble import Ensemble, size_of
from voxquilt.models.factory import predictor_from_file, predictor_from_onnx
from voxquilt.models.patch_network import PatchNetwork
from voxquilt.models.weights import onnx_session
from voxquilt.models.weights.detect import kind_of, not_weights
from voxquilt.models.weights.onnx_header import fixed_patch, read_header
from voxquilt.models.weights.onnx_message import encode, fields
from voxquilt.models.weights.onnx_network import OnnxNetwork
from voxquilt.models.weights.reading import read_onnx, read_state_dict
from voxquilt.models.weights.stored_settings import FORMAT, KEY, carried
from voxquilt.planning.network_check import check_network, find_halo
from voxquilt.planning.preflight import weights_on_device
from voxquilt.planning.shape_probe import probe
from voxquilt.prediction.fingerprint import settings as fingerprint_settings

MIB = 2**20
FREE = (0, 2, 3, 4)


def net(seed: int = 0) -> nn.Module:
    torch.manual_seed(seed)
    return UNet(3, 1, 2, channels=(4, 8), strides=(2,), num_res_units=1).eval()


def patches(count: int, size: int = 8) -> Tensor:
    return torch.randn(count, 1, size, size, size, generator=torch.Generator().manual_seed(count))


def close(a: Tensor, b: Tensor) -> None:
    torch.testing.assert_close(a, b, atol=1e-5, rtol=1e-5)


@pytest.fixture(scope="module")
def fixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Two patches of 8 x 8 x 8 at a time."""
    return export(tmp_path_factory.mktemp("fixed") / "net.onnx", net(), (2, 1, 8, 8, 8))


@pytest.fixture(scope="module")
def free(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("free") / "net.onnx", net(), (2, 1, 8, 8, 8), FREE)


# Predicting


@pytest.mark.parametrize("count", [1, 2, 5])
def test_a_fixed_batch_takes_batches_of_any_size(fixed: Path, count: int) -> None:
    """Two at a time: the last chunk is filled up, and each output is that of its patch."""
    (loaded,) = read_onnx(fixed)
    with torch.no_grad():
        close(loaded(patches(count)), net()(patches(count)))


def test_a_fixed_batch_is_run_with_exactly_that_many_patches(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Five patches are three runs of two."""
    (loaded,) = read_onnx(fixed)
    sizes: list[int] = []
    run = onnx_session.Session.run
    monkeypatch.setattr(onnx_session.Session, "run", lambda *a: sizes.append(len(a[2])) or run(*a))
    loaded(patches(5))
    assert sizes == [2, 2, 2]


@pytest.mark.parametrize(("count", "size"), [(1, 8), (3, 8), (2, 16)])
def test_free_axes_take_any_size(free: Path, count: int, size: int) -> None:
    """In one run, of patches of any size that the network takes."""
    (loaded,) = read_onnx(free)
    assert loaded.sizes == (None, 1, None, None, None)
    with torch.no_grad():
        close(loaded(patches(count, size)), net()(patches(count, size)))


@pytest.mark.parametrize("memory", ["channels last", "strided", "half", "double"])
def test_patches_may_lie_in_memory_in_any_way_and_be_of_any_type(free: Path, memory: str) -> None:
    """Permuted, cut out of a larger batch, or of another type than the file's."""
    (loaded,) = read_onnx(free)
    given = {
        "channels last": lambda x: x.contiguous(memory_format=torch.channels_last_3d),
        "strided": lambda x: torch.nn.functional.pad(x, (1, 2, 3, 0, 0, 1))[..., :-1, 3:, 1:-2],
        "half": lambda x: x.half(),
        "double": lambda x: x.double(),
    }[memory](patches(2))
    with torch.no_grad():
        output = loaded(given)
        close(output, net()(given.float()))
    assert output.dtype == torch.float32


@pytest.mark.parametrize("dtype", [torch.float16, torch.float64])
def test_inputs_and_outputs_of_other_types_are_cast(tmp_path: Path, dtype: torch.dtype) -> None:
    """A file in half or double precision takes and gives float32."""
    module = nn.Sequential(nn.Flatten(2), nn.Linear(8**3, 8**3), nn.Unflatten(2, (8, 8, 8))).eval()
    path = export(tmp_path / "a.onnx", copy.deepcopy(module).to(dtype), (2, 1, 8, 8, 8), [0], dtype=dtype)
    assert read_header(path).inputs[0].type == {torch.float16: 10, torch.float64: 11}[dtype]
    (loaded,) = read_onnx(path)
    with torch.no_grad():
        output = loaded(patches(3))
        torch.testing.assert_close(output, module(patches(3)), atol=5e-3, rtol=5e-3)
    assert output.dtype == torch.float32
    assert probe(PatchNetwork([loaded]), 1, (8, 8, 8)).types == {"": torch.float32}


def test_flips_and_ensembles_average_as_with_the_network_itself(tmp_path: Path) -> None:
    """Two files, and a file beside a network of torch; all flips."""
    paths = [export(tmp_path / f"{seed}.onnx", net(seed), (1, 1, 8, 8, 8)) for seed in (0, 1)]
    wanted = PatchNetwork([net(0), net(1)], flips=[0, 2])(patches(3))[""]
    with torch.no_grad():
        close(predictor_from_onnx(paths, flips=[0, 2])(patches(3))[""], wanted)
        close(PatchNetwork([*read_onnx(paths[0]), net(1)], flips=[0, 2])(patches(3))[""], wanted)


def test_a_2d_network_takes_patches_of_one_voxel_along_the_squeezed_axis(tmp_path: Path) -> None:
    """A file with four axes; without model.squeeze_axis the error says what to set."""
    module = nn.Conv2d(1, 2, 3, padding=1).eval()
    path = export(tmp_path / "a.onnx", module, (1, 1, 8, 6))
    flat = torch.randn(3, 1, 8, 6, 1)
    with torch.no_grad():
        close(predictor_from_onnx(path, squeeze_axis=2)(flat)[""][..., 0], module(flat[..., 0]))
    assert fixed_patch(path) == (8, 6)
    with pytest.raises(OutputError, match=r"1 x 8 x 6 .*Set model\.squeeze_axis, since it is a 2-D network"):
        predictor_from_onnx(path)(flat)
    deep = export(tmp_path / "b.onnx", nn.Conv3d(1, 2, 1), (1, 1, 8, 6, 1))
    with pytest.raises(OutputError, match=r"Set model\.squeeze_axis=null"):
        predictor_from_onnx(deep, squeeze_axis=2)(flat)


class Several(nn.Module):
    """Two outputs of different channels."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return torch.cat([x, 2 * x], 1), x + 1


class Deep(nn.Module):
    """Outputs as of deep supervision."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        return 3 * x, nn.functional.avg_pool3d(x, 2)


def test_several_outputs_are_named_as_in_the_file(tmp_path: Path) -> None:
    """Each can be chosen by its name; what cannot be part of a file's name becomes an underscore."""
    path = export(tmp_path / "a.onnx", Several(), (2, 1, 8, 8, 8), names=["seg/logits:0", "edge"])
    outputs = predictor_from_onnx(path)(patches(3))
    assert list(outputs) == ["seg_logits_0", "edge"]
    assert torch.equal(outputs["seg_logits_0"], torch.cat([patches(3), 2 * patches(3)], 1))
    assert torch.equal(outputs["edge"], patches(3) + 1)
    assert list(predictor_from_onnx(path, outputs=["edge"])(patches(3))) == ["edge"]
    with pytest.raises(OutputError, match=r"names \['other'\]; the network gives \['seg_logits_0', 'edge'"):
        predictor_from_onnx(path, outputs=["other"])(patches(3))
    assert set(probe(predictor_from_onnx(path).network, 1, (8, 8, 8)).outputs) == {"seg_logits_0", "edge"}


def test_deep_supervision_is_an_error_that_says_how_to_keep_the_first(tmp_path: Path) -> None:
    """Before a run; the suggested setting works."""
    path = export(tmp_path / "a.onnx", Deep(), (1, 1, 8, 8, 8), names=["out", "coarse"])
    with pytest.raises(ConfigError, match=r"deep supervision\? Set model\.outputs=\[out\]"):
        check_network(predictor_from_onnx(path).network, ["image"], 1, (8, 8, 8), None)
    outputs = predictor_from_onnx(path, outputs=["out"])(patches(2))
    assert torch.equal(outputs["out"], 3 * patches(2))


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda n: pickle.loads(pickle.dumps(n))], ids=["copy", "pickle"])
def test_a_network_that_has_run_can_be_copied_and_pickled(fixed: Path, copied: Any) -> None:
    """As ddp_spawn pickles it: it holds the file's path, and is quite small."""
    (loaded,) = read_onnx(fixed)
    wanted = loaded(patches(3))
    assert len(pickle.dumps(loaded)) < 1000
    assert torch.equal(copied(loaded)(patches(3)), wanted)


def test_a_process_opens_a_file_once_when_it_first_runs_it(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Not when it is read; a forked process opens it again; as many threads compute as torch has."""
    opened: list[int] = []
    made = onnxruntime.InferenceSession

    def session(model: Any, options: Any, **rest: Any) -> Any:
        opened.extend([options.intra_op_num_threads] if isinstance(model, str) else [])
        return made(model, options, **rest)

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    (loaded,) = read_onnx(fixed)
    assert opened == []
    loaded(patches(1))
    loaded(patches(3))
    assert opened == [torch.get_num_threads()]
    monkeypatch.setattr("os.getpid", lambda: -1)
    loaded(patches(3))
    assert len(opened) == 2


def test_a_relative_path_is_found_from_another_folder(
    fixed: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The file is opened later, perhaps by a process that began elsewhere."""
    monkeypatch.chdir(fixed.parent)
    (loaded,) = read_onnx("net.onnx")
    monkeypatch.chdir(tmp_path)
    with torch.no_grad():
        close(loaded(patches(1)), net()(patches(1)))


def test_compiling_onnx_is_refused(fixed: Path) -> None:
    """It would do nothing."""
    with pytest.raises(ConfigError, match="compile=true has no effect on TorchScript and ONNX"):
        predictor_from_onnx(fixed, compile=True)


def test_a_network_beside_the_file_is_refused(fixed: Path) -> None:
    """It brings its own."""
    with pytest.raises(ConfigError, match=r"net\.onnx \(onnx\) is a network by itself"):
        predictor_from_file(fixed, net())
    with pytest.raises(ConfigError, match=r"net\.onnx cannot be read as weights"):
        read_state_dict(net(), fixed)


# Devices


def test_a_device_for_which_onnxruntime_has_no_provider_is_refused() -> None:
    """Never a silent run on the CPU; `meta` is a device that is not CUDA."""
    for name in ("cuda:0", "meta"):
        with pytest.raises(ConfigError, match=rf"on {name}, and onnxruntime .* has no provider .*onnxruntime-gpu"):
            onnx_session.Session(Path("net.onnx"), torch.device(name))


def test_a_provider_that_onnxruntime_gives_up_is_refused(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """It has one, but cannot load it, as with another version of CUDA: it then goes on with the CPU and only warns."""
    monkeypatch.setattr(onnxruntime, "get_available_providers", lambda: ["CUDAExecutionProvider"])
    made, asked = onnxruntime.InferenceSession, []

    def session(model: Any, options: Any, providers: list[Any]) -> Any:
        asked.extend(providers)
        return made(model, options, providers=["CPUExecutionProvider"])

    monkeypatch.setattr(onnxruntime, "InferenceSession", session)
    (loaded,) = read_onnx(fixed)
    with pytest.raises(ConfigError, match=r"could not use cuda:1 for .*net\.onnx, and would run on the CPU"):
        loaded.open_session(torch.device("cuda:1"))
    assert asked[-2][0] == "CUDAExecutionProvider"
    assert asked[-2][1]["device_id"] == 1


def test_onnx_never_waits_on_the_host_for_its_turn(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Its weights are not torch's to move. Those of others are."""
    members = Ensemble([*read_onnx(fixed), net()], offload=True)
    members.to("meta")
    assert members.waiting == {1}


# Planning


@pytest.mark.parametrize(("count", "size"), [(1, 8), (5, 8), (3, 16)])
def test_a_probe_knows_the_outputs_without_computing(
    free: Path, count: int, size: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Shapes follow from the file's operators; nothing is run and no weight is loaded."""
    network = predictor_from_onnx(free).network
    monkeypatch.setattr(OnnxNetwork, "open_session", None)
    found = probe(network, 1, (size, size, size), count)
    assert found.outputs == {"": (count, 2, size, size, size)}
    assert found.output_bytes == 4 * count * 2 * size**3


def test_a_probe_runs_zeros_where_shapes_depend_on_values(tmp_path: Path) -> None:
    """A pooling whose result is cut to a length that the graph computes from values."""
    path = graph(
        tmp_path / "a.onnx",
        [("ReduceMax", ["x"], ["m"], {"keepdims": 0}), ("Cast", ["m"], ["n"], {"to": TensorProto.INT64}),
         ("Unsqueeze", ["n", "zero"], ["start"]), ("Slice", ["x", "start", "end", "axis"], ["y"])],
        weights={"zero": np.array([0]), "end": np.array([3]), "axis": np.array([2])},
        outputs={"y": [1, 1, None, 4, 4]},
    )  # fmt: skip
    network = predictor_from_onnx(path, output="resampled").network
    assert probe(network, 1, (4, 4, 4)).outputs == {"": (1, 1, 3, 4, 4)}
    assert network(torch.zeros(1, 1, 4, 4, 4))[""].shape == (1, 1, 3, 4, 4)


def test_a_patch_size_that_the_file_lacks_is_one_error(fixed: Path) -> None:
    """Before a run and when such a patch comes."""
    network = predictor_from_onnx(fixed).network
    with pytest.raises(ConfigError, match=r"exported for inputs of 1 x 8 x 8 x 8 .*these are 1 x 16 x 16 x 16\. Set"):
        check_network(network, ["image"], 1, (16, 16, 16), None)
    assert check_network(network, ["image"], 1, (8, 8, 8), ["a", "b"]) is not None
    with pytest.raises(ConfigError, match=r"these are 2 x 8 x 8 x 8"):
        check_network(network, ["t1", "t2"], 2, (8, 8, 8), None)
    with pytest.raises(OutputError, match=r"these are 1 x 16 x 16 x 16"):
        network(patches(1, 16))


def test_a_patch_that_strides_do_not_divide_names_one_that_works(free: Path) -> None:
    """onnxruntime's inference of shapes finds out, as a network of torch does."""
    with pytest.raises(ConfigError, match=r"wanted is a multiple of 2 .*\[10, 10, 10\] would work"):
        check_network(predictor_from_onnx(free).network, ["image"], 1, (9, 9, 9), None)


def test_the_halo_of_valid_convolutions_is_found(tmp_path: Path) -> None:
    """model.output=cropped, with a file that takes any size."""
    path = export(tmp_path / "a.onnx", nn.Conv3d(1, 2, 5), (1, 1, 8, 8, 8), FREE)
    network = predictor_from_onnx(path, output="cropped").network
    case = SubjectFiles("a", {"image": tmp_path / "a.nii"})
    save(tmp_path / "a.nii", noise((9, 9, 9)))
    assert find_halo(network, [case], (8, 8, 8)) == ((2, 2), (2, 2), (2, 2))


def test_bytes_of_a_chain_are_counted_while_values_live(tmp_path: Path) -> None:
    """Three steps that need memory of their own: two values live at a time, and half as much is added."""
    nodes = [("Exp", ["x"], ["a"]), ("Exp", ["a"], ["b"]), ("Relu", ["b"], ["c"]), ("Exp", ["c"], ["y"])]
    path = graph(tmp_path / "a.onnx", nodes, inputs={"x": [1, 1, 32, 32, 32]}, outputs={"y": [1, 1, 32, 32, 32]})
    assert probe(OnnxNetwork(path), 1, (32, 32, 32)).peak_bytes == 4 * 32**3 * (1 + 2 * 1.5)
    kept = [("Exp", ["x"], ["a"]), ("Exp", ["a"], ["b"]), ("Exp", ["b"], ["c"]), ("Sum", ["a", "b", "c"], ["y"])]
    graph(tmp_path / "b.onnx", kept, inputs={"x": [1, 1, 32, 32, 32]}, outputs={"y": [1, 1, 32, 32, 32]})
    assert probe(OnnxNetwork(tmp_path / "b.onnx"), 1, (32, 32, 32)).peak_bytes == 4 * 32**3 * (1 + 4 * 1.5)


MEASURE = """
import sys, torch
from pathlib import Path
from voxquilt.models.weights.onnx_network import OnnxNetwork
from voxquilt.planning.shape_probe import probe
def held(key):
    return 1024 * int(next(line.split()[1] for line in open("/proc/self/status") if line.startswith(key)))
network, size = OnnxNetwork(Path(sys.argv[1])), int(sys.argv[2])
with torch.inference_mode():
    expected = probe(network, 1, (size,) * 3).peak_bytes
    network(torch.zeros(1, 1, 16, 16, 16))
    patch = torch.zeros(1, 1, size, size, size)
    Path("/proc/self/clear_refs").write_text("5")
    base = held("VmRSS")
    network(patch)
    print(expected, held("VmHWM") - base)
"""


@pytest.mark.slow
def test_the_estimate_is_near_what_a_run_takes(tmp_path: Path) -> None:
    """A residual U-Net with 96^3 voxels: from 0.6 to 1.5 times the memory of the real forward pass."""
    torch.manual_seed(0)
    network = UNet(3, 1, 2, channels=(16, 32, 64), strides=(2, 2), num_res_units=2)
    path = export(tmp_path / "a.onnx", network, (1, 1, 16, 16, 16), FREE)
    done = subprocess.run([sys.executable, "-c", MEASURE, path, "96"], capture_output=True, text=True, check=True)
    expected, measured = map(int, done.stdout.split())
    assert measured > 40 * MIB
    assert 0.6 * measured < expected < 1.5 * measured


def test_the_weights_count_on_a_device(fixed: Path) -> None:
    """They are the file's bytes, since torch has none of them."""
    assert size_of(read_onnx(fixed)[0]) == fixed.stat().st_size
    assert weights_on_device(predictor_from_onnx([fixed, fixed])) == 2 * fixed.stat().st_size


# Reading without onnxruntime


def test_the_header_is_what_onnx_itself_reads(fixed: Path, free: Path) -> None:
    """Inputs, outputs, operators, and the only patch size of a file."""
    for path in (fixed, free):
        header, model = read_header(path), onnx.load(path)
        assert [value.name for value in header.inputs] == [value.name for value in model.graph.input]
        assert [operator.kind for operator in header.operators] == [node.op_type for node in model.graph.node]
        assert [operator.inputs for operator in header.operators] == [tuple(node.input) for node in model.graph.node]
    assert read_header(fixed).inputs[0].sizes == (2, 1, 8, 8, 8)
    assert fixed_patch(fixed) == (8, 8, 8)
    assert fixed_patch(free) is None
    assert kind_of(fixed) == "onnx"
    assert not_weights(fixed) == ""


def test_weights_that_old_files_list_among_the_inputs_are_no_inputs(tmp_path: Path) -> None:
    """As files of before 2019 have them."""
    path = graph(
        tmp_path / "a.onnx", [("Add", ["x", "w"], ["y"])],
        inputs={"x": [1, 1, 4, 4, 4], "w": [1, 1, 4, 4, 4]}, weights={"w": np.full((1, 1, 4, 4, 4), 2, np.float32)},
    )  # fmt: skip
    (loaded,) = read_onnx(path)
    assert torch.equal(loaded(torch.ones(3, 1, 4, 4, 4)), torch.full((3, 1, 4, 4, 4), 3.0))


@given(st.lists(st.tuples(st.integers(1, 5000), st.integers(0, 2**63) | st.binary())))
def test_fields_are_read_back_unchanged(written: list[tuple[int, int | bytes]]) -> None:
    """Numbers and bytes, in their order."""
    message = b"".join(encode(number, value) for number, value in written)
    read = [
        (number, value if isinstance(value, int) else bytes(value)) for number, value in fields(memoryview(message))
    ]
    assert read == written


SETTINGS = {
    "format": FORMAT, "images": ["t1"], "data": {"patch_size": [8, 8, 8]}, "preprocess": {}, "model": {}, "stitch": {},
}  # fmt: skip


def test_settings_are_read_from_the_metadata_and_checked_as_those_of_other_files(fixed: Path, tmp_path: Path) -> None:
    """Without onnxruntime; none in a file without them, and no key that no file may bring."""

    def stored(text: str) -> Any:
        path = tmp_path / "a.onnx"
        path.write_bytes(fixed.read_bytes())
        return carried(with_settings(path, KEY, text))

    assert carried(fixed) is None
    assert stored(json.dumps(SETTINGS)) == SETTINGS
    assert stored("{no json") is None
    by_channel = SETTINGS | {"preprocess": {"intensity": {0: [{"_target_": "voxquilt.NoNormalization"}]}}}
    assert stored(json.dumps(by_channel)) == by_channel  # though JSON's keys are texts
    with pytest.raises(ConfigError, match=r"model\.trust_checkpoint, which no checkpoint may bring"):
        stored(json.dumps(SETTINGS | {"model": {"trust_checkpoint": True}}))
    with pytest.raises(ConfigError, match="have format 99"):
        stored(json.dumps(SETTINGS | {"format": 99}))
    with pytest.raises(ConfigError, match="not plain values"):
        stored(json.dumps(SETTINGS | {"images": ["${oc.env:HOME}"]}))


# Trust


def test_files_outside_the_folder_are_never_read(tmp_path: Path) -> None:
    """By .., by an absolute path, by a link, or without a name: named, before onnxruntime sees the file."""
    (tmp_path / "in").mkdir()
    (tmp_path / "secret").write_bytes(bytes(256))
    (tmp_path / "in/link").symlink_to(tmp_path / "secret")
    (tmp_path / "in/folder").symlink_to(tmp_path)
    for name in ("../secret", str(tmp_path / "secret"), "link", "folder/secret", "", "../in/w"):
        path = with_external(tmp_path / "in/net.onnx", name)
        with pytest.raises(ConfigError, match=r"net\.onnx was not loaded, since it reads .*outside its own"):
            read_onnx(path)


def test_weights_beside_the_file_are_read_if_they_are_whole(tmp_path: Path) -> None:
    """Missing and cut ones are named, and count in the fingerprint of a run."""
    weights = np.arange(64, dtype=np.float32)
    path = with_external(tmp_path / "net.onnx", "net.onnx.data", weights.tobytes())
    (loaded,) = read_onnx(path)
    assert torch.equal(loaded(torch.zeros(1, 1, 4, 4, 4)).flatten(), torch.from_numpy(weights))
    assert size_of(loaded) == path.stat().st_size + 256
    before = fingerprint_settings({"ckpt_path": str(path)})
    (tmp_path / "net.onnx.data").write_bytes(bytes(256))
    assert fingerprint_settings({"ckpt_path": str(path)}) != before
    (tmp_path / "net.onnx.data").write_bytes(bytes(200))
    with pytest.raises(ConfigError, match=r"net\.onnx has its weights in net\.onnx\.data, which is too small"):
        read_onnx(path)
    (tmp_path / "net.onnx.data").unlink()
    with pytest.raises(ConfigError, match=r"weights in net\.onnx\.data, which must be beside it, and is not there"):
        read_onnx(path)


@pytest.mark.parametrize("place", ["attribute", "inner graph", "function", "sparse"])
def test_weights_in_other_files_are_found_wherever_they_may_be(tmp_path: Path, place: str) -> None:
    """In an operator's attribute, in a graph inside of one, in a function, in a sparse tensor."""
    path = with_external(tmp_path / "net.onnx", "../secret")
    model = onnx.load(path, load_external_data=False)
    weight = onnx.TensorProto()
    weight.CopyFrom(model.graph.initializer[0])
    del model.graph.initializer[:]
    constant = onnx.helper.make_node("Constant", [], ["w"], value=weight)
    if place == "attribute":
        model.graph.node.insert(0, constant)
    elif place == "inner graph":
        inner = onnx.helper.make_graph([constant], "inner", [], [onnx.helper.make_tensor_value_info("w", 1, None)])
        model.graph.node.insert(0, onnx.helper.make_node("If", ["c"], ["w"], then_branch=inner, else_branch=inner))
    elif place == "function":
        opset = [onnx.helper.make_opsetid("", 20)]
        model.functions.append(onnx.helper.make_function("custom.domain", "F", [], ["w"], [constant], opset))
    else:
        model.graph.sparse_initializer.add().values.CopyFrom(weight)
    path.write_bytes(model.SerializeToString())
    with pytest.raises(ConfigError, match=r"reads weights from '\.\./secret'"):
        read_onnx(path)


def test_an_operator_that_onnxruntime_lacks_is_named(tmp_path: Path) -> None:
    """Of a library of the file's author, which is never loaded."""
    path = graph(tmp_path / "net.onnx", [("MyOp", ["x"], ["y"], {"domain": "custom.domain"})])
    with pytest.raises(ConfigError, match=r"net\.onnx cannot be used by onnxruntime: .*MyOp"):
        read_onnx(path)


def test_other_inputs_than_patches_are_refused_by_name(tmp_path: Path) -> None:
    """Several, of integers, or with other axes."""
    shape = [1, 1, 4, 4, 4]
    two = graph(tmp_path / "two.onnx", [("Add", ["a", "b"], ["y"])], inputs={"a": shape, "b": shape})
    with pytest.raises(ConfigError, match=r"two\.onnx cannot be used: its inputs are a, b; wanted is one"):
        read_onnx(two)
    flat = graph(tmp_path / "flat.onnx", [("Relu", ["x"], ["y"])], inputs={"x": [1, 4]}, outputs={"y": [1, 4]})
    with pytest.raises(ConfigError, match=r"its input x has 2 axes; wanted are 5"):
        read_onnx(flat)
    integers = graph(tmp_path / "int.onnx", [("Identity", ["x"], ["y"])], type=TensorProto.INT32)
    with pytest.raises(ConfigError, match=r"its input x is torch\.int32; wanted are floating-point"):
        read_onnx(integers)


def test_an_output_that_is_not_a_tensor_is_refused_by_name(fixed: Path, tmp_path: Path) -> None:
    """The file is not damaged."""
    model = onnx.load(fixed)
    model.graph.node.append(onnx.helper.make_node("SequenceConstruct", [model.graph.output[0].name], ["list"]))
    model.graph.output.append(onnx.helper.make_tensor_sequence_value_info("list", 1, None))
    onnx.save(model, tmp_path / "net.onnx")
    with pytest.raises(ConfigError, match=r"net\.onnx cannot be used: its output list is not a tensor"):
        read_onnx(tmp_path / "net.onnx")


@pytest.mark.parametrize("share", [0.02, 0.3, 0.6, 0.99])
def test_a_file_that_was_cut_is_one_message(fixed: Path, tmp_path: Path, share: float) -> None:
    """Wherever it ends; it is still taken for ONNX."""
    path = tmp_path / "cut.onnx"
    path.write_bytes(fixed.read_bytes()[: int(share * fixed.stat().st_size)])
    with pytest.raises(ConfigError, match=r"cut\.onnx is not a whole ONNX file: it is damaged"):
        predictor_from_file(path)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"", "empty: copying"), (b"<html><body>login</body>", "an HTML page"), (b"version https://git-lfs", "git-LFS"),
        (b"\x08\x0a\x12\x02", "not a whole ONNX"), (b"\x08\x0a\x12\x00", "not a whole ONNX"),
        (b"\x08\x0a\x3a\x00", "inputs are none"), (b"\x08\x0a\x3a\x04\x0a\xff\xff\xff", "not a whole ONNX"),
        (b"\x08\x0a" + encode(7, encode(11, encode(1, b"\xff"))), "not a whole ONNX"),
    ],
)  # fmt: skip
def test_a_file_that_is_something_else_is_one_message(tmp_path: Path, content: bytes, message: str) -> None:
    """What it is, where that is known."""
    path = tmp_path / "net.onnx"
    path.write_bytes(content)
    with pytest.raises(ConfigError, match=message):
        read_onnx(path)


def test_graphs_in_graphs_without_end_are_one_message(tmp_path: Path) -> None:
    """Deeper than Python can follow."""
    content = b""
    for _ in range(5000):
        content = encode(1, encode(5, encode(6, content)))
    path = tmp_path / "net.onnx"
    path.write_bytes(b"\x08\x0a" + encode(7, content))
    with pytest.raises(ConfigError, match=r"net\.onnx is not a whole ONNX file"):
        read_onnx(path)


@settings(deadline=None)
@given(place=st.integers(0, 10**6), value=st.integers(0, 255))
def test_any_changed_byte_gives_a_network_or_one_message(fixed: Path, place: int, value: int) -> None:
    """Never another kind of error, from reading to opening."""
    content = bytearray(fixed.read_bytes())
    content[place % len(content)] = value
    path = fixed.parent / "changed.onnx"
    path.write_bytes(content)
    with contextlib.suppress(ConfigError):
        read_onnx(path)[0].open_session(torch.device("cpu"))


def test_without_onnxruntime_the_message_says_what_to_install(fixed: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only reading needs it: recognising and settings do not."""
    monkeypatch.setitem(sys.modules, "onnxruntime", None)
    onnx_session._runtime.cache_clear()
    try:
        assert kind_of(fixed) == "onnx"
        assert fixed_patch(fixed) == (8, 8, 8)
        with pytest.raises(ConfigError, match=r"pip install 'voxquilt\[onnx\]'"):
            read_onnx(fixed)
    finally:
        onnx_session._runtime.cache_clear()
