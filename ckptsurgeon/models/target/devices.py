"""Lists the devices of this machine, and refuses a device that it does not have."""

from __future__ import annotations

import torch

from ckptsurgeon.errors import DeviceError


def check_device(device: str) -> torch.device:
    """The device, if this machine has it; `meta` always exists.

    Raises:
        DeviceError: the text names no device, or this machine or build of torch does not have it. The hint lists the available ones.

    >>> check_device("cpu")
    device(type='cpu')
    """
    try:
        parsed = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise DeviceError(f"{device!r} is not the name of a device", hint=_hint()) from error
    if parsed.type == "meta":
        return parsed
    try:
        torch.empty(1, device=parsed)
    except (RuntimeError, AssertionError, ImportError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise DeviceError(f"this machine has no device {device!r} ({reason[:200]})", hint=_hint()) from error
    return parsed


def available_devices() -> tuple[str, ...]:
    """The names of the available devices: `cpu`, `meta`, and torch's accelerators with their numbers."""
    accelerators = [f"cuda:{index}" for index in range(torch.cuda.device_count())] if torch.cuda.is_available() else []
    accelerators += ["mps"] if torch.backends.mps.is_available() else []
    accelerators += [f"xpu:{index}" for index in range(torch.xpu.device_count())] if torch.xpu.is_available() else []
    return ("cpu", "meta", *accelerators)


def _hint() -> str:
    return f"{' or '.join(f'device={name!r}' for name in available_devices())}"
