"""A training loop of one's own, with the images resident on its device: one call makes an augmented, normalised batch.

python examples/loader_in_a_training_loop.py
"""

import torch
from torch import nn

from bbfast import datasets, ops

device = "cuda" if torch.cuda.is_available() else "cpu"
data = datasets.load("digits")
images, labels = data.train.images.to(device), data.train.labels.to(device)  # uint8 [N, 3, 32, 32], int64 [N]
model = nn.Sequential(nn.Conv2d(3, 16, 3, stride=2), nn.ReLU(), nn.Flatten(), nn.Linear(16 * 15 * 15, 10)).to(device)
optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)

for epoch in range(3):
    right = 0
    for index in torch.randperm(len(images), device=device).split(128):
        offset = torch.randint(0, 5, (len(index), 2), device=device)  # where each crop starts in the padded image
        x = ops.gather_augment(images, index, offset=offset, padding=2, mean=data.mean, std=data.std)
        logits = model(x)
        optimizer.zero_grad()
        nn.functional.cross_entropy(logits, labels[index]).backward()
        optimizer.step()
        right += int((logits.argmax(1) == labels[index]).sum())
    print(f"epoch {epoch + 1}: training accuracy {right / len(images):.3f}")
