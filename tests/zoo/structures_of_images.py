"""Blocks of well-known image networks, small and written anew: the operations alone."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from tests.zoo.structures import Run, Structure, conv, structure


def c3(width: int, made: int, depth: int) -> nn.Module:
    """YOLOv5's: two ways of half the width, a chain of bottlenecks on one of them."""
    half = made // 2
    chain = [nn.Sequential(conv(half, half, 1), conv(half, half)) for _ in range(depth)]

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        y = self.one(x)
        for block in self.chain:
            y = y + block(y)
        return self.leave(torch.cat([y, self.two(x)], 1))

    return Run(
        forward, one=conv(width, half, 1), two=conv(width, half, 1), chain=nn.ModuleList(chain),
        leave=conv(made, made, 1),
    )  # fmt: skip


def c3k2(width: int, made: int) -> nn.Module:
    """YOLO11's: halves as in C2f, and a C3 as the block that makes the next part."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        parts = list(self.enter(x).chunk(2, 1))
        parts.append(self.inner(parts[-1]))
        return self.leave(torch.cat(parts, 1))

    half = made // 2
    return Run(
        forward, enter=conv(width, made, 1), inner=c3(half, half, 2), leave=conv(3 * half, made, 1)
    )


def pooled(width: int) -> nn.Module:
    """SPPF: three pools one after the other, all of them kept."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        parts = [self.enter(x)]
        for _ in range(3):
            parts.append(F.max_pool2d(parts[-1], 5, 1, 2))
        return self.leave(torch.cat(parts, 1))

    return Run(forward, enter=conv(width, width // 2, 1), leave=conv(2 * width, width, 1))


def detector(block: nn.Module) -> nn.Module:
    """A stem, a block, a neck that goes up and down again, and a head for each of two sizes."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        large = self.block(self.stem(x))
        small = self.pool(self.down(large))
        large = self.mix(torch.cat([F.interpolate(small, scale_factor=2.0), large], 1))
        small = self.again(torch.cat([self.back(large), small], 1))
        found = [
            torch.cat([box(y), name(y)], 1).flatten(2)
            for y, box, name in zip((large, small), self.boxes, self.names, strict=True)
        ]
        return torch.cat(found, 2)

    return Run(
        forward, stem=conv(3, 8), block=block, down=conv(8, 12, stride=2), pool=pooled(12),
        mix=c3(20, 8, 1), back=conv(8, 10, stride=2), again=c3(22, 14, 1),
        boxes=nn.ModuleList([nn.Sequential(conv(w, 6), nn.Conv2d(6, 4, 1)) for w in (8, 14)]),
        names=nn.ModuleList([nn.Sequential(conv(w, 5), nn.Conv2d(5, 3, 1)) for w in (8, 14)]),
    )  # fmt: skip


HEADS = tuple(f"{side}.{size}.1" for side in ("boxes", "names") for size in (0, 1))


def res2net() -> nn.Module:
    """A bottleneck whose middle is cut in four: each part but the last is convolved with the sum of
    itself and what was made of the one before."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        parts = torch.split(self.first(x), self.width, 1)
        made = [self.convs[0](parts[0])]
        for part, one in zip(parts[1:3], self.convs[1:], strict=True):
            made.append(one(made[-1] + part))
        y = self.last(torch.cat([*made, parts[3]], 1))
        return self.leave((x + y).relu()).mean((2, 3))

    return Run(
        forward, enter=conv(3, 10), first=conv(10, 24, 1), last=conv(24, 10, 1), width=6,
        convs=nn.ModuleList(conv(6, 6) for _ in range(3)), leave=nn.Conv2d(10, 3, 1),
    )  # fmt: skip


def inception() -> nn.Module:
    """Four branches side by side, and a head that runs in training alone."""

    def forward(self: nn.Module, x: Tensor) -> tuple[Tensor, ...]:
        x = self.enter(x)
        for block in self.blocks:
            x = torch.cat([branch(x) for branch in block], 1)
        found = self.leave(x.mean((2, 3)))
        if self.training:
            return found, self.beside(F.adaptive_avg_pool2d(x, 2).flatten(1))
        return (found,)

    def block(width: int) -> nn.ModuleList:
        pool = nn.Sequential(nn.MaxPool2d(3, 1, 1), conv(width, 4, 1))
        double = nn.Sequential(conv(width, 5, 1), conv(5, 6), conv(6, 6))
        return nn.ModuleList(
            [conv(width, 4, 1), nn.Sequential(conv(width, 5, 1), conv(5, 6)), double, pool]
        )

    beside = nn.Sequential(nn.Linear(80, 9), nn.ReLU(), nn.Dropout(0.2), nn.Linear(9, 3))
    return Run(
        forward, enter=conv(3, 8), blocks=nn.ModuleList([block(8), block(20)]), beside=beside,
        leave=nn.Linear(20, 3),
    )  # fmt: skip


def cross_stage() -> nn.Module:
    """CSPResNet's: half of a wider convolution goes through residual blocks, half goes past."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        past, y = self.expand(self.enter(x)).split(self.half, 1)
        for block in self.blocks:
            y = (y + block(y)).relu()
        return self.leave(self.merge(torch.cat([past, self.after(y)], 1))).mean((2, 3))

    blocks = [nn.Sequential(conv(8, 6, 1), conv(6, 8)) for _ in range(2)]
    return Run(
        forward, enter=conv(3, 10), expand=conv(10, 16, 1), blocks=nn.ModuleList(blocks), half=8,
        after=conv(8, 8, 1), merge=conv(16, 12, 1), leave=nn.Conv2d(12, 3, 1),
    )  # fmt: skip


def linear_attention() -> nn.Module:
    """EfficientViT's: queries, keys and values of two scales side by side as more heads, a row of
    ones below the values to divide by what the weights sum to."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        qkv = self.qkv(x)
        qkv = torch.cat([qkv, self.mix(self.near(qkv))], 1)
        n, _, height, width = qkv.shape
        q, k, v = qkv.reshape(n, -1, 3 * self.size, height * width).split(self.size, 2)
        q, k, v = q.relu(), k.relu(), F.pad(v, (0, 0, 0, 1), value=1.0)
        y = (v @ k.mT) @ q
        y = y[:, :, :-1] / (y[:, :, -1:] + 1e-3)
        x = x + self.project(y.reshape(n, -1, height, width))
        return self.leave(x).mean((2, 3))

    heads, size = 2, 4
    packed = 3 * heads * size
    return Run(
        forward, enter=conv(3, 10), qkv=nn.Conv2d(10, packed, 1), size=size,
        near=nn.Conv2d(packed, packed, 5, padding=2, groups=packed),
        mix=nn.Conv2d(packed, packed, 1, groups=3 * heads), project=conv(2 * heads * size, 10, 1),
        leave=nn.Conv2d(10, 3, 1),
    )  # fmt: skip


def reparametrised_mixer() -> nn.Module:
    """FastViT's: a depthwise mixing less a norm, scaled channel by channel, and a feed-forward."""

    def forward(self: nn.Module, x: Tensor) -> Tensor:
        x = self.enter(x)
        x = x + self.scale * (self.mix(x) + self.point(x) - self.norm(x))
        x = x + self.scale2 * self.down(F.gelu(self.up(self.near(x))))
        return self.leave(x).mean((2, 3))

    def depthwise(kernel: int) -> nn.Module:
        layer = nn.Conv2d(12, 12, kernel, padding=kernel // 2, groups=12, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(12))

    scales = [nn.Parameter(torch.rand(12, 1, 1) + 0.5) for _ in range(2)]
    return Run(
        forward, enter=conv(3, 12), mix=depthwise(3), point=depthwise(1), norm=nn.BatchNorm2d(12),
        near=depthwise(7), up=nn.Conv2d(12, 30, 1), down=nn.Conv2d(30, 12, 1), scale=scales[0],
        scale2=scales[1], leave=nn.Conv2d(12, 3, 1),
    )  # fmt: skip


#: A head that eval mode does not run stays, with what it gives the output.
IMAGES: dict[str, Structure] = {
    "yolov5": structure(lambda: detector(c3(8, 8, 2)), *HEADS),
    "yolo11": structure(lambda: detector(c3k2(8, 8)), *HEADS),
    "res2net": structure(res2net, "leave"),
    "inception": structure(inception, "leave", "beside.0", "beside.3"),
    "cspresnet": structure(cross_stage, "leave"),
    "efficientvit": structure(linear_attention, "leave"),
    "fastvit": structure(reparametrised_mixer, "leave"),
}
