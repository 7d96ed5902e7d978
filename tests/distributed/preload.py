"""What the processes of these tests would otherwise each import, for seconds."""

import torch._dynamo
import torch.distributed.tensor  # noqa: F401

import taylor_kernels  # noqa: F401
from tests.distributed import launch  # noqa: F401
