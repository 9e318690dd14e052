"""Ranks: the `Group` that layers communicate through, the ledger of what went through it, and how a model is cut."""

from headrace.parallel.group import Group, OneRankGroup
from headrace.parallel.ledger import LedgerRow

__all__ = ["Group", "LedgerRow", "OneRankGroup"]
