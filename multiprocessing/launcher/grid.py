"""Flower's grid, and around it what every run needs: waiting, refusing bad replies, order, and a record of each round.

Strategies stay the library's: they reach the clients through a `Grid`, so one wrapper of it serves them all.
"""

import os
import platform
import random
import re
import time
from collections.abc import Callable, Iterable, Mapping
from importlib.metadata import version
from logging import WARNING
from pathlib import Path
from typing import Any

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MessageType, MetricRecord, RecordDict
from flwr.common import log
from flwr.serverapp import Grid

from launcher.replies import client_rows, fault, mean_metrics, memory, model_sha256, odd_ones_out, payload
from launcher.results import last, load_history, make_run_folder, save_history, write_model

CONNECT_TIMEOUT = 60.0  # seconds to wait for clients that are not connected
ANSWER_PATIENCE = 30.0  # seconds without one more answer, after which who has not said its partition id is left out
PULL_INTERVAL = 0.25  # seconds; Flower's own grid sleeps 3


class RunGrid(Grid):
    """Wraps Flower's `Grid`: `strategy.start(grid=RunGrid(grid, context), ...)` is all that a server has to do.

    The run's folder is RUN_DIR, which the launcher sets, else a new one in ./runs.
    """

    def __init__(self, grid: Grid, context: Context) -> None:
        self._grid = grid
        self._min_clients = int(context.run_config["min-clients"])
        self._sampled = int(context.run_config["sampled-clients"])
        self._wanted = self._min_clients  # how many clients to wait for; for round 1 it is all of them
        self._partition_of: dict[int, int] = {}  # node id -> partition id, as far as it is known
        self._since = time.monotonic()  # when the round under way began
        self._waited = False  # whether the wait for clients before the first round is over
        self._server_evaluates = False
        self.folder = Path(os.environ.get("RUN_DIR") or make_run_folder(Path("runs").absolute()))
        try:
            self._history = load_history(self.folder)  # the launcher wrote down what was asked for
            self._wanted = self._history["clients"]
        except FileNotFoundError:  # no launcher: `flwr run` by hand, or several machines
            counts = {"clients": self._min_clients, "min_clients": self._min_clients, "sampled": self._sampled}
            name, dataset = context.run_config.get("example", "app"), os.environ.get("DATASET", "auto")
            self._history = {"schema": 1, "example": name, "dataset": dataset, "status": "running", **counts}
        versions = {"python": platform.python_version(), **{name: version(name) for name in ("flwr", "torch", "numpy")}}
        self._history.update(config=dict(context.run_config), rounds=[], versions=versions)
        self._seed = int(context.run_config["seed"])

    # --- The clients -------------------------------------------------------------------------------------------------

    def get_node_ids(self) -> list[int]:
        """The clients that are connected, in the order of their partition ids where only some of them are sampled.

        Waits until there are enough; raises TimeoutError where there are too few after a minute.
        """
        deadline = time.monotonic() + CONNECT_TIMEOUT
        while len(nodes := self._connected()) < self._wanted - len(self._lost_partitions()):
            if time.monotonic() > deadline:
                break
            time.sleep(PULL_INTERVAL)
        if len(nodes) < self._wanted:
            log(WARNING, "%d of %d clients are connected", len(nodes), self._wanted)
        self._wanted = self._min_clients
        if not self._waited:
            self._since, self._waited = time.monotonic(), True
        if len(nodes) > self._sampled:  # it matters who is drawn: ask each node once for its partition id
            unknown = [node for node in nodes if node not in self._partition_of]
            queries = [Message(RecordDict(), node, MessageType.QUERY) for node in unknown]
            answered = self._exchange(queries, patience=ANSWER_PATIENCE)
            nodes = [node for node in nodes if node in self._partition_of or node in answered]
        if len(nodes) < self._min_clients:
            raise TimeoutError(f"{len(nodes)} clients answer, and a round needs {self._min_clients}")
        # Strategies draw their sample next, from Python's global generator. So does Flower, for its heartbeats, when
        # one is due: only a seed for each sample makes the samples repeatable.
        phases = sum(phase in entry for entry in self.rounds for phase in (MessageType.TRAIN, MessageType.EVALUATE))
        random.seed(f"{self._seed} {phases}")
        return sorted(nodes, key=self._order)

    def _connected(self) -> list[int]:
        lost = self._lost_partitions()
        return [node for node in self._grid.get_node_ids() if self._partition_of.get(node) not in lost]

    def _lost_partitions(self) -> set[int]:
        """Clients whose process has ended, as the launcher saw; Flower itself notices after a minute."""
        try:
            return {int(partition) for partition in (self.folder / "lost-clients").read_text().split()}
        except FileNotFoundError:
            return set()

    def _order(self, node: int) -> tuple[float, int]:
        return self._partition_of.get(node, float("inf")), node

    # --- Messages ----------------------------------------------------------------------------------------------------

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        """Send messages, wait for the replies, and return those that can be used, in the order of partition ids.

        Raises RuntimeError, with the first reason, where there is none.
        """
        messages = list(messages)
        if not messages:  # the strategy skips this phase: the round ends without it
            self._end_round()
            return []
        phase, content = messages[0].metadata.message_type, messages[0].content
        replies = self._exchange(messages, timeout)
        reasons = {m.metadata.dst_node_id: "no reply in time, or the client is gone" for m in messages}
        reasons |= {node: fault(reply, content) for node, reply in replies.items()}
        reasons |= odd_ones_out({node: replies[node] for node, reason in reasons.items() if reason is None})
        nodes = sorted(reasons, key=self._order)
        good = [replies[node] for node in nodes if reasons[node] is None]
        failures = [
            {"partition-id": self._partition_of.get(node), "reason": reasons[node]} for node in nodes if reasons[node]
        ]
        config = dict(next(iter(content.config_records.values())))
        entry = self._round(config.pop("server-round"))
        entry[phase] = {**(mean_metrics(good) if good else {}), "clients": len(good), "failures": failures}
        entry[phase].update(config=config, by_client=client_rows(good))
        entry["bytes"] += sum(payload(message) for message in [*messages, *replies.values()])
        self.note_memory(memory(good))
        for failure in failures:
            log(WARNING, "round %s, %s: partition %s: %s", entry["round"], phase, *failure.values())
        if not good:
            self._server_evaluates = False
            self._end_round()
            raise RuntimeError(f"round {entry['round']}: no client could {phase}. The first: {failures[0]['reason']}")
        if phase == MessageType.EVALUATE:
            self._end_round()
        return good

    def _exchange(
        self, messages: list[Message], timeout: float | None = None, patience: float | None = None
    ) -> dict[int, Message]:
        """Push messages, and pull the replies, by node id, until all are here, time is up, or the rest are lost.

        `timeout` counts from the start, `patience` from the last reply, both in seconds.
        """
        if messages:
            self._grid.push_messages(messages)
        waiting = {message.metadata.message_id: message.metadata.dst_node_id for message in messages}
        began = latest = time.monotonic()
        replies: dict[int, Message] = {}
        while True:
            for reply in self._grid.pull_messages(list(waiting)) if waiting else ():
                node = waiting.pop(reply.metadata.reply_to_message_id)
                replies[node] = reply
                latest = time.monotonic()
                self._note_partition(node, reply)
            lost = self._lost_partitions()
            now = time.monotonic()
            over = (timeout is not None and now > began + timeout) or (patience is not None and now > latest + patience)
            if over or all(self._partition_of.get(node) in lost for node in waiting.values()):
                return replies
            time.sleep(PULL_INTERVAL)

    def _note_partition(self, node: int, reply: Message) -> None:
        if reply.has_error():
            tag = re.search(r"partition (\d+): ", reply.error.reason or "")
            if tag:
                self._partition_of[node] = int(tag[1])
        elif "client" in reply.content:
            self._partition_of[node] = int(reply.content["client"]["partition-id"])

    # --- The record --------------------------------------------------------------------------------------------------

    def recorded(self, evaluate_fn: Callable[[int, ArrayRecord], MetricRecord | None]) -> Callable[..., Any]:
        """Wrap a strategy's `evaluate_fn`, so that what it returns stands in the history under "server"."""

        self._server_evaluates = True

        def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            entry = self._round(server_round)
            metrics = evaluate_fn(server_round, arrays)
            entry["server"] = dict(metrics or {})
            self._end_round(after_server=True)
            return metrics

        return evaluate

    def note_memory(self, mib: Mapping[str, float]) -> None:
        """Put memory figures, in MiB, into the round under way; of each, the largest is kept."""
        if mib:
            noted = self._history["rounds"][-1].setdefault("memory", {})
            noted.update({name: max(round(value, 1), noted.get(name, 0.0)) for name, value in mib.items()})

    def aggregated(self, aggregate_fn: Callable[[list[RecordDict], str], MetricRecord]) -> Callable[..., Any]:
        """Wrap a strategy's `train_metrics_aggr_fn` or `evaluate_metrics_aggr_fn`: what it returns goes into the
        history, over the mean of the clients' metrics, under the phase that was last."""

        def aggregate(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
            found = aggregate_fn(replies, weighted_by_key)
            entry = self.rounds[-1]
            phase = MessageType.EVALUATE if MessageType.EVALUATE in entry else MessageType.TRAIN
            entry[phase].update({key.removeprefix("train_"): value for key, value in found.items()})
            return found

        return aggregate

    @property
    def rounds(self) -> list[dict[str, Any]]:
        """The rounds of the history so far."""
        return self._history["rounds"]

    def note(self, **facts: Any) -> None:
        """Put facts about the run as a whole into the history; they are written with the next round."""
        self._history.update(facts)

    def save(self, arrays: ArrayRecord, write: Callable[[Path, dict[str, np.ndarray]], None] | None = None) -> None:
        """Write the trained model to model.pt, by `write_model` or `write`; its hash and accuracy to the history."""
        state = {name: array.numpy() for name, array in arrays.items()}
        (write or write_model)(self.folder / "model.pt", state)
        by_server = last(self._history, "server", "accuracy")
        accuracy = last(self._history, "evaluate", "accuracy") if by_server is None else by_server
        self._history.update(accuracy=accuracy, model_sha256=model_sha256(state))
        save_history(self.folder, self._history)

    def _round(self, number: int) -> dict[str, Any]:
        rounds = self._history["rounds"]
        if not rounds or rounds[-1]["round"] != number:
            rounds.append({"round": number, "seconds": 0.0, "bytes": 0})
        return rounds[-1]

    def _end_round(self, after_server: bool = False) -> None:
        """Close the newest round and write it down; where the server evaluates, only after it has."""
        if self._server_evaluates and not after_server:
            return
        now = time.monotonic()
        self._history["rounds"][-1]["seconds"] = round(now - self._since, 2)
        self._since = now
        save_history(self.folder, self._history)

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
