"""What a user can get wrong with `score` and `prune` is said in one line, by kind."""

from __future__ import annotations

import importlib.util

import pytest

pytest.importorskip("matplotlib", reason="prune needs matplotlib")
pytest.importorskip("safetensors", reason="prune needs safetensors")

from tests.helpers.user_models import command

pytestmark = pytest.mark.usefixtures("one_thread", "weights_alone")

MORE = """
once = iter(pairs * 3)
dataset = TensorDataset(torch.randn(6, 1, 6, 6), torch.randint(0, 4, (6,)))
class Odd(nn.Module):
    def __init__(self):
        super().__init__()
        self.one = nn.Linear(36, 4)
    def forward(self, x):
        return {"logits": self.one(x.flatten(1))}
named = lambda: [{"x": torch.randn(3, 1, 6, 6)}]
others = lambda: [{"y": torch.randn(3, 1, 6, 6)}]
def step(model, batch):
    return model(batch[0]).square().mean()
def part(model, batch):
    return model.head(torch.ones(1, 10)).sum()
def worse(model, batch):
    raise KeyError("weights")
def no_optimizer(model):
    return 3
flawed = lambda: pairs + [(pairs[0][0] * torch.nan, pairs[0][1])] * 30
"""
BOTH = ("--model", "mynets:model", "--data", "mynets:pairs")
HALF = ("--filters", "0.7")

#: Options -> what the message begins with, and what it has.
MISTAKES = {
    "nothing": ((), "--model and --data: not given"),
    "no data": (("--model", "mynets:model"), "--data: not given"),
    "no module": (("--model", "mynet:model", "--data", "mynets:pairs"), "--model: there is no"),
    "no attribute": (("--model", "mynets:modle", "--data", "mynets:pairs"), "--model:", "'model'"),
    "arguments": (
        ("--model", "mynets:needs_arguments", "--data", "mynets:pairs"),
        "--model: mynets:needs_arguments wants arguments (width)",
    ),
    "single": (
        ("--model", "mynets:model", "--data", "mynets:single"),
        "--data: a minibatch is a Tensor, neither a pair (inputs, targets) nor a dict",
        "--forward",
    ),
    "triple": (("--model", "mynets:model", "--data", "mynets:triple"), "--data:", "tuple of 3"),
    "dataset": (
        ("--model", "mynets:model", "--data", "mynets:dataset"),
        "--data: mynets:dataset gave a TensorDataset, which cannot be iterated over",
    ),
    "once": (
        ("--model", "mynets:model", "--data", "mynets:once"),
        "--data: mynets:once is a list_iterator, which can be iterated over once",
    ),
    "names": (
        ("--model", "mynets:Odd", "--data", "mynets:others"),
        "--model: the model, given y by name", "unexpected keyword",
    ),
    "no loss": (
        ("--model", "mynets:Odd", "--data", "mynets:named"),
        "--model: of a dict with x it returned a dict without a loss (logits)",
    ),
    "no targets": (
        ("--model", "mynets:Odd", "--data", "mynets:named", "--loss", "mynets:vector"),
        "--data: a minibatch is a dict without targets for --loss",
    ),
    "vector": ((*BOTH, "--loss", "mynets:vector"), "--loss: it gave shape (3,)"),
    "forward raises": ((*BOTH, "--forward", "mynets:worse"), "--forward:", "KeyError: 'weights'"),
    "a part": ((*BOTH, "--forward", "mynets:part"), "--forward: it never called the model itself"),
    "two losses": (
        (*BOTH, "--forward", "mynets:step", "--loss", "mynets:vector"), "--forward: computes",
    ),
    "criterion": ((*BOTH, "--criterion", "taylor_bn"), "--criterion:", "'taylor_fo_bn'"),
    "batches": ((*BOTH, "--batches", "0"), "--batches: 0 is below 1"),
    "device": ((*BOTH, "--device", "tpu"), "--device:", "use auto, cpu or cuda"),
}  # fmt: skip
OF_PRUNE = {
    "no target": ((), "--flops, --params, --filters: none is given"),
    "percent": (("--flops", "50"), "--flops: 50 is not between 0 and 1", "for 50% write 0.5"),
    "all": (("--params", "1"), "--params 1: keeps everything"),
    "contradiction": (("--filters", "1", "--flops", "0.5"), "--filters 1:", "contradicts --flops"),
    "unreachable": (("--params", "0.01"), "--params: 0.01 cannot be reached; with every layer at"),
    "bounds": ((*HALF, "--min-filters", "7"), "--filters: 0.7 cannot be reached"),
    "ignored": ((*HALF, "--ignore", "hed"), "--ignore: 'hed' matches no module"),
    "oracle": ((*HALF, "--criterion", "oracle"), "--criterion: 'oracle' says nothing of filters"),
    "two paces": ((*HALF, "--epochs", "2", "--per-step", "3"), "--epochs:", "--per-step"),
    "odd pace": ((*HALF, "--per-step", "1.5"), "--per-step: 1.5 is neither"),
    "epochs": ((*HALF, "--epochs", "0"), "--epochs: 0 is below 1"),
    "rate": ((*HALF, "--lr", "-1"), "--lr: -1 is not a positive number"),
    "no optimizer": (
        (*HALF, "--optimizer", "mynets:no_optimizer"), "--optimizer:", "gave a int, not a torch.opt"
    ),
    "rate of a function": (
        (*HALF, "--optimizer", "mynets:no_optimizer", "--lr", "1"), "--lr: the function",
    ),
    "not called": ((*HALF, "--optimizer", "mynets:number"), "--optimizer:", "is a int, neither"),
    "wrong rate": (
        (*HALF, "--optimizer", "torch.optim:Optimizer"), "--optimizer: torch.optim:Optimizer(param"
    ),
    "nothing to resume": ((*HALF, "--dry-run", "--resume"), "--dry-run: changes nothing"),
    "no val": ((*HALF, "--val", "mynets:nowhere"), "--val: mynets has no 'nowhere'"),
    "later": ((*HALF, "--data", "mynets:flawed"), "--data: the loss is nan on minibatch 1"),
}  # fmt: skip
ALL = {f"score: {name}": ("score", *rest) for name, rest in MISTAKES.items()} | {
    f"prune: {name}": ("prune", (*BOTH, *rest[0]), *rest[1:]) for name, rest in OF_PRUNE.items()
}


@pytest.mark.parametrize("name", ALL)
def test_a_mistake_is_one_line(name, folder, capsys):
    with open(folder / "mynets.py", "a") as file:
        file.write(MORE)
    job, options, begins, *says = ALL[name]
    code, out, err = command(capsys, job, *options, "--out", "out")
    assert code == 2
    assert out == ""
    *progress, last = err.splitlines()
    assert last.startswith(f"error: {begins}"), last
    assert all(part in last for part in says), last
    assert not any("error" in line or "Traceback" in line for line in progress)
    assert not (folder / "out/result.json").exists()


CONFIGS = {
    "it.toml": 'model = "mynets:model"\ndata = "mynets:pairs"\nflops = 0.7\nper-step = 3\n'
    'ignore = ["two*"]\ndry_run = true\nbatches = 1\njson = true\n',
    "it.yaml": "model: mynets:model\ndata: mynets:pairs\nflops: 0.7\nper-step: 3\n"
    "ignore: [two*]\ndry_run: true\nbatches: 1\njson: true\n",
}


@pytest.mark.parametrize("name", CONFIGS)
def test_options_come_from_a_file_and_the_command_line_comes_first(name, folder, capsys):
    if name.endswith("yaml"):
        pytest.importorskip("yaml", reason="a YAML file needs PyYAML")
    (folder / name).write_text(CONFIGS[name])
    code, out, err = command(capsys, "prune", "--config", name, "--flops", "0.8")
    assert code == 0, err
    assert '"flops": 0.8' in out  # the target; --json was in the file
    assert '"two.0": "\'two' in out


def test_a_lone_pattern_needs_no_list(folder, capsys):
    (folder / "it.toml").write_text(CONFIGS["it.toml"].replace('["two*"]', '"two*"'))
    code, out, err = command(capsys, "prune", "--config", "it.toml")
    assert code == 0, err
    assert '"two.0": "\'two' in out


@pytest.mark.parametrize(
    ("name", "content", "says"),
    [
        (
            "it.toml",
            'flop = 0.5\nmodel = "a:b"',
            "'flop', which is no option; did you mean 'flops'",
        ),
        ("it.toml", "flops = ", "is no valid TOML"),
        ("it.yaml", "[1, 2]", "holds no options"),
        ("it.yaml", "a: [", "is no valid YAML"),
        ("it.json", "{}", "is neither .toml nor .yaml"),
        ("it.toml", "flops = 'much'", "Invalid value for '--flops'"),
        ("nowhere.toml", None, "cannot read 'nowhere.toml': No such file"),
    ],
)
def test_mistakes_in_a_file_of_options(name, content, says, folder, capsys):
    if content is not None:
        (folder / name).write_text(content)
    code, out, err = command(capsys, "prune", "--config", name)
    assert code == 2
    assert out == ""
    assert err.count("\n") == 1
    assert says in err


@pytest.mark.parametrize(
    ("name", "hidden", "says"),
    [
        ("it.yaml", {"yaml"}, "pip install pyyaml"),
        ("it.toml", {"tomllib", "tomli"}, "Python 3.11 or later, or pip install tomli"),
    ],
)
def test_a_library_that_a_file_needs_is_named(name, hidden, says, folder, capsys, monkeypatch):
    (folder / name).write_text("")
    find = importlib.util.find_spec
    monkeypatch.setattr(importlib.util, "find_spec", lambda n: None if n in hidden else find(n))
    code, _, err = command(capsys, "score", "--config", name)
    assert code == 2
    assert says in err
