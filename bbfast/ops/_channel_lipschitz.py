"""Upper bound of the Lipschitz constant of each output channel: CLP (Zheng et al. 2022, arXiv 2208.03111)."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from bbfast.ops import _check
from bbfast.ops._func import holds_nothing

__all__ = ["channel_lipschitz", "channel_lipschitz_reference"]

# Elements of the float64 copy that exists at a time.
_PIECE = 1 << 22


def channel_lipschitz(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """Spectral norm of each output channel's kernel, times ``|scale|``.

    ``s_j = |scale_j| sigma_max(W_j)`` with ``W_j`` the kernel of output channel j as ``[C_in, kh kw]`` matrix. Exact,
    without power iteration: the root of the largest eigenvalue of the smaller Gram matrix, all channels in one batched
    float64 eigen-solve; a kernel of one row or column is its length. Nothing overflows or vanishes: squares of narrower
    floats fit float64, and float64 kernels are scaled first. NaN or infinity in a kernel (or its scale) gives NaN for
    its channel. Not differentiable.

    Plain PyTorch on every device: products and batched eigen-solve are BLAS's, LAPACK's and cuSOLVER's own work. On
    CUDA torch's eigen-solve makes the host wait for its verdict.

    Args:
        weight: Floating ``[C_out, C_in, *kernel]`` of a convolution of any dimension, or ``[C_out, C_in]`` of a linear
            layer (whose rows' lengths they are). Groups: C_in is that of a group.
        scale: Floating ``[C_out]``, the factor that follows: ``gamma / sqrt(var + eps)`` of a BatchNorm (BackdoorBench
            leaves out the eps). None is 1.

    Returns:
        ``[C_out]``, dtype and device of ``weight``.

    Raises:
        TypeError: if a dtype does not fit.
        ValueError: if a shape or device does not fit.

    Source: Zheng et al., ECCV 2022, the upper bound of the channel Lipschitz constant.
    """
    _check_arguments(weight, scale)
    weight = weight.detach()
    o = weight.shape[0]
    if weight.numel() and holds_nothing(weight):
        return weight.new_zeros(o)
    kernels = weight.reshape(o, weight.shape[1], -1) if weight.numel() else weight.new_zeros(o, 1, 1)
    step = max(1, _PIECE // kernels[0].numel()) if o else 1
    norms = torch.cat([_norms(part) for part in kernels.split(step)]) if o else kernels.double().flatten()
    return _scaled(norms, scale).to(weight.dtype)


def channel_lipschitz_reference(weight: Tensor, scale: Tensor | None = None) -> Tensor:
    """:func:`channel_lipschitz` by a singular value decomposition of each kernel, one after the other."""
    _check_arguments(weight, scale)
    norms = [weight.new_zeros(0, dtype=torch.float64)]
    for kernel in weight.detach().double():
        matrix = kernel.reshape(kernel.shape[0], -1) if kernel.numel() else kernel.new_zeros(1, 1)
        good = matrix.isfinite().all()  # the decomposition refuses what is not finite
        norm = torch.linalg.matrix_norm(torch.where(good, matrix, 0), 2)
        norms.append(torch.where(good, norm, torch.nan).view(1))
    return _scaled(torch.cat(norms), scale).to(weight.dtype)


def _norms(kernels: Tensor) -> Tensor:
    """Largest singular value of each matrix, float64."""
    size: Tensor | None = None
    if kernels.dtype == torch.float64:  # the squares of narrower numbers fit float64 whatever their size
        top = kernels.abs().amax((1, 2))
        size = torch.where(top > 0, top, 1)
        kernels = kernels / size[:, None, None]
    kernels = kernels.double()
    if 1 in kernels.shape[1:]:
        norms = kernels.square().sum((1, 2)).sqrt()
    else:
        left = kernels.mT if kernels.shape[2] < kernels.shape[1] else kernels
        gram = left @ left.mT
        # The eigen-solver refuses what is not finite.
        good = gram.isfinite().all(2).all(1)
        top_eigenvalue = torch.linalg.eigvalsh(torch.where(good[:, None, None], gram, 0))[:, -1]
        norms = torch.where(good, top_eigenvalue.clamp(min=0).sqrt(), torch.nan)
    norms = norms.masked_fill(norms.isinf(), torch.nan)
    return norms if size is None else norms * size


def _scaled(norms: Tensor, scale: Tensor | None) -> Tensor:
    if scale is None:
        return norms
    norms = norms * scale.detach().double().abs()
    return norms.masked_fill(~norms.isfinite(), torch.nan)


def _check_arguments(weight: Any, scale: Any) -> None:
    op = "channel_lipschitz"
    if not _check.is_dense(weight, _check.FLOATS):
        raise TypeError(f"{op}: weight must be a floating tensor, got {_check.describe(weight)}")
    if weight.dim() < 2:
        raise ValueError(f"{op}: weight must be [C_out, C_in, ...], got {_check.describe(weight)}")
    if scale is None:
        return
    o = weight.shape[0]
    if not _check.is_dense(scale, _check.FLOATS):
        raise TypeError(f"{op}: scale must be a floating tensor [{o}], got {_check.describe(scale)}")
    if tuple(scale.shape) != (o,):
        raise ValueError(f"{op}: scale must be [{o}], got {_check.describe(scale)}")
    _check.same_device(op, "scale", scale, weight)
