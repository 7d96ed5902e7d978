"""Networks at the sizes that they are published in, with random weights.

The tests take tiny ones. What a trace takes beside a pass is told by these: an operation on a row
of 32 numbers takes less time than any look at it.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo.language import Built
from tests.zoo.networks import Network

#: Tokens of an example.
TOKENS = 128


def _tokens(vocabulary: int, length: int = TOKENS) -> torch.Tensor:
    return torch.randint(2, vocabulary, (1, length))


def _images(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size)


def _language(model: str, config: str, **sizes: Any) -> Built:
    """A model of language: its defaults but for these sizes."""
    import transformers as hf

    made = getattr(hf, config)(**sizes)
    inputs = {"input_ids": _tokens(made.vocab_size)}
    causal = model.endswith(("ForCausalLM", "LMHeadModel"))
    return getattr(hf, model)(made), {**inputs, "use_cache": False} if causal else inputs


def _vision(model: str, config: str, size: int, **sizes: Any) -> Built:
    import transformers as hf

    return getattr(hf, model)(getattr(hf, config)(**sizes)), _images(size)


def _t5() -> Built:
    import transformers as hf

    config = hf.T5Config(decoder_start_token_id=0)  # its defaults are those of t5-small
    inputs = {
        "input_ids": _tokens(config.vocab_size),
        "decoder_input_ids": _tokens(config.vocab_size, 32),
        "use_cache": False,
    }
    return hf.T5ForConditionalGeneration(config), inputs


def _whisper() -> Built:
    import transformers as hf

    config = hf.WhisperConfig()  # its defaults are those of whisper-tiny
    inputs = {
        "input_features": torch.randn(1, 80, 3000),
        "decoder_input_ids": _tokens(1000, 32),
        "use_cache": False,
    }
    return hf.WhisperForConditionalGeneration(config), inputs


def _wav2vec2() -> Built:
    import transformers as hf

    return hf.Wav2Vec2ForCTC(hf.Wav2Vec2Config()), {"input_values": torch.randn(1, 16_000)}


def _clip() -> Built:
    import transformers as hf

    config = hf.CLIPConfig()
    inputs = {"input_ids": _tokens(40_000, 77), "pixel_values": _images(224)}
    return hf.CLIPModel(config), inputs


class _Translation(nn.Module):
    """PyTorch's own transformer, as wide and deep as it comes, between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(10_000, 512)
        self.body = nn.Transformer(batch_first=True)
        self.head = nn.Linear(512, 10_000)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.body(x, x))


def _swin_unetr() -> Built:
    from monai.networks.nets import SwinUNETR

    return SwinUNETR(in_channels=1, out_channels=2), torch.randn(1, 1, 64, 64, 64)


_LLAMA = dict(
    hidden_size=576, num_hidden_layers=30, num_attention_heads=9, num_key_value_heads=3,
    intermediate_size=1536, vocab_size=49_152, tie_word_embeddings=True,
)  # fmt: skip
_DEBERTA = dict(
    vocab_size=128_100, hidden_size=768, num_hidden_layers=6, num_attention_heads=12,
    intermediate_size=3072, relative_attention=True, pos_att_type=["p2c", "c2p"],
    position_buckets=256, norm_rel_ebd="layer_norm", share_att_key=True,
)  # fmt: skip
_ALBERT = dict(
    hidden_size=768, num_attention_heads=12, intermediate_size=3072, embedding_size=128
)  # fmt: skip
_BIGCODE = dict(n_embd=768, n_layer=20, n_head=12, n_inner=3072, vocab_size=49_152)
_MAMBA = dict(hidden_size=768, num_hidden_layers=24)
_MAMBA2 = dict(
    hidden_size=768, num_hidden_layers=24, num_heads=24, n_groups=1, state_size=128,
    vocab_size=50_288,
)  # fmt: skip

_HF: dict[str, Callable[[], Built]] = {
    "SmolLM-135M": partial(_language, "LlamaForCausalLM", "LlamaConfig", **_LLAMA),
    "GPT-2": partial(_language, "GPT2LMHeadModel", "GPT2Config"),
    "tiny StarCoder": partial(_language, "GPTBigCodeForCausalLM", "GPTBigCodeConfig", **_BIGCODE),
    "Mamba-130m": partial(_language, "MambaForCausalLM", "MambaConfig", **_MAMBA),
    "Mamba2-130m": partial(_language, "Mamba2ForCausalLM", "Mamba2Config", **_MAMBA2),
    "BERT base": partial(_language, "BertForSequenceClassification", "BertConfig"),
    "RoFormer base": partial(
        _language, "RoFormerForSequenceClassification", "RoFormerConfig", embedding_size=768
    ),
    "ALBERT base": partial(_language, "AlbertForSequenceClassification", "AlbertConfig", **_ALBERT),
    "DeBERTa-v3 small": partial(
        _language, "DebertaV2ForSequenceClassification", "DebertaV2Config", **_DEBERTA
    ),
    "T5 small": _t5,
    "Whisper tiny, 30 s": _whisper,
    "wav2vec2 base, 1 s": _wav2vec2,
    "CLIP ViT-B/32": _clip,
    "ViT-B/16": partial(_vision, "ViTForImageClassification", "ViTConfig", 224),
    "Swin-T": partial(_vision, "SwinForImageClassification", "SwinConfig", 224),
    "Swinv2-T, 256²": partial(
        _vision, "Swinv2ForImageClassification", "Swinv2Config", 256, image_size=256, window_size=8
    ),
    "ConvNeXt-T": partial(_vision, "ConvNextForImageClassification", "ConvNextConfig", 224),
    "SegFormer-B0, 512²": partial(
        _vision, "SegformerForSemanticSegmentation", "SegformerConfig", 512
    ),
    "ResNet-50": partial(_vision, "ResNetForImageClassification", "ResNetConfig", 224),
}


def _network(package: str, build: Callable[[], Built]) -> Network:
    return Network(package, lambda _: build())


PUBLISHED: dict[str, Network] = {
    **{name: _network("transformers", build) for name, build in _HF.items()},
    "SwinUNETR, 64³": _network("monai", _swin_unetr),
    "nn.Transformer": _network(
        "torch", lambda: (_Translation(), _tokens(10_000))
    ),
}  # fmt: skip
