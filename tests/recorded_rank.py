"""A rank as `headrace.engine.rank_process` runs it, on kernels whose decode steps are recorded and replayed."""

from recorded_kernels import with_recordings

from headrace.engine import load_rank, rank_process


def record_decode_steps() -> None:
    """In this process, whatever is loaded from now on."""
    resolve = load_rank.resolve_kernels
    load_rank.resolve_kernels = lambda *args, **kwargs: with_recordings(resolve(*args, **kwargs))


if __name__ == "__main__":
    record_decode_steps()
    rank_process.main()
