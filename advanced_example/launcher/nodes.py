"""Which client is which: Flower numbers its nodes at random, and what a client sends says which partition it holds."""

import re
from pathlib import Path

from flwr.app import Message


class Nodes:
    """Node ids and partition ids, as far as replies have told them; and whose process has ended."""

    def __init__(self, run_dir: Path) -> None:
        self._run_dir = run_dir
        self.partition_of: dict[int, int] = {}  # node id -> partition id

    def note(self, node: int, reply: Message) -> None:
        """Learn from a reply, or from an error, whose it is."""
        if reply.has_error():
            tag = re.search(r"partition (\d+): ", reply.error.reason or "")
            if tag:
                self.partition_of[node] = int(tag[1])
        elif "client" in reply.content:
            self.partition_of[node] = int(reply.content["client"]["partition-id"])

    def lost(self) -> set[int]:
        """The partitions of clients whose process has ended, as the launcher saw; Flower notices after a minute."""
        try:
            return {int(partition) for partition in (self._run_dir / "lost-clients").read_text().split()}
        except FileNotFoundError:
            return set()

    def left(self, nodes: list[int]) -> list[int]:
        """Those whose process has not ended."""
        lost = self.lost()
        return [node for node in nodes if self.partition_of.get(node) not in lost]

    def ordered(self, nodes: list[int]) -> list[int]:
        """By partition id; those that have not told it come last."""
        return sorted(nodes, key=lambda node: (self.partition_of.get(node, float("inf")), node))
