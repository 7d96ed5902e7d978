"""`PrunedMultiheadAttention` is nn.MultiheadAttention where the widths fit, and what is left of one
where they do not."""

from __future__ import annotations

import copy
import itertools
import pickle

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations, parametrize

from taylor_kernels.tracing import PrunedMultiheadAttention, follow_attention, trace
from tests.tracing.removal import faults, removed

E, HEADS, N, L, S = 12, 3, 2, 5, 4


def pair(**options: object) -> tuple[nn.MultiheadAttention, nn.MultiheadAttention]:
    """PyTorch's own, and a copy of the other class; every bias drawn."""
    stock = nn.MultiheadAttention(E, HEADS, dtype=torch.float64, **options)
    with torch.no_grad():
        for parameter in stock.parameters():
            parameter.copy_(torch.randn_like(parameter))
    ours = copy.deepcopy(stock)
    ours.__class__ = PrunedMultiheadAttention
    return stock, ours


def assert_same(stock: nn.Module, ours: nn.Module, *inputs: Tensor, **options: object) -> None:
    """Outputs, weights, and the gradients of inputs and parameters, to 1e-12."""
    results = []
    for module in (stock, ours):
        leaves = {id(x): x.clone().requires_grad_() for x in inputs}
        output, weights = module(*(leaves[id(x)] for x in inputs), **options)
        total = (output * torch.linspace(-1, 1, output.numel()).reshape(output.shape)).sum()
        if weights is not None:
            total = total + (weights * torch.arange(weights.numel()).reshape(weights.shape)).sum()
        wanted = [*leaves.values(), *module.parameters()]
        results.append([output, weights, *torch.autograd.grad(total, wanted)])
    for one, other in zip(*results, strict=True):
        if one is None or other is None:
            assert one is other
        else:
            torch.testing.assert_close(other, one, rtol=1e-12, atol=1e-12)


OPTIONS = {
    "plain": {},
    "batch_first": {"batch_first": True},
    "no bias": {"bias": False},
    "bias_kv and zero_attn": {"add_bias_kv": True, "add_zero_attn": True, "batch_first": True},
    "other keys and values": {"kdim": 7, "vdim": 5},
    "other keys, bias_kv": {"kdim": 7, "add_bias_kv": True, "batch_first": True},
}


def streams(options: dict, batched: bool) -> list[Tensor]:
    """A query, keys and values that such a module takes."""
    widths = (E, options.get("kdim", E), options.get("vdim", E))
    found = []
    for length, width in zip((L, S, S), widths, strict=True):
        lead = (N, length) if options.get("batch_first") else (length, N)
        shape = (*lead, width) if batched else (length, width)
        found.append(torch.randn(shape, dtype=torch.float64))
    return found


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("batched", [True, False], ids=["batch", "one"])
def test_it_computes_what_pytorch_does(options, batched):
    stock, ours = pair(**options)
    inputs = streams(options, batched)
    lead = (N,) if batched else ()
    padding = torch.zeros(*lead, S, dtype=torch.bool)
    padding[..., -1] = True
    blocked = torch.triu(torch.ones(L, S, dtype=torch.bool), 1)
    per_head = torch.randn(HEADS * (N if batched else 1), L, S, dtype=torch.float64)
    masks = [None, blocked, torch.randn(L, S, dtype=torch.float64), per_head]
    for mask, padded, need, average in itertools.product(
        masks, (None, padding), (True, False), (True, False)
    ):
        if mask is None or padded is None or mask.dtype == padded.dtype:  # PyTorch warns of others
            assert_same(
                stock, ours, *inputs, attn_mask=mask, key_padding_mask=padded, need_weights=need,
                average_attn_weights=average,
            )  # fmt: skip


@pytest.mark.parametrize("batch_first", [True, False])
def test_self_attention_and_causal_masks(batch_first):
    stock, ours = pair(batch_first=batch_first)
    x = torch.randn(N, L, E, dtype=torch.float64)
    causal = nn.Transformer.generate_square_subsequent_mask(L, dtype=torch.float64)
    length = x.size(1 if batch_first else 0)
    for need in (True, False):
        assert_same(stock, ours, x, x, x, need_weights=need)
        mask = causal[:length, :length]
        assert_same(stock, ours, x, x, x, attn_mask=mask, is_causal=True, need_weights=need)
    memory = torch.randn_like(x)
    assert_same(stock, ours, x, memory, memory)


def test_masks_that_do_not_fit_are_one_clear_error():
    _, ours = pair(batch_first=True)
    x = torch.randn(N, L, E, dtype=torch.float64)
    with pytest.raises(RuntimeError, match="attn_mask: is_causal only says"):
        ours(x, x, x, is_causal=True)
    with pytest.raises(RuntimeError, match="2 examples and 3 heads, got 4"):
        ours(x, x, x, attn_mask=torch.zeros(4, L, L, dtype=torch.float64))
    with pytest.raises(RuntimeError, match=r"mask: expected bool .* got torch.int64"):
        ours(x, x, x, attn_mask=torch.zeros(L, L, dtype=torch.int64))


class Attending(nn.Module):
    """An attention between linear layers, whose second result is thrown away, or not."""

    def __init__(self, weights: str = "thrown away", **options: object) -> None:
        super().__init__()
        self.enter, self.out = nn.Linear(5, E), nn.Linear(E, 3)
        self.attention = nn.MultiheadAttention(E, HEADS, **options)
        widths = [options[k] for k in ("kdim", "vdim") if k in options]
        self.others = nn.ModuleList(nn.Linear(5, width) for width in widths)
        self.weights = weights

    def forward(self, x: Tensor) -> Tensor | tuple[Tensor, ...]:
        q = self.enter(x)
        k, v = (layer(x) for layer in self.others) if self.others else (q, q)
        y, weights = self.attention(q, k, v, average_attn_weights=self.weights != "of each head")
        if self.weights == "used":
            y = y * weights.mean()
        return (self.out(y), weights) if self.weights.startswith("returned") else self.out(y)


@pytest.mark.parametrize("options", [
    {"batch_first": True}, {"add_bias_kv": True}, {"add_zero_attn": True, "bias": False},
    {"kdim": 6, "vdim": 4}, {"kdim": 6, "vdim": 4, "add_bias_kv": True, "batch_first": True},
], ids=str)  # fmt: skip
def test_heads_and_every_width_go(options):
    model, inputs = Attending(**options), torch.randn(2, 6, 5)
    channels = trace(model, inputs)
    assert type(model.attention) is nn.MultiheadAttention
    assert not faults(model, inputs, channels)
    weight = "q_proj_weight" if "kdim" in options else "in_proj_weight"
    sizes = {group.name: group.size for group in channels.groups}
    others = {"others.0": 6, "others.1": 4} if "kdim" in options else {}
    assert sizes == {
        "enter": E, f"attention.{weight}": HEADS, "attention.out_proj": E, **others
    }  # fmt: skip
    assert set(channels.skipped) == {"out"}


@pytest.mark.parametrize("weights", ["returned", "used"])
def test_a_mean_over_heads_keeps_them_where_it_is_read(weights):
    model, inputs = Attending(weights, batch_first=True), torch.randn(2, 6, 5)
    channels = trace(model, inputs)
    assert not faults(model, inputs, channels)
    assert "attention.in_proj_weight" in channels.skipped
    assert {group.name for group in channels.groups} == {"enter", "attention.out_proj"}


def test_a_class_of_someone_else_runs_as_it_is():
    class Own(nn.MultiheadAttention):
        def forward(self, *args: Tensor, **options: object):
            y, weights = super().forward(*args, **options)
            return 2 * y, weights

    model, inputs = Attending(batch_first=True), torch.randn(2, 6, 5)
    model.attention.__class__ = Own
    channels = trace(model, inputs)
    assert type(model.attention) is Own
    assert "checks its width against embed_dim" in channels.skipped["enter"]
    assert not faults(model, inputs, channels)


class Halves(nn.Module):
    """A parametrization whose originals have other shapes than the weight."""

    def forward(self, left: Tensor, right: Tensor) -> Tensor:
        return left @ right

    def right_inverse(self, weight: Tensor) -> tuple[Tensor, Tensor]:
        return weight.clone(), torch.eye(weight.size(1))


PARAMETRIZE = {
    "weight_norm": parametrizations.weight_norm,
    "spectral_norm": parametrizations.spectral_norm,
    "product": lambda module, name: parametrize.register_parametrization(module, name, Halves()),
}


@pytest.mark.parametrize("where", ["own weights", "out_proj", "both"])
@pytest.mark.parametrize("keys", [{}, {"kdim": 6, "vdim": 4}], ids=["packed", "apart"])
@pytest.mark.parametrize("change", PARAMETRIZE.values(), ids=PARAMETRIZE)
def test_a_parametrized_one_keeps_what_it_checks(change, keys, where):
    model, inputs = Attending(batch_first=True, **keys).eval(), torch.randn(2, 6, 5)
    if where != "out_proj":
        packed = ["in_proj_weight"]
        for name in ["q_proj_weight", "k_proj_weight", "v_proj_weight"] if keys else packed:
            change(model.attention, name)
    if where != "own weights":
        change(model.attention.out_proj, "weight")
    channels = trace(model, inputs)
    sizes = {group.name: group.size for group in channels.groups}
    if where == "out_proj":
        assert sizes["enter"] == E
        assert HEADS in sizes.values()
    else:
        assert "checks its width" in channels.skipped["enter"]
        assert HEADS not in sizes.values()
    for number, group in enumerate(channels.groups):
        dead = [torch.zeros(other.size, dtype=torch.bool) for other in channels.groups]
        dead[number][0] = True
        small = removed(model, channels, dead)
        assert small(inputs).shape == (2, 6, 3), group.name


def test_a_query_that_is_named_keeps_its_width():
    class Named(Attending):
        def forward(self, x: Tensor) -> Tensor:
            q = self.enter(x)
            return self.out(self.attention(key=q, value=q, query=q)[0])

    model = Named(batch_first=True)
    parametrizations.weight_norm(model.attention, "in_proj_weight")
    assert "checks its width" in trace(model, torch.randn(2, 6, 5)).skipped["enter"]


def test_an_error_leaves_the_class_as_it_was():
    model = Attending(batch_first=True)
    with pytest.raises(ValueError, match="does not run on them"):
        trace(model, torch.randn(2, 6, 4))
    assert type(model.attention) is nn.MultiheadAttention


def test_it_is_pickled_and_has_the_names_of_the_original():
    stock, ours = pair(add_bias_kv=True)
    again = pickle.loads(pickle.dumps(ours))
    assert type(again) is PrunedMultiheadAttention
    assert list(again.state_dict()) == list(stock.state_dict())
    x = torch.randn(L, N, E, dtype=torch.float64)
    assert torch.equal(again(x, x, x)[0], ours(x, x, x)[0])


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
def test_an_encoder_that_packs_padded_examples_takes_the_open_path():
    layer = nn.TransformerEncoderLayer(E, 4, 8, batch_first=True, dropout=0.0)
    encoder = nn.TransformerEncoder(layer, 2).double().eval()
    assert encoder.use_nested_tensor
    x = torch.randn(N, L, E, dtype=torch.float64)
    padding = torch.zeros(N, L, dtype=torch.bool)
    padding[0, -2:] = True
    with torch.no_grad():
        expected = encoder(x, src_key_padding_mask=padding)
        follow_attention(dict(encoder.named_modules()), "layers.1.self_attn.out_proj")
        found = encoder(x, src_key_padding_mask=padding)
    assert type(encoder.layers[1].self_attn) is PrunedMultiheadAttention
    assert not encoder.use_nested_tensor
    torch.testing.assert_close(found[~padding], expected[~padding], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kdim", [None, 6])
def test_parameters_can_be_drawn_anew(kdim):
    model = nn.MultiheadAttention(8, 2, kdim=kdim, add_bias_kv=True)
    model.__class__ = PrunedMultiheadAttention
    before = {name: value.clone() for name, value in model.named_parameters()}
    with torch.no_grad():
        for value in model.parameters():
            value.fill_(torch.nan)
    model._qkv_same_embed_dim = kdim is None
    model._reset_parameters()
    assert not model._qkv_same_embed_dim
    for name, value in model.named_parameters():
        assert value.isfinite().all() or name == "out_proj.weight", name
        assert value.shape == before[name].shape


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_it_can_be_scripted(options):
    _, ours = pair(**options)
    query, key, value = streams(options, batched=True)
    scripted, mask = torch.jit.script(ours), torch.randn(L, S, dtype=torch.float64)
    for need, attn_mask in itertools.product((True, False), (None, mask)):
        found = scripted(query, key, value, need_weights=need, attn_mask=attn_mask)
        expected = ours(query, key, value, need_weights=need, attn_mask=attn_mask)
        assert (found[1] is None) is (expected[1] is None) is not need
        for one, other in zip(found, expected, strict=True):
            if other is not None:
                torch.testing.assert_close(one, other, rtol=1e-12, atol=1e-12)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*:DeprecationWarning")
def test_layers_around_a_pruned_one_can_be_scripted():
    model = nn.TransformerEncoderLayer(E, HEADS, 8, batch_first=True, dropout=0.0).double().eval()
    x = torch.randn(N, L, E, dtype=torch.float64)
    channels = trace(model, x)
    dead = [torch.zeros(group.size, dtype=torch.bool) for group in channels.groups]
    names = [group.name for group in channels.groups]
    dead[names.index("self_attn.in_proj_weight")][0] = True
    small = removed(model, channels, dead)
    assert small.self_attn.num_heads == HEADS - 1
    torch.testing.assert_close(torch.jit.script(small)(x), small(x), rtol=1e-12, atol=1e-12)
