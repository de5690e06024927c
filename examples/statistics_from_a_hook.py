"""Statistics of a layer's activations over a whole data set, from a forward hook, without keeping the activations.

python examples/statistics_from_a_hook.py
"""

import torch
from torchvision.models import resnet18

from bbfast import datasets, ops

data = datasets.load("digits")
model = resnet18(num_classes=10).eval()
stats = None  # grows by one batch after another: count, mean, var, min, max, abs_mean of every channel


def collect(module: torch.nn.Module, inputs: tuple[torch.Tensor, ...], output: torch.Tensor) -> None:
    global stats
    stats = ops.channel_stats(output, state=stats)


hook = model.layer2.register_forward_hook(collect)
with torch.no_grad():
    for index in torch.arange(len(data.test)).split(128):
        model(ops.gather_augment(data.test.images, index, mean=data.mean, std=data.std))
hook.remove()
loudest = stats.mean.topk(3)
print(f"{len(stats.mean)} channels, {int(stats.count[0])} values each")
for value, channel in zip(loudest.values.tolist(), loudest.indices.tolist(), strict=True):
    print(f"channel {channel}: mean {value:.3f}, deviation {stats.var[channel].sqrt():.3f}")
