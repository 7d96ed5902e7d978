from __future__ import annotations

import pytest

pytest.importorskip("torch_pruning", reason="no torch_pruning here: pip install torch-pruning")
