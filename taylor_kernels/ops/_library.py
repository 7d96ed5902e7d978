"""The torch.library namespace that the ops register themselves in."""

import torch

library = torch.library.Library("taylor_kernels", "DEF")
