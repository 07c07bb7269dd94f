"""Runs an example: ./run.sh starts it. Nothing imports it but an example's own launch.py: Flower needs none of it."""
