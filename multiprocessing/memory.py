"""The memory that a run's processes take, and what is in use on the GPUs: noted after each round, drawn in the end."""

import io
import threading
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from flwr.app import ArrayRecord, Message, MetricRecord

from gpus import Free, in_use
from rounds import history
from rounds.guarded import EvaluateFn, Guarded
from rounds.replies import card

PREFIX = "memory of "  # of the keys under which clients and server say it, in MiB
ON_GPU = "GPU"  # in the names of what is drawn apart
LOOK = 1.0  # seconds between two looks at the GPUs, each a process
COLOURS = ("#0072B2", "#D55E00", "#009E73", "#E69F00", "#56B4E9", "#000000")  # Okabe and Ito, 2008
MARKS = ("o-", "s:", "^-", "d:", "x-.", "v--")


class Measured(Guarded):
    """Guarded, which writes down the largest memory of each kind of process in a round, in MiB, as "memory".

    On a cluster it also counts the replies that came from each node, as "nodes".
    """

    def judge(self, replies: Iterable[Message]) -> list[Message]:
        good = super().judge(replies)
        for reply in good:
            self.note_memory("client", card(reply))
        if nodes := Counter(node for reply in good if isinstance(node := card(reply).get("node"), str)):
            self.record.entry["nodes"] = Counter(self.record.entry.get("nodes", {})) + nodes
        return good

    def note_memory(self, whose: str, said: Mapping[str, Any]) -> None:
        """Note "memory of client" as "client", and "memory of child" as "client's child"; and, first, the device."""
        if isinstance(said.get("device"), str):
            self.record.history.setdefault("device", said["device"])
        noted = self.record.entry.setdefault("memory", {})
        for key, value in said.items():
            if key.startswith(PREFIX) and isinstance(value, int | float):
                name = key.removeprefix(PREFIX)
                name = name if name == whose else f"{whose}'s {name}"
                noted[name] = max(round(value, 1), noted.get(name, 0.0))

    def closing(self, evaluate_fn: EvaluateFn | None) -> EvaluateFn:
        """Note what is in use on the GPUs at the most, and what when a round's children are gone."""
        if not (before := self.record.history.get("gpus")) or evaluate_fn is None:
            return super().closing(evaluate_fn)
        watch = Watch(before)
        watch.start()

        def evaluate_and_look(server_round: int, arrays: ArrayRecord) -> MetricRecord | None:
            metrics = evaluate_fn(server_round, arrays)
            found = {"GPU at work": watch.take(), "GPU between rounds": in_use(before)}
            noted = self.record.entry.setdefault("memory", {})
            noted.update({name: round(mib, 1) for name, mib in found.items() if mib is not None})
            return metrics

        return super().closing(evaluate_and_look)


class Watch(threading.Thread):
    """Looks at the GPUs from outside, again and again. This process never uses CUDA, which would take memory itself."""

    def __init__(self, before: Free) -> None:
        super().__init__(daemon=True)
        self.before, self.most = before, None

    def run(self) -> None:
        while True:
            if (found := in_use(self.before)) is not None:
                self.most = max(found, self.most or 0.0)
            time.sleep(LOOK)

    def take(self) -> float | None:
        """Return the most that was seen since the last time."""
        most, self.most = self.most, None
        return most


def draw(record: history.History, path: Path) -> None:
    """Draw the memory by round; what is on the GPU has a panel of its own."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    noted = sorted({name for entry in record["rounds"] for name in entry.get("memory", {})})
    plt.rcParams["text.parse_math"] = False  # a name may hold a $
    panels = {
        "memory of the largest, MiB": [name for name in noted if ON_GPU not in name],
        "on the fullest GPU, beyond what was in use before, MiB": [name for name in noted if ON_GPU in name],
    }
    panels = {label: names for label, names in panels.items() if names}
    size = (6 * len(panels), 3.6)
    figure, all_axes = plt.subplots(1, len(panels), figsize=size, layout="constrained", squeeze=False)
    for axes, (label, names) in zip(all_axes[0], panels.items(), strict=True):
        for i, name in enumerate(names):
            rounds = [entry for entry in record["rounds"] if name in entry.get("memory", {})]
            points = [entry["round"] for entry in rounds], [entry["memory"][name] for entry in rounds]
            axes.plot(*points, MARKS[i % len(MARKS)], color=COLOURS[i % len(COLOURS)], label=name)
        axes.set(xlabel="round", ylabel=label)
        axes.set_ylim(bottom=0)
        axes.xaxis.get_major_locator().set_params(integer=True)
        axes.grid(alpha=0.3)
        axes.legend()
    figure.suptitle(f"{record['example']}: {record['clients']} clients")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    plt.close(figure)
    history.write_whole(path, drawn.getvalue())
