"""Wraps Flower's grid: waits for clients, knows them by their partition ids, and looks for replies more often."""

import math
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
ASK_AT_ONCE, ANSWER_TIMEOUT = 16, 180.0  # clients that are asked side by side; seconds for their answers
PULL_INTERVAL = 0.25  # seconds at most between two looks for replies; Flower's own grid sleeps 3
PULL_SHARE = 0.02  # of the time that may go into looking: a look is quick in a simulation, and costs on the network


class PatientGrid:
    """Stands in for Flower's `Grid` before a strategy."""

    def __init__(self, grid: Grid, folder: Path, clients: int | None, min_clients: int) -> None:
        self.grid, self.folder, self.min_clients = grid, folder, min_clients
        self.wanted = clients or min_clients  # how many to wait for: all of them at first, then `min_clients`
        self.partition_of: dict[int, int] = {}  # by node id, of all that were ever connected
        self.node_of: dict[int, int] = {}  # by partition id, of those that are now
        self.asked: set[int] = set()
        self.seed = ""  # of the next sample
        self.report: Callable[[int, int], None] | None = None  # is told how far a phase is: replies, messages

    def __getattr__(self, name: str) -> Any:  # all else is the wrapped grid's
        return getattr(self.grid, name)

    def get_node_ids(self) -> list[int]:
        """Return the connected clients by partition id, once there are enough. Raises TimeoutError after a minute."""
        deadline = time.monotonic() + CONNECT_TIMEOUT
        nodes = self.alive(self.grid.get_node_ids())
        while len(nodes) < max(self.min_clients, self.wanted - len(self.lost)) and time.monotonic() < deadline:
            time.sleep(PULL_INTERVAL)
            nodes = self.alive(self.grid.get_node_ids())
        if len(nodes) < self.min_clients:
            raise TimeoutError(f"{len(nodes)} clients are connected, and a round needs {self.min_clients}")
        self.wanted = self.min_clients
        unknown = [node for node in nodes if node not in self.partition_of and node not in self.asked]
        self.asked.update(unknown)  # once: who doesn't say it, such as a client without mods, stays unknown
        for i in range(0, len(unknown), ASK_AT_ONCE):
            # "train", since mods run for registered types only; without content, which the mod `named` answers
            questions = [Message(RecordDict(), node, MessageType.TRAIN) for node in unknown[i : i + ASK_AT_ONCE]]
            self.send_and_receive(questions, timeout=ANSWER_TIMEOUT)
        nodes = self.ordered(nodes)
        self.node_of = {partition: node for node, partition in self.partition_of.items() if node in nodes}  # the newest
        random.seed(self.seed)  # strategies draw their sample next, and Flower's heartbeats use the same generator
        return nodes

    def ordered(self, nodes: Iterable[int]) -> list[int]:
        """Sort nodes by partition id, those of unknown partition last."""
        return sorted(nodes, key=lambda node: (self.partition_of.get(node, math.inf), node))

    def alive(self, nodes: Iterable[int]) -> list[int]:
        """Return the nodes that have not died, as the launcher saw at once; Flower notices after a minute."""
        partition_of, self.lost = history.clients(self.folder)
        self.partition_of.update(partition_of)
        return [node for node in nodes if self.partition_of.get(node) not in self.lost]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages; return the replies that come within `timeout` seconds, without those of clients that die."""
        messages, replies = list(messages), []
        pushed = set(self.grid.push_messages(messages))  # without those that Flower could not take
        sent = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        waiting = {number: node for number, node in sent.items() if number in pushed}
        report = self.report or (lambda replies, messages: None)
        report(0, len(messages))
        deadline = time.monotonic() + (math.inf if timeout is None else timeout)
        while waiting:
            looked = time.monotonic()
            came = list(self.grid.pull_messages(list(waiting)))
            for reply in came:
                waiting.pop(reply.metadata.reply_to_message_id)
                replies.append(reply)
                if (identity := partition_id(reply)) is not None:
                    self.partition_of.setdefault(reply.metadata.src_node_id, identity)
                    self.node_of.setdefault(identity, reply.metadata.src_node_id)
            if came:
                report(len(replies), len(messages))
            now = time.monotonic()
            if now > deadline or not self.alive(waiting.values()):
                break
            time.sleep(min(PULL_INTERVAL, (now - looked) / PULL_SHARE) if waiting else 0)
        return replies
