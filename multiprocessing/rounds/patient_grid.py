"""Wraps Flower's grid: waits for clients, knows them by their partition ids, and looks for replies more often."""

import random
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

from flwr.app import Message, MessageType, RecordDict
from flwr.serverapp import Grid

from rounds import history
from rounds.replies import partition_id

CONNECT_TIMEOUT = 60.0  # seconds to wait for clients that are not connected
TELL_TIMEOUT = 5.0  # of these, for the launcher to say which client is which
ASK_AT_ONCE, ANSWER_TIMEOUT = 16, 180.0  # clients that are asked side by side; seconds for their answers
PULL_INTERVAL = 0.25  # seconds at most between two looks for replies; Flower's own grid sleeps 3
PULL_SHARE = 0.02  # of the time that may go into looking: a look is quick in a simulation, and costs on the network


class PatientGrid:
    """Stands in for Flower's `Grid` before a strategy."""

    def __init__(self, grid: Grid, folder: Path, clients: int | None, min_clients: int) -> None:
        self.grid, self.folder, self.min_clients = grid, folder, min_clients
        self.wanted = clients or min_clients  # how many to wait for: all of them at first, then `min_clients`
        self.partition_of: dict[int, int] = {}  # node id -> partition id
        self.connected: list[int] = []
        self.asked: set[int] = set()
        self.seed = ""  # of the next sample
        self.tell: Callable[[int, int], None] = lambda replies, messages: None

    def __getattr__(self, name: str) -> Any:  # all else is the wrapped grid's
        return getattr(self.grid, name)

    def get_node_ids(self) -> list[int]:
        """Return the connected clients by partition id, once there are enough; raise TimeoutError after a minute."""
        began = time.monotonic()
        while True:
            nodes, waited = self.left(self.grid.get_node_ids()), time.monotonic() - began
            told = history.clients(self.folder)
            enough = len(nodes) >= max(self.min_clients, self.wanted - len(told[1] if told else ()))
            if waited > CONNECT_TIMEOUT or (enough and (not told or waited > TELL_TIMEOUT or self.known(nodes))):
                break
            time.sleep(PULL_INTERVAL)
        if len(nodes) < self.min_clients:
            raise TimeoutError(f"{len(nodes)} clients are connected, and a round needs {self.min_clients}")
        self.wanted = self.min_clients
        self.ask([node for node in nodes if node not in self.partition_of and node not in self.asked])
        self.connected = self.ordered(nodes)
        random.seed(self.seed)  # strategies draw their sample next, and Flower's heartbeats use the same generator
        return self.connected

    def ordered(self, nodes: Iterable[int]) -> list[int]:
        """Sort nodes by partition id, those of unknown partition last."""
        return sorted(nodes, key=lambda node: (self.partition_of.get(node, float("inf")), node))

    def owner(self, partition: int | None) -> int | None:
        """Return the first connected node that has a partition id; None where it is unknown, or nobody has it."""
        owners = (node for node in self.connected if self.partition_of.get(node) == partition)
        return None if partition is None else next(owners, None)

    def left(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes that have not died, as the launcher saw at once; Flower notices after a minute."""
        partition_of, lost = history.clients(self.folder) or ({}, set())
        self.partition_of.update(partition_of)
        return [node for node in nodes if self.partition_of.get(node) not in lost]

    def known(self, nodes: list[int]) -> bool:
        return all(node in self.partition_of for node in nodes)

    def ask(self, nodes: list[int]) -> None:
        """Ask each client once for its partition id; one that does not say it, such as a client without mods, stays."""
        self.asked.update(nodes)
        for i in range(0, len(nodes), ASK_AT_ONCE):
            # "train", since mods run for registered types only; without content, which the mod `named` answers
            questions = [Message(RecordDict(), node, MessageType.TRAIN) for node in nodes[i : i + ASK_AT_ONCE]]
            self.exchange(questions, ANSWER_TIMEOUT)

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages; return the replies that come within `timeout` seconds, without those of clients that die."""
        return self.exchange(list(messages), timeout, self.tell)

    def exchange(
        self, messages: list[Message], timeout: float | None, tell: Callable[[int, int], None] | None = None
    ) -> list[Message]:
        if messages:
            self.grid.push_messages(messages)
        waiting = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        replies: list[Message] = []
        told, deadline = -1, time.monotonic() + (float("inf") if timeout is None else timeout)
        while self.left(waiting.values()):
            looked = time.monotonic()
            for reply in self.grid.pull_messages(list(waiting)):
                waiting.pop(reply.metadata.reply_to_message_id)
                replies.append(reply)
                if (identity := partition_id(reply)) is not None:
                    self.partition_of.setdefault(reply.metadata.src_node_id, identity)
            if tell and told < len(replies):
                told = len(replies)
                tell(told, len(messages))
            now = time.monotonic()
            if now > deadline:
                break
            time.sleep(min(PULL_INTERVAL, (now - looked) / PULL_SHARE) if waiting else 0)
        return replies
