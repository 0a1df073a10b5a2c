"""What several commands take: lists and devices."""

from __future__ import annotations

import torch


def listed(text: str) -> list[str]:
    """The parts between commas, without empty ones."""
    return [part for part in text.split(",") if part]


def device_named(text: str) -> torch.device:
    """A device of a kind that can be measured on. Raises ValueError for any other."""
    try:
        device = torch.device(text)
    except RuntimeError:
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(f"bench: expected --device to be cpu, cuda or cuda:N, got {text}")
    return device


def require(device: torch.device) -> torch.device:
    """The device. Raises ValueError where this machine has no such one."""
    if device.type == "cuda" and not torch.cuda.is_available():
        raise ValueError(f"bench: --device {device}: torch sees no CUDA device")
    return device
