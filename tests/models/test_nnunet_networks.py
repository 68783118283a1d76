"""Tests nnU-Net's networks: names and outputs are those of its own modules, and nothing in a checkpoint is run."""

import os
import pickle
import re
import zipfile
from pathlib import Path
from typing import Any

import pytest
import torch
from nnunet_folders import (
    FLAT_OPTIONS,
    MAIN,
    MISSING,
    OPTIONS,
    RESIDUAL_OPTIONS,
    filled,
    make_model,
    patch,
    stored,
    with_duplicates,
    write_checkpoint,
)
from odd_files import Bomb

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.checkpoint import load_weights
from voxquilt.models.nnunet.folder import read_folder
from voxquilt.models.nnunet.networks import build_network
from voxquilt.models.nnunet.predictor import predictor_from_nnunet

# Outputs of dynamic_network_architectures 0.4.4 with the weights of `filled`, run by hand: names of weights with their
# duplicates and without, every (n // 6)th of n values, the mean and the standard deviation.
REFERENCES: dict[str, tuple[dict[str, Any], tuple[int, ...], int, int, list[float], float, float]] = {
    "plain": (
        {},
        (1, 2, 4, 8, 8),
        96,
        36,
        [-0.22778, -0.24418, -0.45944, -0.4644, -0.46621, -0.4515],
        -0.383696,
        0.194487,
    ),
    "residual": (
        RESIDUAL_OPTIONS,
        (1, 2, 4, 8, 8),
        180,
        55,
        [-0.22692, -0.23391, -0.38442, -0.36242, -0.53283, -0.54805],
        -0.381734,
        0.205927,
    ),
    "2-D with batch norm": (
        FLAT_OPTIONS | {f"{OPTIONS}norm_op": "torch.nn.modules.batchnorm.BatchNorm2d"},
        (1, 2, 4, 6),
        74,
        25,
        [0.46531, 0.46783, 0.11985, 0.13948, 0.03041, 0.03457],
        0.224549,
        0.184352,
    ),
}


@pytest.mark.parametrize("name", REFERENCES)
def test_networks_give_what_those_of_nnunet_give(tmp_path: Path, name: str) -> None:
    """To five digits, after a way through a checkpoint with all names that nnU-Net has for the same weights."""
    plans, shape, names, own, values, mean, std = REFERENCES[name]
    model = read_folder(make_model(tmp_path, plans, inference_allowed_mirroring_axes=(0, 1)))
    network = build_network(model)
    assert len(network.state_dict()) == own
    assert len(with_duplicates(network.state_dict())) == names
    load_weights(model.checkpoints[0], network).eval()
    with torch.no_grad():
        output = network(patch(*shape))
    assert output.shape == (1, 3, *shape[2:])
    flat = output.flatten().double()
    assert flat[:: len(flat) // 6][:6].tolist() == pytest.approx(values, abs=2e-5)
    assert (float(flat.mean()), float(flat.std())) == pytest.approx((mean, std), abs=2e-6)


def test_names_of_weights_are_those_of_nnunet(tmp_path: Path) -> None:
    """A shortcut's convolution is number 1 behind a pool and 0 without one; stages of the decoder count from below."""
    names = set(build_network(read_folder(make_model(tmp_path, RESIDUAL_OPTIONS))).state_dict())
    assert {
        "encoder.stem.convs.0.conv.weight",
        "encoder.stages.1.blocks.0.skip.1.conv.weight",
        "encoder.stages.1.blocks.1.conv2.norm.bias",
        "decoder.transpconvs.0.bias",
        "decoder.stages.1.convs.0.conv.weight",
        "decoder.seg_layers.1.weight",
    } <= names
    assert not any("skip.0" in name or name.startswith("encoder.stages.2.blocks.0.skip") for name in names)
    options = {**RESIDUAL_OPTIONS, f"{OPTIONS}stem_channels": 2}
    names = set(build_network(read_folder(make_model(tmp_path / "stem", options))).state_dict())
    assert "encoder.stages.0.blocks.0.skip.0.conv.weight" in names


def test_old_plans_make_the_same_network(tmp_path: Path) -> None:
    """The keys of nnU-Net 2.0 to 2.2."""
    old = {
        f"{MAIN}architecture": MISSING,
        f"{MAIN}UNet_class_name": "PlainConvUNet",
        f"{MAIN}UNet_base_num_features": 2,
        f"{MAIN}unet_max_num_features": 5,
        f"{MAIN}n_conv_per_stage_encoder": [1, 2, 1],
        f"{MAIN}n_conv_per_stage_decoder": [2, 1],
        f"{MAIN}pool_op_kernel_sizes": [[1, 1, 1], [1, 2, 2], [2, 2, 2]],
        f"{MAIN}conv_kernel_sizes": [[1, 3, 3], [3, 3, 3], [3, 3, 3]],
    }
    new, before = (read_folder(make_model(tmp_path / str(n), plans)) for n, plans in enumerate(({}, old)))
    assert new.plan.architecture == before.plan.architecture
    old[f"{MAIN}UNet_class_name"] = "ResidualEncoderUNet"
    residual = read_folder(make_model(tmp_path / "residual", old)).plan.architecture
    assert (residual.network, residual.features, residual.blocks) == ("ResidualEncoderUNet", (2, 4, 5), (1, 2, 1))


def test_batch_norm_is_told_from_the_weights(tmp_path: Path) -> None:
    """nnUNetTrainerBN changes the network without changing the plans."""
    plans = {f"{OPTIONS}norm_op": "torch.nn.modules.batchnorm.BatchNorm3d"}
    weights = filled(build_network(read_folder(make_model(tmp_path / "a", plans)))).state_dict()
    model = read_folder(make_model(tmp_path / "b", weights=weights, trainer_name="nnUNetTrainerBN"))
    network = load_weights(model.checkpoints[0], build_network(model))
    assert torch.equal(
        network.state_dict()["decoder.stages.1.convs.0.norm.running_var"],
        weights["decoder.stages.1.convs.0.norm.running_var"],
    )


@pytest.mark.parametrize(("trainer", "eps"), [("nnUNetTrainer", 0.01), ("nnUNetTrainerBN", 1e-5)])
def test_batch_norm_of_the_plans_keeps_its_options_unless_the_trainer_replaces_them(
    tmp_path: Path, trainer: str, eps: float
) -> None:
    """Weights have the same names and shapes with any eps, and predictions would differ silently."""
    plans = {
        f"{OPTIONS}norm_op": "torch.nn.modules.batchnorm.BatchNorm3d",
        f"{OPTIONS}norm_op_kwargs": {"eps": 0.01, "affine": True},
    }
    weights = filled(build_network(read_folder(make_model(tmp_path / "a", plans)))).state_dict()
    model = read_folder(make_model(tmp_path / "b", plans, weights=weights, trainer_name=trainer))
    norms = [layer for layer in build_network(model).modules() if isinstance(layer, torch.nn.BatchNorm3d)]
    assert norms
    assert {norm.eps for norm in norms} == {eps}


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappings_of_names_do_not_count(tmp_path: Path, prefix: str) -> None:
    """What torch.compile and DDP put before them."""
    model = read_folder(make_model(tmp_path))
    weights = filled(build_network(model), offset=3).state_dict()
    path = write_checkpoint(tmp_path, 0, stored({prefix + k: v for k, v in with_duplicates(weights).items()}))
    loaded = load_weights(path, build_network(model)).state_dict()
    assert all(torch.equal(loaded[name], weights[name]) for name in weights)


def test_checkpoints_in_torchs_old_format_are_read(tmp_path: Path) -> None:
    """What they say about themselves and their weights, although they cannot be mapped as zip archives are."""
    model = read_folder(make_model(tmp_path, inference_allowed_mirroring_axes=(0, 2)))
    path = model.checkpoints[0]
    content = torch.load(path, weights_only=False)
    torch.save(content, path, _use_new_zipfile_serialization=False)
    assert read_folder(tmp_path) == model
    loaded = load_weights(path, build_network(model)).state_dict()
    assert loaded
    assert all(torch.equal(loaded[name], content["network_weights"][name]) for name in loaded)


def test_weights_that_do_not_fit_are_listed(tmp_path: Path) -> None:
    """Missing, unexpected and of another shape, and which file may be wrong."""
    model = read_folder(make_model(tmp_path))
    weights = build_network(model).state_dict()
    del weights["decoder.seg_layers.0.bias"]
    weights["encoder.attention.weight"] = torch.ones(2)
    weights["decoder.seg_layers.1.weight"] = torch.ones(4, 2, 1, 1, 1)
    path = write_checkpoint(tmp_path, 0, stored(weights))
    with pytest.raises(ConfigError) as caught:
        load_weights(path, build_network(model))
    text = str(caught.value)
    assert "1 missing: decoder.seg_layers.0.bias" in text
    assert "1 unexpected: encoder.attention.weight" in text
    assert "1 of another shape: decoder.seg_layers.1.weight (4, 2, 1, 1, 1) for (3, 2, 1, 1, 1)" in text
    assert "Does plans.json belong to the checkpoint?" in text


def test_checkpoints_written_under_numpy_1_are_read(tmp_path: Path) -> None:
    """It has another name for the function that makes scalars."""
    path = make_model(tmp_path) / "fold_0" / "checkpoint_final.pth"
    with zipfile.ZipFile(path) as archive:
        records = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w") as archive:
        for name, content in records.items():
            archive.writestr(name, content.replace(b"numpy._core.multiarray\n", b"numpy.core.multiarray\n"))
    assert b"numpy.core.multiarray" in path.read_bytes()
    model = read_folder(tmp_path)
    loaded = load_weights(path, build_network(model)).state_dict()
    assert all(torch.equal(loaded[name], tensor) for name, tensor in filled(build_network(model)).state_dict().items())


def test_code_in_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """It is refused by its name, unless the file is trusted."""
    marker = tmp_path / "ran"
    folder = make_model(tmp_path / "model")
    weights = build_network(read_folder(folder)).state_dict()
    write_checkpoint(folder, 0, stored(weights, extra=Bomb(marker)))
    with pytest.raises(ConfigError, match=r"holds more than tensors and plain values: \w+\.mkdir") as caught:
        predictor_from_nnunet(folder)
    assert "trust_checkpoint=true" in str(caught.value)
    assert not marker.exists()
    predictor_from_nnunet(folder, trust_checkpoint=True)
    assert marker.exists()


def test_a_whole_pickle_in_place_of_a_checkpoint_is_not_run(tmp_path: Path) -> None:
    """It is no checkpoint of nnU-Net."""
    marker = tmp_path / "ran"
    folder = make_model(tmp_path / "model")
    (folder / "fold_0" / "checkpoint_final.pth").write_bytes(pickle.dumps(Bomb(marker)))
    with pytest.raises(ConfigError, match="is not a checkpoint of nnU-Net, or is damaged"):
        predictor_from_nnunet(folder)
    write_checkpoint(folder, 0, Bomb(marker))
    with pytest.raises(ConfigError, match="is not a checkpoint of nnU-Net, or is damaged"):
        predictor_from_nnunet(folder)
    assert not marker.exists()


class Touch:
    """Runs a command of the shell when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, tuple[str]]:
        return os.system, (f"touch '{self.path}'",)


def test_a_shell_command_among_the_weights_is_not_run(tmp_path: Path) -> None:
    """Neither when the folder is read nor when weights are loaded."""
    marker = tmp_path / "ran"
    folder = make_model(tmp_path / "model")
    weights = dict(build_network(read_folder(folder)).state_dict())
    path = write_checkpoint(folder, 0, stored(weights | {"decoder.seg_layers.0.bias": Touch(marker)}))
    model = read_folder(folder)
    with pytest.raises(ConfigError, match=r"holds more than tensors and plain values: \w+\.system"):
        load_weights(path, build_network(model))
    assert not marker.exists()


@pytest.mark.parametrize(
    ("path", "value"),
    [
        (f"{MAIN}architecture.network_class_name", "os.system"),
        (f"{MAIN}architecture.network_class_name", "my_package.PlainConvUNet"),
        (f"{MAIN}architecture.network_class_name", "dynamic_network_architectures.architectures.primus.Primus"),
        (f"{OPTIONS}conv_op", "os.system"),
        (f"{OPTIONS}conv_op", "evil.Conv3d"),
        (f"{OPTIONS}conv_op", "torch.nn.Conv2d"),
        (f"{OPTIONS}conv_op", None),
        (f"{OPTIONS}norm_op", "torch.nn.modules.instancenorm.InstanceNorm2d"),
        (f"{OPTIONS}norm_op", "torch.nn.LayerNorm"),
        (f"{OPTIONS}norm_op_kwargs", {"track_running_stats": True}),
        (f"{OPTIONS}norm_op_kwargs", {"device": ["cpu"]}),
        (f"{OPTIONS}nonlin", "torch.nn.modules.activation.MultiheadAttention"),
        (f"{OPTIONS}dropout_op", "builtins.print"),
        (f"{OPTIONS}squeeze_excitation", True),
        (f"{OPTIONS}n_blocks_per_stage", [1, 1, 1]),
        (f"{OPTIONS}strides", [[2, 2, 2], [1, 2, 2], [2, 2, 2]]),
        (f"{OPTIONS}strides", [[1, 1, 1], [1, 2], [2, 2, 2]]),
        (f"{OPTIONS}kernel_sizes", [[1, 3, 3]]),
        (f"{OPTIONS}features_per_stage", [2, 4, True]),
        (f"{OPTIONS}n_conv_per_stage", [1, 0, 1]),
        (f"{OPTIONS}n_conv_per_stage_decoder", [1]),
        (f"{OPTIONS}n_stages", 1),
        (f"{OPTIONS}conv_bias", "yes"),
    ],
)
def test_other_networks_are_refused_by_name(tmp_path: Path, path: str, value: Any) -> None:
    """The message has the file, the key, what came, and what was wanted; names are never imported."""
    folder = make_model(tmp_path, {path: value}, weights={"a": torch.ones(1)})
    with pytest.raises(ConfigError) as caught:
        read_folder(folder)
    assert str(caught.value).startswith(f"{folder / 'plans.json'}: {path} is {value!r}; wanted is ")


@pytest.mark.parametrize(
    ("key", "value"), [("block", "x.BottleneckD"), ("bottleneck_channels", 4), ("stem_channels", 0)]
)
def test_other_residual_networks_are_refused_by_name(tmp_path: Path, key: str, value: Any) -> None:
    """Bottlenecks are not built."""
    plans = {**RESIDUAL_OPTIONS, f"{OPTIONS}{key}": value}
    with pytest.raises(ConfigError, match=rf"arch_kwargs\.{key} is {re.escape(repr(value))}; wanted is "):
        read_folder(make_model(tmp_path, plans, weights={"a": torch.ones(1)}))


def test_options_that_a_layer_does_not_take_are_an_error(tmp_path: Path) -> None:
    """With torch's text."""
    folder = make_model(tmp_path, {f"{OPTIONS}nonlin_kwargs": {"slope": 0.1}}, weights={"a": torch.ones(1)})
    with pytest.raises(ConfigError, match=r"plans\.json: its network cannot be built: .*'slope'"):
        build_network(read_folder(folder))


@pytest.mark.parametrize(
    ("options", "absent"),
    [
        ({"norm_op": None, "norm_op_kwargs": None}, ".norm."),
        ({"conv_bias": False}, ".conv.bias"),
        ({"conv_bias": MISSING}, ".conv.bias"),
    ],
)
def test_layers_can_be_left_out(tmp_path: Path, options: dict[str, Any], absent: str) -> None:
    """And the network still predicts."""
    folder = make_model(tmp_path, {f"{OPTIONS}{key}": value for key, value in options.items()})
    network = build_network(read_folder(folder))
    assert not any(absent in name for name in network.state_dict())
    assert network(patch(1, 2, 4, 8, 8)).shape == (1, 3, 4, 8, 8)


def test_dropout_has_no_effect_and_the_nonlinearity_may_come_first(tmp_path: Path) -> None:
    """Dropout has no weights; the other order gives other values."""
    outputs = []
    changes = [
        {},
        {f"{OPTIONS}dropout_op": "torch.nn.Dropout3d", f"{OPTIONS}dropout_op_kwargs": {"p": 0.5}},
        {f"{OPTIONS}nonlin_first": True},
    ]
    for n, plans in enumerate(changes):
        with torch.no_grad():
            predictor = predictor_from_nnunet(make_model(tmp_path / str(n), plans), flips=[])
            outputs.append(predictor(patch(1, 2, 4, 8, 8))[""])
    assert torch.equal(outputs[0], outputs[1])
    assert not torch.allclose(outputs[0], outputs[2], atol=1e-2)


# Predictors


def test_folds_are_averaged_as_logits(tmp_path: Path) -> None:
    """In the order of their numbers; fold_all only by name."""
    folder = make_model(tmp_path, folds=[0, 1, "all"])
    batch = patch(2, 2, 4, 8, 8)
    with torch.no_grad():
        both = predictor_from_nnunet(folder, flips=[])(batch)[""]
        single = [predictor_from_nnunet(folder, folds=[fold], flips=[])(batch)[""] for fold in (0, 1, "all")]
    assert torch.allclose(both, (single[0] + single[1]) / 2, atol=1e-6)
    assert not torch.allclose(single[0], single[1], atol=1e-2)
    assert not torch.allclose(single[0], single[2], atol=1e-2)


def test_flips_are_the_mirroring_of_the_checkpoint(tmp_path: Path) -> None:
    """Or other ones; all combinations, averaged."""
    folder = make_model(tmp_path, inference_allowed_mirroring_axes=(0, 2))
    batch = patch(1, 2, 4, 8, 8)
    with torch.no_grad():
        plain = predictor_from_nnunet(folder, flips=[])
        runs = [plain(batch.flip(axes))[""].flip(axes) for axes in ((), (2,), (4,), (2, 4))]
        given = predictor_from_nnunet(folder)(batch)[""]
        named = predictor_from_nnunet(folder, flips=[0, 2])(batch)[""]
    assert torch.allclose(given, torch.stack(runs).mean(0), atol=1e-6)
    assert torch.equal(given, named)
    assert not torch.allclose(given, runs[0], atol=1e-3)
    with pytest.raises(ConfigError, match="flips is 'all'; wanted is 'checkpoint'"):
        predictor_from_nnunet(folder, flips="all")


def test_a_2d_network_predicts_slices_and_mirrors_in_their_plane(tmp_path: Path) -> None:
    """Its axes 0 and 1 are the model's 1 and 2."""
    folder = make_model(tmp_path, FLAT_OPTIONS, inference_allowed_mirroring_axes=(0, 1))
    model = read_folder(folder)
    network = load_weights(model.checkpoints[0], build_network(model)).eval()
    batch = patch(2, 2, 1, 4, 6)
    assert model.flips == (1, 2)
    with torch.no_grad():
        runs = [network(batch[:, :, 0].flip(axes)).flip(axes) for axes in ((), (2,), (3,), (2, 3))]
        output = predictor_from_nnunet(folder)(batch)[""]
    assert output.shape == (2, 3, 1, 4, 6)
    assert torch.allclose(output[:, :, 0], torch.stack(runs).mean(0), atol=1e-6)


def test_options_reach_the_patch_network(tmp_path: Path) -> None:
    """Such as offload."""
    predictor = predictor_from_nnunet(make_model(tmp_path), offload=True)
    assert predictor.network.networks.offload is True
