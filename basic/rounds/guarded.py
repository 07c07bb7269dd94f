"""A guard around a strategy that averages: it waits, refuses broken replies, restores dtypes, writes history.json."""

import math
from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from rounds import history
from rounds.averages import align, as_sent, model_sha256, payload, settle
from rounds.patient_grid import PatientGrid
from rounds.record import Record, row
from rounds.replies import fault, partition_id, stranger, usual

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class Guarded(Strategy):
    """`Guarded(FedAvg(...), context)` is started as FedAvg is; the strategy sees only replies that it can average."""

    def __init__(self, strategy: Strategy, context: Context) -> None:
        self.strategy, self.config = strategy, context.run_config
        self.record = Record(context)  # what goes into history.json
        self.folder = self.record.folder
        self.rounds_done = 0  # by an earlier start: the strategy, the clients and the history count on from there

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, evaluate_fn: EvaluateFn | None = None, **kwargs: Any
    ) -> Result:
        """Run the rounds as the strategy's own `start` would. Raises RuntimeError if no reply can be used."""
        self.initial_arrays = initial_arrays
        least = max(self.config["min-clients"], self.config["sampled-clients"])  # to sample more would take for ever
        self.grid = PatientGrid(grid, self.folder, self.record.history.get("clients"), least)
        try:
            result = super().start(self.grid, initial_arrays, *args, evaluate_fn=self.closing(evaluate_fn), **kwargs)
        except Exception as error:
            self.record.end(status="failed", reason=str(error))
            raise
        result.arrays = result.arrays or initial_arrays  # where nobody was to train
        state = {name: array.numpy() for name, array in result.arrays.items()}
        self.record.history["model_sha256"] = model_sha256(state)
        if (accuracy := history.final(self.record.history, "accuracy")) is not None:  # not every task has one
            self.record.history["accuracy"] = accuracy
        self.record.end(status="completed")
        return result

    def closing(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn:
        """Wrap the server's evaluation, the last step of each round, so that it also closes the round."""

        def close_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            if server_round == 0:  # before any training
                if evaluate_fn is None or self.record.history["rounds"]:  # a resumed run has done it
                    return None
                self.record.begin_round(0)
            found = None
            if evaluate_fn:
                history.tell_progress(self.folder, self.record.entry["round"], "server", 0, 1)
                found = evaluate_fn(server_round + self.rounds_done, arrays)
                self.record.note("server", found)
            self.record.end_round()
            return found

        return close_round

    # --- A phase: messages go out, replies come back -----------------------------------------------------------------

    def configure_train(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.send(MessageType.TRAIN, server_round, arrays, config)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.send(MessageType.EVALUATE, server_round, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, averaged = self.strategy.aggregate_train(self.record.entry["round"], self.judge(replies))
        self.record.note(self.phase, averaged)
        return arrays and as_sent(arrays, self.initial_arrays), averaged

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        averaged = self.strategy.aggregate_evaluate(self.record.entry["round"], self.judge(replies))
        self.record.note(self.phase, averaged)
        return averaged

    def summary(self) -> None:
        self.strategy.summary()

    def send(self, phase: str, server_round: int, arrays: ArrayRecord, config: ConfigRecord) -> list[Message]:
        server_round += self.rounds_done
        self.phase, self.grid.seed = phase, f"{self.config['seed']} {server_round} {phase}"
        self.grid.report = None  # the strategy asks for the nodes next, and a new one is asked who it is
        configure = self.strategy.configure_evaluate
        if phase == MessageType.TRAIN:
            configure = self.strategy.configure_train
            self.record.begin_round(server_round, clients=len(self.grid.get_node_ids()))
        messages = list(configure(server_round, arrays, config, self.grid))
        self.grid.report = lambda done, of: history.tell_progress(self.folder, server_round, phase, done, of)
        self.sent = {message.metadata.dst_node_id: message for message in messages}
        return messages

    def judge(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies that can be used, by partition id; note in the history who failed, and why."""
        if not self.sent:  # the strategy skips this phase
            return []
        record, good, failures = self.record, [], []
        came = {reply.metadata.src_node_id: reply for reply in replies}
        partitions = usual(came.values(), "num-partitions", int)
        dataset = record.history.get("dataset") or usual(came.values(), "dataset", str)
        for node in self.grid.ordered(self.sent):
            if reason := self.reason(node, came.get(node), partitions, dataset):
                failures.append({"partition-id": self.grid.partition_of.get(node), "reason": reason})
                record.warn(self.phase, f"partition {failures[-1]['partition-id']}: {reason}")
            else:
                good.append(came[node])
        training = self.phase == MessageType.TRAIN
        record.entry["bytes"] += payload([*self.sent.values(), *(good if training else [])])
        record.entry[self.phase] = entry = {"clients": len(good), "failures": failures}
        if not good:
            first = failures[0]["reason"]
            raise RuntimeError(f"round {record.entry['round']}: no client could {self.phase}. The first: {first}")
        entry["by_client"] = [row(reply) for reply in good]
        if device := usual(good, "device", str):
            record.history["device"] = device
        for key, positions in settle(good).items():
            entry.setdefault("left_out", {})[key] = without = [partition_id(good[i]) for i in positions]
            record.warn(self.phase, f"no usable {key} from partitions {without}; the rest of the reply counts")
        for reply in good if training else []:
            align(reply, self.sent[reply.metadata.src_node_id].content)
        return good

    def reason(self, node: int, reply: Message | None, partitions: int | None, dataset: str | None) -> str | None:
        """Say why a client's answer can't be used, or None."""
        if reply is None:
            return "no reply in time, or the client is gone"
        identity = partition_id(reply)
        if self.grid.node_of.get(identity, node) != node:
            return f"another client has partition-id {identity} too: give each SuperNode a number of its own"
        asked = self.sent[node].content if self.phase == MessageType.TRAIN else None
        examples = self.record.history.get("examples", math.inf)
        return stranger(reply, partitions, dataset) or fault(reply, asked, examples)
