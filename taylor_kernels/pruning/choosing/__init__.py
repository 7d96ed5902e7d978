"""Which units may go and what they cost, and which of them go next under a budget."""
