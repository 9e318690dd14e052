"""Requests become steps, steps become tokens: scheduler, runner, sampler and the engine that joins them."""
