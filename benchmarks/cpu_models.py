"""The networks of the CPU table, with random weights: from transformers' config classes, or written here."""

from __future__ import annotations

from collections.abc import Callable
from itertools import pairwise
from typing import Any

import torch
import transformers as tf
from torch import nn

from benchmarks.gpu_models import efficientnet_b0, mobilenet_v3_large
from tests.e2e.zoo import Wrapped

Inputs = tuple[torch.Tensor, ...]


class DoubleConv(nn.Sequential):
    def __init__(self, i: int, o: int) -> None:
        layers = [m for a in (i, o) for m in (nn.Conv2d(a, o, 3, padding=1), nn.BatchNorm2d(o), nn.ReLU())]
        super().__init__(*layers)


class UNet(nn.Module):
    """Ronneberger et al. 2015 with same padding, batch norm and 32 channels at the top."""

    def __init__(self, width: int = 32, depth: int = 4) -> None:
        super().__init__()
        sizes = [width << i for i in range(depth + 1)]
        self.down = nn.ModuleList(DoubleConv(i, o) for i, o in zip([3, *sizes], sizes))
        self.rise = nn.ModuleList(nn.ConvTranspose2d(o, i, 2, 2) for i, o in pairwise(sizes))
        self.up = nn.ModuleList(DoubleConv(2 * i, i) for i in sizes[:-1])
        self.out = nn.Conv2d(width, 2, 1)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        skips = []
        for i, block in enumerate(self.down):
            x = block(x if i == 0 else nn.functional.max_pool2d(x, 2))
            skips.append(x)
        for rise, block, skip in zip(reversed(self.rise), reversed(self.up), reversed(skips[:-1])):
            x = block(torch.cat((rise(x), skip), 1))
        return self.out(x)


def image(batch: int) -> Inputs:
    return (torch.randn(batch, 3, 224, 224, generator=torch.Generator().manual_seed(0)),)


def ids(batch: int) -> Inputs:
    return (torch.randint(3, 1000, (batch, 128), generator=torch.Generator().manual_seed(0)),)


def _hidden(make: Callable[[], Any], name: str) -> Callable[[], nn.Module]:
    return lambda: Wrapped(make().eval(), (name,), ("last_hidden_state",)).eval()


MODELS: dict[str, tuple[Callable[[], nn.Module], Callable[[int], Inputs]]] = {
    "ResNet-50": (_hidden(lambda: tf.ResNetModel(tf.ResNetConfig()), "pixel_values"), image),
    "MobileNet-V2": (_hidden(lambda: tf.MobileNetV2Model(tf.MobileNetV2Config()), "pixel_values"), image),
    "MobileNet-V3": (lambda: mobilenet_v3_large().eval(), image),
    "EfficientNet-B0": (lambda: efficientnet_b0().eval(), image),
    "ViT-B/16": (_hidden(lambda: tf.ViTModel(tf.ViTConfig()), "pixel_values"), image),
    "ConvNeXt-T": (_hidden(lambda: tf.ConvNextModel(tf.ConvNextConfig()), "pixel_values"), image),
    "Swin-T": (_hidden(lambda: tf.SwinModel(tf.SwinConfig()), "pixel_values"), image),
    "BERT-base-128": (_hidden(lambda: tf.BertModel(tf.BertConfig()), "input_ids"), ids),
    "GPT-2-128": (_hidden(lambda: tf.GPT2Model(tf.GPT2Config(use_cache=False)), "input_ids"), ids),
    "U-Net": (lambda: UNet().eval(), image),
}
