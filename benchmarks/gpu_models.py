"""The five networks of the GPU table, with random weights: three from transformers' config classes, two written here."""

from __future__ import annotations

import torch
from torch import nn


class Logits(nn.Module):
    """A transformers model reduced to one tensor in, one tensor out."""

    def __init__(self, model: nn.Module, field: str) -> None:
        super().__init__()
        self.model, self.field = model, field

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return getattr(self.model(x), self.field)


def conv_bn(i: int, o: int, k: int, s: int = 1, groups: int = 1, act: nn.Module | None = None) -> nn.Sequential:
    layers = [nn.Conv2d(i, o, k, s, k // 2, groups=groups, bias=False), nn.BatchNorm2d(o)]
    return nn.Sequential(*layers, *([act] if act is not None else []))


class SqueezeExcite(nn.Module):
    def __init__(self, c: int, mid: int, act: nn.Module, gate: nn.Module) -> None:
        super().__init__()
        self.reduce, self.expand, self.act, self.gate = nn.Conv2d(c, mid, 1), nn.Conv2d(mid, c, 1), act, gate

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        pooled = x.mean((2, 3), keepdim=True)
        return x * self.gate(self.expand(self.act(self.reduce(pooled))))


class InvertedResidual(nn.Module):
    def __init__(self, i: int, mid: int, o: int, k: int, s: int, act: nn.Module, se: nn.Module | None) -> None:
        super().__init__()
        self.expand = conv_bn(i, mid, 1, act=act) if mid != i else nn.Identity()
        self.depthwise = conv_bn(mid, mid, k, s, groups=mid, act=act)
        self.se = se or nn.Identity()
        self.project = conv_bn(mid, o, 1)
        self.residual = s == 1 and i == o

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        y = self.project(self.se(self.depthwise(self.expand(x))))
        return x + y if self.residual else y


class Bottleneck(nn.Module):
    def __init__(self, i: int, mid: int, o: int, s: int) -> None:
        super().__init__()
        self.a, self.b = conv_bn(i, mid, 1, act=nn.ReLU()), conv_bn(mid, mid, 3, s, act=nn.ReLU())
        self.c = conv_bn(mid, o, 1)
        self.skip = conv_bn(i, o, 1, s) if s != 1 or i != o else nn.Identity()

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.relu(self.c(self.b(self.a(x))) + self.skip(x))


def resnet50() -> nn.Module:
    """He et al. 2015, stride in the 3x3 (version 1.5)."""
    layers: list[nn.Module] = [conv_bn(3, 64, 7, 2, act=nn.ReLU()), nn.MaxPool2d(3, 2, 1)]
    width = 64
    for mid, count, stride in ((64, 3, 1), (128, 4, 2), (256, 6, 2), (512, 3, 2)):
        for i in range(count):
            layers.append(Bottleneck(width, mid, 4 * mid, stride if i == 0 else 1))
            width = 4 * mid
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2048, 1000))


def efficientnet_b0() -> nn.Module:
    """Tan and Le 2019."""
    layers: list[nn.Module] = [conv_bn(3, 32, 3, 2, act=nn.SiLU())]
    width = 32
    for t, o, n, s, k in (
        (1, 16, 1, 1, 3), (6, 24, 2, 2, 3), (6, 40, 2, 2, 5), (6, 80, 3, 2, 3), (6, 112, 3, 1, 5), (6, 192, 4, 2, 5),
        (6, 320, 1, 1, 3),
    ):  # fmt: skip
        for i in range(n):
            mid = width * t
            se = SqueezeExcite(mid, max(1, width // 4), nn.SiLU(), nn.Sigmoid())
            layers.append(InvertedResidual(width, mid, o, k, s if i == 0 else 1, nn.SiLU(), se))
            width = o
    head = [conv_bn(320, 1280, 1, act=nn.SiLU()), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(1280, 1000)]
    return nn.Sequential(*layers, *head)


def mobilenet_v3_large() -> nn.Module:
    """Howard et al. 2019."""
    layers: list[nn.Module] = [conv_bn(3, 16, 3, 2, act=nn.Hardswish())]
    width = 16
    for k, mid, o, se, hard, s in (
        (3, 16, 16, 0, 0, 1), (3, 64, 24, 0, 0, 2), (3, 72, 24, 0, 0, 1), (5, 72, 40, 1, 0, 2), (5, 120, 40, 1, 0, 1),
        (5, 120, 40, 1, 0, 1), (3, 240, 80, 0, 1, 2), (3, 200, 80, 0, 1, 1), (3, 184, 80, 0, 1, 1),
        (3, 184, 80, 0, 1, 1), (3, 480, 112, 1, 1, 1), (3, 672, 112, 1, 1, 1), (5, 672, 160, 1, 1, 2),
        (5, 960, 160, 1, 1, 1), (5, 960, 160, 1, 1, 1),
    ):  # fmt: skip
        act: nn.Module = nn.Hardswish() if hard else nn.ReLU()
        excite = SqueezeExcite(mid, -(-mid // 4 // 8) * 8, nn.ReLU(), nn.Hardsigmoid()) if se else None
        layers.append(InvertedResidual(width, mid, o, k, s, act, excite))
        width = o
    head = [conv_bn(160, 960, 1, act=nn.Hardswish()), nn.AdaptiveAvgPool2d(1), nn.Flatten()]
    return nn.Sequential(*layers, *head, nn.Linear(960, 1280), nn.Hardswish(), nn.Linear(1280, 1000))


def bert_base() -> nn.Module:
    from transformers import BertConfig, BertModel

    return Logits(BertModel(BertConfig()), "last_hidden_state")


def vit_b16() -> nn.Module:
    from transformers import ViTConfig, ViTModel

    return Logits(ViTModel(ViTConfig(), add_pooling_layer=False), "last_hidden_state")


MODELS = {
    "resnet50": resnet50, "bert_base": bert_base, "vit_b16": vit_b16, "efficientnet_b0": efficientnet_b0,
    "mobilenet_v3_large": mobilenet_v3_large,
}  # fmt: skip


def make(name: str) -> nn.Module:
    """Deterministic weights; batch norms with statistics that are not the identity."""
    torch.manual_seed(0)
    model = MODELS[name]()
    for m in model.modules():
        if isinstance(m, nn.BatchNorm2d):
            nn.init.uniform_(m.running_var, 0.5, 1.5)
            nn.init.normal_(m.running_mean, 0, 0.1)
    return model.eval()


def example(name: str, batch: int) -> torch.Tensor:
    """Tokens [batch, 128] for BERT, images [batch, 3, 224, 224] in fp16 for the others."""
    g = torch.Generator().manual_seed(batch)
    if name == "bert_base":
        return torch.randint(0, 30000, (batch, 128), generator=g)
    return torch.randn(batch, 3, 224, 224, generator=g).half()
