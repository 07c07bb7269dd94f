"""A guard around any of Flower's strategies: it waits, refuses broken replies, restores dtypes, writes history.json."""

from collections.abc import Callable, Iterable
from typing import Any

from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, MetricRecord
from flwr.serverapp import Grid
from flwr.serverapp.strategy import Result, Strategy

from rounds import history
from rounds.averages import as_sent, model_sha256, payload, settle, widen
from rounds.patient_grid import PatientGrid
from rounds.record import Record, row
from rounds.replies import fault, partition_id, stranger, usual

EvaluateFn = Callable[[int, ArrayRecord], MetricRecord | None]


class Guarded(Strategy):
    """`Guarded(FedAvg(...), context)` is started as FedAvg is; the strategy sees only replies that it can average.

    `rounds_done` are rounds that an earlier start has completed: the strategy, the clients and the history count on
    from there. `record` is what goes into history.json.
    """

    def __init__(self, strategy: Strategy, context: Context, rounds_done: int = 0) -> None:
        self.strategy, self.rounds_done = strategy, rounds_done
        self.config = dict(context.run_config)
        self.record = Record(context, rounds_done)
        self.folder = self.record.folder

    def start(
        self, grid: Grid, initial_arrays: ArrayRecord, *args: Any, evaluate_fn: EvaluateFn | None = None, **kwargs: Any
    ) -> Result:
        """Run the rounds as the strategy's own `start` would. Raises RuntimeError where no reply can be used."""
        self.initial_arrays, self.began = initial_arrays, False
        self.grid = PatientGrid(grid, self.folder, self.record.history.get("clients"), self.config["min-clients"])
        try:
            result = super().start(self.grid, initial_arrays, *args, evaluate_fn=self.closing(evaluate_fn), **kwargs)
        except Exception as error:
            self.record.end({"status": "failed", "reason": str(error)})
            raise
        state = {name: array.numpy() for name, array in (result.arrays or initial_arrays).items()}
        self.record.history["model_sha256"] = model_sha256(state)
        if (accuracy := history.final(self.record.history, "accuracy")) is not None:  # not every task has one
            self.record.history["accuracy"] = accuracy
        self.record.end({"status": "completed"})
        if not self.record.launched:
            print(f"The rounds and the model are in {self.folder}", flush=True)
        return result

    def closing(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn:
        """Wrap the server's evaluation, the last step of each round, so that it also closes the round."""

        def close_round(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            first = server_round == 0  # before any training
            if first and (evaluate_fn is None or self.record.history["rounds"]):  # or it was done before a resume
                return None
            if first:
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
        self.record.begin_round(server_round + self.rounds_done)
        return self.send(MessageType.TRAIN, self.strategy.configure_train, arrays, config)

    def configure_evaluate(
        self, server_round: int, arrays: ArrayRecord, config: ConfigRecord, grid: Grid
    ) -> Iterable[Message]:
        return self.send(MessageType.EVALUATE, self.strategy.configure_evaluate, arrays, config)

    def aggregate_train(
        self, server_round: int, replies: Iterable[Message]
    ) -> tuple[ArrayRecord | None, MetricRecord | None]:
        arrays, averaged = self.strategy.aggregate_train(self.record.entry["round"], self.judge(replies))
        self.note(averaged)
        return arrays and as_sent(arrays, self.initial_arrays), averaged

    def aggregate_evaluate(self, server_round: int, replies: Iterable[Message]) -> MetricRecord | None:
        averaged = self.strategy.aggregate_evaluate(self.record.entry["round"], self.judge(replies))
        self.note(averaged)
        return averaged

    def note(self, averaged: MetricRecord | None) -> None:
        """Put into the history what the strategy averaged, then the means of the metrics that it did not see."""
        self.record.note(self.phase, averaged)
        self.record.note(self.phase, self.means)

    def summary(self) -> None:
        self.strategy.summary()

    def send(
        self, phase: str, configure: Callable[..., Iterable[Message]], arrays: ArrayRecord, config: ConfigRecord
    ) -> list[Message]:
        server_round, self.phase = self.record.entry["round"], phase
        self.grid.seed = f"{self.config['seed']} {server_round} {phase}"
        self.grid.tell = lambda done, of: history.tell_progress(self.folder, server_round, phase, done, of)
        messages = list(configure(server_round, arrays, config, self.grid))
        if not self.began:
            self.began = True
            self.record.clients_are_there(len(self.grid.connected))
        self.sent = {message.metadata.dst_node_id: message for message in messages}
        return messages

    def judge(self, replies: Iterable[Message]) -> list[Message]:
        """Return the replies that can be used, by partition id; note in the history who failed, and why."""
        self.means = {}
        if not self.sent:  # the strategy skips this phase
            return []
        came = {reply.metadata.src_node_id: reply for reply in replies}
        reasons = {node: self.reason(node, came) for node in self.grid.ordered(self.sent)}
        good = [came[node] for node, reason in reasons.items() if reason is None]
        failures = [
            {"partition-id": self.grid.partition_of.get(node), "reason": reason}
            for node, reason in reasons.items()
            if reason is not None
        ]
        for failure in failures:
            self.record.warn(self.phase, f"partition {failure['partition-id']}: {failure['reason']}")
        self.record.entry["bytes"] += payload([*self.sent.values(), *good])
        self.record.entry[self.phase] = entry = {"clients": len(good), "failures": failures}
        if not good:
            first = failures[0]["reason"]
            raise RuntimeError(f"round {self.record.entry['round']}: no client could {self.phase}. The first: {first}")
        entry["by_client"] = [row(reply) for reply in good]
        if device := usual(good, "device", str):
            self.record.history["device"] = device
        self.means, lacking = settle(good)
        for key, positions in lacking.items():
            entry.setdefault("left_out", {})[key] = partitions = [partition_id(good[i]) for i in positions]
            self.record.warn(self.phase, f"no usable {key} from partitions {partitions}; the rest of the reply counts")
        for reply in good:
            widen(reply)
        return good

    def reason(self, node: int, came: dict[int, Message]) -> str | None:
        """Say why a client's answer can't be used, or None."""
        if node not in came:
            return "no reply in time, or the client is gone"
        known = self.record.history
        asked = self.sent[node].content if self.phase == MessageType.TRAIN else None
        partitions = known["clients"] if self.record.launched else usual(came.values(), "num-partitions", int)
        dataset = known.get("dataset") or usual(came.values(), "dataset", str)
        identity = partition_id(came[node])
        if self.grid.owner(identity) not in (node, None):
            return f"another client has partition-id {identity} too: give each SuperNode a number of its own"
        examples = known.get("examples", float("inf"))
        return stranger(came[node], partitions, dataset) or fault(came[node], asked, examples)
