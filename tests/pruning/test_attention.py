"""nn.Transformer as it is pruned: heads, width and feed-forward, and what goes on afterwards."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import Tensor, nn

import taylor_kernels as tk
from taylor_kernels.tracing import PrunedMultiheadAttention

WIDTH, HEADS = 12, 3


class Translation(nn.Module):
    """PyTorch's transformer, with cross attention, on embeddings of its own width."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(20, WIDTH)
        self.body = nn.Transformer(WIDTH, HEADS, 1, 1, 16, dropout=0.0, batch_first=True)
        self.head = nn.Linear(WIDTH, 5)

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        return self.head(self.body(x, x[:, :-1]))


pytestmark = pytest.mark.filterwarnings("ignore:enable_nested_tensor is True")
TOKENS = torch.arange(42).reshape(6, 7) % 20


def step(model: nn.Module, optimizer: torch.optim.Optimizer, pruner: tk.Pruner | None = None):
    optimizer.zero_grad()
    outputs = model(TOKENS)
    target = torch.linspace(-1, 1, outputs.numel(), dtype=outputs.dtype).reshape(outputs.shape)
    loss = (outputs - target).square().mean()
    loss.backward()
    if pruner is not None:
        pruner.step()
    optimizer.step()


def pruned(criterion: str, seed: int = 0):
    torch.manual_seed(seed)
    model = Translation().double()
    optimizer = torch.optim.AdamW(model.parameters(), 1e-2)
    pruner = tk.Pruner(
        model, TOKENS[:1], criterion, params=0.6, every=1, per_step=0.06, optimizer=optimizer
    )
    while not pruner.done:
        step(model, optimizer, pruner)
    model(TOKENS)
    return model, optimizer, pruner


@pytest.mark.parametrize(
    "criterion", ["taylor_fo", "magnitude_l2", "taylor_fo_bn", "taylor_fo_gate"]
)
def test_masked_is_compacted_and_training_goes_on(criterion):
    model, optimizer, pruner = pruned(criterion)
    assert set(pruner.skipped) == {"head"}
    model.eval()
    expected, names = model(TOKENS), list(model.state_dict())
    with torch.no_grad():  # the path that PyTorch takes for inference
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-10)
    pruner.compact()
    torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-10)
    with torch.no_grad():
        torch.testing.assert_close(model(TOKENS), expected, rtol=0, atol=1e-10)
    assert list(model.state_dict()) == names
    assert sum(p.numel() for p in model.parameters()) == pruner.cost.params
    attentions = [m for m in model.modules() if isinstance(m, nn.MultiheadAttention)]
    assert len(attentions) == 3
    assert any(type(module) is PrunedMultiheadAttention for module in attentions)
    for module in attentions:
        rows, columns = module.in_proj_weight.shape
        assert rows == 3 * module.num_heads * module.head_dim
        assert module.head_dim == WIDTH // HEADS
        assert columns == module.embed_dim == module.out_proj.out_features == model.body.d_model
    step(model.train(), optimizer)
    for parameter in model.parameters():
        assert optimizer.state[parameter]["exp_avg"].shape == parameter.shape


def test_the_masked_model_trains_on_as_the_compacted_one():
    model, optimizer, _ = pruned("taylor_fo", seed=1)
    twin, twin_optimizer, twins = pruned("taylor_fo", seed=1)
    twins.compact()
    for _ in range(3):
        step(model, optimizer)
        step(twin, twin_optimizer)
    torch.testing.assert_close(model(TOKENS), twin(TOKENS), rtol=0, atol=1e-10)


def test_it_is_saved_loaded_and_copied(tmp_path):
    model, _, pruner = pruned("magnitude_l2", seed=2)
    pruner.compact()
    tk.save_pruned(tmp_path / "pruned.safetensors", pruner)
    again = tk.load_pruned(Translation().double(), tmp_path / "pruned.safetensors")
    assert torch.equal(again(TOKENS), model(TOKENS))
    torch.save(model, tmp_path / "whole.pt")
    whole = torch.load(tmp_path / "whole.pt", weights_only=False)
    assert torch.equal(whole(TOKENS), model(TOKENS))
    assert torch.equal(copy.deepcopy(model)(TOKENS), model(TOKENS))


@pytest.mark.parametrize("criterion", ["taylor_fo", "taylor_fo_bn", "taylor_fo_gate"])
def test_a_checkpoint_is_resumed(tmp_path, criterion):
    model, optimizer, pruner = pruned(criterion, seed=3)
    pruner.compact()
    path = tmp_path / "run.ckpt"
    tk.save_checkpoint(path, model=model, optimizer=optimizer, pruner=pruner)
    again = Translation().double()
    other = torch.optim.AdamW(again.parameters(), 1e-2)
    its = tk.Pruner(
        again, TOKENS[:1], criterion, params=0.6, every=1, per_step=0.06, optimizer=other
    )
    tk.load_checkpoint(path, model=again, optimizer=other, pruner=its)
    assert torch.equal(again(TOKENS), model(TOKENS))
    step(model, optimizer)
    step(again, other)
    assert torch.equal(again(TOKENS), model(TOKENS))


class Padded(nn.Module):
    """An encoder that is given examples of several lengths."""

    def __init__(self) -> None:
        super().__init__()
        layer = nn.TransformerEncoderLayer(8, 2, 12, dropout=0.0, batch_first=True)
        self.enter, self.head = nn.Linear(4, 8), nn.Linear(8, 3)
        self.body = nn.TransformerEncoder(layer, 2)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        return self.head(self.body(self.enter(x), src_key_padding_mask=padding))


@pytest.mark.parametrize("ignore", [[], ["enter"], ["*self_attn*"]], ids=str)
def test_inference_on_padded_examples_while_masked(ignore):
    """PyTorch packs them for a fused path that knows of no masks."""
    torch.manual_seed(0)
    model, x = Padded().double(), torch.randn(3, 6, 4, dtype=torch.float64)
    padding = torch.zeros(3, 6, dtype=torch.bool)
    padding[0, -2:] = True
    pruner = tk.Pruner(
        model, (x, padding), "magnitude_l2", params=0.8, every=1, per_step=0.1, ignore=ignore
    )
    while not pruner.done:
        pruner.step()
    expected = model.eval()(x, padding)
    with torch.no_grad():
        torch.testing.assert_close(model(x, padding), expected, rtol=0, atol=1e-10)
        twin = copy.deepcopy(model)
        torch.testing.assert_close(twin(x, padding), expected, rtol=0, atol=1e-10)
        with pytest.warns(UserWarning, match="new parameters"):
            pruner.compact()
        torch.testing.assert_close(model(x, padding), expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("criterion", ["taylor_fo_bn", "taylor_fo_gate"])
@pytest.mark.parametrize("batched", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_heads_and_stream_whatever_comes_first(batch_first, batched, criterion):
    """Other layers count as an example what is in dim 0, and gates of the stream add up there."""
    torch.manual_seed(5)
    layer = nn.TransformerEncoderLayer(8, 4, 12, dropout=0.0, batch_first=batch_first)
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    model.double()
    x = torch.randn(*((3, 5, 4) if batched else (5, 4)), dtype=torch.float64)
    optimizer = torch.optim.SGD(model.parameters(), 0.0)
    pruner = tk.Pruner(model, x, criterion, params=0.5, every=1, per_step=0.1, optimizer=optimizer)
    while not pruner.done:
        model(x).square().mean().backward()
        pruner.step()
        expected = model(x)
        pruner.compact()  # and on with the class that has other widths
        torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
    heads = [layer.self_attn.num_heads for layer in model[1].layers]
    assert min(heads) < 4


@pytest.mark.parametrize("norm_first", [False, True])
@pytest.mark.parametrize("batch_first", [False, True])
def test_the_head_that_does_nothing_goes_by_default(batch_first, norm_first):
    torch.manual_seed(4)
    layer = nn.TransformerEncoderLayer(
        8, 4, 12, dropout=0.0, batch_first=batch_first, norm_first=norm_first
    )
    model = nn.Sequential(nn.Linear(4, 8), nn.TransformerEncoder(layer, 2), nn.Linear(8, 3))
    with torch.no_grad():  # of the heads of 2 channels each, the second and the last but one
        model[1].layers[0].self_attn.out_proj.weight[:, 2:4] *= 1e-3
        model[1].layers[1].self_attn.out_proj.weight[:, 4:6] *= 1e-3
    model.double()
    x = torch.randn(6, 6, 4, dtype=torch.float64)
    pruner = tk.Pruner(model, x[:1], flops=0.6, every=2, per_step=6, ignore=["0", "*.linear1"])
    while len(pruner.history) < 2:
        model(x).square().mean().backward()
        pruner.step()
    gone = {name: rows for record in pruner.history for name, rows in record.removed.items()}
    assert set(gone) == {f"1.layers.{n}.self_attn.in_proj_weight" for n in range(2)}
    for number, head in ((0, 1), (1, 2)):
        rows = torch.tensor(gone[f"1.layers.{number}.self_attn.in_proj_weight"])
        assert set((rows % 8 // 2).tolist()) == {head}
    expected = model.eval()(x)
    with pytest.warns(UserWarning, match="new parameters"):
        pruner.compact()
    torch.testing.assert_close(model(x), expected, rtol=0, atol=1e-10)
