"""Ranks: the `Group` that layers communicate through, and how a model is cut among ranks."""

from headrace.parallel.group import Group, OneRankGroup

__all__ = ["Group", "OneRankGroup"]
