"""The numerics under `spectra`: decompositions, power-law fits, nulls, scores of a single weight."""
