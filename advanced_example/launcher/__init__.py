"""Runs an example: ./run.sh starts __main__.py. Flower needs none of it; only an example's own launch.py imports it."""
