"""The zoo: networks that people bring, and the least that the pruner does for each of them."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import nn

from tests.zoo import language, vision


@dataclass(frozen=True)
class Network:
    """A network of the zoo.

    Attributes:
        package: that it comes from.
        build: makes it, with inputs for images of a size.
        sizes: of the images in the tests and in the table.
        least: so many of its layers can be pruned, at least.
        params: the fraction of parameters that it is pruned to.
        outputs: those that others read, None for all.
    """

    package: str
    build: Callable[[int], tuple[nn.Module, Any]]
    sizes: tuple[int, int] = (0, 0)
    least: int = 1
    params: float = 0.7
    outputs: tuple[str, ...] | None = None

    def built(self, size: int = 0) -> tuple[nn.Module, Any]:
        torch.manual_seed(0)
        return self.build(size or self.sizes[0])


def _cv(name: str, least: int, sizes: tuple[int, int] = (64, 224), **options: Any) -> Network:
    return Network("pytorchcv", partial(vision.pytorchcv, name), sizes, least, **options)


def _hf(name: str, least: int, **options: Any) -> Network:
    return Network("transformers", partial(_configured, name), (0, 0), least, **options)


def _configured(name: str, _: int) -> tuple[nn.Module, Any]:
    return language.BUILDERS[name]()


CIFAR = (32, 32)
NETWORKS: dict[str, Network] = {
    "resnet18": _cv("resnet18", 20),
    "seresnet18": _cv("seresnet18", 36),
    "preresnet18": _cv("preresnet18", 20),
    "diaresnet20_cifar10": _cv("diaresnet20_cifar10", 33, CIFAR),
    "wrn16_10_cifar10": _cv("wrn16_10_cifar10", 16, CIFAR),
    "simplepose_resnet18": _cv("simplepose_resnet18_coco", 23),
    "densenet121": _cv("densenet121", 120),
    "mobilenetv2_w1": _cv("mobilenetv2_w1", 53),
    "mobilenetv3_large_w1": _cv("mobilenetv3_large_w1", 63),
    "efficientnet_b0": _cv("efficientnet_b0", 81),
    "regnetx004": _cv("regnetx004", 71),
    "inceptionv3": _cv("inceptionv3", 94, (96, 299)),
    "squeezenet_v1_1": _cv("squeezenet_v1_1", 25),
    "hrnet_w18_small_v1": _cv("hrnet_w18_small_v1", 91),
    "resnext50_32x4d": _cv("resnext50_32x4d", 53),
    "ghostnet": _cv("ghostnet", 95),
    "igcv3_w1": _cv("igcv3_w1", 98),
    "shufflenetv2_w1": _cv("shufflenetv2_w1", 56),
    "shufflenet_g3_w1": _cv("shufflenet_g3_w1", 49),
    "pyramidnet110_a48_cifar10": _cv("pyramidnet110_a48_cifar10", 109, CIFAR),
    "resnesta18": _cv("resnesta18", 38),
    "dpn68": _cv("dpn68", 71),
    "centernet_resnet18": _cv("centernet_resnet18_voc", 29),
    "efficientnet_pytorch_b0": Network("efficientnet_pytorch", vision.efficientnet, (64, 224), 81),
    "monai_unet": Network("monai", vision.monai_unet, (32, 64), 11),
    "monai_basic_unet": Network("monai", vision.monai_basic_unet, (32, 32), 22),
    "monai_swin_unetr": Network("monai", vision.monai_swin_unetr, (64, 64), 52),
    # Those of transformers, whose streams are normalised across their channels.
    "llama": _hf("llama", 14),
    "llama_eager": _hf("llama_eager", 14),
    "qwen2": _hf("qwen2", 14),
    "qwen3": _hf("qwen3", 14),
    "gpt2": _hf("gpt2", 8),
    "bert": _hf("bert", 13),
    "albert": _hf("albert", 8),
    "deberta_v2": _hf("deberta_v2", 13),
    "mamba": _hf("mamba", 10),
    "t5": _hf("t5", 22),
    # Nobody reads the hidden states that are returned beside: their stream can go.
    "t5_logits": _hf("t5", 32, outputs=("logits",)),
    "vit": _hf("vit", 13),
    "swin": _hf("swin", 14),
    "swinv2": _hf("swinv2", 18),
    "convnext": _hf("convnext", 16),
    "segformer": _hf("segformer", 40),
    "whisper": _hf("whisper", 15),
    "whisper_logits": _hf("whisper", 18, outputs=("logits",)),
    "hf_resnet": _hf("hf_resnet", 10),
    "clip": _hf("clip", 16),
    "clip_logits": _hf("clip", 27, outputs=("logits_per_image", "logits_per_text")),
    "whisper_encoder": _hf("whisper_encoder", 5),
    "mixtral": _hf("mixtral", 16),
    "wav2vec2": _hf("wav2vec2", 16),
    "wav2vec2_conformer": _hf("wav2vec2_conformer", 27),
    "gpt_bigcode": _hf("gpt_bigcode", 8),
    "olmo2": _hf("olmo2", 14),
    "stablelm": _hf("stablelm", 14),
    "roformer": _hf("roformer", 14),
    "phi3": _hf("phi3", 8),
    "mamba2": _hf("mamba2", 6),
    "torch_transformer": Network("torch", partial(_configured, "torch_transformer"), least=10),
}

#: Networks that are in no table; each has shown what those above do not.
OTHERS: dict[str, Network] = {
    # Its windows have as many places as there are heads; no token is looked at from everywhere.
    "led": _hf("led", 32, outputs=("logits",)),
    # Experts in a dictionary, of which some see no token; the heads of one attention give all
    # others' their number by a bias.
    "switch": _hf("switch", 44, outputs=("logits",)),
}
