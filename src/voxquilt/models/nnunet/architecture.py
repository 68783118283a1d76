"""Reads a network's architecture out of plans, as plain values: names in a file are compared, never imported."""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from voxquilt.models.nnunet.json_values import USE_NNUNET, Node, is_integer, is_list_of_integers

PLAIN, RESIDUAL = "PlainConvUNet", "ResidualEncoderUNet"
NONLINEARITIES = ("LeakyReLU", "ReLU", "PReLU", "ELU", "SELU", "CELU", "GELU", "SiLU", "Mish", "Hardswish")
_ARCHITECTURES = "dynamic_network_architectures.architectures."
_BLOCKS = {PLAIN: "n_conv_per_stage", RESIDUAL: "n_blocks_per_stage"}
# Arguments of the classes in dynamic_network_architectures 0.4.4, architectures/unet.py; each is read below, but for
# deep_supervision, which nnU-Net turns off.
_COMMON = {
    "n_stages", "features_per_stage", "conv_op", "kernel_sizes", "strides", "n_conv_per_stage_decoder", "conv_bias",
    "norm_op", "norm_op_kwargs", "dropout_op", "dropout_op_kwargs", "nonlin", "nonlin_kwargs", "deep_supervision",
}  # fmt: skip
_ARGUMENTS = {
    PLAIN: _COMMON | {"n_conv_per_stage", "nonlin_first"},
    RESIDUAL: _COMMON | {"n_blocks_per_stage", "block", "bottleneck_channels", "stem_channels"},
}

Sizes = tuple[tuple[int, ...], ...]


@dataclass(frozen=True)
class Layer:
    """A class of torch.nn by its name, and its arguments."""

    name: str
    options: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Architecture:
    """A U-Net of dynamic_network_architectures, whose names for the options these are, more or less.

    Args:
        network: 'PlainConvUNet' or 'ResidualEncoderUNet'.
        dimensions: 2 or 3.
        features: Channels per stage, from the highest resolution down.
        kernel_sizes: Kernel size per stage.
        strides: Stride with which each stage begins; 1 for the first.
        blocks: Convolutions per stage of the encoder, or residual blocks.
        decoder_convs: Convolutions per stage of the decoder, from the lowest resolution up.
        conv_bias: Whether convolutions have a bias.
        norm: The normalisation layer, if any.
        dropout: The dropout layer, if any, which has no effect in prediction.
        nonlin: The nonlinearity, if any.
        nonlin_first: Whether it comes before the normalisation.
        stem: Channels of the first convolution of a residual encoder.
    """

    network: str
    dimensions: int
    features: tuple[int, ...]
    kernel_sizes: Sizes
    strides: Sizes
    blocks: tuple[int, ...]
    decoder_convs: tuple[int, ...]
    conv_bias: bool
    norm: Layer | None
    dropout: Layer | None
    nonlin: Layer | None
    nonlin_first: bool
    stem: int

    @property
    def reduction(self) -> tuple[int, ...]:
        """How many voxels of a patch become one in the lowest stage, per axis."""
        total = [1] * self.dimensions
        for stride in self.strides:
            total = [a * b for a, b in zip(total, stride, strict=True)]
        return tuple(total)


def read_architecture(configuration: Node, dimensions: int) -> Architecture:
    """The architecture of a configuration of plans, of nnU-Net 2.0 to 2.8.

    Raises:
        ConfigError: a network or an option that is not supported.
    """
    if "architecture" not in configuration.values:
        return _read_old(configuration, dimensions)
    node = configuration.child("architecture")
    name = node.text("network_class_name")
    network = name.rpartition(".")[2]
    if not name.startswith(_ARCHITECTURES) or network not in _BLOCKS:
        wanted = f"{_ARCHITECTURES}unet.{PLAIN} or .{RESIDUAL}"
        raise node.refusal("network_class_name", wanted, USE_NNUNET)
    options = node.child("arch_kwargs")
    for key in options.values:
        if key not in _ARGUMENTS[network]:
            raise options.refusal(key, f"no such option of {network}", USE_NNUNET)
    _layer(options, "conv", (f"Conv{dimensions}d",), required=True)
    return _assemble(
        options,
        network,
        dimensions,
        norm=_layer(options, "norm", (f"InstanceNorm{dimensions}d", f"BatchNorm{dimensions}d")),
        dropout=_layer(options, "dropout", (f"Dropout{dimensions}d",)),
        nonlin=_layer(options, "nonlin", NONLINEARITIES),
    )


def read_planned(node: Node) -> Architecture:
    """The architecture of an object that has one at 'architecture', whose convolution says how many axes it has.

    Raises:
        ConfigError: a network or an option that is not supported.
    """
    options = node.child("architecture").child("arch_kwargs")
    return read_architecture(node, 2 if str(options.values.get("conv_op")).endswith("2d") else 3)


def as_planned(given: Architecture) -> dict[str, Any]:
    """What plans.json would say of an architecture; `read_planned` reads it."""
    layers = {"norm_op": given.norm, "dropout_op": given.dropout, "nonlin": given.nonlin}
    residual = {"stem_channels": given.stem} if given.network == RESIDUAL else {"nonlin_first": given.nonlin_first}
    options: dict[str, Any] = {
        "n_stages": len(given.features),
        "features_per_stage": list(given.features),
        "conv_op": f"torch.nn.Conv{given.dimensions}d",
        "kernel_sizes": [list(size) for size in given.kernel_sizes],
        "strides": [list(stride) for stride in given.strides],
        _BLOCKS[given.network]: list(given.blocks),
        "n_conv_per_stage_decoder": list(given.decoder_convs),
        "conv_bias": given.conv_bias,
        **residual,
    }
    for key, layer in layers.items():
        options[key] = None if layer is None else f"torch.nn.{layer.name}"
        options[f"{key}_kwargs"] = None if layer is None else dict(layer.options)
    return {"network_class_name": f"{_ARCHITECTURES}unet.{given.network}", "arch_kwargs": options}


def with_batch_norm(architecture: Architecture) -> Architecture:
    """The architecture as nnUNetTrainerBN changes it (training/nnUNetTrainer/variants/network_architecture)."""
    return replace(architecture, norm=Layer(f"BatchNorm{architecture.dimensions}d", {"eps": 1e-5, "affine": True}))


def _read_old(node: Node, dimensions: int) -> Architecture:
    """Plans of nnU-Net 2.0 to 2.2, of which utilities/plans_handling/plans_handler.py says what they mean."""
    network = node.choice("UNet_class_name", tuple(_BLOCKS))
    blocks = node.integers("n_conv_per_stage_encoder")
    stages = len(blocks)
    ((base,), (most,)) = (_counts(node, key, 1) for key in ("UNet_base_num_features", "unet_max_num_features"))
    options = {
        "n_stages": stages,
        "features_per_stage": [min(base * 2**stage, most) for stage in range(stages)],
        "kernel_sizes": list(_sizes(node, "conv_kernel_sizes", stages, dimensions)),
        "strides": list(_sizes(node, "pool_op_kernel_sizes", stages, dimensions)),
        _BLOCKS[network]: blocks,
        "n_conv_per_stage_decoder": node.values.get("n_conv_per_stage_decoder"),
        "conv_bias": True,
    }
    return _assemble(
        Node(node.file, options, node.place),
        network,
        dimensions,
        norm=Layer(f"InstanceNorm{dimensions}d", {"eps": 1e-5, "affine": True}),
        dropout=None,
        nonlin=Layer("LeakyReLU", {"inplace": True}),
    )


def _assemble(
    options: Node, network: str, dimensions: int, *, norm: Layer | None, dropout: Layer | None, nonlin: Layer | None
) -> Architecture:
    stages = options.values.get("n_stages")
    if not is_integer(stages) or not 2 <= stages <= 32:
        raise options.refusal("n_stages", "an integer from 2 to 32")
    for key, supported in (("block", (None, "BasicBlockD")), ("bottleneck_channels", (None,))):
        value = options.values.get(key)
        if (value.rpartition(".")[2] if isinstance(value, str) else value) not in supported:
            raise options.refusal(key, "BasicBlockD" if key == "block" else "null", USE_NNUNET)
    strides = _sizes(options, "strides", stages, dimensions)
    if set(strides[0]) != {1}:
        raise options.refusal("strides", "1 along each axis of the first stage", USE_NNUNET)
    features = _counts(options, "features_per_stage", stages)
    stem = options.values.get("stem_channels")
    if stem is not None and (not is_integer(stem) or stem < 1):
        raise options.refusal("stem_channels", "an integer of at least 1, or null")
    return Architecture(
        network,
        dimensions,
        features,
        _sizes(options, "kernel_sizes", stages, dimensions),
        strides,
        _counts(options, _BLOCKS[network], stages),
        _counts(options, "n_conv_per_stage_decoder", stages - 1),
        options.flag("conv_bias", False),
        norm,
        dropout,
        nonlin,
        options.flag("nonlin_first", False),
        stem or features[0],
    )


def _layer(options: Node, kind: str, known: tuple[str, ...], *, required: bool = False) -> Layer | None:
    """A class of torch.nn by any of its names, such as torch.nn.modules.conv.Conv3d; None for null."""
    key = kind if kind == "nonlin" else f"{kind}_op"
    value = options.values.get(key)
    if value is None and not required:
        return None
    name = value.rpartition(".")[2] if isinstance(value, str) else ""
    if not str(value).startswith("torch.nn.") or name not in known:
        raise options.refusal(key, " or ".join(f"torch.nn.{name}" for name in known), USE_NNUNET)
    arguments = options.values.get(f"{key}_kwargs") or {}
    is_plain = isinstance(arguments, dict) and all(type(v) in (bool, int, float, str) for v in arguments.values())
    if not is_plain or (name.startswith("Instance") and arguments.get("track_running_stats")):
        raise options.refusal(f"{key}_kwargs", f"arguments of torch.nn.{name}", USE_NNUNET)
    return Layer(name, arguments)


def _counts(options: Node, key: str, length: int) -> tuple[int, ...]:
    """A number for each stage, of at least 1; one number counts for all."""
    value = options.values.get(key)
    numbers = [value] * length if is_integer(value) else value
    if not is_list_of_integers(numbers) or len(numbers) != length or min(numbers) < 1:
        raise options.refusal(key, f"{length} integers of at least 1")
    return tuple(numbers)


def _sizes(options: Node, key: str, stages: int, dimensions: int) -> Sizes:
    """A size for each stage; one number counts for all axes, or for all stages."""
    value = options.values.get(key)
    sizes: Any = [value] * stages if is_integer(value) else value
    wanted = f"{dimensions} integers of at least 1 for each of {stages} stages"
    if not isinstance(sizes, list) or len(sizes) != stages:
        raise options.refusal(key, wanted)
    per_axis = [[size] * dimensions if is_integer(size) else size for size in sizes]
    if not all(is_list_of_integers(size) and len(size) == dimensions and min(size) >= 1 for size in per_axis):
        raise options.refusal(key, wanted)
    return tuple(map(tuple, per_axis))
