"""The alpha explorer: one plain state, its picture, its widgets, and the same as an offline page."""
