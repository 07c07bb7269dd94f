"""Guards the rounds, whose loop is Flower's own. server.py and client.py import it; no need to read it to learn."""
