"""Flower's grid, and around it what every run needs: waiting, refusing bad replies, order, and a record of each round.

Strategies stay the library's: they reach the clients through a `Grid`, so one wrapper of it serves them all.
"""

import random
import time
from collections.abc import Callable, Iterable
from logging import WARNING
from typing import Any

from flwr.app import Context, Message, MessageType, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from launcher.nodes import Nodes
from launcher.record import Record
from launcher.replies import busy, client_rows, fault, mean_metrics, memory, odd_ones_out, payload

CONNECT_TIMEOUT = 60.0  # seconds to wait for clients that are not connected
ANSWER_PATIENCE = 30.0  # seconds without one more answer, after which who has not said its partition id is left out
FIRST_ANSWER = 180.0  # seconds that the first answer may take: on a busy machine Ray's workers start slowly
PULL_INTERVAL = 0.25  # seconds at most between two looks for replies; Flower's own grid sleeps 3
PULL_SHARE = 0.02  # of the time may go into looking: a look is quick in a simulation, and costs on the network


class RunGrid(Record, Grid):
    """Wraps Flower's `Grid`: `strategy.start(grid=RunGrid(grid, context), ...)` is all that a server has to do.

    What it keeps of the rounds, and how, is in `Record`.
    """

    def __init__(self, grid: Grid, context: Context) -> None:
        Record.__init__(self, context)
        self._grid = grid
        self._min_clients = int(context.run_config["min-clients"])
        self._sampled = int(context.run_config["sampled-clients"])
        self._seed = int(context.run_config["seed"])
        self._wanted = self._history["clients"]  # how many to wait for: all of them, and after that MIN_CLIENTS
        self._waited = False  # whether that first wait is over
        self._nodes = Nodes(self.folder)

    # --- The clients -------------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """The clients that are connected, in the order of their partition ids where only some of them are sampled.

        Waits until there are enough; raises TimeoutError where there are too few after a minute.
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while len(nodes := self._nodes.left(self._grid.get_node_ids())) < self._wanted - len(self._nodes.lost()):
            if time.monotonic() > deadline:
                break
            time.sleep(PULL_INTERVAL)
        if len(nodes) < self._wanted:
            log(WARNING, "%d of %d clients are connected", len(nodes), self._wanted)
        self._wanted = self._min_clients
        if not self._waited:
            self._waited = True
            self.begin()
        if len(nodes) > self._sampled:  # it matters who is drawn: ask each node once for its partition id
            known = self._nodes.partition_of
            unknown = [node for node in nodes if node not in known]
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
            answered = self._exchange(queries, patience=ANSWER_PATIENCE)
            nodes = [node for node in nodes if node in known or node in answered]
        if len(nodes) < self._min_clients:
            raise TimeoutError(f"{len(nodes)} clients answer, and a round needs {self._min_clients}")
        # Strategies draw their sample next, from Python's global generator. So does Flower, for its heartbeats, when
        # one is due: only a seed for each sample makes the samples repeatable.
        phases = sum(phase in entry for entry in self.rounds for phase in (MessageType.TRAIN, MessageType.EVALUATE))
        random.seed(f"{self._seed} {phases}")
        return self._nodes.ordered(nodes)

    # --- Messages ----------------------------------------------------------------------------------------------------

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, wait for the replies, and return those that can be used, in the order of partition ids.

        Raises RuntimeError, with the first reason, where there is none.
        """
        messages = list(messages)
        if not messages:  # the strategy skips this phase: the round ends without it
            self.end_round()
            return []
        phase, content = messages[0].metadata.message_type, messages[0].content
        config = dict(next(iter(content.config_records.values())))
        server_round, began = config.pop("server-round"), time.time()
        replies = self._exchange(
            messages, timeout, tell=lambda done: self.progress(server_round, phase, done, len(messages))
        )
        reasons = {m.metadata.dst_node_id: "no reply in time, or the client is gone" for m in messages}
        reasons |= {node: fault(reply, content, self.examples) for node, reply in replies.items()}
        reasons |= odd_ones_out({node: replies[node] for node, reason in reasons.items() if reason is None})
        nodes, partition_of = self._nodes.ordered(list(reasons)), self._nodes.partition_of
        good = [replies[node] for node in nodes if reasons[node] is None]
        failures = [
            {"partition-id": partition_of.get(node), "reason": reasons[node]} for node in nodes if reasons[node]
        ]
        entry = self.round(server_round)
        entry["phase_seconds"][phase] = round(busy(replies.values(), since=began), 2)
        entry[phase] = {**(mean_metrics(good) if good else {}), "clients": len(good), "failures": failures}
        entry[phase].update(config=config, by_client=client_rows(good))
        entry["bytes"] += sum(payload(message) for message in [*messages, *replies.values()])
        self.note_memory(memory(good))
        for failure in failures:
            log(WARNING, "round %s, %s: partition %s: %s", entry["round"], phase, *failure.values())
        if not good:
            self.end_round(last=True)
            raise RuntimeError(f"round {entry['round']}: no client could {phase}. The first: {failures[0]['reason']}")
        if phase == MessageType.EVALUATE:
            self.end_round()
        return good

    def _exchange(
        self,
        messages: list[Message],
        timeout: float | None = None,
        patience: float | None = None,
        tell: Callable[[int], None] = lambda done: None,
    ) -> dict[int, Message]:
        """Push messages, and pull the replies, by node id, until all are here, time is up, or the rest are lost.

        `timeout` counts from the start, `patience` from the last reply, both in seconds; `tell` is told how
        many replies are here, from none on.
        """
        tell(0)
        if messages:
            self._grid.push_messages(messages)
        waiting = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        began = latest = time.monotonic()
        replies: dict[int, Message] = {}
        while True:
            looked = time.monotonic()
            for reply in self._grid.pull_messages(list(waiting)) if waiting else ():
                node = waiting.pop(reply.metadata.reply_to_message_id)
                replies[node] = reply
                latest = time.monotonic()
                self._nodes.note(node, reply)
                tell(len(replies))
            now = time.monotonic()
            over = timeout is not None and now > began + timeout
            if patience is not None:
                over |= now > latest + (patience if replies else max(patience, FIRST_ANSWER))
            if over or not self._nodes.left(list(waiting.values())):
                return replies
            time.sleep(min(PULL_INTERVAL, (now - looked) / PULL_SHARE))

    # --- The rest is the wrapped grid's ------------------------------------------------------------------------------

    def set_run(self, run: Any) -> None:
        self._grid.set_run(run)

    @property
    def run(self) -> Any:
        return self._grid.run

    def create_message(self, *args: Any, **kwargs: Any) -> Message:
        return self._grid.create_message(*args, **kwargs)

    def push_messages(self, messages: Iterable[Message]) -> Iterable[str]:
        return self._grid.push_messages(messages)

    def pull_messages(self, message_ids: Iterable[str]) -> Iterable[Message]:
        return self._grid.pull_messages(message_ids)
