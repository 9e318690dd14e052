"""Ranks on hosts of their own, played by network namespaces of this one: what they put on the wire can be counted, and
the wire be made slow. Needs root."""
