"""Which channels go together, which may not go at all, and that neither is taken on trust."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from taylor_kernels.pruning import Pruner
from tests.helpers import zoo


class Model(nn.Module):
    """A forward function over named layers."""

    def __init__(self, forward, **layers):
        super().__init__()
        for name, layer in layers.items():
            setattr(self, name, layer)
        self._run = forward

    def forward(self, x: Tensor) -> Tensor:
        return self._run(self, x)


def conv(i, o, k=1, **options):
    return nn.Conv2d(i, o, k, padding=k // 2, **options)


def attention(m, x):
    q, k, v = m.q(x), m.k(x), m.v(x)
    return m.out(torch.softmax(q @ k.mT, -1) @ v)


def shuffle(m, x):
    x = m.a(x)
    n, c, h, w = x.shape
    return m.b(x.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w))


def squeeze_excite(m, x):
    x = m.a(x)
    gate = torch.sigmoid(m.up(F.relu(m.down(x.mean((2, 3), keepdim=True)))))
    return m.b(x * gate)


def rms(m, x):
    x = m.a(x)
    return m.b(x * torch.rsqrt(x.square().mean(1, keepdim=True) + 1e-6))


def tied():
    model = Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
                  a=nn.Linear(6, 6), b=nn.Linear(6, 6), c=nn.Linear(6, 2))  # fmt: skip
    model.b.weight = model.a.weight
    return model


def weight_norm():
    model = Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x))))),
                  a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2))  # fmt: skip
    nn.utils.parametrizations.weight_norm(model.b)
    return model


PICTURE, ROWS, TOKENS = (2, 4, 6, 6), (3, 6), (2, 5, 6)
#: name -> (model, input shape, layers that can be pruned, layer -> part of the reason why not)
TRICKY = {
    "softmax over channels": (
        lambda: Model(lambda m, x: m.c(F.relu(m.b(m.a(x).softmax(1)))),
                      a=conv(4, 8), b=conv(8, 8), c=conv(8, 2)),
        PICTURE, {"b"}, {"a": "is mixed with other channels (softmax)"},
    ),
    "rms": (lambda: Model(rms, a=conv(4, 8), b=conv(8, 2)), PICTURE, set(), {}),
    "rms norm module": (
        lambda: nn.Sequential(nn.Linear(6, 8), nn.RMSNorm(8), nn.Linear(8, 7), nn.Linear(7, 2)),
        ROWS, {"0", "2"}, {},
    ),
    "a head for training alone": (
        lambda: Model(lambda m, x: (h := F.relu(m.b(F.relu(m.a(x)))), m.c(h) + (
                      m.head(h) if m.training else 0))[1],
                      a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2),
                      head=nn.Linear(8, 2)),
        ROWS, {"a", "b"}, {"head": "not reached on the example"},
    ),
    "local response": (
        lambda: nn.Sequential(conv(4, 8), nn.LocalResponseNorm(3), conv(8, 8), conv(8, 2)),
        PICTURE, {"2"}, {"0": "is mixed with other channels (avg_pool3d in '1')"},
    ),
    "group norm": (
        lambda: nn.Sequential(conv(4, 8), nn.GroupNorm(2, 8), conv(8, 8), conv(8, 2)),
        PICTURE, {"0", "2"}, {},
    ),
    "width in the code": (
        lambda: Model(lambda m, x: m.c(m.b(m.a(x).view(-1, 8))),
                      a=nn.Linear(6, 8), b=nn.Linear(8, 9), c=nn.Linear(9, 2)),
        ROWS, {"b"}, {"a": "does not run without some"},
    ),
    "shuffled": (lambda: Model(shuffle, a=conv(4, 8), b=conv(8, 2)), PICTURE, {"a"}, {}),
    "pixel shuffle": (
        lambda: nn.Sequential(conv(4, 8), nn.PixelShuffle(2), conv(2, 6), conv(6, 2)),
        PICTURE, {"0", "2"}, {},
    ),
    "squeeze and excite": (
        lambda: Model(squeeze_excite, a=conv(4, 8), down=conv(8, 4), up=conv(4, 8), b=conv(8, 2)),
        PICTURE, {"a", "up", "down"}, {},
    ),
    "attention": (
        lambda: Model(attention, q=nn.Linear(6, 8), k=nn.Linear(6, 8), v=nn.Linear(6, 8),
                      out=nn.Linear(8, 3)),
        TOKENS, {"q", "k", "v"}, {},
    ),
    "instance norm without statistics": (
        lambda: nn.Sequential(conv(4, 8), nn.InstanceNorm2d(8, affine=True), conv(8, 2)),
        PICTURE, {"0"}, {},
    ),
    "tied to the input": (tied, ROWS, set(), {}),
    "weight norm": (weight_norm, ROWS, {"a", "b"}, {}),
    "multiplier": (
        lambda: nn.Sequential(conv(4, 6), conv(6, 12, 3, groups=6), conv(12, 2)),
        PICTURE, {"0", "1"}, {},
    ),
    "as many groups as outputs": (
        lambda: nn.Sequential(conv(4, 8), conv(8, 4, 3, groups=4), conv(4, 6), conv(6, 2)),
        PICTURE, {"0", "1", "2"}, {},
    ),
    "scale that starts at zero": (
        lambda: Model(lambda m, x: m.c(m.a(x) + m.scale * m.b(m.a(x))),
                      a=conv(4, 6), b=conv(6, 6), c=conv(6, 2),
                      scale=nn.Parameter(torch.zeros(6, 1, 1))),
        PICTURE, {"a", "b"}, {},
    ),
    "behind an input in a concatenation": (
        lambda: Model(lambda m, x: m.b(torch.cat([x, m.a(x)], 1)), a=conv(4, 6), b=conv(10, 2)),
        PICTURE, {"a"}, {},
    ),
    "concatenated with itself": (
        lambda: Model(lambda m, x: m.b(torch.cat([(y := m.a(x)), y.relu()], 1)),
                      a=conv(4, 6), b=conv(12, 2)),
        PICTURE, {"a"}, {},
    ),
    "part added to a concatenation": (
        lambda: Model(lambda m, x: m.d(F.relu(torch.cat([m.a(x), m.b(x)], 1) + m.c(x))),
                      a=conv(4, 5), b=conv(4, 3), c=conv(4, 8), d=conv(8, 2)),
        PICTURE, {"a", "b", "c"}, {},
    ),
    "channels at the back": (
        lambda: Model(lambda m, x: m.c(F.gelu(m.b(m.a(x).permute(0, 2, 3, 1)))),
                      a=conv(4, 6), b=nn.Linear(6, 8), c=nn.Linear(8, 2)),
        PICTURE, {"a", "b"}, {},
    ),
    "recurrent": (
        lambda: Model(lambda m, x: m.c(F.relu(m.b(m.rnn(m.a(x))[0]))),
                      a=nn.Linear(6, 5), rnn=nn.GRU(5, 4, batch_first=True),
                      b=nn.Linear(4, 7), c=nn.Linear(7, 2)),
        TOKENS, {"a", "b", "rnn.weight_ih_l0", "rnn.weight_hh_l0"}, {},
    ),
    "embedding in the residual": (
        lambda: Model(lambda m, x: m.out(F.relu(m.table(x.long().abs()) + m.pos(x[..., None]))),
                      table=nn.Embedding(9, 6), pos=nn.Linear(1, 6), out=nn.Linear(6, 2)),
        (2, 5), {"pos"}, {},
    ),
    "casts in forward": (
        lambda: Model(lambda m, x: m.c(F.relu(m.b(F.relu(m.a(x)).float()))),
                      a=nn.Linear(6, 8), b=nn.Linear(8, 8), c=nn.Linear(8, 2)),
        ROWS, {"a", "b"}, {},
    ),
}  # fmt: skip


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", TRICKY)
def test_tricky(name):
    make, shape, prunable, reasons = TRICKY[name]
    torch.manual_seed(0)
    model, inputs = make(), torch.randn(shape)
    before = copy.deepcopy(model.state_dict())
    if prunable == set():
        with pytest.raises(ValueError, match="nothing to prune"):
            Pruner(model, inputs, "magnitude_l2", filters=0.6)
        return
    pruner = Pruner(model, inputs, "magnitude_l2", filters=0.6, every=1, per_step=0.3)
    assert all(torch.equal(value, before[key]) for key, value in model.state_dict().items())
    assert set(pruner.widths) == prunable
    for layer, reason in reasons.items():
        assert reason in pruner.skipped[layer]
    assert not pruner.widths.keys() & pruner.skipped.keys()
    while not pruner.done:
        model(inputs).square().mean().backward()
        pruner.step()
    inputs = torch.randn(shape)
    model.eval()
    masked = model(inputs)
    pruner.compact()
    torch.testing.assert_close(model(inputs), masked, rtol=1e-5, atol=1e-6)
    model.train()(inputs)


OUTPUTS = {
    "mlp": ["5"], "vgg": ["head.2"], "unet": ["out"], "unet_grouped": ["out"],
    "transformer": ["out"], "two_inputs": ["heads.0", "heads.1"],
    "gated": ["down"], "shared": ["leave"],
}  # fmt: skip


@pytest.mark.parametrize("name", zoo.ZOO)
def test_every_layer_but_the_outputs_can_be_pruned(name):
    model, inputs = zoo.build(name)
    pruner = Pruner(model, inputs, params=0.9)
    assert list(pruner.skipped) == OUTPUTS.get(name, ["fc"])
    layers = [
        n for n, m in model.named_modules() if isinstance(m, (nn.Linear, nn.modules.conv._ConvNd))
    ]
    assert sorted([*pruner.widths, *pruner.skipped]) == sorted(layers)


def units(pruner, layer):
    """The filters of a layer, unit by unit."""
    return [
        row
        for group in pruner._network.groups
        for slot in group.producers
        if slot.owner == layer
        for row in slot.index.tolist()
    ]


def test_what_goes_together():
    model, inputs = zoo.build("resnext")
    pruner = Pruner(model, inputs, params=0.5)
    assert units(pruner, "blocks.0.two.0") == [[k, k + 4, k + 8, k + 12] for k in range(4)]
    shared = next(g for g in pruner._network.groups if g.name == "stem.0")
    assert {s.owner for s in shared.producers} == {"stem.0", "blocks.0.three", "blocks.1.three"}
    gated = Pruner(*zoo.build("gated"), params=0.5)
    assert units(gated, "up") == [[k, k + 8] for k in range(8)]
    assert units(Pruner(*zoo.build("mobilenet"), params=0.5), "depthwise.0") == [
        [k] for k in range(16)
    ]


@pytest.mark.parametrize("ignore", [["stem"], ["st*"], "module", ["stem.0"], "stem"])
def test_ignore(ignore):
    model, inputs = zoo.build("resnet")
    pruner = Pruner(
        model, inputs, params=0.5, ignore=[model.stem] if ignore == "module" else ignore
    )
    for layer in ("stem.0", "blocks.0.three", "blocks.1.three"):
        assert "is ignored" in pruner.skipped[layer]
    assert "blocks.0.one.0" in pruner.widths


def test_ignored_layers_keep_their_filters_but_not_their_inputs():
    model, inputs = zoo.build("vgg")
    pruner = Pruner(
        model, inputs, "taylor_fo", params=0.5, every=1, per_step=0.2, ignore=["head.0"]
    )
    while not pruner.done:
        zoo.loss(model, inputs).backward()
        pruner.step()
    pruner.compact()
    assert model.head[0].out_features == 10
    assert model.head[0].in_features < 12 * 16


def test_the_output_is_found_wherever_it_comes_out():
    class Many(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.b, self.c = conv(4, 6), conv(6, 6), conv(6, 6)
            self.d = conv(6, 3)

        def forward(self, x):
            hidden = F.relu(self.a(x))
            features = self.b(hidden)
            box = type("Box", (), {})()
            box.logits, box.features = self.d(F.relu(self.c(hidden))), (features.mean((2, 3)),)
            return box

    pruner = Pruner(Many(), torch.randn(2, 4, 5, 5), params=0.7)
    assert set(pruner.widths) == {"a", "c"}
    assert pruner.skipped == dict.fromkeys("bd", "reaches the output of the model")


def test_frozen_layers_are_pruned_by_what_is_not_frozen():
    model, inputs = zoo.build("resnet")
    model.stem[0].weight.requires_grad_(False)
    model.down[0].weight.requires_grad_(False)
    model.last.three.weight.requires_grad_(False)
    pruner = Pruner(model, inputs, "taylor_fo", params=0.3, every=1, per_step=0.2)
    assert "stem.0" in pruner.widths  # scored by the blocks it is added to
    assert "frozen" in pruner.skipped["down.0"]
    while not pruner.done:
        zoo.loss(model, inputs).backward()
        pruner.step()
    pruner.compact()
    assert model.stem[0].out_channels == model.blocks[0].three.out_channels
    assert model.stem[0].out_channels == pruner.widths["stem.0"]
    assert not model.stem[0].weight.requires_grad
    assert "down.0" in Pruner(*zoo.build("resnet"), "magnitude_l2", params=0.6).widths


def test_construction_leaves_model_and_random_state_alone():
    model, inputs = zoo.build("resnet")
    model.train()
    model.blocks[0].eval()
    zoo.loss(model, inputs).backward()
    state = copy.deepcopy(model.state_dict())
    grads = [p.grad.clone() for p in model.parameters()]
    modes = [m.training for m in model.modules()]
    rng = torch.get_rng_state()
    Pruner(model, inputs, "magnitude_l2", params=0.5)
    assert torch.equal(torch.get_rng_state(), rng)
    assert [m.training for m in model.modules()] == modes
    assert all(torch.equal(value, state[key]) for key, value in model.state_dict().items())
    assert all(torch.equal(p.grad, g) for p, g in zip(model.parameters(), grads, strict=True))
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())
