"""The command line: help that is quick and shows an example, errors of one line, `info`."""

from __future__ import annotations

import json

import pytest
import torch

import taylor_kernels as tk
from taylor_kernels import cli
from taylor_kernels.cli import common
from tests.helpers.programs import run_program


def call(capsys, *arguments: str) -> tuple[int, str, str]:
    """Exit code, standard output and standard error of a command run in this process."""
    with pytest.raises(SystemExit) as stop:
        cli.main(list(arguments))
    captured = capsys.readouterr()
    return stop.value.code, captured.out, captured.err


@pytest.mark.parametrize(
    "command", ["demo", "compare", "info", "score", "prune", "at-init", "language"]
)
def test_help_shows_an_example_that_parses(capsys, command):
    code, out, _ = call(capsys, command, "--help")
    assert code == 0
    example = " ".join(out.split()).partition(f"Example: taylor-kernels {command} ")[2].split()
    assert example
    known = out.partition("Options:")[2]
    assert all(word in known for word in example if word.startswith("--"))


@pytest.mark.parametrize("command", ["demo", "compare", "at-init", "language"])
def test_commands_of_one_process_refuse_more(command, capsys, monkeypatch, tmp_path):
    """Each would write into the same folder."""
    for name, value in (("TORCHELASTIC_RUN_ID", "none"), ("WORLD_SIZE", "2"), ("RANK", "1")):
        monkeypatch.setenv(name, value)
    code, _, err = call(capsys, command, "--out", str(tmp_path / "out"))
    assert code == 2
    assert f"started 2 processes, and {command} is of one; start it without" in err
    assert not (tmp_path / "out").exists()


def test_without_a_command_there_is_help(capsys):
    code, out, _ = call(capsys)
    assert code == 0
    assert "demo" in out
    assert "info" in out


def test_help_does_not_import_what_only_commands_need():
    check = (
        "import sys, taylor_kernels.cli as cli\n"
        "for command in ('demo', 'compare', 'score', 'prune', 'at-init', 'language'):\n"
        "    try: cli.main([command, '--help'])\n"
        "    except SystemExit: pass\n"
        "heavy = {'sklearn', 'scipy', 'matplotlib', 'torch_pruning', 'safetensors'}\n"
        "sys.exit(str(heavy & set(sys.modules)) if heavy & set(sys.modules) else 0)"
    )
    done = run_program(check)
    assert done.returncode == 0, done.stderr


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["demo", "--criteria", "taylor_f0_bn"], "did you mean 'taylor_fo_bn'"),
        (["demo", "--criteria", "random", "--criteria", "zzzz"], "'zzzz' is not known"),
        (["demo", "--criteria", "oracle"], "a pass over the data per filter"),
        (["demo", "--flops", "1.5"], "not between 0 and 1"),
        (["demo", "--flops", "0"], "not between 0 and 1"),
        (["demo", "--flops", "nan"], "not between 0 and 1"),
        (["demo", "--flops", "0.0001"], "cannot be reached"),
        (["demo", "--flops", "half"], "'--flops'"),
        (["demo", "--device", "tpu"], "use auto, cpu or cuda"),
        (["demo", "--device", "cuda:99"], "use --device cpu"),
        (["demo", "--seed", "-1"], "--seed"),
        (["demo", "--seeds", "0"], "--seeds"),
        (["demo", "--what"], "--what"),
        (["dmeo"], "dmeo"),
    ],
)
def test_a_mistake_is_one_line_before_any_work(capsys, tmp_path, arguments, says):
    out_folder = tmp_path / "out"
    if arguments[0] == "demo":
        arguments = [*arguments, "--out", str(out_folder)]
    code, out, err = call(capsys, *arguments)
    assert code == 2
    assert out == ""
    assert err.startswith("error: ")
    assert err.count("\n") == 1
    assert says in err
    assert not out_folder.exists()


def test_out_that_cannot_be_written_is_a_mistake_too(capsys, tmp_path):
    (tmp_path / "file").write_text("in the way")
    code, _, err = call(capsys, "demo", "--out", str(tmp_path / "file" / "demo"))
    assert code == 2
    assert err.startswith("error: --out: cannot write to ")
    assert err.count("\n") == 1


def test_what_the_demo_needs_is_named_if_it_is_missing(capsys, monkeypatch):
    find = common.importlib.util.find_spec
    monkeypatch.setattr(
        common.importlib.util, "find_spec", lambda name: None if name == "sklearn" else find(name)
    )
    code, _, err = call(capsys, "demo")
    assert code == 2
    assert err == "error: sklearn not installed; pip install 'taylor-kernels[demo]'\n"


def test_a_fault_of_ours_keeps_its_traceback(monkeypatch):
    def broken(**_):
        raise RuntimeError("a bug")

    monkeypatch.setattr(cli, "app", broken)
    with pytest.raises(RuntimeError, match="a bug"):
        cli.main(["info"])


def test_stopping_by_hand_is_quiet(monkeypatch, capsys):
    def interrupted(**_):
        raise KeyboardInterrupt

    monkeypatch.setattr(cli, "app", interrupted)
    code, _, err = call(capsys, "demo")
    assert (code, err) == (130, "stopped\n")


def test_a_command_that_is_stopped_says_so(monkeypatch, capsys):
    def interrupted():
        raise KeyboardInterrupt

    monkeypatch.setattr("taylor_kernels.system.describe", interrupted)
    code, _, err = call(capsys, "info")
    assert (code, err) == (130, "stopped\n")


def test_info_as_json_says_what_the_library_says(capsys):
    code, out, _ = call(capsys, "info", "--json")
    assert code == 0
    facts = json.loads(out)
    assert facts["versions"]["torch"] == torch.__version__
    assert facts["cpu"]["threads"] == torch.get_num_threads()
    assert set(facts["backends"]) == set(tk.available_backends())
    for name, status in tk.available_backends().items():
        assert facts["backends"][name]["available"] == bool(status)
        assert facts["backends"][name]["detail"] == str(status)


def test_info_names_every_backend_and_why_one_is_missing(capsys):
    code, out, _ = call(capsys, "info")
    assert code == 0
    for name, status in tk.available_backends().items():
        assert any(line.split()[:1] == [name] and str(status) in line for line in out.splitlines())
