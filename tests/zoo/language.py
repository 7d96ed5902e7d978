"""Networks of transformers in tiny configurations, with random weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import nn

Built = tuple[nn.Module, Any]
COMMON = dict(
    hidden_size=32, num_hidden_layers=2, num_attention_heads=4, intermediate_size=48
)  # fmt: skip


def _tokens(length: int = 12) -> torch.Tensor:
    return torch.randint(0, 50, (1, length))


def _images(size: int) -> torch.Tensor:
    return torch.randn(1, 3, size, size)


def _causal(model: nn.Module) -> Built:
    return model, {"input_ids": _tokens(), "use_cache": False}


def llama(attention: str = "sdpa") -> Built:
    import transformers as hf

    config = hf.LlamaConfig(
        **COMMON, vocab_size=50, num_key_value_heads=2, attn_implementation=attention
    )
    return _causal(hf.LlamaForCausalLM(config))


def qwen2() -> Built:
    import transformers as hf

    config = hf.Qwen2Config(**COMMON, vocab_size=50, num_key_value_heads=2)
    return _causal(hf.Qwen2ForCausalLM(config))


def qwen3() -> Built:
    import transformers as hf

    config = hf.Qwen3Config(**COMMON, vocab_size=50, num_key_value_heads=2, head_dim=8)
    return _causal(hf.Qwen3ForCausalLM(config))


def gpt2() -> Built:
    import transformers as hf

    config = hf.GPT2Config(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    return _causal(hf.GPT2LMHeadModel(config))


def bert() -> Built:
    import transformers as hf

    config = hf.BertConfig(**COMMON, vocab_size=50, max_position_embeddings=64)
    return hf.BertForSequenceClassification(config), {"input_ids": _tokens()}


def t5() -> Built:
    import transformers as hf

    config = hf.T5Config(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_heads=4, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(6), "use_cache": False}
    return hf.T5ForConditionalGeneration(config), inputs


def vit() -> Built:
    import transformers as hf

    config = hf.ViTConfig(**COMMON, image_size=32, patch_size=8)
    return hf.ViTForImageClassification(config), _images(32)


def swin() -> Built:
    import transformers as hf

    config = hf.SwinConfig(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return hf.SwinForImageClassification(config), _images(32)


def convnext() -> Built:
    import transformers as hf

    config = hf.ConvNextConfig(hidden_sizes=[8, 16, 24, 32], depths=[1, 1, 1, 1], image_size=64)
    return hf.ConvNextForImageClassification(config), _images(64)


def segformer() -> Built:
    import transformers as hf

    config = hf.SegformerConfig(
        depths=[1, 1, 1, 1], hidden_sizes=[16, 32, 32, 64], decoder_hidden_size=32
    )
    return hf.SegformerForSemanticSegmentation(config), _images(64)


def hf_resnet() -> Built:
    import transformers as hf

    config = hf.ResNetConfig(
        embedding_size=16, hidden_sizes=[16, 32], depths=[2, 2], layer_type="basic"
    )
    return hf.ResNetForImageClassification(config), _images(64)


def whisper() -> Built:
    import transformers as hf

    config = hf.WhisperConfig(
        d_model=32, encoder_layers=1, decoder_layers=1, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, vocab_size=60,
        num_mel_bins=16, max_source_positions=20, max_target_positions=20, pad_token_id=0,
        bos_token_id=1, eos_token_id=2, decoder_start_token_id=1,
    )  # fmt: skip
    inputs = {
        "input_features": torch.randn(1, 16, 40),
        "decoder_input_ids": _tokens(6),
        "use_cache": False,
    }
    return hf.WhisperForConditionalGeneration(config), inputs


def mixtral() -> Built:
    """Its experts are slices of three-dimensional parameters, a loop over those that are hit."""
    import transformers as hf

    config = hf.MixtralConfig(
        **COMMON, vocab_size=50, num_key_value_heads=2, num_local_experts=4,
        experts_implementation="eager",
    )  # fmt: skip
    return _causal(hf.MixtralForCausalLM(config))


def clip() -> Built:
    import transformers as hf

    config = hf.CLIPConfig(
        text_config=dict(
            **COMMON, vocab_size=50, max_position_embeddings=16, bos_token_id=1, eos_token_id=2
        ),
        vision_config=dict(**COMMON, image_size=32, patch_size=8),
        projection_dim=16,
    )
    return hf.CLIPModel(config), {"input_ids": _tokens(), "pixel_values": _images(32)}


def albert() -> Built:
    """Its layers share one set of weights."""
    import transformers as hf

    config = hf.AlbertConfig(**COMMON, vocab_size=50, embedding_size=16, max_position_embeddings=64)
    return hf.AlbertForSequenceClassification(config), {"input_ids": _tokens()}


def deberta_v2() -> Built:
    """Attention to positions, which are projected by the layers of queries and keys."""
    import transformers as hf

    config = hf.DebertaV2Config(
        **COMMON, vocab_size=50, max_position_embeddings=64, relative_attention=True,
        pos_att_type=["p2c", "c2p"], position_buckets=16, norm_rel_ebd="layer_norm",
        share_att_key=True,
    )  # fmt: skip
    return hf.DebertaV2ForSequenceClassification(config), {"input_ids": _tokens()}


def mamba() -> Built:
    import transformers as hf

    config = hf.MambaConfig(hidden_size=32, num_hidden_layers=2, state_size=8, vocab_size=50)
    return _causal(hf.MambaForCausalLM(config))


def swinv2() -> Built:
    import transformers as hf

    config = hf.Swinv2Config(
        image_size=32, patch_size=2, embed_dim=16, depths=[1, 1], num_heads=[2, 4], window_size=4
    )
    return hf.Swinv2ForImageClassification(config), _images(32)


def whisper_encoder() -> Built:
    model, inputs = whisper()
    return model.model.encoder, {"input_features": inputs["input_features"]}


def wav2vec2(kind: str = "Wav2Vec2") -> Built:
    """Masked steps of its stream are set to a parameter that eval mode does not read; the Conformer
    has a layer that no code calls."""
    import transformers as hf

    config = getattr(hf, f"{kind}Config")(
        **COMMON, vocab_size=50, conv_dim=(16, 16), conv_stride=(5, 4), conv_kernel=(10, 5),
        num_feat_extract_layers=2, num_conv_pos_embeddings=8, num_conv_pos_embedding_groups=2,
    )  # fmt: skip
    return getattr(hf, f"{kind}ForCTC")(config), {"input_values": torch.randn(1, 640)}


def gpt_bigcode() -> Built:
    """One head of keys and values, and one layer that makes them and the queries."""
    import transformers as hf

    config = hf.GPTBigCodeConfig(n_embd=32, n_layer=2, n_head=4, vocab_size=50, n_positions=64)
    return hf.GPTBigCodeForCausalLM(config), {"input_ids": _tokens()}


def olmo2() -> Built:
    """Queries and keys are normalised over all their heads."""
    import transformers as hf

    config = hf.Olmo2Config(**COMMON, vocab_size=50, num_key_value_heads=2)
    return hf.Olmo2ForCausalLM(config), {"input_ids": _tokens()}


def stablelm() -> Built:
    """As many dimensions of a head are rotated as there are heads of keys."""
    import transformers as hf

    config = hf.StableLmConfig(**COMMON, vocab_size=50, num_key_value_heads=2)
    return hf.StableLmForCausalLM(config), {"input_ids": _tokens()}


def roformer() -> Built:
    """One table of positions, as wide as a head, turns all layers; the scale counts its width."""
    import transformers as hf

    config = hf.RoFormerConfig(**COMMON, vocab_size=50, embedding_size=16, pad_token_id=1)
    return hf.RoFormerForSequenceClassification(config), {"input_ids": _tokens()}


def phi3() -> Built:
    """It cuts its packed projection by a number of heads that the config alone holds."""
    import transformers as hf

    config = hf.Phi3Config(**COMMON, vocab_size=50, num_key_value_heads=2, pad_token_id=0)
    return _causal(hf.Phi3ForCausalLM(config))


def mamba2() -> Built:
    """As many heads as a head is wide, as states and as steps in a chunk."""
    import transformers as hf

    config = hf.Mamba2Config(
        hidden_size=32, num_hidden_layers=2, num_heads=8, head_dim=8, state_size=8, n_groups=2,
        chunk_size=8, vocab_size=50,
    )  # fmt: skip
    return _causal(hf.Mamba2ForCausalLM(config))


def led() -> Built:
    import transformers as hf

    config = hf.LEDConfig(
        d_model=32, encoder_layers=2, decoder_layers=2, encoder_attention_heads=4,
        decoder_attention_heads=4, encoder_ffn_dim=48, decoder_ffn_dim=48, attention_window=[6, 6],
        vocab_size=50, max_encoder_position_embeddings=64, max_decoder_position_embeddings=64,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(18), "decoder_input_ids": _tokens(6), "use_cache": False}
    # Without a token that all attend to, layers of its own for it are not reached.
    inputs["global_attention_mask"] = (torch.arange(18) == 0).long()[None]
    return hf.LEDForConditionalGeneration(config), inputs


def switch() -> Built:
    import transformers as hf

    config = hf.SwitchTransformersConfig(
        d_model=32, d_kv=8, d_ff=48, num_layers=2, num_decoder_layers=2, num_heads=4,
        num_experts=4, num_sparse_encoder_layers=1, num_sparse_decoder_layers=1, vocab_size=50,
        decoder_start_token_id=0,
    )  # fmt: skip
    inputs = {"input_ids": _tokens(), "decoder_input_ids": _tokens(6), "use_cache": False}
    return hf.SwitchTransformersForConditionalGeneration(config), inputs


class Translation(nn.Module):
    """PyTorch's own transformer between an embedding and a head."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(50, 32)
        self.body = nn.Transformer(32, 4, 1, 1, 48, batch_first=True)
        self.head = nn.Linear(32, 50)

    def forward(self, tokens: torch.Tensor) -> torch.Tensor:
        x = self.embed(tokens)
        return self.head(self.body(x, x))


BUILDERS: dict[str, Callable[[], Built]] = {
    "llama": llama, "llama_eager": lambda: llama("eager"), "qwen2": qwen2, "qwen3": qwen3,
    "gpt2": gpt2, "bert": bert, "t5": t5, "vit": vit, "swin": swin, "convnext": convnext,
    "segformer": segformer, "whisper": whisper, "hf_resnet": hf_resnet,
    "albert": albert, "deberta_v2": deberta_v2, "mamba": mamba, "swinv2": swinv2,
    "wav2vec2": wav2vec2, "wav2vec2_conformer": lambda: wav2vec2("Wav2Vec2Conformer"),
    "gpt_bigcode": gpt_bigcode, "olmo2": olmo2, "stablelm": stablelm,
    "roformer": roformer, "phi3": phi3, "mamba2": mamba2, "led": led, "switch": switch,
    "mixtral": mixtral, "clip": clip, "whisper_encoder": whisper_encoder,
    "torch_transformer": lambda: (Translation(), _tokens()),
}  # fmt: skip
