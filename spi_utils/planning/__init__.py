"""Scores, rules, prices and exact selection: the parts of `plan`. No torch."""
