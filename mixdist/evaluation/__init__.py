"""Evaluation of a mixture on held-out rows."""
