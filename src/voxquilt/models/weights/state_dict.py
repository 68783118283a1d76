"""Reads state dicts: .pt, .pth and .ckpt, as `torch.save` writes them, and .safetensors.

torch is imported where a file is read, so that one can be recognised before torch has loaded.
"""

from copy import deepcopy
from pathlib import Path
from typing import Any

from voxquilt.models.weights.registry import ReadOptions


class StateDict:
    """The format of tensors by name, and of mappings that hold such tensors at any depth."""

    needs_network = True

    def recognises(self, path: Path) -> bool:
        """Any file may be one: this is the format of files that no other recognises."""
        return True

    def read(self, path: Path, options: ReadOptions) -> Any:
        """A copy of the network with the file's weights.

        A state dict may be the file itself, or stand in a mapping as 'state_dict', 'model_state_dict', 'model' or
        'network_weights', or else as the only one, or the only one that fits. What torch.compile (`_orig_mod.`) and DDP
        (`module.`) put into keys does not count.

        `options.prefix` is 'net.' for a LightningModule's self.net, or for a mapping that holds the state dict as
        'net'. Without `options.strict` keys may be missing or left over, but one at least must fit.

        Raises:
            ConfigError: the file cannot be read safely, or keys or shapes do not fit; they are listed.
        """
        from voxquilt.models.weights.safe_loading import load_safely
        from voxquilt.models.weights.state_dict_keys import check_keys, state_of

        network = deepcopy(options.net)
        state = state_of(path, load_safely(path, trust=options.trust), network.state_dict(), options.prefix)
        check_keys(path, network.state_dict(), state, strict=options.strict)
        network.load_state_dict(state, strict=options.strict)
        return network
