"""One file per engine that Headrace is compared with, each run in that engine's own environment.

Only the standard library and the engine are needed here, never Headrace.
"""
