"""Checkpoints and the decoder they fill: one skeleton, one short file per family."""
