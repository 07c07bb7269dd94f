"""What a client's reply must be before a strategy may see it, and what is read from it for the history."""

import hashlib
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, MessageType, RecordDict

EXAMPLES_KEY = "num-examples"


def fault(reply: Message, sent: RecordDict, examples: float = math.inf) -> str | None:
    """Say why a reply can't be used, or None. `sent` is what it answers: weights must come back in the same shapes.

    `examples` are all that there are: who claims more wants more weight than is due.

    Stock aggregation raises on missing keys, broadcasts (1,) over (3,), divides by a sum of zero examples, and lets one
    NaN spread to every weight; one bad reply must cost a round no more than that reply.
    """
    if reply.has_error():
        return reply.error.reason or f"error {reply.error.code}"
    try:
        if len(reply.content.metric_records) != 1:
            return f"expected one MetricRecord, found {len(reply.content.metric_records)}"
        metrics = next(iter(reply.content.metric_records.values()))
        if not isinstance(metrics.get(EXAMPLES_KEY), int | float) or not 0 < metrics[EXAMPLES_KEY] < float("inf"):
            return f"{EXAMPLES_KEY} must be a positive number, not {metrics.get(EXAMPLES_KEY)}"
        if metrics[EXAMPLES_KEY] > examples:
            return f"{EXAMPLES_KEY} is {metrics[EXAMPLES_KEY]}, and the whole data set has {examples}"
        for key, value in metrics.items():
            if not np.all(np.isfinite(value)):
                return f"metric {key} is {value}"
        if reply.metadata.message_type == MessageType.TRAIN:
            return _array_fault(reply.content, sent)
    except Exception as error:  # bytes that are no array, or anything else a stranger may send
        return f"unreadable reply: {type(error).__name__}: {error}"
    return None


def _array_fault(content: RecordDict, sent: RecordDict) -> str | None:
    if list(content.array_records) != list(sent.array_records):
        return f"expected the arrays {list(sent.array_records)}, found {list(content.array_records)}"
    for record, expected in sent.array_records.items():
        found = content.array_records[record]
        if set(found) != set(expected):
            missing, extra = set(expected) - set(found), set(found) - set(expected)
            return f"weights differ in their names: missing {sorted(missing)}, not asked for {sorted(extra)}"
        for key in expected:
            array = found[key].numpy()
            if array.shape != tuple(expected[key].shape):
                return f"{key} has shape {array.shape}, not {tuple(expected[key].shape)}"
            if array.dtype.kind not in "biuf":  # a sum with complex numbers is complex
                return f"{key} holds {array.dtype}, not real numbers"
            if not np.all(np.isfinite(array)):
                return f"{key} holds NaN or infinite numbers"
    return None


def odd_ones_out(replies: dict[int, Message]) -> dict[int, str]:
    """Replies, by node id, whose metrics have another form than most: strategies average only what all of them have."""
    forms = {node: _form(reply) for node, reply in replies.items()}
    usual = Counter(forms.values()).most_common(1)[0][0] if forms else ""
    return {node: f"metrics are {form}, not {usual}" for node, form in forms.items() if form != usual}


def _form(reply: Message) -> str:
    """The metrics' names, with the length of each list, such as `metrics(num-examples, per-class[10])`."""
    ((name, record),) = reply.content.metric_records.items()
    keys = (f"{key}[{len(value)}]" if isinstance(value, list) else key for key, value in record.items())
    return f"{name}({', '.join(sorted(keys))})"


def mean_metrics(replies: list[Message]) -> dict[str, float]:
    """The clients' metrics, averaged by their numbers of examples; `train_loss` is called `loss`."""
    records = [_metrics(reply) for reply in replies]
    weights = [float(record[EXAMPLES_KEY]) for record in records]
    return {
        key.removeprefix("train_"): float(np.average([record[key] for record in records], weights=weights))
        for key, value in records[0].items()
        if key != EXAMPLES_KEY and not isinstance(value, list)
    }


def client_rows(replies: list[Message]) -> list[dict[str, Any]]:
    """What each client said of itself, as a row for the history; `memory` is its process's largest, in MiB."""
    rows = []
    for reply in replies:
        said = reply.content.get("client", {})
        cost = {key: round(said[key], 2) for key in ("seconds", "memory") if _is_number(said.get(key))}
        rows.append({"partition-id": said.get("partition-id"), **cost, **_metrics(reply)})
    return rows


def busy(replies: Iterable[Message], since: float) -> float:
    """Seconds from `since` (of `time.time()`) to now in which at least one client was at work, by their own clocks."""
    said = [reply.content.get("client", {}) for reply in replies if reply.has_content()]
    times = [(one.get("began"), one.get("seconds")) for one in said]
    total, end, now = 0.0, since, time.time()
    for began, seconds in sorted(pair for pair in times if all(map(_is_number, pair))):
        start, stop = max(began, end), min(began + seconds, now)
        if stop > start:
            total, end = total + stop - start, stop
    return total


def _metrics(reply: Message) -> dict[str, Any]:
    return next(iter(reply.content.metric_records.values()))


def payload(message: Message) -> int:
    """The bytes of the weights in a message, without numpy's headers; 0 where it holds none that can be read."""
    if not message.has_content():
        return 0
    arrays = [array for record in message.content.array_records.values() for array in record.values()]
    try:
        return sum(math.prod(array.shape) * np.dtype(array.dtype).itemsize for array in arrays)
    except Exception:  # a type that there is not: such a reply is counted too, before it is left out
        return 0


def memory(replies: list[Message]) -> dict[str, float]:
    """The largest of each figure that clients report in a ConfigRecord "memory", in MiB; most report none."""
    found: dict[str, float] = {}
    for reply in replies:
        for name, value in reply.content.config_records.get("memory", {}).items():
            if _is_number(value):
                found[name] = max(value, found.get(name, 0.0))
    return found


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def model_sha256(state: Mapping[str, Any]) -> str:
    """A hash over name, dtype, shape and bytes of each array, sorted by name: equal means the same to the bit.

    Takes NumPy arrays, or tensors on the CPU.
    """
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor, order="C")
        digest.update(f"{name} {array.dtype} {array.shape} ".encode())
        digest.update(array.tobytes())
    return digest.hexdigest()
