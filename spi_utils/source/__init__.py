"""Where a model comes from, and its weights one at a time."""
