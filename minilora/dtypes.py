"""Names of the dtypes that models come in, and the dtype that autocast computes in."""

from contextlib import AbstractContextManager, nullcontext

import torch

DTYPES = {str(dtype)[6:]: dtype for dtype in (torch.float64, torch.float32, torch.float16, torch.bfloat16)}  # "float64"
HALF_PRECISION = (torch.float16, torch.bfloat16)


def dtype_name(dtype: torch.dtype) -> str:
    """torch.bfloat16 -> "bfloat16"."""
    return str(dtype).removeprefix("torch.")


def autocast_dtype(device: torch.device) -> torch.dtype | None:
    """The dtype in which matrix products on this device run under the autocast that is active now; None without one."""
    if not torch.amp.is_autocast_available(device.type) or not torch.is_autocast_enabled(device.type):
        return None
    return torch.get_autocast_dtype(device.type)


def computing_in(precision: str, device: str) -> AbstractContextManager:
    """Within it matrix products run in bfloat16 for precision "bfloat16", and on CUDA for "auto"."""
    bfloat16 = precision == "bfloat16" or (precision == "auto" and device == "cuda")
    return torch.autocast(device, torch.bfloat16) if bfloat16 else nullcontext()
