"""Schemas of requests. Every field that a client may send is named here; what is not named is refused, not ignored."""
