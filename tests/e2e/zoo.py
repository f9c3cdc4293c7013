"""Architectures from transformers' config classes with random weights, small but structurally whole.

Each entry gives a module whose forward takes positional tensors, two sets of inputs of different dynamic sizes, and
the dynamic shapes for torch.export (None where the architecture exports with fixed shapes only).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import transformers as tf
from torch import nn

Inputs = tuple[torch.Tensor, ...]
BATCH = torch.export.Dim("batch", min=1, max=64)
LENGTH = torch.export.Dim("length", min=2, max=64)


@dataclass(frozen=True)
class Entry:
    """`make()` builds the module with a fixed seed; `rtol` is relative to the largest output magnitude."""

    name: str
    make: Callable[[], nn.Module]
    first: Callable[[], Inputs]
    second: Callable[[], Inputs]
    dynamic: tuple[Any, ...] | None
    rtol: float = 2e-4


class Wrapped(nn.Module):
    """Positional tensors in, a tuple of tensors out; caches and empty fields are dropped."""

    def __init__(self, model: nn.Module, names: tuple[str, ...], fields: tuple[str, ...]) -> None:
        super().__init__()
        self.model = model
        self.names = names
        self.fields = fields

    def forward(self, *args: torch.Tensor) -> tuple[torch.Tensor, ...]:
        out = self.model(**dict(zip(self.names, args)))
        return tuple(out[f] for f in self.fields)


def _make(build: Callable[[], nn.Module], names: tuple[str, ...], fields: tuple[str, ...]) -> Callable[[], nn.Module]:
    def make() -> nn.Module:
        torch.manual_seed(0)
        model = build().eval()
        for module in model.modules():
            if isinstance(module, nn.BatchNorm2d):
                module.running_mean.normal_(0, 0.1)
                module.running_var.uniform_(0.5, 1.5)
        return Wrapped(model, names, fields).eval()

    return make


def _images(batch: int, size: int = 32, channels: int = 3) -> Callable[[], Inputs]:
    return lambda: (torch.randn(batch, channels, size, size, generator=torch.Generator().manual_seed(batch)),)


def _tokens(batch: int, length: int, count: int = 1, vocabulary: int = 100) -> Callable[[], Inputs]:
    def make() -> Inputs:
        g = torch.Generator().manual_seed(batch * 100 + length)
        ids = torch.randint(3, vocabulary, (batch, length), generator=g)
        mask = torch.ones(batch, length, dtype=torch.int64)
        mask[0, length // 2 + 1 :] = 0
        return (ids, mask)[:count]

    return make


def vision(name: str, build: Callable[[], nn.Module], *fields: str, size: int = 32, **kw: Any) -> Entry:
    make = _make(build, ("pixel_values",), fields or ("last_hidden_state",))
    dynamic = None if kw.pop("fixed", False) else ({0: BATCH},)
    second = _images(2 if dynamic is None else 3, size)
    return Entry(name, make, _images(2, size), second, dynamic, **kw)


def text(name: str, build: Callable[[], nn.Module], *fields: str, masked: bool = True, **kw: Any) -> Entry:
    names = ("input_ids", "attention_mask")[: 2 if masked else 1]
    dynamic = None if kw.pop("fixed", False) else ({0: BATCH, 1: LENGTH},) * len(names)
    first, second = _tokens(2, 12, len(names)), _tokens(3, 17, len(names))
    return Entry(name, _make(build, names, fields or ("last_hidden_state",)), first, second if dynamic else first, dynamic, **kw)  # fmt: skip


_BERT = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, max_position_embeddings=64
)  # fmt: skip
_VIT = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, image_size=32, patch_size=8
)
_LLM = dict(
    vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, intermediate_size=64,
    max_position_embeddings=64, use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip


class UNet(nn.Module):
    """A small U-Net with group norm, transposed convolutions and skip connections."""

    def __init__(self) -> None:
        super().__init__()
        self.down1, self.down2 = self._block(3, 16), self._block(16, 32)
        self.middle = self._block(32, 64)
        self.up2, self.up1 = nn.ConvTranspose2d(64, 32, 2, 2), nn.ConvTranspose2d(32, 16, 2, 2)
        self.join2, self.join1 = self._block(64, 32), self._block(32, 16)
        self.head = nn.Conv2d(16, 4, 1)

    @staticmethod
    def _block(i: int, o: int) -> nn.Module:
        return nn.Sequential(nn.Conv2d(i, o, 3, padding=1), nn.GroupNorm(4, o), nn.SiLU())

    def forward(self, pixel_values: torch.Tensor) -> dict[str, torch.Tensor]:
        a = self.down1(pixel_values)
        b = self.down2(nn.functional.max_pool2d(a, 2))
        c = self.middle(nn.functional.max_pool2d(b, 2))
        b = self.join2(torch.cat([self.up2(c), b], 1))
        return {"mask": self.head(self.join1(torch.cat([self.up1(b), a], 1)))}


class LstmTagger(nn.Module):
    """Embedding, bidirectional LSTM, classifier."""

    def __init__(self) -> None:
        super().__init__()
        self.embed, self.rnn, self.head = nn.Embedding(100, 16), nn.LSTM(16, 24, 2, batch_first=True, bidirectional=True), nn.Linear(48, 7)  # fmt: skip

    def forward(self, input_ids: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"tags": self.head(self.rnn(self.embed(input_ids))[0])}


def _t5() -> Entry:
    config = tf.T5Config(vocab_size=100, d_model=32, d_kv=8, d_ff=64, num_layers=2, num_heads=4, use_cache=False)
    make = _make(lambda: tf.T5Model(config), ("input_ids", "decoder_input_ids"), ("last_hidden_state",))
    first = lambda: (*_tokens(2, 12)(), *_tokens(2, 5)())  # noqa: E731
    second = lambda: (*_tokens(3, 17)(), *_tokens(3, 9)())  # noqa: E731
    other = torch.export.Dim("decoder_length", min=2, max=64)
    return Entry("T5", make, first, second, ({0: BATCH, 1: LENGTH}, {0: BATCH, 1: other}))


def _bart() -> Entry:
    config = tf.BartConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, max_position_embeddings=64, use_cache=False,
    )  # fmt: skip
    make = _make(lambda: tf.BartModel(config), ("input_ids", "decoder_input_ids"), ("last_hidden_state",))
    inputs = lambda: (*_tokens(2, 12)(), *_tokens(2, 5)())  # noqa: E731
    return Entry("BART", make, inputs, inputs, None)


def _whisper() -> Entry:
    config = tf.WhisperConfig(
        vocab_size=100, d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4,
        encoder_ffn_dim=64, decoder_ffn_dim=64, num_mel_bins=16, max_source_positions=20, max_target_positions=20,
        use_cache=False, pad_token_id=0, bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    make = _make(lambda: tf.WhisperModel(config), ("input_features", "decoder_input_ids"), ("last_hidden_state",))

    def inputs(batch: int, length: int) -> Callable[[], Inputs]:
        g = torch.Generator().manual_seed(batch)
        return lambda: (torch.randn(batch, 16, 40, generator=g), *_tokens(batch, length)())

    return Entry("Whisper", make, inputs(2, 6), inputs(3, 6), ({0: BATCH}, {0: BATCH}))


def _clip() -> Entry:
    config = tf.CLIPConfig(
        text_config=dict(_BERT, projection_dim=16), vision_config=dict(_VIT, projection_dim=16), projection_dim=16
    )
    names = ("input_ids", "pixel_values")
    make = _make(lambda: tf.CLIPModel(config), names, ("logits_per_image", "text_embeds", "image_embeds"))
    first = lambda: (*_tokens(2, 12)(), *_images(2)())  # noqa: E731
    return Entry("CLIP", make, first, first, None)


def _audio(name: str, build: Callable[[], nn.Module]) -> Entry:
    def inputs(batch: int) -> Callable[[], Inputs]:
        return lambda: (torch.randn(batch, 800, generator=torch.Generator().manual_seed(batch)),)

    return Entry(name, _make(build, ("input_values",), ("last_hidden_state",)), inputs(2), inputs(3), ({0: BATCH},))


_WAV = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=64, conv_dim=(16, 16), conv_stride=(5, 4),
    conv_kernel=(10, 3), num_feat_extract_layers=2, num_conv_pos_embeddings=16, num_conv_pos_embedding_groups=4, vocab_size=32,
)  # fmt: skip
_SMALL_RESNET = dict(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1])


def _detr(name: str, config: Any, model: Any) -> Entry:
    return vision(name, lambda: model(config()), "logits", "pred_boxes", size=64, fixed=True)


def _rt_detr() -> nn.Module:
    """Queries are the best-scored positions. With random weights all scores tie, and torch leaves the order of ties
    open (onnxruntime differs from eager in the same way), so the boxes, which carry positions, are not compared."""
    backbone = tf.RTDetrResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1], layer_type="basic",
        out_features=["stage2", "stage3", "stage4"],
    )  # fmt: skip
    config = tf.RTDetrConfig(
        backbone_config=backbone, encoder_in_channels=[32, 48, 64], encoder_hidden_dim=32, d_model=32, num_queries=10,
        decoder_in_channels=[32, 32, 32], encoder_ffn_dim=64, decoder_ffn_dim=64, decoder_layers=2, num_denoising=0,
        encoder_attention_heads=4, decoder_attention_heads=4, feat_strides=[8, 16, 32],
    )  # fmt: skip
    return tf.RTDetrForObjectDetection(config)


ZOO: tuple[Entry, ...] = (
    vision("ResNet", lambda: tf.ResNetModel(tf.ResNetConfig(**_SMALL_RESNET))),
    vision("MobileNetV1", lambda: tf.MobileNetV1Model(tf.MobileNetV1Config(depth_multiplier=0.25, image_size=32))),
    vision("MobileNetV2", lambda: tf.MobileNetV2Model(tf.MobileNetV2Config(depth_multiplier=0.35, image_size=64)), size=64),
    vision("EfficientNet", lambda: tf.EfficientNetModel(tf.EfficientNetConfig(width_coefficient=0.5, depth_coefficient=0.3, image_size=64, hidden_dim=640)), size=64),
    vision("RegNet", lambda: tf.RegNetModel(tf.RegNetConfig(embedding_size=16, hidden_sizes=[16, 32, 64, 64], depths=[1, 1, 1, 1], groups_width=8))),
    vision("ConvNeXt", lambda: tf.ConvNextModel(tf.ConvNextConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])), size=64),
    vision("ConvNeXtV2", lambda: tf.ConvNextV2Model(tf.ConvNextV2Config(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 2, 1])), size=64),
    vision("ViT", lambda: tf.ViTModel(tf.ViTConfig(**_VIT))),
    vision("DeiT", lambda: tf.DeiTModel(tf.DeiTConfig(**_VIT))),
    vision("BEiT", lambda: tf.BeitModel(tf.BeitConfig(**_VIT, use_relative_position_bias=True))),
    vision("DINOv2", lambda: tf.Dinov2Model(tf.Dinov2Config(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=32, patch_size=8))),
    vision("Swin", lambda: tf.SwinModel(tf.SwinConfig(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4))),
    vision("SwinV2", lambda: tf.Swinv2Model(tf.Swinv2Config(image_size=32, patch_size=2, embed_dim=16, depths=[2, 2], num_heads=[2, 4], window_size=4))),
    vision("PVT", lambda: tf.PvtModel(tf.PvtConfig(image_size=64, hidden_sizes=[16, 32, 40, 64], depths=[1, 1, 1, 1], num_attention_heads=[1, 2, 4, 4])), size=64),
    vision("SegFormer", lambda: tf.SegformerForSemanticSegmentation(tf.SegformerConfig(hidden_sizes=[8, 16, 32, 64], depths=[1, 1, 1, 1], decoder_hidden_size=32)), "logits", size=64),
    vision("PoolFormer", lambda: tf.PoolFormerModel(tf.PoolFormerConfig(hidden_sizes=[16, 32, 48, 64], depths=[1, 1, 1, 1])), size=64),
    vision("MobileViT", lambda: tf.MobileViTModel(tf.MobileViTConfig(image_size=64, hidden_sizes=[16, 24, 32], neck_hidden_sizes=[8, 16, 16, 16, 24, 24, 32])), size=64),
    vision("LeViT", lambda: tf.LevitModel(tf.LevitConfig(image_size=64, hidden_sizes=[16, 32, 48], num_attention_heads=[2, 2, 4], depths=[1, 1, 1], key_dim=[8, 8, 8])), size=64),
    vision("DPT", lambda: tf.DPTForDepthEstimation(tf.DPTConfig(**{**_VIT, "num_hidden_layers": 4}, backbone_out_indices=[0, 1, 2, 3], neck_hidden_sizes=[8, 16, 24, 32], fusion_hidden_size=16)), "predicted_depth"),
    vision("YOLOS", lambda: tf.YolosForObjectDetection(tf.YolosConfig(**{**_VIT, "image_size": [32, 32]}, num_detection_tokens=5)), "logits", "pred_boxes"),
    _detr("DETR", lambda: tf.DetrConfig(use_timm_backbone=False, use_pretrained_backbone=False, backbone=None, backbone_config=tf.ResNetConfig(**_SMALL_RESNET, out_features=["stage4"]), d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4, decoder_attention_heads=4, encoder_ffn_dim=64, decoder_ffn_dim=64, num_queries=5), tf.DetrForObjectDetection),
    vision("RT-DETR", _rt_detr, "logits", "enc_outputs_class", size=64, fixed=True),
    vision("SAM encoder", lambda: tf.SamVisionModel(tf.SamVisionConfig(hidden_size=32, num_hidden_layers=2, num_attention_heads=4, image_size=64, patch_size=8, output_channels=16, window_size=4, global_attn_indexes=[1])), size=64),
    Entry("U-Net", _make(UNet, ("pixel_values",), ("mask",)), _images(2), _images(3), ({0: BATCH},)),
    text("BERT", lambda: tf.BertModel(tf.BertConfig(**_BERT)), "last_hidden_state", "pooler_output"),
    text("RoBERTa", lambda: tf.RobertaModel(tf.RobertaConfig(**_BERT))),
    text("DistilBERT", lambda: tf.DistilBertModel(tf.DistilBertConfig(vocab_size=100, dim=32, n_layers=2, n_heads=4, hidden_dim=64, max_position_embeddings=64))),
    text("ALBERT", lambda: tf.AlbertModel(tf.AlbertConfig(**_BERT, embedding_size=16))),
    text("ELECTRA", lambda: tf.ElectraModel(tf.ElectraConfig(**_BERT, embedding_size=16))),
    text("MPNet", lambda: tf.MPNetModel(tf.MPNetConfig(**_BERT))),
    text("DeBERTa-v2", lambda: tf.DebertaV2Model(tf.DebertaV2Config(**_BERT, relative_attention=True, pos_att_type=["p2c", "c2p"])), fixed=True),
    text("GPT-2", lambda: tf.GPT2Model(tf.GPT2Config(vocab_size=100, n_embd=32, n_layer=2, n_head=4, n_positions=64, use_cache=False, bos_token_id=1, eos_token_id=2)), masked=False),
    text("GPT-NeoX", lambda: tf.GPTNeoXModel(tf.GPTNeoXConfig(**{k: v for k, v in _LLM.items() if k != "num_key_value_heads"})), masked=False),
    text("OPT", lambda: tf.OPTModel(tf.OPTConfig(vocab_size=100, hidden_size=32, word_embed_proj_dim=32, num_hidden_layers=2, num_attention_heads=4, ffn_dim=64, max_position_embeddings=64, use_cache=False)), fixed=True),
    text("Llama", lambda: tf.LlamaModel(tf.LlamaConfig(**_LLM)), masked=False),
    text("Mistral", lambda: tf.MistralModel(tf.MistralConfig(**_LLM, sliding_window=8)), masked=False),
    text("Qwen2", lambda: tf.Qwen2Model(tf.Qwen2Config(**_LLM)), masked=False),
    text("Qwen3", lambda: tf.Qwen3Model(tf.Qwen3Config(**_LLM, head_dim=8)), masked=False),
    text("Gemma2", lambda: tf.Gemma2Model(tf.Gemma2Config(**_LLM, head_dim=8)), masked=False),
    text("Phi", lambda: tf.PhiModel(tf.PhiConfig(**_LLM)), masked=False),
    text("Mamba", lambda: tf.MambaModel(tf.MambaConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, state_size=8, use_cache=False)), masked=False, fixed=True),
    text("Falcon", lambda: tf.FalconModel(tf.FalconConfig(vocab_size=100, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, use_cache=False, bos_token_id=1, eos_token_id=2)), masked=False),
    text("Gemma3", lambda: tf.Gemma3TextModel(tf.Gemma3TextConfig(**_LLM, head_dim=8)), masked=False),
    text("Mixtral", lambda: tf.MixtralModel(tf.MixtralConfig(**_LLM, num_local_experts=4)), masked=False, fixed=True),
    text("GPT-OSS", lambda: tf.GptOssModel(tf.GptOssConfig(**_LLM, head_dim=8, num_local_experts=4)), masked=False, fixed=True),
    text("ModernBERT", lambda: tf.ModernBertModel(tf.ModernBertConfig(**_BERT, pad_token_id=0, bos_token_id=1, eos_token_id=2, cls_token_id=1, sep_token_id=2)), fixed=True),
    _t5(), _bart(), _whisper(), _clip(),
    _audio("Wav2Vec2", lambda: tf.Wav2Vec2Model(tf.Wav2Vec2Config(**_WAV))),
    _audio("HuBERT", lambda: tf.HubertModel(tf.HubertConfig(**_WAV))),
    Entry("BiLSTM", _make(LstmTagger, ("input_ids",), ("tags",)), _tokens(2, 12), _tokens(3, 12), ({0: BATCH},)),
)  # fmt: skip
