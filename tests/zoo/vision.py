"""Networks of pytorchcv, monai and efficientnet_pytorch, with random weights."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from tests.zoo.packages import torchvision_stub


def pytorchcv(name: str, size: int) -> tuple[nn.Module, Any]:
    """A network of pytorchcv; its last pooling takes whatever size the images have."""
    with torchvision_stub():
        from pytorchcv.model_provider import get_model

        model = get_model(name)
    for module in list(model.modules()):
        for child, layer in module.named_children():
            if isinstance(layer, nn.AvgPool2d) and layer.kernel_size in (7, 8, 13):
                setattr(module, child, nn.AdaptiveAvgPool2d(1))
    return model, torch.randn(1, 3, size, size)


def monai_unet(size: int) -> tuple[nn.Module, Any]:
    from monai.networks.nets import UNet

    model = UNet(
        spatial_dims=2, in_channels=1, out_channels=2, channels=(8, 16, 32), strides=(2, 2),
        num_res_units=2,
    )  # fmt: skip
    return model, torch.randn(1, 1, size, size)


def monai_basic_unet(size: int) -> tuple[nn.Module, Any]:
    from monai.networks.nets import BasicUNet

    model = BasicUNet(spatial_dims=3, in_channels=1, out_channels=2, features=(8, 8, 16, 32, 64, 8))
    return model, torch.randn(1, 1, size, size, size)


def efficientnet(size: int) -> tuple[nn.Module, Any]:
    from efficientnet_pytorch import EfficientNet

    model = EfficientNet.from_name("efficientnet-b0", image_size=size)
    return model, torch.randn(1, 3, size, size)


def monai_swin_unetr(size: int) -> tuple[nn.Module, Any]:
    """Its encoder normalises what it returns by functions, in code that does much else."""
    from monai.networks.nets import SwinUNETR

    model = SwinUNETR(
        in_channels=1, out_channels=2, patch_size=2, depths=(1, 1, 1, 1), num_heads=(2, 2, 2, 2),
        window_size=4, feature_size=12, spatial_dims=2,
    )  # fmt: skip
    return model, torch.randn(1, 1, size, size)
