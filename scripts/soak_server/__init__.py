"""A server under 500 clients of which every tenth leaves: does it stay up, and leave nothing behind?

`python -m scripts.soak_server --minutes 3` starts one, loads it, and says what it found. With `--kills 5` the model is
spread over two ranks, of which one is killed that often: what runs is lost with a word, and the server is there again.
"""
