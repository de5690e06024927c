"""Gradients through an inner optimum that one image-sized variable has."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

__all__ = ["double_backward_products", "fixed_point", "jvp_products", "twice_differentiable"]

Inner = Callable[[dict[str, Tensor], Tensor], Tensor]
"""The inner loss of (parameters by name, delta)."""


def fixed_point(product: Callable[[Tensor], Tensor], outer: Tensor, steps: int, lr: float, tol: float) -> Tensor:
    """``steps`` iterations of ``v <- v - lr H v + outer`` from ``v = 0``.

    That is ``v <- (dPhi / d delta)^T v + dL_out / d delta`` for the map ``Phi(delta) = delta - lr grad L_in``; as
    ``steps`` grows ``v`` goes to ``(lr H)^-1 outer`` where the map contracts. The first iteration gives ``outer`` and
    needs no product.

    Args:
        product: ``v`` to ``H v``, with H the Hessian of the inner loss in delta.
        outer: ``dL_out / d delta``.
        steps: Iterations.
        lr: Inner learning rate.
        tol: Stop when ``v`` changes by less than this norm.
    """
    v = torch.zeros_like(outer)
    for step in range(steps):
        new = outer.clone() if step == 0 else v - lr * product(v) + outer
        change = float((new - v).norm())
        v = new
        if change < tol:
            break
    return v


def double_backward_products(
    inner: Tensor, delta: Tensor, parameters: list[Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], list[Tensor | None]]]:
    """``v -> H v`` and ``v -> d/d theta <grad_delta L_in, v>`` by reverse mode, from one graph of the inner gradient.

    Args:
        inner: The inner loss, with its graph.
        delta: Its variable.
        parameters: theta.
    """
    (gradient,) = torch.autograd.grad(inner, delta, create_graph=True)

    def product(v: Tensor) -> Tensor:
        found = torch.autograd.grad(gradient, delta, v, retain_graph=True, allow_unused=True)[0]
        return torch.zeros_like(v) if found is None else found

    def mixed(v: Tensor) -> list[Tensor | None]:
        return list(torch.autograd.grad(gradient, parameters, v, allow_unused=True))

    return product, mixed


def jvp_products(
    inner: Inner, delta: Tensor, parameters: dict[str, Tensor]
) -> tuple[Callable[[Tensor], Tensor], Callable[[Tensor], list[Tensor | None]]]:
    """The same two by forward over reverse mode: nothing is kept between products, each runs the network anew."""
    values = {name: p.detach() for name, p in parameters.items()}
    at = delta.detach()

    def product(v: Tensor) -> Tensor:
        found: Tensor = torch.func.jvp(lambda d: torch.func.grad(inner, argnums=1)(values, d), (at,), (v,))[1]
        return found

    def mixed(v: Tensor) -> list[Tensor | None]:
        found = torch.func.jvp(lambda d: torch.func.grad(inner, argnums=0)(values, d), (at,), (v,))[1]
        return [found[name] for name in values]

    return product, mixed


@contextlib.contextmanager
def twice_differentiable(model: nn.Module) -> Iterator[None]:
    """The block runs attention by plain matrix products: the fused kernels have no second derivative."""
    with sdpa_kernel(SDPBackend.MATH):
        yield
