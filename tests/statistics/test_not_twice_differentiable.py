"""What cannot be differentiated twice is one clear error, and what seems so is no obstacle."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.utils import prune

import taylor_kernels as tk
from tests.helpers.expansions import close, scores

pytestmark = pytest.mark.usefixtures("one_thread")


class Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.tanh()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (1 - x.tanh().square())


ONCE = {
    "once_differentiable": (Once.apply, "whose backward is marked once_differentiable"),
    "cdist": (lambda x: torch.cdist(x[None], x[None])[0], "_cdist_backward.* is not implemented"),
}


@pytest.mark.parametrize("operation", ONCE)
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn", "obd_hutchinson"])
def test_a_model_that_cannot_be_differentiated_twice_is_one_clear_error(criterion, operation):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Linear(4, 5), nn.Linear(5, 3)
            self.operation = ONCE[operation][0]

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.operation(self.a(x)))

    model, x = Net(), torch.randn(5, 4)
    message = rf"differentiated twice: .*{ONCE[operation][1]}.*use taylor_so_diag or obd_fisher"
    with pytest.raises(RuntimeError, match=message):
        scores(model, criterion, lambda: model(x).square().mean())
    instead = scores(model, "taylor_so_diag", lambda: model(x).square().mean())
    assert all(score.isfinite().all() for score in instead.values())


class OnceLoss(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square().mean()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 2 * x / x.numel()


ONCE_LOSSES = {
    "once_differentiable": OnceLoss.apply,
    "ctc": lambda x: F.ctc_loss(
        x.log_softmax(2).transpose(0, 1), torch.tensor([[1, 2]] * 5), [4] * 5, [2] * 5
    ),
    "behind a sum": lambda x: Once.apply(x).sum(),
}


@pytest.mark.parametrize("loss", ONCE_LOSSES)
@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn", "obd_bn", "obd_fisher_mc"])
def test_a_loss_that_cannot_be_differentiated_twice_is_one_clear_error(criterion, loss):
    """Also where the gradient that its last function is given needs none itself."""
    model, x = nn.Linear(6, 3), torch.randn(5, 4, 6)
    with pytest.raises(RuntimeError, match=r"be differentiated twice: .*; use .*obd_fisher"):
        scores(model, criterion, lambda: ONCE_LOSSES[loss](model(x)))


def test_a_compiled_model_in_the_closure_is_one_clear_error():
    model, x = nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)), torch.randn(5, 4)
    imp = tk.Importance(model, "taylor_so")
    torch.compiler.reset()
    compiled = torch.compile(model, backend="aot_eager")
    with pytest.raises(RuntimeError, match=r"twice: torch\.compile .*use taylor_so_diag or obd"):
        imp.update(closure=lambda: compiled(x).square().mean())


@pytest.mark.parametrize("criterion", ["taylor_so", "taylor_so_bn"])
def test_fused_attention_is_no_obstacle(criterion):
    class Attention(nn.Module):
        def __init__(self, fused: bool) -> None:
            super().__init__()
            self.qkv, self.out = nn.Linear(8, 24), nn.Linear(8, 3)
            self.fused = fused

        def forward(self, x: Tensor) -> Tensor:
            q, k, v = self.qkv(x).chunk(3, -1)
            if self.fused:
                x = F.scaled_dot_product_attention(q, k, v)
            else:
                x = (q @ k.mT / 8**0.5).softmax(-1) @ v
            return self.out(x.mean(1))

    fused, plain = Attention(True).double(), Attention(False).double()
    fused.load_state_dict(plain.state_dict())
    x, y = torch.randn(4, 6, 8, dtype=torch.float64), torch.randint(0, 3, (4,))
    expected = scores(plain, criterion, lambda: F.cross_entropy(plain(x), y))
    got = scores(fused, criterion, lambda: F.cross_entropy(fused(x), y))
    close(got, torch.cat(list(expected.values())).double())


def test_a_computed_weight_is_an_error_that_says_so():
    model = nn.Sequential(nn.utils.parametrizations.weight_norm(nn.Linear(4, 3)))
    with pytest.raises(RuntimeError, match=r"0\.weight is computed from other parameters"):
        scores(model, "taylor_so", lambda: model(torch.randn(2, 4)).sum())


@pytest.mark.parametrize("criterion", ["taylor_so", "obd_hutchinson", "taylor_fo"])
@pytest.mark.filterwarnings("ignore::FutureWarning")
def test_a_weight_computed_by_a_hook_is_an_error_whatever_ran_before(criterion):
    masked = nn.Linear(4, 3)
    prune.random_unstructured(masked, "weight", 0.5)
    for layer in (masked, nn.utils.weight_norm(nn.Linear(4, 3))):
        model = nn.Sequential(layer)
        imp = tk.Importance(model, criterion)
        with torch.no_grad():
            model(torch.randn(2, 4))  # leaves a weight without a graph
        closure = {"closure": lambda m=model: m(torch.randn(2, 4)).sum()}
        with pytest.raises(RuntimeError, match=r"0\.weight is computed from other parameters"):
            imp.update(**(closure if imp.needs_closure else {}))
