"""Short names for contents: what differs in one byte has another digest."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from pathlib import Path

import torch
from torch import Tensor


def digest(*parts: str | bytes) -> str:
    """16 hexadecimal digits that stand for the parts."""
    total = hashlib.sha256()
    for part in parts:
        data = part.encode() if isinstance(part, str) else part
        total.update(f"{len(data)}:".encode())
        total.update(data)
    return total.hexdigest()[:16]


def digest_tensors(tensors: Iterable[Tensor]) -> str:
    """The digest of the values, shapes and dtypes of tensors."""
    parts: list[str | bytes] = []
    for tensor in tensors:
        flat = tensor.detach().cpu().contiguous().flatten()
        parts += [f"{tuple(tensor.shape)} {tensor.dtype}", flat.view(torch.uint8).numpy().tobytes()]
    return digest(*parts)


def digest_files(files: Iterable[Path]) -> str:
    """The digest of the contents of files."""
    return digest(*(file.read_bytes() for file in sorted(files)))
