"""Random numbers that are drawn on the side."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator

import torch


@contextlib.contextmanager
def kept_random_state(device: torch.device) -> Iterator[None]:
    """Within the block the random numbers of the program, on the CPU and a device, are drawn without being used up."""
    with contextlib.ExitStack() as stack:
        stack.enter_context(torch.random.fork_rng(devices=[]))
        if device.type == "mps":  # it has one state for all
            stack.callback(torch.mps.set_rng_state, torch.mps.get_rng_state())
        elif device.type != "cpu":
            stack.enter_context(torch.random.fork_rng(devices=[device], device_type=device.type))
        yield
