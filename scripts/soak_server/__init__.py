"""A server under 500 clients of which every tenth leaves: does it stay up, and leave nothing behind?

`python -m scripts.soak_server --minutes 3` starts one, loads it, and says what it found.
"""
