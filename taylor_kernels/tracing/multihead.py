"""nn.MultiheadAttention whose heads do not make up its width: what pruning makes of one.

PyTorch's own derives all widths from `embed_dim`: heads · head_dim must equal it, and so must the
width of the query. Without some heads, or without some channels of the stream that it stands on, no
nn.MultiheadAttention has the shapes that are left. `PrunedMultiheadAttention` computes the same

    softmax(q kᵀ / √head_dim + mask) v,    q = x_q W_qᵀ + b_q, ...

from the same parameters under the same names, and takes each width from the tensor that has it.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.nn import functional


class PrunedMultiheadAttention(nn.MultiheadAttention):
    """An nn.MultiheadAttention with `num_heads` heads of `head_dim`, on streams of any width.

    It is made of an nn.MultiheadAttention by exchanging its class (`prunable_attention`,
    `follow_attention`), and has its parameters, attributes, arguments and results. With the shapes
    of the original the results are the same but for rounding. PyTorch's fused inference paths take
    the width of a head from `embed_dim`, and are not used.

    Attributes:
        num_heads: how many heads there are.
        head_dim: the width of each, which scales the products of queries and keys.
        embed_dim, kdim, vdim: the widths of the query, the keys and the values that it is given.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import taylor_kernels as tk
        >>> class Attend(nn.Module):
        ...     def __init__(self):
        ...         super().__init__()
        ...         self.attention = nn.MultiheadAttention(8, 4, batch_first=True)
        ...         self.head = nn.Linear(8, 2)
        ...     def forward(self, x):
        ...         return self.head(self.attention(x, x, x, need_weights=False)[0])
        >>> pruner = tk.Pruner(Attend(), torch.randn(1, 5, 8), "magnitude_l2", params=0.6, every=1)
        >>> while not pruner.done:
        ...     _ = pruner.step()
        >>> attention = pruner.compact().attention
        >>> type(attention).__name__, attention.head_dim
        ('PrunedMultiheadAttention', 2)
    """

    #: torch.jit.script compiles the others with the module, and none of these can be.
    __jit_unused_properties__: ClassVar = [
        "_qkv_same_embed_dim", "query_weight", "key_weight", "value_weight",
    ]  # fmt: skip

    @property
    def _qkv_same_embed_dim(self) -> bool:
        """nn.TransformerEncoderLayer and others ask this before they take a fused path, which
        these widths do not fit: False, though the weights may be packed as before."""
        return False

    @_qkv_same_embed_dim.setter
    def _qkv_same_embed_dim(self, packed: bool) -> None:
        self.__dict__["_qkv_same_embed_dim"] = packed

    def _reset_parameters(self) -> None:
        """As in nn.MultiheadAttention, which asks whether the weights are packed."""
        for weight in (
            self.in_proj_weight, self.q_proj_weight, self.k_proj_weight, self.v_proj_weight,
        ):  # fmt: skip
            if weight is not None:
                nn.init.xavier_uniform_(weight)
        if self.in_proj_bias is not None:
            nn.init.zeros_(self.in_proj_bias)
            nn.init.zeros_(self.out_proj.bias)
        for bias in (self.bias_k, self.bias_v):
            if bias is not None:
                nn.init.xavier_normal_(bias)

    @property
    def query_weight(self) -> Tensor:
        """The parameter that has the query's width in dimension 1."""
        return self.q_proj_weight if self.in_proj_weight is None else self.in_proj_weight

    @property
    def key_weight(self) -> Tensor:
        """The parameter that has the keys' width in dimension 1."""
        return self.k_proj_weight if self.in_proj_weight is None else self.in_proj_weight

    @property
    def value_weight(self) -> Tensor:
        """The parameter that has the values' width in dimension 1."""
        return self.v_proj_weight if self.in_proj_weight is None else self.in_proj_weight

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        key_padding_mask: Tensor | None = None,
        need_weights: bool = True,
        attn_mask: Tensor | None = None,
        average_attn_weights: bool = True,
        is_causal: bool = False,
    ) -> tuple[Tensor, Tensor | None]:
        """As nn.MultiheadAttention.forward: arguments, shapes and results.

        Raises:
            RuntimeError: `is_causal` without an `attn_mask`, as in PyTorch; or a mask that is
                neither of bools nor of numbers, or of other heads than there are.
        """
        if is_causal and attn_mask is None:
            raise RuntimeError("attn_mask: is_causal only says what it is like; pass the mask too")
        batched = query.dim() == 3
        lead = 0 if self.batch_first or not batched else 1
        same = query is key and key is value
        query = self._examples_first(query)
        key = query if same else self._examples_first(key)
        value = key if same else self._examples_first(value)
        padding = _additive(key_padding_mask, query)
        if padding is not None and not batched:
            padding = padding.unsqueeze(0)
        causal = is_causal and padding is None and not need_weights
        mask = None if causal else self._of_heads(_additive(attn_mask, query), query.size(0))

        q, k, v = self._projected(query, key, value, same)
        if self.bias_k is not None and self.bias_v is not None:
            k = torch.cat([k, self.bias_k.expand(k.size(0), -1, -1)], 1)
            v = torch.cat([v, self.bias_v.expand(v.size(0), -1, -1)], 1)
        if self.add_zero_attn:
            k = torch.cat([k, k.new_zeros(k.size(0), 1, k.size(2))], 1)
            v = torch.cat([v, v.new_zeros(v.size(0), 1, v.size(2))], 1)
        more = k.size(1) - key.size(1)  # positions that no mask speaks of
        if mask is not None:
            mask = functional.pad(mask, (0, more))
        if padding is not None:
            padding = functional.pad(padding, (0, more))[:, None, None]
            mask = padding if mask is None else mask + padding

        q, k, v = self._heads(q), self._heads(k), self._heads(v)
        dropout = self.dropout if self.training else 0.0
        weights: Tensor | None = None
        if need_weights:
            scores = (q * self.head_dim**-0.5) @ k.transpose(-2, -1)
            found = (scores if mask is None else scores + mask).softmax(-1)
            if dropout > 0.0:
                found = functional.dropout(found, dropout)
            weights = found
            context = found @ v
        else:
            context = functional.scaled_dot_product_attention(
                q, k, v, mask, dropout, is_causal=causal
            )
        context = context.transpose(1, 2).flatten(2)
        output = functional.linear(context, self.out_proj.weight, self.out_proj.bias)
        if not batched:
            output = output.squeeze(0)
            weights = None if weights is None else weights.squeeze(0)
        if weights is not None and average_attn_weights:
            weights = weights.mean(-3)
        return output.transpose(0, 1) if lead else output, weights

    def _examples_first(self, x: Tensor) -> Tensor:
        """[N, L, width] of what may have no examples, or have them second."""
        if x.dim() == 2:
            return x.unsqueeze(0)
        return x if self.batch_first else x.transpose(0, 1)

    def _projected(
        self, query: Tensor, key: Tensor, value: Tensor, same: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Queries, keys and values, from one product where all are of the same tensor."""
        if self.in_proj_weight is not None and same:
            packed = functional.linear(query, self.in_proj_weight, self.in_proj_bias)
            q, k, v = packed.chunk(3, -1)
            return q, k, v
        of_q: Tensor | None = None
        of_k: Tensor | None = None
        of_v: Tensor | None = None
        if self.in_proj_bias is not None:
            of_q, of_k, of_v = self.in_proj_bias.chunk(3)
        if self.in_proj_weight is None:
            to_q, to_k, to_v = self.q_proj_weight, self.k_proj_weight, self.v_proj_weight
        else:
            to_q, to_k, to_v = self.in_proj_weight.chunk(3)
        return (
            functional.linear(query, to_q, of_q),
            functional.linear(key, to_k, of_k),
            functional.linear(value, to_v, of_v),
        )

    def _heads(self, x: Tensor) -> Tensor:
        """[N, heads, L, head_dim] of [N, L, heads · head_dim]."""
        return x.unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def _of_heads(self, mask: Tensor | None, examples: int) -> Tensor | None:
        """A mask of [L, S] or [N · heads, L, S] as one that can be added to [N, heads, L, S]."""
        if mask is None or mask.dim() == 2 or mask.size(0) == 1:
            return mask
        if mask.size(0) != examples * self.num_heads:
            raise RuntimeError(
                f"attn_mask: expected one for each of {examples} examples and {self.num_heads} "
                f"heads, got {mask.size(0)}; pass [L, S], or make it of the heads that are left"
            )
        return mask.unflatten(0, (examples, self.num_heads))


def _additive(mask: Tensor | None, like: Tensor) -> Tensor | None:
    """A mask as numbers that are added: a bool is True where nothing is to be looked at."""
    if mask is None or mask.is_floating_point():
        return mask
    if mask.dtype != torch.bool:
        raise RuntimeError(f"mask: expected bool or floating-point numbers, got {mask.dtype}")
    zeros = torch.zeros(mask.shape, dtype=like.dtype, device=mask.device)
    return zeros.masked_fill(mask, -torch.inf)


#: Parameters of nn.MultiheadAttention that its own forward checks against `embed_dim`: dimensions.
CHECKED = (
    ("in_proj_weight", 0), ("in_proj_weight", 1), ("q_proj_weight", 0), ("q_proj_weight", 1),
    ("k_proj_weight", 0), ("v_proj_weight", 0), ("out_proj.weight", 1),
)  # fmt: skip


@contextmanager
def prunable_attention(modules: Iterable[nn.Module]) -> Iterator[None]:
    """Inside, every nn.MultiheadAttention of a model runs in a form whose widths can shrink.

    Classes of others that inherit from it run as they are.

    Args:
        modules: all of the model's.
    """
    found = [m for m in modules if type(m) is nn.MultiheadAttention]
    for module in found:
        module.__class__ = PrunedMultiheadAttention
    try:
        yield
    finally:
        for module in found:
            module.__class__ = nn.MultiheadAttention


def follow_attention(modules: Mapping[str, nn.Module], name: str) -> None:
    """An attention, or its `out_proj`, of this name is about to get other widths.

    It takes on the class that can have them.
    """
    for candidate in (name, name.rpartition(".")[0]):
        if type(modules.get(candidate)) is nn.MultiheadAttention:
            modules[candidate].__class__ = PrunedMultiheadAttention
            unpack_examples(modules, candidate)


def unpack_examples(modules: Mapping[str, nn.Module], name: str) -> None:
    """An nn.TransformerEncoder around this module packs padded examples no more.

    It does so for PyTorch's fused inference path alone, which a module that is cut, or is run on
    some of its channels, has left: other modules cannot read what is packed.
    """
    parts = name.split(".")
    for n in range(len(parts)):
        around = modules.get(".".join(parts[:n]))
        if isinstance(around, nn.TransformerEncoder):
            around.use_nested_tensor = False
