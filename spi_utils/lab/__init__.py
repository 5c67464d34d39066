"""The compactness lab: the preprint's experiments, its synthetic ones and the ones that it implies."""
