"""torch.ops.taylor_kernels.*, called without the functions in front of them.

What the kernels trust is checked in the ops too. The calls run in a child process, since one that
is not refused may end it.
"""

from __future__ import annotations

import pytest
import torch

import taylor_kernels as tk
from tests.helpers.programs import run_program

SETUP = """
import torch
import taylor_kernels
torch.set_num_threads(1)
ops = torch.ops.taylor_kernels
def t(*shape, **kind): return torch.ones(*shape, **kind)
big, one, w = t(512, 512, 3, 3), t(1, 1, 3, 3), t(64, 8, 3, 3)
y = t(4, 6, 3, 3)
x, dy, geometry = t(2, 6, 8, 8), t(2, 4, 8, 8), ([1, 1], [1, 1], [1, 1])
half, double = dict(dtype=torch.float16), dict(dtype=torch.float64)
moments, fisher, size = ops.filter_moments, ops.conv2d_fisher, [4, 6, 3, 3]
mixed = [w, w.double()]
"""

#: An expression, the error that it raises, and how its message begins.
CALLS = [
    (call, *said.split(": ", 1))
    for said, call in (
        line.split(" <- ")
        for line in """\
ValueError: grads[0]: shape <- moments([big], [one], [1], True, False, None)
ValueError: grads[0]: dtype <- moments([w], [w.half()], [1], True, False, None)
TypeError: grads[0]: layout <- moments([w], [w.to_sparse()], [1], True, False, None)
TypeError: weights[0]: dtype <- moments([w.int()], [w.int()], [1], True, False, None)
ValueError: groups: 100 does not divide <- moments([w], [w], [100], True, True, None)
ValueError: groups: 3 does not divide <- moments([w], [w], [3], True, True, None)
ValueError: groups: 0 is not <- moments([w], [w], [0], True, True, None)
ValueError: groups: -1 is not <- moments([w], [w], [-1], True, True, None)
ValueError: weights: 1 of them <- moments([w], [w], [1, 1], True, True, None)
ValueError: weights: 2 of them <- moments([w, w], [w], [1, 1], True, True, None)
ValueError: weights: no tensors <- moments([], [], [], True, True, None)
ValueError: weights[0]: has no dim 1 <- moments([t(3)], [t(3)], [1], True, True, None)
ValueError: weights[0]: has 0 dim <- moments([t(())], [t(())], [1], True, False, None)
ValueError: weights: one call <- moments(mixed, mixed, [1, 1], True, False, None)
ValueError: hvps[0]: shape <- ops.second_order_moments([w], [w], [one], [1], True, False, None)
ValueError: hvps[0]: shape <- ops.hutchinson_moments([w], [one], [1], True, False, 0, [0], None)
ValueError: streams: 0 values <- ops.hutchinson_moments([w], [w], [1], True, False, 0, [], None)
ValueError: streams: -1 <- ops.hutchinson_moments([w], [w], [1], True, False, 0, [-1], None)
ValueError: grad_output: shape <- ops.gate_gradients(y, y[:2], None, 1, None)
ValueError: grad_output: dtype <- ops.gate_gradients(y, y.half(), None, 1, None)
ValueError: bias: shape <- ops.gate_gradients(y, y, t(5), 1, None)
ValueError: channel_dim: -1 <- ops.gate_gradients(y, y, None, -1, None)
ValueError: channel_dim: 0 <- ops.gate_gradients(y, y, None, 0, None)
ValueError: channel_dim: 4 <- ops.gate_gradients(y, y, None, 4, None)
ValueError: output: has shape <- ops.gate_gradients(t(4), t(4), None, 1, None)
ValueError: grad_output: has shape <- fisher(x, dy[:1], None, size, *geometry, 1, False, None)
ValueError: grad_output: dtype <- fisher(x, dy.half(), None, size, *geometry, 1, False, None)
ValueError: weight: shape <- fisher(x, dy, t(1), size, *geometry, 1, False, None)
ValueError: weight_size: expected 4 <- fisher(x, dy, None, [4, 6, 3], *geometry, 1, False, None)
ValueError: grad_output: has shape <- fisher(x, dy, None, [4, 6, 9, 9], *geometry, 1, False, None)
ValueError: groups: 0 <- fisher(x, dy, None, size, *geometry, 0, False, None)
ValueError: stride: expected <- fisher(x, dy, None, size, [0, 1], [1, 1], [1, 1], 1, False, None)
ValueError: input: has shape <- fisher(x[0], dy, None, size, *geometry, 1, False, None)
ValueError: counts: -64 <- ops.rademacher(w, [-64], 0, [0], None)
ValueError: streams: 0 values <- ops.rademacher(w, [64], 0, [], None)
ValueError: streams: 4294967296 <- ops.rademacher(w, [64], 0, [2**32], None)
TypeError: like: dtype <- ops.rademacher(w.int(), [64], 0, [0], None)
""".splitlines()
    )
]


@pytest.fixture(scope="module")
def said() -> list[str]:
    """What came of each call, as far as the child process got."""
    program = SETUP + (
        f"for call in {[call for call, _, _ in CALLS]!r}:\n"
        "    try:\n"
        "        eval(call)\n"
        "        print('accepted', flush=True)\n"
        "    except Exception as error:\n"
        "        print(type(error).__name__, str(error).splitlines()[0], flush=True)\n"
    )
    child = run_program(program)
    lines = child.stdout.splitlines()
    return lines + [f"ended with {child.returncode}"] * (len(CALLS) - len(lines))


@pytest.mark.parametrize("i", range(len(CALLS)), ids=[call for call, _, _ in CALLS])
def test_a_bad_argument_is_refused(said, i):
    _, error, message = CALLS[i]
    assert said[i].startswith(f"{error} {message}")


@pytest.mark.parametrize("backend", ["cpu", "reference"])
def test_vmap_over_no_slices_gives_no_slices(backend):
    def moments(w, g):
        return tk.filter_moments(w, g, dim=(0, 1), backend=backend)

    rows, columns = torch.vmap(moments)(torch.ones(0, 4, 3), torch.ones(0, 4, 3))
    assert (rows.shape, columns.shape) == ((0, 4, 5), (0, 3, 5))
    y = torch.ones(2, 0, 4, 6)
    gates = torch.vmap(lambda y: tk.gate_gradients(y, y, backend=backend), in_dims=1)(y)
    assert gates.shape == (0, 2, 4)


def test_a_dtensor_is_refused_with_what_to_do():
    """A sharded parameter as FSDP2 keeps it, in a world of one process."""
    program = (
        "import torch, torch.distributed as dist, taylor_kernels as tk\n"
        "from torch.distributed.device_mesh import init_device_mesh\n"
        "from torch.distributed.tensor import Shard, distribute_tensor\n"
        "dist.init_process_group('gloo', store=dist.HashStore(), rank=0, world_size=1)\n"
        "w = distribute_tensor(torch.ones(4, 3), init_device_mesh('cpu', (1,)), [Shard(0)])\n"
        "for call in (tk.filter_moments, tk.gate_gradients):\n"
        "    for pair in ((w, w), (torch.ones(4, 3), w)):\n"
        "        try:\n"
        "            call(*pair)\n"
        "        except TypeError as error:\n"
        "            print(error)\n"
    )
    child = run_program(program)
    lines = child.stdout.splitlines()
    assert [line.partition(":")[0] for line in lines] == [
        "weights", "grads", "output", "grad_output"
    ], child.stderr  # fmt: skip
    assert all("a DTensor is not supported; pass tensor.full_tensor()" in line for line in lines)
