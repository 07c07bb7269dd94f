"""Machinery that server.py and client.py import beside Flower. You need not read it to learn federated learning."""
