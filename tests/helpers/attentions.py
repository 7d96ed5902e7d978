"""A network around an attention, the same with its heads written out, and what it learns."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.utils.checkpoint import checkpoint

WIDTH, HEADS, EXAMPLES = 12, 4, 4  # an odd number of heads has no fused path


class Written(nn.MultiheadAttention):
    """nn.MultiheadAttention in a few lines, with `gates` [examples, heads] on the context."""

    gates: Tensor

    def forward(
        self, query, key, value, key_padding_mask=None, need_weights=True, attn_mask=None,
        average_attn_weights=True, is_causal=False,
    ):  # fmt: skip
        batched = query.dim() == 3
        given = [x if batched else x[None] for x in (query, key, value)]
        given = [x if self.batch_first or not batched else x.transpose(0, 1) for x in given]
        weights = (
            (self.q_proj_weight, self.k_proj_weight, self.v_proj_weight)
            if self.in_proj_weight is None
            else self.in_proj_weight.chunk(3)
        )
        biases = self.in_proj_bias.chunk(3)
        q, k, v = map(functional.linear, given, weights, biases)
        more = 0
        if self.bias_k is not None:
            k = torch.cat((k, self.bias_k.expand(len(k), 1, -1)), 1)
            v = torch.cat((v, self.bias_v.expand(len(v), 1, -1)), 1)
            more += 1
        if self.add_zero_attn:
            k = torch.cat((k, k.new_zeros(len(k), 1, k.size(2))), 1)
            v = torch.cat((v, v.new_zeros(len(v), 1, v.size(2))), 1)
            more += 1
        q, k, v = (x.unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for x in (q, k, v))
        scores = q @ k.mT / q.size(-1) ** 0.5
        if attn_mask is not None:
            scores = scores + functional.pad(attn_mask, (0, more))
        if key_padding_mask is not None:
            padding = functional.pad(key_padding_mask, (0, more))
            scores = scores.masked_fill(padding[:, None, None], -torch.inf)
        context = scores.softmax(-1) @ v * self.gates[:, :, None, None].to(v)
        context = context.transpose(1, 2).flatten(2)
        output = functional.linear(context, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            return output[0], None
        return output if self.batch_first else output.transpose(0, 1), None


class Net(nn.Module):
    """An attention between linear layers, used in one way or another."""

    def __init__(self, kind: str, batch_first: bool, need_weights: bool) -> None:
        super().__init__()
        options = {
            "cross": {"kdim": 7, "vdim": 5},
            "added": {"add_bias_kv": True, "add_zero_attn": True},
        }.get(kind, {})
        self.kind, self.need_weights = kind, need_weights
        self.enter, self.head = nn.Linear(6, WIDTH), nn.Linear(WIDTH, 5)
        self.attention = nn.MultiheadAttention(WIDTH, HEADS, batch_first=batch_first, **options)
        self.to_key, self.to_value = nn.Linear(6, 7), nn.Linear(6, 5)

    def attend(self, *streams: Tensor, **masks: Tensor) -> Tensor:
        return self.attention(*streams, need_weights=self.need_weights, **masks)[0]

    def forward(self, x: Tensor) -> Tensor:
        first = self.attention.batch_first or self.kind == "unbatched"
        h = self.enter(x if first else x.transpose(0, 1))
        if self.kind == "cross":
            y = x[:, 1:] if first else x[:, 1:].transpose(0, 1)
            h = h + self.attend(h, self.to_key(y), self.to_value(y))
        elif self.kind == "padded":
            padding = torch.arange(x.size(1)) > torch.tensor([4, 2, 3, 1])[: len(x), None]
            causal = torch.full((x.size(1),) * 2, -torch.inf, dtype=x.dtype).triu(1)
            h = self.attend(h, h, h, key_padding_mask=padding, attn_mask=causal)
        elif self.kind == "unbatched":
            h = torch.stack([self.attend(one, one, one) for one in h])
        elif self.kind == "twice":
            h = self.attend(h, h, h).tanh()
            h = self.attend(h, h[:, :3], h[:, :3]) if first else self.attend(h, h[:3], h[:3])
        elif self.kind == "reentrant":
            h = checkpoint(self.attend, h, h, h, use_reentrant=True)
        elif self.kind == "checkpoint":
            h = checkpoint(self.attend, h, h, h, use_reentrant=False)
        else:
            h = self.attend(h, h, h)
        out = self.head(h.tanh())
        return out if first else out.transpose(0, 1)


def data(examples: int = EXAMPLES) -> tuple[Tensor, Tensor]:
    x = torch.randn(examples, 5, 6, dtype=torch.float64)
    return x, torch.randn(examples, 5, 5, dtype=torch.float64)


def loss(model: nn.Module, x: Tensor, target: Tensor) -> Tensor:
    return (model(x) - target).square().sum()
