"""What a run writes down: atoms, the labels that carry them, and how they met."""
