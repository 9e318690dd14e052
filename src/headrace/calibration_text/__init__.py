"""Plain English that models are calibrated on unless the user has text of their own."""

from pathlib import Path


def calibration_text() -> str:
    """About 1500 words: prose on inference and on general facts, a dialogue, figures, a list and some code."""
    return (Path(__file__).resolve().parent / "text.txt").read_text(encoding="utf-8")
