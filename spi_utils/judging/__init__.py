"""Variants, controls, numbers and the audit: the parts of `evaluate`."""
