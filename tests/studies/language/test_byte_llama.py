"""The study's model against transformers' Llama, its text, and the memory that is counted."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from taylor_kernels.studies.language.network import ByteLlama, Sizes
from taylor_kernels.studies.language.text import even_windows, load_text, random_windows
from taylor_kernels.studies.language.training import Schedule, bits_per_byte, byte_loss, train
from taylor_kernels.studies.memory import peak_bytes

pytestmark = pytest.mark.usefixtures("one_thread")
SIZES = Sizes(width=24, hidden=40, layers=3, heads=6, groups=3, head_dim=4, context=40)
#: Ours in transformers' names.
NAMES = {
    "embed": "model.embed_tokens", "head": "lm_head", "norm": "model.norm",
    "attention_norm": "input_layernorm", "feed_forward_norm": "post_attention_layernorm",
    "attention.query": "self_attn.q_proj", "attention.key": "self_attn.k_proj",
    "attention.value": "self_attn.v_proj", "attention.out": "self_attn.o_proj",
    "feed_forward.gate": "mlp.gate_proj", "feed_forward.up": "mlp.up_proj",
    "feed_forward.down": "mlp.down_proj",
}  # fmt: skip


def theirs(name: str) -> str:
    module, kind = name.rsplit(".", 1)
    if not module.startswith("layers."):
        return f"{NAMES[module]}.{kind}"
    _, number, inner = module.split(".", 2)
    return f"model.layers.{number}.{NAMES[inner]}.{kind}"


def test_it_is_the_llama_of_transformers():
    transformers = pytest.importorskip("transformers")
    model = ByteLlama(SIZES).double()
    with torch.no_grad():
        for parameter in model.parameters():  # a start that is small would hide most mistakes
            parameter.copy_(torch.randn_like(parameter) * 0.3)
    config = transformers.LlamaConfig(
        vocab_size=256, hidden_size=24, intermediate_size=40, num_hidden_layers=3,
        num_attention_heads=6, num_key_value_heads=3, head_dim=4, rms_norm_eps=1e-5,
        max_position_embeddings=40, use_cache=False, tie_word_embeddings=False,
    )  # fmt: skip
    other = transformers.LlamaForCausalLM(config).double().eval()
    other.load_state_dict({theirs(name): value for name, value in model.state_dict().items()})
    tokens = torch.randint(256, (3, 40))
    with torch.no_grad():
        # Angles are computed in float32 there and here.
        torch.testing.assert_close(
            model(tokens), other(input_ids=tokens).logits, rtol=1e-4, atol=1e-4
        )


def test_a_byte_says_nothing_of_those_before_it():
    model = ByteLlama(SIZES).double()
    tokens = torch.randint(256, (2, 40))
    changed = tokens.clone()
    changed[:, 25] = (changed[:, 25] + 1) % 256
    one, other = model(tokens), model(changed)
    torch.testing.assert_close(one[:, :25], other[:, :25], rtol=0, atol=1e-13)
    assert ((one[:, 25:] - other[:, 25:]).abs().amax((0, 2)) > 0).all()


@pytest.mark.parametrize("sizes", [Sizes(heads=6, groups=4), Sizes(head_dim=7)])
def test_sizes_that_cannot_be_are_said(sizes):
    with pytest.raises(ValueError, match="heads must be a multiple of groups, and head_dim even"):
        ByteLlama(sizes)


def test_held_out_modules_are_others(tmp_path):
    files = []
    for number in range(25):
        files.append(tmp_path / f"m{number:02}.py")
        files[-1].write_bytes(bytes([number]) * (number + 1))
    text = load_text(files)
    held_out = {9, 19}
    assert set(text.held_out.tolist()) == held_out
    assert set(text.train.tolist()) == set(range(25)) - held_out
    assert (text.train_modules, text.held_out_modules) == (23, 2)
    assert len(text.train) + len(text.held_out) == sum(range(26))
    with pytest.raises(ValueError, match="files: 9 modules"):
        load_text(files[:9])


def test_the_standard_library_is_there():
    text = load_text()
    assert len(text.train) > 8 * len(text.held_out) / 2 > 100_000
    assert b"import " in bytes(text.held_out.tolist())


def test_windows_are_pieces_of_the_text():
    data = torch.arange(200).to(torch.uint8)
    windows = random_windows(data, 50, 30, torch.Generator().manual_seed(1))
    assert windows.shape == (50, 30)
    assert (windows.diff(dim=1) == 1).all()
    even = even_windows(data, 4, 20)
    assert even[:, 0].tolist() == [0, 60, 120, 180]
    assert even[-1, -1] == 199
    assert random_windows(data, 1, 200, torch.Generator()).tolist() == [list(range(200))]


def test_training_learns_what_repeats():
    """Text of one period: after some steps nearly nothing is left to be told of a byte."""
    data = torch.arange(32).repeat(100).to(torch.uint8)
    torch.manual_seed(0)
    model = ByteLlama(Sizes(width=16, hidden=16, layers=1, heads=2, groups=1, head_dim=8))
    windows = even_windows(data, 2, 33)
    before = bits_per_byte(model, windows)
    notes = []
    schedule = Schedule(steps=30, lr=3e-2, windows=2, length=32)
    train(model, data, schedule, seed=1, on_step=notes.append)
    assert before > 7
    assert bits_per_byte(model, windows) < before / 2
    assert len(notes) == 30
    assert model.training


def test_the_bits_of_a_byte_are_those_of_all_windows():
    model = ByteLlama(SIZES).double().train()
    windows = torch.randint(256, (19, 33))  # more than are judged at once, and no multiple of it
    logits = model(windows[:, :-1])
    expected = F.cross_entropy(logits.flatten(0, 1), windows[:, 1:].flatten(), reduction="none")
    found = bits_per_byte(model, windows)
    assert found == pytest.approx(expected.mean().item() / torch.tensor(2.0).log().item(), rel=1e-6)
    assert model.training


def test_bytes_at_the_peak_are_counted():
    x = torch.zeros(1000)

    def chain() -> torch.Tensor:
        y = x + 1  # 4,000 bytes
        y = y.view(10, 100)  # the same ones
        z = y * 2  # 8,000 now
        del y
        return z.sum() + (z * 3).sum()  # z, z * 3 and two numbers

    assert peak_bytes(chain) == 8_008
    assert peak_bytes(lambda: x.add_(1)) == 0
    assert peak_bytes(lambda: [x + 1 for _ in range(5)]) == 20_000
    assert peak_bytes(lambda: sum((x + 1).sum() for _ in range(50))) < 5_000


def test_a_backward_pass_counts_too():
    layer = nn.Linear(100, 100, bias=False)
    inputs = torch.randn(50, 100)

    def step() -> None:
        layer(inputs).square().sum().backward()

    found = peak_bytes(step)
    outputs, gradient = 4 * 50 * 100, 4 * 100 * 100
    assert outputs + gradient <= found <= 5 * outputs + 2 * gradient
    layer.zero_grad()
    windows = torch.randint(256, (2, 33))
    model = ByteLlama(SIZES)
    half = peak_bytes(lambda: byte_loss(model, windows[:1]).backward())
    model.zero_grad()
    assert half < peak_bytes(lambda: byte_loss(model, windows).backward()) < 2 * half
