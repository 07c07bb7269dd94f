"""Machinery that ./run.sh starts: it checks what is asked for, starts server and clients, watches, and stops them."""
