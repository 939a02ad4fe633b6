"""Ranks: who they are, what crosses the wire, the primitives of a step."""
