"""Trigger networks: trained beside the model, kept in the attack's tensors, applied from there."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from bbfast.data.loader import derive_seed
from bbfast.training.optim import load_optimizer_state, optimizer_state
from bbfast.training.recipe import Recipe

__all__ = ["TrainedNetwork", "apply_network", "initial", "refuse_fp16"]

_PIXELS, _PIXELS_CPU = 1 << 20, 1 << 14
"""Pixels of a piece: 1024 images of 32 x 32, 16 of them on the CPU."""


class TrainedNetwork:
    """A network with an optimiser of its own, both part of a program's state.

    Args:
        name: Prefix of its tensors.
        network: The network, on the device of the training.
        optimizer: Over its parameters.
        accumulate: Never clear the gradients, so that each step sees the sum of all so far.
    """

    def __init__(
        self, name: str, network: nn.Module, optimizer: torch.optim.Optimizer, *, accumulate: bool = False
    ) -> None:
        self.name, self.network, self.optimizer, self.accumulate = name, network, optimizer, accumulate

    def step(self) -> None:
        """One step with the gradients there are; parameters without one stay."""
        self.optimizer.step()
        if not self.accumulate:
            self.optimizer.zero_grad()

    def set_lr(self, lr: float) -> None:
        """Learning rate of the next steps."""
        for group in self.optimizer.param_groups:
            group["lr"] = lr

    def tensors(self) -> dict[str, Tensor]:
        """Weights and buffers by name, which go on changing with the training."""
        return {f"{self.name}.{key}": value for key, value in self.network.state_dict().items()}

    def state(self) -> dict[str, Tensor]:
        """Everything a resumed run needs."""
        kept = self.tensors()
        kept |= {f"{self.name}/optimizer.{key}": value for key, value in optimizer_state(self.optimizer).items()}
        if self.accumulate:
            gradients = enumerate(p.grad for p in self.network.parameters())
            kept |= {f"{self.name}/grad.{i}": grad for i, grad in gradients if grad is not None}
        return kept

    def load_state(self, tensors: Mapping[str, Tensor]) -> None:
        """Take back what :meth:`state` gave; weights are copied into the tensors that are there."""
        self.network.load_state_dict(_under(tensors, f"{self.name}."))
        load_optimizer_state(self.optimizer, _under(tensors, f"{self.name}/optimizer."))
        gradients = _under(tensors, f"{self.name}/grad.")
        for i, parameter in enumerate(self.network.parameters()):
            if str(i) in gradients:
                parameter.grad = gradients[str(i)].clone()


def initial(build: Callable[[], nn.Module], *key: int | str) -> nn.Module:
    """A new network whose weights are a function of the key; torch's generator stays as it was."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(derive_seed("network", *key))
        return build()


def apply_network(
    build: Callable[[], nn.Module], tensors: Mapping[str, Tensor], name: str, x: Tensor, *others: Tensor
) -> Tensor:
    """Run a network in eval mode with stored weights; differentiable in ``x``.

    Without gradient it runs in pieces of one size, the last one filled up: the result for an image then does not
    depend on the other images and the layout.

    Args:
        build: Builds the network; its own weights are not used.
        tensors: Weights and buffers, ``"<name>.<key>"``.
        name: Prefix.
        x: float32 or float64 ``[B, C, H, W]``, on the device where it shall run; weights are taken to its type.
        *others: Further arguments of the network, the same for every image.
    """
    with torch.device("meta"):
        network = build().eval()
    weights = {
        key: value.to(x.device, x.dtype if value.is_floating_point() else value.dtype)
        for key, value in _under(tensors, f"{name}.").items()
    }
    if x.requires_grad or not len(x):
        return functional_call(network, weights, (x, *others))
    rows = max(1, (_PIXELS_CPU if x.device.type == "cpu" else _PIXELS) // (x.shape[-2] * x.shape[-1]))
    parts = []
    with torch.no_grad():
        for part in x.split(rows):
            filled = F.pad(part, (0, 0, 0, 0, 0, 0, 0, rows - len(part)))
            filled = filled.clone(memory_format=torch.contiguous_format)  # kernels are chosen by the strides, too
            parts.append(functional_call(network, weights, (filled, *others))[: len(part)])
    return torch.cat(parts)


def refuse_fp16(recipe: Recipe, attack: str) -> None:
    """The scaler of fp16 scales the model's loss and knows no other optimiser.

    Raises:
        ValueError: if the recipe asks for fp16.
    """
    if recipe.precision == "fp16":
        raise ValueError(f"{attack}: precision 'fp16' is not supported; use 'bf16', 'fp32' or 'auto'")


def _under(tensors: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {key[len(prefix) :]: value for key, value in tensors.items() if key.startswith(prefix)}
