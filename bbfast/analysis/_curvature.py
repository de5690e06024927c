"""Curvature of a loss: Hessian-vector products and Lanczos."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["hessian_product", "lanczos", "rademacher"]

Product = Callable[[Tensor], Tensor]


def hessian_product(model: nn.Module, batches: Callable[[], Iterator[Tensor]], labels: Tensor) -> tuple[Product, int]:
    """``v -> H v`` for the mean cross-entropy of a model in eval mode, over all its parameters as one vector.

    Reverse over reverse, a micro-batch at a time, so the whole set counts and memory is that of one batch.

    Args:
        model: In eval mode; its parameters and buffers are left as they are.
        batches: Gives the normalised images, the same at every call.
        labels: int64 ``[n]``.

    Returns:
        The product, float32 ``[P]`` to float32 ``[P]``, and ``P``.
    """
    named = dict(model.named_parameters())
    shapes = {name: value.shape for name, value in named.items()}
    sizes = [value.numel() for value in named.values()]
    theta = torch.cat([value.detach().flatten().float() for value in named.values()])

    def loss(flat: Tensor, x: Tensor, y: Tensor) -> Tensor:
        parts = {name: part.view(shapes[name]) for name, part in zip(shapes, flat.split(sizes), strict=True)}
        logits = torch.func.functional_call(model, parts, (x,))
        return F.cross_entropy(logits.float(), y, reduction="sum")

    def product(vector: Tensor) -> Tensor:
        total, start = torch.zeros_like(theta), 0
        with torch.enable_grad(), _exact(theta.device):
            for x in batches():
                flat = theta.clone().requires_grad_()
                y = labels[start : start + len(x)].to(x.device)
                (slope,) = torch.autograd.grad(loss(flat, x, y), flat, create_graph=True)
                (part,) = torch.autograd.grad(slope @ vector, flat)
                total += part
                start += len(x)
        return total / start

    return product, theta.numel()


@contextlib.contextmanager
def _exact(device: torch.device) -> Iterator[None]:
    """No TensorFloat-32, and attention that can be differentiated twice."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    before = torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32
    try:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = False
        with sdpa_kernel(SDPBackend.MATH):
            yield
    finally:
        if device.type == "cuda":
            torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32 = before


def rademacher(size: int, generator: torch.Generator, device: torch.device) -> Tensor:
    """Plus and minus one, float32 ``[size]``, drawn on the CPU."""
    return (torch.randint(0, 2, (size,), generator=generator) * 2 - 1).float().to(device)


def lanczos(product: Product, start: Tensor, steps: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Ritz values of a symmetric operator, with full reorthogonalisation.

    Args:
        product: The operator.
        start: ``[P]``, not zero.
        steps: At most; fewer if the vectors reached are all there are.

    Returns:
        Values in rising order, their weights (squared first components, sum 1), and bounds of their errors
        ``|beta_m u_m|``, float64 ``[<= steps]`` each.
    """
    vectors = [start / start.norm()]
    alpha: list[float] = []
    beta: list[float] = []
    for step in range(min(steps, start.numel())):
        image = product(vectors[-1])
        alpha.append(float(image.double() @ vectors[-1].double()))
        basis = torch.stack(vectors)
        for _ in range(2):
            image = image - basis.T @ (basis @ image)
        beta.append(float(image.norm()))
        scale = max(max(map(abs, alpha)), max(beta))
        if beta[-1] <= 1e-6 * scale or step + 1 == start.numel():
            beta[-1] = 0.0
            break
        vectors.append(image / beta[-1])
    matrix = np.diag(alpha) + np.diag(beta[:-1], 1) + np.diag(beta[:-1], -1)
    values, parts = np.linalg.eigh(matrix)
    return values, parts[0] ** 2, abs(beta[-1] * parts[-1])
