"""Comparisons that need more than Headrace: other engines, their environments and converted models."""
