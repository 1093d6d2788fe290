"""Which devices this machine has, and a clear no for one that it lacks. No model and no checkpoint is touched here."""

from __future__ import annotations

import torch

from ckptsurgeon.errors import DeviceError


def check_device(device: str) -> torch.device:
    """The device, if this machine has it; `meta` always is.

    Raises:
        DeviceError: the text names no device, or the machine (or this build of torch) lacks it; lists those that there are.

    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        place = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is not the name of a device", hint=_hint()) from error
    if place.type == "meta":
        return place
    try:
        torch.empty(1, device=place)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"this machine has no device {device!r} ({reason[:200]})", hint=_hint()) from error
    return place


def available_devices() -> tuple[str, ...]:
    """The names of the devices that are here: `cpu`, `meta`, and what accelerators torch sees, with their numbers."""
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    accelerators += [f"xpu:{index}" for index in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    return ("cpu", "meta", *accelerators)


def _hint() -> str:
    return f"{' or '.join(f'device={name!r}' for name in available_devices())}"
