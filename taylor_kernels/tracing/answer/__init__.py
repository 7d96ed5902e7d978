"""What a trace says: channels in groups and units, what their removal asks, table and picture."""
