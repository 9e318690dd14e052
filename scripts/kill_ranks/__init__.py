"""Kills and stops ranks of a running engine at random moments, and checks that nothing hangs and nothing is left.

python -m scripts.kill_ranks --trials 100
"""
