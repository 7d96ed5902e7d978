"""ParameterFisher against a loop over examples, in float64: every kind of parameter alone."""

from __future__ import annotations

import copy
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn
from torch.nn.utils import parametrizations

import taylor_kernels as tk
from tests.helpers.parameter_loop import by_loop, close, metered

pytestmark = pytest.mark.usefixtures("one_thread")
N = 5


def floats(*shape: int) -> Callable[[], Tensor]:
    return lambda: torch.randn(N, *shape, dtype=torch.float64)


def tokens(*shape: int, of: int = 7) -> Callable[[], Tensor]:
    return lambda: torch.randint(0, of, (N, *shape))


def used(norm: nn.Module) -> nn.Module:
    """In eval mode, with running statistics of its own and affine parameters, one of them 0."""
    for name, buffer in norm.named_buffers():
        if buffer.is_floating_point():
            buffer.data = torch.rand_like(buffer) + (0.5 if "var" in name else 0)
    nn.init.normal_(norm.weight)
    norm.weight.data.view(-1)[0] = 0
    if norm.bias is not None:
        nn.init.normal_(norm.bias)
    return norm.eval()


class RMS(nn.RMSNorm):
    """PyTorch's has no bias."""

    bias = None


KINDS: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "linear": (lambda: nn.Linear(7, 5), floats(7)),
    "linear, tokens": (lambda: nn.Linear(7, 5), floats(3, 2, 7)),
    "conv1d": (lambda: nn.Conv1d(4, 6, 3, stride=2, padding=1, groups=2), floats(4, 9)),
    "conv2d": (lambda: nn.Conv2d(3, 5, (3, 2), stride=2, padding=1, dilation=2), floats(3, 8, 7)),
    "conv2d, depthwise": (lambda: nn.Conv2d(6, 6, 3, groups=6), floats(6, 6, 6)),
    "conv2d, reflect": (
        lambda: nn.Conv2d(3, 4, 3, padding=1, padding_mode="reflect"),
        floats(3, 6, 6),
    ),
    "conv3d": (lambda: nn.Conv3d(4, 6, (2, 3, 1), padding=1, groups=2), floats(4, 4, 5, 3)),
    "transposed 1d": (lambda: nn.ConvTranspose1d(3, 4, 4, stride=3), floats(3, 5)),
    "transposed 2d": (
        lambda: nn.ConvTranspose2d(4, 6, 3, 2, padding=1, output_padding=1, groups=2),
        floats(4, 5, 4),
    ),
    "transposed 3d": (lambda: nn.ConvTranspose3d(4, 6, 2, stride=2, groups=2), floats(4, 3, 4, 3)),
    "batch norm": (lambda: used(nn.BatchNorm1d(4)), floats(4)),
    "batch norm 1d": (lambda: used(nn.BatchNorm1d(4)), floats(4, 6)),
    "batch norm 2d": (lambda: used(nn.BatchNorm2d(4)), floats(4, 3, 5)),
    "batch norm 3d": (lambda: used(nn.BatchNorm3d(4)), floats(4, 3, 2, 2)),
    "instance norm": (lambda: used(nn.InstanceNorm2d(4, affine=True)), floats(4, 3, 5)),
    "instance norm, tracking": (
        lambda: used(nn.InstanceNorm1d(4, affine=True, track_running_stats=True)),
        floats(4, 6),
    ),
    "group norm": (lambda: used(nn.GroupNorm(2, 6)), floats(6, 3, 4)),
    "layer norm": (lambda: used(nn.LayerNorm(6)), floats(6)),
    "layer norm, tokens": (lambda: used(nn.LayerNorm(6)), floats(3, 2, 6)),
    "layer norm of two dimensions": (lambda: used(nn.LayerNorm((3, 4))), floats(2, 3, 4)),
    "layer norm without bias": (lambda: used(nn.LayerNorm(6, bias=False)), floats(3, 6)),
    "rms norm": (lambda: used(RMS(6)), floats(3, 6)),
    "rms norm of two dimensions": (lambda: used(RMS((2, 6))), floats(3, 2, 6)),
    "embedding": (lambda: nn.Embedding(7, 3), tokens(9)),
    "embedding of one token": (lambda: nn.Embedding(7, 3), tokens()),
    "embedding, padded": (lambda: nn.Embedding(7, 3, padding_idx=2), tokens(4, 3)),
    "embedding, by frequency": (lambda: nn.Embedding(7, 3, scale_grad_by_freq=True), tokens(9)),
}
BY_RERUN: dict[str, tuple[Callable[[], nn.Module], Callable[[], Tensor]]] = {
    "prelu": (lambda: nn.PReLU(4), floats(4, 3)),
    "embedding bag": (lambda: nn.EmbeddingBag(7, 3), tokens(6)),
    "lstm": (lambda: nn.LSTM(4, 3, num_layers=2, batch_first=True), floats(5, 4)),
    "weight norm": (
        lambda: parametrizations.weight_norm(nn.Linear(4, 3)),
        floats(4),
    ),
    "spectral norm": (
        lambda: parametrizations.spectral_norm(nn.Conv1d(4, 3, 2)).eval(),
        floats(4, 5),
    ),
    "a linear layer with a forward of its own": (lambda: Doubled(4, 3), floats(4)),
    "parameters of a module": (lambda: ClassToken(), floats(3, 4)),
}


class Doubled(nn.Linear):
    """Its weight is not what it multiplies by."""

    def forward(self, input: Tensor) -> Tensor:
        return nn.functional.linear(input, 2 * self.weight, self.bias)


class ClassToken(nn.Module):
    """A parameter of its own, a list of them, and an attention whose weights others use."""

    def __init__(self) -> None:
        super().__init__()
        self.token = nn.Parameter(torch.randn(1, 1, 4))
        self.scales = nn.ParameterList([nn.Parameter(torch.randn(4)) for _ in range(2)])
        self.attention = nn.MultiheadAttention(4, 2, batch_first=True)

    def forward(self, x: Tensor) -> Tensor:
        x = torch.cat([self.token.expand(len(x), -1, -1), x], 1) * self.scales[0]
        return self.attention(x, x, x, need_weights=False)[0][:, 0] * self.scales[1]


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("closure", [True, False], ids=["closure", "backward"])
@pytest.mark.parametrize("kind", KINDS)
def test_is_that_of_a_loop_over_examples(kind, closure):
    make, data = KINDS[kind]
    model, batches = nn.Sequential(make()).double(), [data(), data()]
    close(metered(model, batches, closure=closure), by_loop(model, batches))


@pytest.mark.parametrize("closure", [True, False], ids=["closure", "backward"])
@pytest.mark.parametrize("kind", BY_RERUN)
def test_other_kinds_take_a_run_for_each_example_and_are_named(kind, closure):
    make, data = BY_RERUN[kind]
    model, batches = nn.Sequential(make()).double(), [data(), data()]
    names = [name for name, _ in model.named_parameters()]
    with pytest.warns(UserWarning, match="run of .* for each example") as said:
        found = metered(model, batches, closure=closure)
    told = [name for w in said for name in str(w.message).split(":")[0].split(", ")]
    assert sorted(told) == sorted(names)
    close(found, by_loop(model, batches))


@pytest.mark.parametrize(
    ("module", "shape"),
    [
        (nn.Linear(4, 3), (4,)),
        (nn.Conv2d(2, 3, 3), (2, 5, 5)),
        (nn.ConvTranspose1d(2, 3, 3), (2, 5)),
        (nn.LayerNorm((2, 4)), (2, 4)),
        (nn.InstanceNorm2d(2, affine=True), (2, 5, 5)),
    ],
    ids=lambda value: type(value).__name__,
)
def test_an_input_without_a_batch_says_so(module, shape):
    with pytest.raises(ValueError, match="input has no batch dimension"):
        metered(nn.Sequential(module), [torch.randn(shape)], lambda m, x: m(x).sum())


def test_time_first_modules_count_examples_in_dim_1():
    rnn = nn.GRU(4, 3).double()
    x = torch.randn(6, N, 4, dtype=torch.float64)

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        return model(x)[0].sin().sum() / x.size(1)

    with pytest.warns(UserWarning, match="run"):
        found = metered(rnn, [x], loss)
    expected = {name: torch.zeros_like(p) for name, p in rnn.named_parameters()}
    for n in range(N):
        grads = torch.autograd.grad(loss(rnn, x[:, n : n + 1]), [*rnn.parameters()])
        for name, grad in zip(expected, grads, strict=True):
            expected[name] += grad.square() / N
    close(found, expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("kind", ["linear, tokens", "conv2d", "batch norm 2d", "layer norm"])
def test_half_types_are_summed_in_float32(kind, dtype):
    make, data = KINDS[kind]
    model, x = nn.Sequential(make()).to(dtype), data().to(dtype)
    scale = 1e-3  # whose squares float16 does not hold

    def loss(model: nn.Module, x: Tensor) -> Tensor:
        out = model(x)
        return (out * scale * torch.linspace(1, 2, out[0].numel()).view(out[0].shape).to(out)).sum()

    found = metered(model, [x], loss, reduction="sum")
    assert all(value.dtype == torch.float32 for value in found.values())
    expected = by_loop(copy.deepcopy(model).double(), [x.double()], loss)
    eps = torch.finfo(dtype).eps
    for name, want in expected.items():
        assert (found[name] - want).abs().max() <= 8 * eps * want.max(), name


def test_batch_norm_in_train_mode_gives_each_example_its_share():
    model = nn.Sequential(nn.Linear(4, 3), nn.BatchNorm1d(3), nn.Tanh(), nn.Linear(3, 2)).double()
    x = torch.randn(N, 4, dtype=torch.float64)
    names = dict(model.named_parameters())
    own = {
        name: p.detach().expand(N, *p.shape).clone().requires_grad_() for name, p in names.items()
    }
    h = torch.einsum("noi,ni->no", own["0.weight"], x) + own["0.bias"]
    h = (h - h.mean(0)) / (h.var(0, correction=0) + model[1].eps).sqrt()
    h = (h * own["1.weight"] + own["1.bias"]).tanh()
    out = torch.einsum("noi,ni->no", own["3.weight"], h) + own["3.bias"]
    shares = torch.autograd.grad(out.sin().sum() / N, [*own.values()])
    expected = {name: N * g.square().sum(0) for name, g in zip(own, shares, strict=True)}
    found = metered(model, [x], lambda model, x: model(x).sin().sum() / len(x))
    del expected["0.bias"], found["0.bias"]  # normalised away: 0 up to rounding
    close(found, expected)


def test_the_example_of_an_outer_product_is_a_matrix_product_of_squares():
    """One token for each example takes another way than several; both are the same."""
    layer = nn.Linear(5, 4).double()
    x = torch.randn(N, 5, dtype=torch.float64)
    one = metered(nn.Sequential(layer), [x])
    two = metered(nn.Sequential(layer), [x[:, None]])
    close(one, two)
    assert tk.ParameterFisher(nn.Sequential(layer)).examples == 0
