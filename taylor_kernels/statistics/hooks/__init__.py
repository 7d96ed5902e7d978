"""How statistics see a running model: hooks on its passes, its outputs and its norms."""
