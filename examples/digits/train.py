"""Trains the demo's small CNN on scikit-learn's digits and writes digits.onnx. Takes about ten seconds.

Run from the repository root: python examples/digits/train.py
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from sklearn.datasets import load_digits
from torch import nn


class DigitsNet(nn.Module):
    """[n, 1, 8, 8] in 0..1 → logits [n, 10]."""

    def __init__(self) -> None:
        super().__init__()
        self.features = nn.Sequential(
            nn.Conv2d(1, 32, 3, padding=1, bias=False), nn.BatchNorm2d(32), nn.ReLU(),
            nn.Conv2d(32, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(), nn.MaxPool2d(2),
            nn.Conv2d(64, 64, 3, padding=1, bias=False), nn.BatchNorm2d(64), nn.ReLU(),
        )  # fmt: skip
        self.classify = nn.Linear(64, 10)

    def forward(self, image: torch.Tensor) -> torch.Tensor:
        return self.classify(self.features(image).mean((2, 3)))


def main() -> None:
    torch.manual_seed(0)
    images, labels = load_digits(return_X_y=True)
    order = np.random.default_rng(0).permutation(len(labels))
    split = int(0.8 * len(labels))
    x = torch.tensor(images / 16, dtype=torch.float32).reshape(-1, 1, 8, 8)
    y = torch.tensor(labels)
    train, held_out = order[:split], order[split:]
    net = DigitsNet()
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3, weight_decay=1e-2)
    epochs = 30
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs)
    for _ in range(epochs):
        net.train()
        for batch in np.array_split(np.random.default_rng(1).permutation(train), len(train) // 64):
            optimizer.zero_grad()
            F.cross_entropy(net(x[batch]), y[batch]).backward()
            optimizer.step()
        schedule.step()
    net.eval()
    with torch.inference_mode():
        accuracy = float((net(x[held_out]).argmax(1) == y[held_out]).float().mean())
    print(f"held-out accuracy {100 * accuracy:.2f} %")
    program = torch.onnx.export(
        net, (x[:2],), input_names=["image"], output_names=["logits"], dynamo=True, opset_version=18,
        dynamic_shapes={"image": {0: torch.export.Dim("n")}}, optimize=False, verbose=False,
    )  # fmt: skip
    assert program is not None
    program.save(Path(__file__).parent / "digits.onnx", external_data=False)


if __name__ == "__main__":
    main()
