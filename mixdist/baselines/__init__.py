"""Baselines, which mixtures are compared with: densities in closed form, clusterings, one expert trained alone."""
