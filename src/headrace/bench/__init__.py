"""Measurements of a loaded model and of the machine's limits; how they are shown is the command line's business."""
