"""Tests exported programs: they predict as their network does, in batches of any size, and no file runs code."""

import io
import json
import os
import pickle
import zipfile
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import pytest
import torch
from odd_files import Bomb
from torch import Tensor, nn

from voxquilt.errors import ConfigError, OutputError
from voxquilt.models.factory import predictor_from_exported, predictor_from_file
from voxquilt.models.weights.reading import read_exported
from voxquilt.planning.network_check import check_network

pytestmark = pytest.mark.filterwarnings("ignore")  # torch.export's own

CODE = "__import__('os').mkdir({!r})"


class Net(nn.Module):
    """Two output channels, a buffer, and a constant created in forward."""

    def __init__(self) -> None:
        super().__init__()
        self.first = nn.Conv3d(1, 3, 3, padding=1)
        self.norm = nn.BatchNorm3d(3)
        self.register_buffer("offset", torch.tensor([1.0, -1.0]).reshape(2, 1, 1, 1))
        self.last = nn.Conv3d(3, 2, 1)

    def forward(self, x: Tensor) -> Tensor:
        ramp = torch.arange(2, device=x.device).reshape(2, 1, 1, 1)
        return self.last(self.norm(self.first(x)).relu()) + self.offset + ramp


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().eval()


def patches(count: int, size: int = 6) -> Tensor:
    return torch.randn(count, 1, size, size, size, generator=torch.Generator().manual_seed(count))


def export(path: Path, module: nn.Module, batch: int = 2, dynamic: Any = None) -> Path:
    """An archive as `torch.export.save` writes it."""
    torch.export.save(torch.export.export(module, (patches(batch),), dynamic_shapes=dynamic), path)
    return path


@pytest.fixture(scope="module")
def archive(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return export(tmp_path_factory.mktemp("archive") / "net.pt2", net())


def changed(archive: Path, path: Path, change: Callable[[dict[str, bytes]], None]) -> Path:
    """A copy of the archive with other records."""
    with zipfile.ZipFile(archive) as old:
        records = {name.partition("/")[2]: old.read(name) for name in old.namelist()}
    change(records)
    with zipfile.ZipFile(path, "w") as new:
        for name, content in records.items():
            new.writestr(f"net/{name}", content)
    return path


# Predicting


@pytest.mark.parametrize("count", [1, 2, 3, 4, 7])
@pytest.mark.parametrize("exported", [1, 3, 4])
def test_a_program_with_a_fixed_batch_size_takes_batches_of_any_size(tmp_path: Path, exported: int, count: int) -> None:
    """Smaller ones are filled up, larger ones run in turn; each output is that of its patch."""
    module = net()
    (loaded,) = read_exported(export(tmp_path / "a.pt2", module, exported))
    with torch.no_grad():
        torch.testing.assert_close(loaded(patches(count)), module(patches(count)), atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("dims", "most"), [({0: torch.export.Dim("b", min=1, max=3)}, 3), ({0: torch.export.Dim("b", min=4)}, 9)]
)
def test_a_program_with_a_range_of_batch_sizes_runs_only_within_it(tmp_path: Path, dims: Any, most: int) -> None:
    """One to three, and four or more: for seven patches and for one the outputs are the network's."""
    module = net()
    (loaded,) = read_exported(export(tmp_path / "a.pt2", module, most, (dims,)))
    with torch.no_grad():
        for count in (1, 7):
            torch.testing.assert_close(loaded(patches(count)), module(patches(count)), atol=1e-6, rtol=1e-6)


def test_programs_form_an_ensemble_and_ignore_train_and_eval(tmp_path: Path) -> None:
    """Two files are averaged; torch's programs refuse both calls, so they are ignored."""
    paths = [export(tmp_path / f"{seed}.pt2", net(seed)) for seed in (0, 1)]
    predictor = predictor_from_exported(paths)
    predictor.train().eval()
    with torch.no_grad():
        mean = (net(0)(patches(3)) + net(1)(patches(3))) / 2
        torch.testing.assert_close(predictor(patches(3))[""], mean, atol=1e-6, rtol=1e-6)


def test_a_program_with_dynamic_axes_takes_any_patch_size(tmp_path: Path) -> None:
    """Exported with dynamic spatial axes."""
    auto = torch.export.Dim.AUTO
    path = export(tmp_path / "a.pt2", net(), 2, ({0: auto, 2: auto, 3: auto, 4: auto},))
    predictor = predictor_from_exported(path)
    with torch.no_grad():
        torch.testing.assert_close(predictor(patches(1, 9))[""], net()(patches(1, 9)), atol=1e-6, rtol=1e-6)


def test_a_patch_size_that_the_program_lacks_is_refused(archive: Path) -> None:
    """Before a run and when such a patch comes; both messages say what is wanted."""
    with pytest.raises(ConfigError, match=r"exported for inputs of 1 x 6 x 6 x 6 .*Set data\.patch_size"):
        check_network(predictor_from_exported(archive), ["image"], 1, (8, 8, 8), None)
    assert check_network(predictor_from_exported(archive), ["image"], 1, (6, 6, 6), None) is not None
    (loaded,) = read_exported(archive)
    with pytest.raises(OutputError, match=r"exported for inputs of 1 x 6 x 6 x 6 .*these are 1 x 8 x 8 x 8"):
        loaded(patches(2, 8))


def test_a_program_survives_pickling(archive: Path) -> None:
    """As ddp_spawn pickles it for its processes."""
    (loaded,) = read_exported(archive)
    with torch.no_grad():
        assert torch.equal(pickle.loads(pickle.dumps(loaded))(patches(3)), loaded(patches(3)))


def test_constants_of_a_program_move_with_it_to_another_device(archive: Path) -> None:
    """The meta device stands in for one."""
    (loaded,) = read_exported(archive)
    loaded.to("meta")
    assert loaded(patches(2).to("meta")).device.type == "meta"


def test_a_program_with_several_inputs_is_refused(tmp_path: Path) -> None:
    """Patches are a single tensor."""

    class Sum(nn.Module):
        def forward(self, a: Tensor, b: Tensor) -> Tensor:
            return a + b

    torch.export.save(torch.export.export(Sum(), (patches(1), patches(1))), tmp_path / "a.pt2")
    with pytest.raises(ConfigError, match=r"its inputs are \('a', 'b'\); wanted is one"):
        read_exported(tmp_path / "a.pt2")


# Trust


def saved(content: object) -> bytes:
    buffer = io.BytesIO()
    torch.save(content, buffer)
    return buffer.getvalue()


def in_json(name: str, change: Callable[[Any], None]) -> Callable[[dict[str, bytes]], None]:
    def apply(records: dict[str, bytes]) -> None:
        node = json.loads(records[name])
        change(node)
        records[name] = json.dumps(node).encode()

    return apply


def payload(
    kind: str, name: str, make: Callable[[Path], bytes]
) -> Callable[[Path], Callable[[dict[str, bytes]], None]]:
    """A change of the archive: a record of weights or constants becomes a pickle."""

    def of(marker: Path) -> Callable[[dict[str, bytes]], None]:
        def apply(records: dict[str, bytes]) -> None:
            config = f"data/{kind}/model_{kind}_config.json"
            node = json.loads(records[config])
            key = "last.bias" if kind == "weights" else "bomb"
            node["config"][key] = {"path_name": name, "is_param": True, "use_pickle": True, "tensor_meta": None}
            records[config] = json.dumps(node).encode()
            records[f"data/{kind}/{name}"] = make(marker)

        return apply

    return of


def program(change: Callable[[dict[str, Any], str], None]) -> Callable[[Path], Callable[[dict[str, bytes]], None]]:
    """A change of the archive: the program gets a part that would run code."""
    return lambda marker: in_json("models/model.json", lambda model: change(model, CODE.format(str(marker))))


def first_node(model: dict[str, Any]) -> dict[str, Any]:
    return model["graph_module"]["graph"]["nodes"][0]


def call(model: dict[str, Any], code: str) -> None:
    node = first_node(model)
    node["target"] = "torch.os.mkdir"
    node["inputs"] = [{"name": "path", "arg": {"as_string": code.split("'")[3]}, "kind": 1}]


def rename(model: dict[str, Any], code: str) -> None:
    text = json.dumps(model["graph_module"])
    name = json.dumps(first_node(model)["outputs"][0]["as_tensor"]["name"])
    model["graph_module"] = json.loads(text.replace(name, json.dumps(f"x = {code}; y")))


def size(model: dict[str, Any], code: str) -> None:
    values = model["graph_module"]["graph"]["tensor_values"]
    next(iter(values.values()))["sizes"][0] = {"as_expr": {"expr_str": code, "hint": {"as_int": 2}}}


def tree(kind: str, context: Callable[[str], Any]) -> Callable[[dict[str, Any], str], None]:
    def change(model: dict[str, Any], code: str) -> None:
        signature = model["graph_module"]["module_call_graph"][0]["signature"]
        leaf = {"type": None, "context": None, "children_spec": []}
        signature["out_spec"] = json.dumps([1, {"type": kind, "context": context(code), "children_spec": [leaf]}])

    return change


def guard(model: dict[str, Any], code: str) -> None:
    model["guards_code"] = [f"L['x'] is {code}"]


def compiled(marker: Path) -> Callable[[dict[str, bytes]], None]:
    return lambda records: records.update({"data/aotinductor/model/a.so": b"", "data/aotinductor/model/a.json": b"{}"})


BOMBS: Mapping[str, tuple[Callable[[Path], Callable[[dict[str, bytes]], None]], str]] = {
    "weight": (payload("weights", "weight_99", lambda m: saved(Bomb(m))), "holds more than tensors"),
    "weight, legacy pickle": (payload("weights", "weight_99", lambda m: pickle.dumps(Bomb(m))), "weight_99"),
    "constant": (payload("constants", "tensor_0", lambda m: saved(Bomb(m))), "tensor_0 holds more than tensors"),
    "custom object": (payload("constants", "custom_obj_0", lambda m: saved(Bomb(m))), "an object that is not a tensor"),
    "opaque object": (payload("constants", "opaque_obj_0", lambda m: pickle.dumps(Bomb(m))), "not a tensor"),
    "sample inputs": (
        lambda m: lambda records: records.update({"data/sample_inputs/model.pt": saved(((Bomb(m),), {}))}),
        "sample_inputs/model.pt holds more than tensors",
    ),
    "symbolic size": (program(size), "which would be evaluated"),
    "operator": (program(call), "'torch.os.mkdir', which is not one of the operators"),
    "name": (program(rename), "where a name is wanted"),
    "default dictionary": (
        program(tree("collections.defaultdict", lambda code: {"default_factory_module": "this"})),
        "of a type that would be imported",
    ),
    "enumeration": (
        program(tree("builtins.dict", lambda code: '{"__enum__": true, "fqn": "this:x", "name": "y"}')),
        "of a type that would be imported",
    ),
    "compiled library": (compiled, "compiled code"),
}
GO_OFF = ("weight", "weight, legacy pickle", "constant", "opaque object", "sample inputs", "symbolic size")


@pytest.mark.parametrize("name", BOMBS)
def test_an_archive_that_would_run_code_is_refused(archive: Path, tmp_path: Path, name: str) -> None:
    """In pickled records and in everything that torch evaluates, imports or compiles: named, and not run."""
    make, message = BOMBS[name]
    marker = tmp_path / "ran"
    path = changed(archive, tmp_path / "bomb.pt2", make(marker))
    with pytest.raises(ConfigError, match=r"bomb\.pt2 was not loaded .*" + message):
        read_exported(path)
    assert not marker.exists()


@pytest.mark.parametrize("name", GO_OFF)
def test_the_bombs_are_real(archive: Path, tmp_path: Path, name: str) -> None:
    """Loaded with trust and run, the file executes its code: torch itself prevents none of these."""
    marker = tmp_path / "ran"
    path = changed(archive, tmp_path / "bomb.pt2", BOMBS[name][0](marker))
    try:
        read_exported(path, trust=True)[0](patches(2))
    except Exception:
        assert marker.exists()
    assert marker.exists()


def test_guards_are_dropped_not_executed(archive: Path, tmp_path: Path) -> None:
    """torch compiles guards as Python; the program is the same without them, since sizes are checked elsewhere."""
    marker = tmp_path / "ran"
    path = changed(archive, tmp_path / "guarded.pt2", program(guard)(marker))
    with torch.no_grad():
        torch.testing.assert_close(read_exported(path)[0](patches(2)), net()(patches(2)), atol=1e-6, rtol=1e-6)
    assert not marker.exists()


def test_a_program_is_recognised_by_its_file(archive: Path) -> None:
    """model=auto needs only the path."""
    with torch.no_grad():
        assert torch.equal(
            predictor_from_file(archive)(patches(2))[""], predictor_from_exported(archive)(patches(2))[""]
        )


def test_a_trusted_archive_is_loaded_without_a_check(archive: Path) -> None:
    """trust_checkpoint=true, for archives with objects of the user's own."""
    with torch.no_grad():
        torch.testing.assert_close(
            predictor_from_exported(archive, trust_checkpoint=True)(patches(2))[""],
            net()(patches(2)),
            atol=1e-6,
            rtol=1e-6,
        )


@pytest.mark.parametrize(
    "content", [b"", b"text", pickle.dumps({}), saved({}), None], ids=["empty", "text", "pickle", "state", "missing"]
)
def test_a_file_that_is_not_an_archive_is_one_message(tmp_path: Path, content: bytes | None) -> None:
    """With the path and what else the file might be."""
    path = tmp_path / "net.pt2"
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(
        ConfigError, match=r"net\.pt2 (was not loaded .*model=state_dict|cannot be read|is not a file of weights)"
    ):
        read_exported(path)


def test_a_damaged_archive_is_one_message(archive: Path, tmp_path: Path) -> None:
    """Truncated, with a program that is not JSON, or without a record or the graph."""
    (tmp_path / "cut.pt2").write_bytes(archive.read_bytes()[: os.path.getsize(archive) // 2])
    changed(archive, tmp_path / "json.pt2", lambda records: records.update({"models/model.json": b"{"}))
    changed(archive, tmp_path / "less.pt2", lambda records: records.pop("data/weights/weight_0") and None)
    changed(archive, tmp_path / "graph.pt2", in_json("models/model.json", lambda m: m["graph_module"].pop("graph")))
    for name in ("cut", "json", "less", "graph"):
        with pytest.raises(ConfigError, match=rf"{name}\.pt2 (was not loaded|cannot be used) as an exported program"):
            read_exported(tmp_path / f"{name}.pt2")
