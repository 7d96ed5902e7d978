"""Parameters that are used more than once, or by other code than their modules."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import taylor_kernels as tk
from tests.helpers.fisher_loop import Twice
from tests.helpers.parameter_loop import by_loop, close, mean_of_own, metered

pytestmark = [pytest.mark.usefixtures("one_thread"), pytest.mark.filterwarnings("error")]
closures = pytest.mark.parametrize("closure", [True, False], ids=["closure", "backward"])
N = 4


class Language(nn.Module):
    """Embedding and head share their weight; positions are embedded once for all examples."""

    def __init__(self, *, tied_by_module: bool, positions: bool = False) -> None:
        super().__init__()
        self.embed = nn.Embedding(9, 6, padding_idx=1)
        self.norm = nn.LayerNorm(6)
        self.block = nn.Linear(6, 6)
        self.positions = nn.Embedding(5, 6) if positions else None
        self.head = nn.Linear(6, 9, bias=False) if tied_by_module else None
        if self.head is not None:
            self.head.weight = self.embed.weight

    def forward(self, tokens: Tensor) -> Tensor:
        x = self.embed(tokens)
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens.size(1))[None])
        x = self.norm(self.block(self.norm(x)).tanh() + x)
        return F.linear(x, self.embed.weight) if self.head is None else self.head(x)


def tokens() -> Tensor:
    return torch.randint(0, 9, (N, 5))


@closures
def test_modules_called_twice(closure):
    model, batches = Twice().double(), [torch.randn(N, 3, 12, 12, dtype=torch.float64)] * 2
    close(metered(model, batches, closure=closure), by_loop(model, batches))


@closures
def test_one_weight_of_two_modules(closure):
    model, batches = Language(tied_by_module=True).double(), [tokens(), tokens()]
    close(metered(model, batches, closure=closure), by_loop(model, batches))


@closures
def test_a_weight_that_other_code_uses_too_is_found_in_the_graph(closure):
    model, batches = Language(tied_by_module=False).double(), [tokens(), tokens()]
    with pytest.warns(UserWarning, match=r"^embed.weight: .* run of the whole model"):
        found = metered(model, batches, closure=closure)
    close(found, by_loop(model, batches))


@closures
def test_a_module_whose_input_has_no_examples(closure):
    model, batches = Language(tied_by_module=True, positions=True).double(), [tokens(), tokens()]
    with pytest.warns(UserWarning, match=r"^positions.weight: .* run of the whole model"):
        found = metered(model, batches, closure=closure)
    close(found, by_loop(model, batches))


class Windows(nn.Module):
    """[N, 4, W]: its layer sees pairs of positions, so that dim 0 counts no examples there."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.inner = nn.Sequential(nn.Linear(2 * width, 2 * width), nn.Tanh())
        self.scale = nn.Linear(width, width)

    def forward(self, x: Tensor) -> Tensor:
        y = self.inner(x.reshape(2 * len(x), -1)).view(x.shape)
        return self.scale(y) + x


class Embeddings(nn.Module):
    """Of tokens, and of positions, which are the same for all examples."""

    def __init__(self, *, tied: bool) -> None:
        super().__init__()
        self.words, self.places = nn.Embedding(9, 6), nn.Embedding(9, 6)
        if tied:
            self.places.weight = self.words.weight

    def forward(self, ids: Tensor) -> Tensor:
        return self.words(ids) + self.places(torch.arange(ids.size(1))[None])


class Nested(nn.Module):
    def __init__(self, *, tied: bool = False) -> None:
        super().__init__()
        self.embeddings = Embeddings(tied=tied)
        self.blocks = nn.ModuleList([Windows(6), Windows(6)])
        self.head = nn.Linear(6, 3)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embeddings(ids)
        for block in [*self.blocks, self.blocks[0]]:  # one of them twice
            x = block(x)
        return self.head(x.mean(1))


@closures
@pytest.mark.parametrize("tied", [False, True])
def test_the_nearest_module_that_was_given_examples_is_run_again(closure, tied):
    model, batches = Nested(tied=tied).double(), [torch.randint(0, 9, (3, 4)) for _ in range(2)]
    with pytest.warns(UserWarning, match="they take a run of") as told:
        found = metered(model, batches, closure=closure)
    close(found, by_loop(model, batches))
    said = {str(w.message).split(":")[0]: str(w.message) for w in told}
    place = "embeddings.words.weight" if tied else "embeddings.places.weight"
    assert ("a run of the whole model" if tied else "a run of embeddings ") in said[place]
    windows = next(text for name, text in said.items() if "blocks.1.inner.0.weight" in name)
    assert "a run of blocks.1 " in windows
    assert len(said) == 3


@closures
def test_a_module_that_is_not_called_leaves_its_part_to_the_model(closure):
    model, batches = Nested().double(), [torch.randint(0, 9, (3, 4))]
    block = model.blocks[1]
    model.blocks[1] = nn.Identity()
    model.aside = nn.Sequential(block)  # neither it nor the block is called

    def forward(ids: Tensor) -> Tensor:
        return model.head(Windows.forward(block, model.embeddings(ids)).mean(1))

    model.forward = forward
    with pytest.warns(UserWarning, match="they take a run of") as told:
        found = metered(model, batches, closure=closure)
    windows = next(text for w in told if "aside.0.inner.0.weight" in (text := str(w.message)))
    assert "a run of the whole model" in windows
    expected = by_loop(model, batches)
    assert not found["blocks.0.scale.weight"].any()
    reached = [name for name, value in expected.items() if value.any()]
    close({n: found[n] for n in reached}, {n: expected[n] for n in reached})


def test_dict_inputs_and_outputs_in_a_container():
    language = Language(tied_by_module=True).double()

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.inner = language
            self.scale = nn.Parameter(torch.rand(9, dtype=torch.float64))

        def forward(self, *, input_ids: Tensor) -> dict[str, Tensor]:
            return {"logits": self.inner(input_ids) * self.scale}

    def loss(model: nn.Module, ids: Tensor) -> Tensor:
        return model(input_ids=ids)["logits"].sin().sum() / len(ids)

    model, batches = Wrapped(), [tokens()]
    with pytest.warns(UserWarning, match=r"^scale: "):
        found = metered(model, batches, loss)
    close(found, by_loop(model, batches, loss))


def test_transposed_uses_of_one_weight_by_two_modules():
    """Layers of different kinds add up too: a 1x1 convolution and a linear layer."""

    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Conv1d(3, 3, 1)
            self.b = nn.ConvTranspose1d(3, 3, 1)
            self.b.weight = self.a.weight
            self.b.bias = self.a.bias

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x).tanh())

    model, x = Tied().double(), torch.randn(N, 3, 4, dtype=torch.float64)
    close(metered(model, [x]), by_loop(model, [x]))


@closures
def test_activations_changed_in_place_and_checkpoints(closure):
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.inner, self.last = (nn.Linear(4, 4) for _ in range(3))

        def forward(self, x: Tensor) -> Tensor:
            x = F.relu(self.first(x), inplace=True)
            x = checkpoint(lambda x: self.inner(x).tanh(), x, use_reentrant=self.reentrant)
            return self.last(x)

    model, x = Net().double(), torch.randn(N, 4, dtype=torch.float64)
    nn.init.constant_(model.first.bias, 0.5)
    model.reentrant = False
    close(metered(model, [x], closure=closure), by_loop(model, [x]))
    model.reentrant = True
    if not closure:
        with pytest.raises(RuntimeError, match=r"inner: .*use_reentrant=False"):
            metered(model, [x])


def test_an_input_changed_in_place_is_an_error():
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.norm = nn.Embedding(5, 3)

        def forward(self, x: Tensor) -> Tensor:
            y = self.norm(x)
            x.add_(1)
            return y

    meter = tk.ParameterFisher(model := Net())
    with pytest.raises(RuntimeError, match="norm: its input was changed in place"):
        mean_of_own(model, torch.zeros(N, 2, dtype=torch.int64)).backward()
    assert meter.examples == 0


def test_a_run_that_gives_other_outputs_is_an_error():
    model = nn.Sequential(nn.LSTM(3, 4, 2, dropout=0.5, batch_first=True)).double()
    with pytest.warns(UserWarning, match="LSTM|0"), pytest.raises(RuntimeError, match="eval mode"):
        metered(model, [torch.randn(N, 5, 3, dtype=torch.float64)])


def test_dropout_keeps_the_mask_of_the_pass():
    model = nn.Sequential(nn.Dropout(0.5), nn.Linear(6, 3)).double()
    x = torch.randn(N, 6, dtype=torch.float64)
    meter = tk.ParameterFisher(model)
    torch.manual_seed(3)
    mean_of_own(model, x).backward()
    meter.update()
    torch.manual_seed(3)
    dropped = model[0](x)
    expected = by_loop(nn.Sequential(nn.Identity(), model[1]), [dropped])
    close(meter.compute(), expected)
