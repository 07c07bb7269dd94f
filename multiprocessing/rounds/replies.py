"""Checks clients' replies before they reach the strategy: one bad reply costs a round no more than that reply.

Flower's own aggregation raises on missing keys, broadcasts shape (1,) over (3,), takes negative numbers of examples,
and lets one NaN spread to every weight.
"""

import math
import re
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Message, MetricRecord, RecordDict

EXAMPLES_KEY = "num-examples"
CARD = "client"  # the ConfigRecord in which the mod `named` says whose reply it is
NAMED = re.compile(r"\Apartition (\d{1,9}): ")  # the prefix that it puts on an error


def card(reply: Message) -> Mapping[str, Any]:
    """Return what a client says of itself: "partition-id" and more; empty where it says nothing that can be read."""
    if reply.has_error():
        said = NAMED.match(reply.error.reason or "")
        return {"partition-id": int(said[1])} if said else {}
    return reply.content.config_records.get(CARD, {})


def partition_id(reply: Message) -> int | None:
    """Return a reply's partition id where it is a whole number from 0 on, else None."""
    said = card(reply).get("partition-id")
    return said if type(said) is int and said >= 0 else None


def usual(replies: Iterable[Message], key: str, kind: type) -> Any:
    """Return what most clients say of themselves under `key`; None where none says anything of that type."""
    said = [value for reply in replies if isinstance(value := card(reply).get(key), kind)]
    return statistics.mode(said) if said else None


def stranger(reply: Message, num_partitions: int | None, dataset: str | None) -> str | None:
    """Say why a client can't belong to this run, with what to change; None where it can, or says nothing."""
    said = card(reply)
    if num_partitions and said.get("num-partitions", num_partitions) != num_partitions:
        return (
            f"num-partitions is {_short(said['num-partitions'])} there and {num_partitions} here: start that SuperNode "
            f"with --node-config 'partition-id=... num-partitions={num_partitions}'"
        )
    possible = range(max(1, num_partitions or 2**31))
    if said and partition_id(reply) not in possible:
        return f"partition-id is {_short(said.get('partition-id'))}, not a whole number from 0 to {possible[-1]}"
    if dataset and said.get("dataset", dataset) != dataset:
        return f"its data set is {_short(said['dataset'])} and this run's is {dataset}: set DATASET={dataset} there"
    return None


def metrics(reply: Message) -> MetricRecord:
    """Return the reply's only MetricRecord."""
    return next(iter(reply.content.metric_records.values()))


def fault(reply: Message, sent: RecordDict | None, examples: float = math.inf) -> str | None:
    """Say why a reply can't be used; None where it can. Metrics are another matter: see `settle`.

    Weights must come back as they were `sent`: the same names, shapes and dtypes, and finite; None if none were asked
    for. A client that claims more than all `examples` there are would get too much weight.
    """
    if reply.has_error():
        return one_line(NAMED.sub("", reply.error.reason or "")) or f"error {reply.error.code}"
    try:
        if len(reply.content.metric_records) != 1:
            return f"expected one MetricRecord, found {len(reply.content.metric_records)}"
        count = metrics(reply).get(EXAMPLES_KEY)
        if not isinstance(count, int | float) or not 0 < count < math.inf:
            return f"{EXAMPLES_KEY} must be a positive number, not {_short(count)}"
        if count > examples:
            return f"{EXAMPLES_KEY} is {_short(count)}, and the whole data set has {examples}"
        return _array_fault(reply.content, sent) if sent else None
    except Exception as error:  # bytes that are no array, or anything else a stranger may send
        return one_line(f"unreadable reply: {type(error).__name__}: {error}")


def _array_fault(content: RecordDict, sent: RecordDict) -> str | None:
    if list(content.array_records) != list(sent.array_records):
        return f"expected the arrays {list(sent.array_records)}, found {_short(list(content.array_records))}"
    for record, expected in sent.array_records.items():
        found = content.array_records[record]
        if odd := sorted(set(expected) ^ set(found)):
            return f"weights have other names than those sent: {_short(odd)}"
        for key, like in expected.items():
            array = found[key].numpy()
            form, sent_form = f"{array.dtype} {array.shape}", f"{like.dtype} {tuple(like.shape)}"
            if form != sent_form:
                return f"{key} is {form}, not {sent_form}, which was sent"
            if found[key].dtype != like.dtype:
                return f"{key} is {like.dtype}, and is called {_short(found[key].dtype)}"
            if not np.all(np.isfinite(array)):
                return f"{key} holds NaN or infinite numbers"
    return None


def one_line(reason: str) -> str:
    """Reduce a reason to one line, without colours and what Flower and Ray wrap around a client's error."""
    plain = re.sub(r"\x1b\[[0-9;]*m", "", reason)
    plain = plain.rpartition("ClientAppException occurred. Message: ")[2].removesuffix("'>")
    return _short(" ".join(plain.split()), 300)


def _short(value: Any, most: int = 80) -> str:
    text = "".join(filter(str.isprintable, str(value)))
    return text if len(text) <= most else f"{text[: most - 3]}..."
