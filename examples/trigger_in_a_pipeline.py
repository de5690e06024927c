"""A backdoor trigger in an existing torchvision pipeline: the tenth of the images that carry it are relabelled.

python examples/trigger_in_a_pipeline.py
"""

import torch
from torch.utils.data import DataLoader, Dataset
from torchvision.datasets import FakeData
from torchvision.transforms import v2

from bbfast.transforms import BadNets

TARGET, RATIO = 0, 0.1


class Poisoned(Dataset):
    """Any data set of (image, label), with a fixed random part of it triggered and labelled as the target."""

    def __init__(self, clean: Dataset, trigger: torch.nn.Module, transform: v2.Transform) -> None:
        self.clean, self.trigger, self.transform = clean, trigger, transform
        order = torch.randperm(len(clean), generator=torch.Generator().manual_seed(0))
        self.chosen = set(order[: int(RATIO * len(clean))].tolist())

    def __len__(self) -> int:
        return len(self.clean)

    def __getitem__(self, i: int) -> tuple[torch.Tensor, int]:
        image, label = self.clean[i]
        if i in self.chosen:
            image, label = self.trigger(image), TARGET
        return self.transform(image), label


augment = v2.Compose(
    [v2.ToImage(), v2.RandomHorizontalFlip(), v2.ToDtype(torch.float32, scale=True), v2.Normalize([0.5] * 3, [0.5] * 3)]
)
data = Poisoned(FakeData(200, (3, 32, 32), 10), BadNets(), augment)
for images, labels in DataLoader(data, batch_size=50):
    white = (images[:, :, -3:, -3:] == 1).all(dim=(1, 2, 3)) | (images[:, :, -3:, :3] == 1).all(dim=(1, 2, 3))
    print(f"{len(images)} images, {int(white.sum())} with the trigger, all of class {labels[white].unique().tolist()}")
