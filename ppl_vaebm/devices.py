"""What a device must be able to do before anything runs on it."""

from __future__ import annotations

import torch

from ppl_vaebm.errors import InputError


def set_threads(threads: int) -> None:
    """Set PyTorch's number of CPU threads; 0 leaves it unchanged."""
    if threads:
        torch.set_num_threads(threads)


def check_device(device: str) -> None:
    """Refuse a device that cannot do what every stage needs: draw float64 from a generator of its own.

    Args:
        device: as PyTorch names it.

    Raises:
        InputError: no such device here, or it lacks float64.
    """
    try:
        generator = torch.Generator(device=device)
        torch.rand((), generator=generator, dtype=torch.float64, device=device).item()
    # torch raises these for unknown names, missing drivers, a build without the device, and a missing dtype.
    except (RuntimeError, AssertionError, NotImplementedError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise InputError(
            f"expected a device that PyTorch can use here with float64, found {device!r} ({reason}); set --device cpu"
        ) from None


def has_bfloat16(device: str) -> bool:
    """Say whether networks run in bfloat16 on a device.

    On a CPU without instructions for it PyTorch emulates it: ten times slower than float32, and convolutions can crash
    the process (PyTorch 2.14).

    Args:
        device: as PyTorch names it.
    """
    if torch.device(device).type != "cpu":
        return True
    return bool(torch.ops.mkldnn._is_mkldnn_bf16_supported())


def check_bfloat16(device: str, option: str) -> None:
    """Refuse bfloat16 on a device that only emulates it.

    Args:
        device: as PyTorch names it.
        option: that asks for it.

    Raises:
        InputError: see :func:`has_bfloat16`.
    """
    if not has_bfloat16(device):
        raise InputError(
            f"expected a device with instructions for bfloat16 for {option}, found a CPU without: set "
            f"--{option.replace('.', '.no-')}, which is faster here"
        )
