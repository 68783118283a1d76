"""Tells apart the queues in which work for a device waits."""

from collections.abc import Hashable

import torch


def queue_on(device: torch.device) -> Hashable:
    """The queue to which the calling thread gives a device's work: on CUDA the current stream.

    What is kept for later volumes belongs to one queue. Another would read what has not been uploaded yet, and its
    memory could be used again while another still reads it. Of 'cuda', which names no device, it tells which is meant.
    """
    return torch.cuda.current_stream(device) if device.type == "cuda" else device
