"""Builds the U-Nets that nnU-Net plans, with the names of weights that its checkpoints have.

Written anew after dynamic_network_architectures 0.4.4 (Apache-2.0, MIC-DKFZ), whose modules have the same weights under
several names. Here each weight has one: neither `all_modules.` nor `decoder.encoder.` is there.
"""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from voxquilt.errors import ConfigError
from voxquilt.models.nnunet.architecture import RESIDUAL, Architecture, Layer, read_planned
from voxquilt.models.nnunet.folder import NnunetFolder
from voxquilt.models.nnunet.json_values import Node
from voxquilt.text import first_line

Size = Sequence[int]


def build_network(folder: NnunetFolder) -> "UNet":
    """The network of a model folder, with initial weights.

    Raises:
        ConfigError: a layer does not take the options that plans.json gives it.
    """
    return build_unet(
        folder.plan.architecture, folder.input_channels, folder.dataset.labels.heads, source=folder.path / "plans.json"
    )


def build_unet(architecture: Architecture, inputs: int, outputs: int, *, source: Path) -> "UNet":
    """A network from an architecture.

    Args:
        architecture: Which network.
        inputs: Channels of the input.
        outputs: Channels of the output.
        source: The file that the architecture is from, for messages.

    Raises:
        ConfigError: a layer does not take the options that it is given.
    """
    with _as_config_error(source):
        return UNet(architecture, inputs, outputs)


@contextmanager
def _as_config_error(source: Path) -> Iterator[None]:
    try:
        yield
    except (TypeError, ValueError, RuntimeError) as error:
        raise ConfigError(
            f"{source}: its network cannot be built: {first_line(error)}. Compare norm_op_kwargs, dropout_op_kwargs "
            f"and nonlin_kwargs with torch's documentation."
        ) from error


class UNet(nn.Module):
    """A U-Net with a plain or a residual encoder; (B, C, ...) patches to logits, without deep supervision."""

    def __init__(self, architecture: Architecture, inputs: int, outputs: int) -> None:
        super().__init__()
        layers = _Layers(architecture)
        encoder = _ResidualEncoder if architecture.network == RESIDUAL else _PlainEncoder
        self.encoder = encoder(layers, inputs)
        self.decoder = _Decoder(layers, outputs)

    def forward(self, patches: Tensor) -> Tensor:
        return self.decoder(self.encoder(patches))


class PlannedUNet(UNet):
    """A U-Net to train, as nnU-Net plans it; its names of weights are those of nnU-Net's checkpoints.

    Weights begin as nnU-Net's do: He's initialisation, and residual blocks that add nothing. The outputs of lower
    resolution, which only deep supervision uses, are there and are not trained.

    >>> plan = {"network_class_name": "dynamic_network_architectures.architectures.unet.PlainConvUNet", "arch_kwargs": {
    ...     "n_stages": 2, "features_per_stage": [4, 8], "conv_op": "torch.nn.Conv3d", "kernel_sizes": 3,
    ...     "strides": [1, 2], "n_conv_per_stage": 1, "n_conv_per_stage_decoder": 1, "nonlin": "torch.nn.ReLU"}}
    >>> PlannedUNet(1, 2, plan)(torch.rand(1, 1, 8, 8, 8)).shape
    torch.Size([1, 2, 8, 8, 8])

    Args:
        in_channels: Channels of the input.
        out_channels: Channels of the output.
        architecture: `network_class_name` and `arch_kwargs` as in plans.json, by which nothing is imported.

    Raises:
        ConfigError: a network, a layer or an option that is not supported.
    """

    def __init__(self, in_channels: int, out_channels: int, architecture: Mapping[str, Any]) -> None:
        source = Path("model.net")
        given = read_planned(Node(source, {"architecture": dict(architecture)}))
        with _as_config_error(source):
            super().__init__(given, in_channels, out_channels)
        self._initialise()
        for head in self.decoder.seg_layers[:-1]:
            head.requires_grad_(False)

    def _initialise(self) -> None:
        """As InitWeights_He(1e-2) and init_last_bn_before_add_to_0 of dynamic_network_architectures."""
        for name, module in self.named_modules():
            if isinstance(module, nn.Conv2d | nn.Conv3d | nn.ConvTranspose2d | nn.ConvTranspose3d):
                nn.init.kaiming_normal_(module.weight, a=1e-2)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif name.endswith(".conv2.norm"):
                for parameter in module.parameters():
                    nn.init.zeros_(parameter)


class _Layers:
    """Makes the layers that an architecture names."""

    def __init__(self, architecture: Architecture) -> None:
        self.architecture = architecture
        is_2d = architecture.dimensions == 2
        # Their annotations want a fixed number of axes.
        self._conv: Callable[..., nn.Module] = nn.Conv2d if is_2d else nn.Conv3d
        self._transposed: Callable[..., nn.Module] = nn.ConvTranspose2d if is_2d else nn.ConvTranspose3d
        self._pool: Callable[..., nn.Module] = nn.AvgPool2d if is_2d else nn.AvgPool3d

    def block(
        self,
        inputs: int,
        outputs: int,
        kernel: Size,
        stride: Size | int = 1,
        *,
        bias: bool | None = None,
        dropout: bool = True,
        nonlin: bool = True,
    ) -> nn.Sequential:
        """A convolution and what follows it."""
        given = self.architecture
        conv = self._conv(
            inputs,
            outputs,
            tuple(kernel),
            stride if isinstance(stride, int) else tuple(stride),
            tuple((size - 1) // 2 for size in kernel),
            bias=given.conv_bias if bias is None else bias,
        )
        after = [("norm", _make(given.norm, outputs)), ("nonlin", _make(given.nonlin) if nonlin else None)]
        if given.nonlin_first:
            after.reverse()
        modules = [("conv", conv), ("dropout", _make(given.dropout) if dropout else None), *after]
        return nn.Sequential(OrderedDict((name, module) for name, module in modules if module is not None))

    def stack(self, count: int, inputs: int, outputs: int, kernel: Size, stride: Size | int = 1) -> nn.Sequential:
        """Several convolutions, of which the first has the stride."""
        first = self.block(inputs, outputs, kernel, stride)
        others = [self.block(outputs, outputs, kernel) for _ in range(count - 1)]
        return nn.Sequential(OrderedDict(convs=nn.Sequential(first, *others)))

    def pool(self, stride: Size) -> nn.Module:
        """The mean over a stride's voxels."""
        return self._pool(tuple(stride), tuple(stride))

    def upsample(self, inputs: int, outputs: int, stride: Size) -> nn.Module:
        """The way back over a stride."""
        return self._transposed(inputs, outputs, tuple(stride), tuple(stride), bias=self.architecture.conv_bias)

    def head(self, inputs: int, outputs: int) -> nn.Module:
        """Features to logits."""
        return self._conv(inputs, outputs, 1)

    def nonlinearity(self) -> nn.Module:
        """The nonlinearity by itself."""
        return _make(self.architecture.nonlin) or nn.Identity()


def _make(layer: Layer | None, *channels: int) -> nn.Module | None:
    # The name is one of those that voxquilt.models.nnunet.architecture lets pass.
    return None if layer is None else getattr(nn, layer.name)(*channels, **layer.options)


class _PlainEncoder(nn.Module):
    """Stages of convolutions."""

    def __init__(self, layers: _Layers, inputs: int) -> None:
        super().__init__()
        given = layers.architecture
        stages: list[nn.Module] = []
        for count, outputs, kernel, stride in zip(
            given.blocks, given.features, given.kernel_sizes, given.strides, strict=True
        ):
            stages.append(nn.Sequential(layers.stack(count, inputs, outputs, kernel, stride)))
            inputs = outputs
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        return _outputs_of(self.stages, x)


class _ResidualEncoder(nn.Module):
    """A convolution at full resolution, and stages of residual blocks."""

    def __init__(self, layers: _Layers, inputs: int) -> None:
        super().__init__()
        given = layers.architecture
        self.stem = layers.stack(1, inputs, given.stem, given.kernel_sizes[0])
        inputs = given.stem
        stages: list[nn.Module] = []
        for count, outputs, kernel, stride in zip(
            given.blocks, given.features, given.kernel_sizes, given.strides, strict=True
        ):
            first = _ResidualBlock(layers, inputs, outputs, kernel, stride)
            unit = (1,) * given.dimensions
            others = [_ResidualBlock(layers, outputs, outputs, kernel, unit) for _ in range(count - 1)]
            stages.append(nn.Sequential(OrderedDict(blocks=nn.Sequential(first, *others))))
            inputs = outputs
        self.stages = nn.Sequential(*stages)

    def forward(self, x: Tensor) -> list[Tensor]:
        return _outputs_of(self.stages, self.stem(x))


class _ResidualBlock(nn.Module):
    """Two convolutions beside a shortcut, which is pooled and projected where shapes differ (ResNet-D)."""

    def __init__(self, layers: _Layers, inputs: int, outputs: int, kernel: Size, stride: Size) -> None:
        super().__init__()
        self.conv1 = layers.block(inputs, outputs, kernel, stride)
        self.conv2 = layers.block(outputs, outputs, kernel, dropout=False, nonlin=False)
        shortcut = [layers.pool(stride)] if set(stride) != {1} else []
        if inputs != outputs:
            unit = (1,) * len(kernel)
            shortcut.append(layers.block(inputs, outputs, unit, bias=False, dropout=False, nonlin=False))
        self.skip = nn.Sequential(*shortcut)  # the input itself where it is empty
        self.nonlin2 = layers.nonlinearity()

    def forward(self, x: Tensor) -> Tensor:
        out = self.conv2(self.conv1(x))
        out += self.skip(x)
        return self.nonlin2(out)


class _Decoder(nn.Module):
    """Stages that upsample and join the encoder's output of the same resolution, from the lowest up."""

    def __init__(self, layers: _Layers, outputs: int) -> None:
        super().__init__()
        given = layers.architecture
        self.transpconvs, self.stages, self.seg_layers = nn.ModuleList(), nn.ModuleList(), nn.ModuleList()
        for n, count in enumerate(given.decoder_convs):
            below, beside = given.features[-1 - n], given.features[-2 - n]
            self.transpconvs.append(layers.upsample(below, beside, given.strides[-1 - n]))
            self.stages.append(layers.stack(count, 2 * beside, beside, given.kernel_sizes[-2 - n]))
            # Only the last one predicts; checkpoints have those of deep supervision in any case.
            self.seg_layers.append(layers.head(beside, outputs))

    def forward(self, skips: list[Tensor]) -> Tensor:
        *skips, x = skips
        for upsample, stage, skip in zip(self.transpconvs, self.stages, reversed(skips), strict=True):
            x = stage(torch.cat((upsample(x), skip), 1))
        return self.seg_layers[-1](x)


def _outputs_of(stages: nn.Sequential, x: Tensor) -> list[Tensor]:
    outputs: list[Tensor] = []
    for stage in stages:
        x = stage(x)
        outputs.append(x)
    return outputs
