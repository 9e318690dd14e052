"""Ranks: the groups that layers communicate through, the ledger of what went through them, and the lines that ranks
start, follow and end by. Lines and places need no torch, so that a rank shows signs of life while it imports it.
"""
