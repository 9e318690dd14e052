"""Tests and measures the GPU backend on the machine it runs on, and prints one table: ``python -m scripts.gpu_check``.

Nothing is installed, fetched or built ahead: Triton compiles its kernels when they are first launched, and the native
module is not needed. Each thing measured is a unit that may fail, hang or crash the device alone; all that was found is
written as it comes. ``--dry-run`` runs every unit on a CPU, in sizes at which figures mean nothing.
"""
