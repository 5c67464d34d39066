"""Functions from data to a matplotlib Figure. No model, no pyplot."""
