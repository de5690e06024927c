"""The images that excite each channel most, in one pass that keeps no more than those."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor, nn

from bbfast import ops
from bbfast.analysis._layers import by_channel, finite
from bbfast.analysis.subject import Subject, View

__all__ = ["classes_of", "in_order", "majority", "top_images"]


def in_order(view: View) -> View:
    """The same samples by rising id: of equal activations the smaller id then comes first, however they came."""
    return view.take(view.ids.argsort(stable=True))


def classes_of(view: View, num_classes: int) -> Tensor:
    """True class of each sample, or K for a poisoned one, int64 ``[n]``."""
    return torch.where(view.poisoned, num_classes, view.labels)


@torch.no_grad()
def top_images(
    subject: Subject, view: View, layers: Mapping[str, nn.Module], k: int, tool: str, size: int = 256
) -> dict[str, ops.TopK]:
    """The k samples with the largest sum over space for each channel of each layer.

    Args:
        subject: Whose model is run.
        view: The images.
        layers: By name; one that takes no part in a forward pass is left out of what is returned.
        k: Samples to keep; ids are positions in ``view``.
        tool: Its asker, for messages.
        size: Images a batch; the result does not depend on it as long as the model's outputs do not.
    """
    state: dict[str, ops.TopK] = {}
    index = torch.zeros(0, dtype=torch.int64)

    def keeper(name: str, layer: nn.Module) -> Callable[[Tensor], None]:
        def keep(out: Tensor) -> None:
            values = finite(name, tool, by_channel(layer, out)).sum(2)
            state[name] = ops.topk_update(state.get(name), values, index, k)

        return keep

    start = 0
    with subject.watching({name: keeper(name, layer) for name, layer in layers.items()}):
        for x in subject.batches(view.images, size):
            index = torch.arange(start, start + len(x), device=x.device)
            subject.model(x)
            start += len(x)
    return {name: state[name] for name in layers if name in state}


def majority(classes: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """The most frequent class of each row and its share; of equally frequent ones the smallest.

    Args:
        classes: int64 ``[C, k]`` in ``0..count-1``.
        count: Number of classes.
    """
    counts = torch.zeros(len(classes), count).scatter_add_(1, classes, torch.ones(classes.shape))
    most = counts.argmax(1)
    return most, counts.gather(1, most[:, None])[:, 0] / classes.shape[1]
