"""An attribute whose number is also another size by chance counts what it counts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from tests.zoo import judging


class Rotated(nn.Module):
    """Attention that turns the first `rotary` dimensions of a head in pairs (i, i + rotary / 2)."""

    def __init__(self, heads: int, dim: int, rotary: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.rotary_dim = heads, dim, rotary
        self.read = nn.Linear(5, 7)
        self.qkv = nn.ModuleList(nn.Linear(7, heads * dim) for _ in range(3))
        self.write = nn.Linear(heads * dim, 6)
        self.leave = nn.Linear(6, 2)

    def turned(self, x: Tensor) -> Tensor:
        first, rest = x[..., : self.rotary_dim], x[..., self.rotary_dim :]
        angles = torch.arange(x.size(-2))[:, None] * torch.arange(1, self.rotary_dim // 2 + 1)
        angles = torch.cat([angles, angles], -1).to(x.dtype)
        half = first.size(-1) // 2
        other = torch.cat([-first[..., half:], first[..., :half]], -1)
        return torch.cat([first * angles.cos() + other * angles.sin(), rest], -1)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        shape = (*x.shape[:2], self.num_heads, self.head_dim)
        q, k, v = (layer(y).view(shape).transpose(1, 2) for layer in self.qkv)
        q, k = self.turned(q), self.turned(k)
        z = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.leave(self.write(z.transpose(1, 2).flatten(2)).tanh())


@pytest.mark.parametrize(
    ("heads", "dim", "rotary"),
    [(4, 10, 8), (4, 9, 4), (3, 8, 6), (6, 14, 6), (5, 12, 10), (2, 8, 4)],
)
def test_heads_go_though_as_many_dimensions_are_rotated(heads, dim, rotary):
    torch.manual_seed(heads)
    model = Rotated(heads, dim, rotary)
    judging.check_all_but(["leave"], model, torch.randn(1, 4, 5))


class TurnedInPairs(Rotated):
    """Attention that turns pairs (2i, 2i + 1) as complex numbers: a head is cut into these too."""

    def turned(self, x: Tensor) -> Tensor:
        angles = torch.arange(x.size(-2))[:, None] * torch.arange(1, self.rotary_dim // 2 + 1)
        angles = angles.to(x.dtype)
        pairs = torch.view_as_complex(x.reshape(*x.shape[:-1], -1, 2).contiguous())
        return torch.view_as_real(pairs * torch.polar(torch.ones_like(angles), angles)).flatten(-2)


@pytest.mark.parametrize(("heads", "dim"), [(2, 6), (2, 10), (3, 6), (4, 8)])
def test_heads_go_though_their_number_is_that_of_parts_of_a_head(heads, dim):
    """Two parts of a complex number, or as many numbers as there are heads."""
    torch.manual_seed(heads)
    model = TurnedInPairs(heads, dim, dim)
    judging.check_all_but(["leave"], model, torch.randn(1, 4, 5))


class Windows(nn.Module):
    """Attention in windows, as many tokens of which as there are heads: a size that counts none."""

    def __init__(self, name: str, heads: int) -> None:
        super().__init__()
        self.num_heads, self.head_dim, self.name = heads, 5, name
        setattr(self, name, heads)
        self.read, self.qkv = nn.Linear(3, 7), nn.Linear(7, 3 * 5 * heads)
        self.write, self.leave = nn.Linear(5 * heads, 6), nn.Linear(6, 2)

    def forward(self, x: Tensor) -> Tensor:
        size = getattr(self, self.name)
        qkv = self.qkv(self.read(x))
        shape = (len(x), size, -1, 3, self.num_heads, self.head_dim)
        q, k, v = qkv.reshape(shape).permute(3, 0, 2, 4, 1, 5)
        z = nn.functional.scaled_dot_product_attention(q, k, v, scale=0.3)
        return self.leave(self.write(z.permute(0, 3, 1, 2, 4).flatten(3).flatten(1, 2)).tanh())


@pytest.mark.parametrize("name", ["window_size", "patch_size", "resolution_out", "query_stride"])
@pytest.mark.parametrize("heads", [3, 4])
def test_heads_go_though_windows_have_as_many_tokens(name, heads):
    """Hiera's and LeViT's."""
    torch.manual_seed(heads)
    judging.check_all_but(["leave"], Windows(name, heads), torch.randn(1, 3 * heads, 3))


class Patches(nn.Module):
    """MobileViT: an image cut into patches and put together again, its channels beside a batch."""

    def __init__(self, width: int, patch: int) -> None:
        super().__init__()
        self.patch, self.enter = patch, nn.Conv2d(3, width, 3, padding=1)
        self.mix, self.leave = nn.Linear(width, width), nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x, p = self.enter(image).tanh(), self.patch
        n, c, h, w = x.shape
        rows, columns = h // p, w // p
        y = x.reshape(n * c * rows, p, columns, p).transpose(1, 2)
        y = y.reshape(n, c, rows * columns, p * p).permute(0, 3, 2, 1).reshape(n * p * p, -1, c)
        y = self.mix(y).tanh()
        y = y.contiguous().view(n, p * p, rows * columns, -1).transpose(1, 3)
        y = y.reshape(n * c * rows, columns, p, p).transpose(1, 2).reshape(n, c, h, w)
        return self.leave(x + y)


@pytest.mark.parametrize(("width", "patch", "size"), [(9, 2, 4), (8, 2, 8), (6, 4, 8), (12, 2, 4)])
def test_channels_beside_many_places_go(width, patch, size):
    torch.manual_seed(width)
    judging.check_all_but(["leave"], Patches(width, patch), torch.randn(1, 3, size, size))


class Packed(nn.Module):
    """A token put before others by its own sizes: (batch, width) becomes (batch, -1, width)."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(width))
        self.read, self.leave = nn.Linear(4, width), nn.Linear(width, 2)

    def forward(self, x: Tensor) -> Tensor:
        token, y = self.token.expand(len(x), -1), self.read(x)
        token = token.reshape(*token.shape[:1], -1, *token.shape[1:])
        return self.leave(torch.cat([token, y], 1).tanh())


@pytest.mark.parametrize("width", [8, 11, 24])
def test_channels_go_of_a_token_whose_place_pytorch_infers(width):
    torch.manual_seed(width)
    judging.check_all_but(["leave"], Packed(width), torch.randn(1, 3, 4))


class HighWindows(nn.Module):
    """An image cut into windows as high as it is: NesT's last stage, MobileViT, CrossFormer."""

    def __init__(self, width: int, across: int) -> None:
        super().__init__()
        self.across, self.enter = across, nn.Conv2d(3, width, 3, padding=1)
        self.mix, self.leave = nn.Conv2d(width, width, 1), nn.Conv2d(width, 2, 1)

    def forward(self, image: Tensor) -> Tensor:
        x = self.enter(image).tanh()
        n, c, h, w = x.shape
        y = x.reshape(n, c, 1, h, self.across, w // self.across).permute(0, 2, 4, 1, 3, 5)
        y = self.mix(y.reshape(n * self.across, c, h, w // self.across))
        y = y.reshape(n, 1, self.across, *y.shape[1:]).permute(0, 3, 1, 4, 2, 5)
        return self.leave(y.reshape(n, y.size(1), h, w).tanh())


@pytest.mark.parametrize(("width", "across"), [(8, 1), (13, 2), (16, 1)])
def test_channels_go_beside_windows_as_high_as_the_image(width, across):
    torch.manual_seed(width)
    judging.check_all_but(["leave"], HighWindows(width, across), torch.randn(1, 3, 4, 6))


class OneHead(nn.Module):
    """A reshape that names its width in the code: so wide that it looks like no constant."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.read, self.middle = nn.Linear(4, width), nn.Linear(width, 7)
        self.leave = nn.Linear(7, 2)

    def forward(self, x: Tensor) -> Tensor:
        y = self.read(x)
        y = y.reshape(len(y), -1, 9)
        return self.leave(self.middle(y).tanh())


def test_a_width_that_is_a_constant_stays_and_the_rest_goes():
    judging.check_all_but(["read", "leave"], OneHead(9), torch.randn(1, 4))
