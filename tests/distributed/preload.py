"""What the processes of these tests would otherwise each import, for seconds."""

from contextlib import suppress

import torch._dynamo
import torch.distributed.tensor  # noqa: F401

import taylor_kernels  # noqa: F401
from tests.distributed import launch  # noqa: F401

with suppress(ImportError):  # of what the demo needs: its tests are skipped then
    from taylor_kernels.studies.own import artifacts, pages, run  # noqa: F401
