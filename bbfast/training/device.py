"""Where training runs and in which number format."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Iterator

import torch
from torch import nn

__all__ = ["Numerics", "choose_numerics", "cpu_has_bf16", "placed", "resolve_device"]

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def resolve_device(device: str | torch.device = "auto") -> torch.device:
    """The device that ``device`` means; ``"auto"`` is the first GPU, else the CPU.

    Raises:
        TypeError: if it is neither text nor a ``torch.device``.
        ValueError: if torch knows no such device or this machine has none.
    """
    if not isinstance(device, (str, torch.device)):
        raise TypeError(f"device must be 'auto', a name like 'cuda:0' or a torch.device, got {device!r}")
    if device == "auto":
        return torch.device("cuda", torch.cuda.current_device()) if torch.cuda.is_available() else torch.device("cpu")
    try:
        resolved = torch.device(device)
    except RuntimeError:
        raise ValueError(f"device must be 'auto', 'cpu' or a name like 'cuda:0', got {device!r}") from None
    if resolved.type == "cuda":
        count = torch.cuda.device_count() if torch.cuda.is_available() else 0
        if (resolved.index or 0) >= count:
            raise ValueError(
                f"device {device!r} does not exist: this machine shows torch {count} CUDA device(s); use 'cpu'"
            )
        return torch.device("cuda", torch.cuda.current_device() if resolved.index is None else resolved.index)
    if resolved.type == "meta":
        raise ValueError(f"device {device!r} cannot be used: it holds no values; use 'cpu'")
    if resolved.type != "cpu":
        try:
            torch.empty(1, device=resolved)
        except (RuntimeError, NotImplementedError) as error:
            reason = str(error).splitlines()[0]
            raise ValueError(f"device {device!r} cannot be used on this machine: {reason}") from None
    return resolved


def cpu_has_bf16() -> bool:
    """Whether the processor multiplies bfloat16 in hardware (AVX512-BF16 or AMX); emulated, it would be slower."""
    capabilities = getattr(torch.cpu, "get_capabilities", None)
    found = capabilities() if capabilities is not None else {}
    return bool(found.get("avx512_bf16") or found.get("amx_bf16"))


@dataclasses.dataclass(frozen=True)
class Numerics:
    """Number format and memory layout of a run.

    Args:
        dtype: Type of activations; weights stay float32 and are cast by autocast.
        channels_last: Whether images and 4-d weights lie channels last.
    """

    dtype: torch.dtype
    channels_last: bool

    @property
    def precision(self) -> str:
        """``fp32``, ``bf16`` or ``fp16``."""
        return next(name for name, dtype in _DTYPES.items() if dtype == self.dtype)

    def autocast(self, device: torch.device, cache: bool = True) -> torch.autocast:
        """Autocast to the run's type; does nothing for float32."""
        enabled = self.dtype != torch.float32
        dtype = self.dtype if enabled else None
        return torch.autocast(device.type, dtype=dtype, enabled=enabled, cache_enabled=cache)

    @property
    def memory_format(self) -> torch.memory_format:
        return torch.channels_last if self.channels_last else torch.contiguous_format


def choose_numerics(precision: str, channels_last: bool | str, model: nn.Module, device: torch.device) -> Numerics:
    """Settle what a recipe leaves to ``"auto"``. A rule, not a measurement: the same machine always chooses the same.

    bf16: on a GPU of compute capability 8.0 and up; on a CPU with bf16 units, except for models that join depthwise
    convolutions and BatchNorm (MobileNet, EfficientNet: measured 0.6 to 0.85 times as fast as float32; all others of
    the zoo gain, 1.2 to 2 times and more). Channels last: for models with 2-d convolutions, on both. Figures:
    ``benchmarks/training.py``.

    Raises:
        ValueError: if the device cannot train in the precision asked for.
    """
    if precision == "auto":
        precision = "bf16" if _gains_from_bf16(model, device) else "fp32"
    if precision == "fp16" and device.type == "cpu":
        raise ValueError("precision 'fp16' needs a GPU; on a CPU use 'auto', 'bf16' or 'fp32'")
    if channels_last == "auto":
        has_convolutions = any(isinstance(module, nn.Conv2d) for module in model.modules())
        channels_last = has_convolutions and device.type in ("cpu", "cuda")
    return Numerics(_DTYPES[precision], bool(channels_last))


def _gains_from_bf16(model: nn.Module, device: torch.device) -> bool:
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        modules = list(model.modules())
        depthwise = any(isinstance(m, nn.Conv2d) and m.groups == m.in_channels > 1 for m in modules)
        return cpu_has_bf16() and not (depthwise and any(isinstance(m, nn.BatchNorm2d) for m in modules))
    return False


@contextlib.contextmanager
def placed(model: nn.Module, device: torch.device, memory_format: torch.memory_format | None = None) -> Iterator[None]:
    """The model on ``device`` and its 4-d weights in ``memory_format`` for the block; as they were afterwards.

    A model spread over several devices is left where it is.
    """
    homes = {tensor.device for tensor in (*model.parameters(), *model.buffers())}
    home = homes.pop() if len(homes) == 1 else None
    moves = home is not None and home != device
    relaid = [p for p in model.parameters() if p.dim() == 4] if memory_format is torch.channels_last else []
    relaid = [p for p in relaid if p.is_contiguous() and not p.is_contiguous(memory_format=torch.channels_last)]
    try:
        if moves:
            model.to(device)
        for p in relaid:
            p.data = p.data.contiguous(memory_format=torch.channels_last)
        yield
    finally:
        for p in relaid:
            p.data = p.data.contiguous()
        if moves:
            model.to(home)
