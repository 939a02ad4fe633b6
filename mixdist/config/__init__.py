"""Parsing of the config, and building objects from it."""
