"""Makes replies ready for a strategy to average, and gives the averaged weights the dtypes that were sent."""

import hashlib
import math
import statistics
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message, RecordDict

from rounds.replies import EXAMPLES_KEY, metrics


def settle(replies: list[Message]) -> dict[str, list[int]]:
    """Give all replies the same metrics, since strategies average only what all of them have.

    Where a value is missing, or isn't finite, or is a list of another length than most, the mean of the others takes
    its place, which leaves their mean as it is. Returns, for each such metric, the positions of those replies.
    """
    lacking = {}
    for key in sorted(set().union(*map(metrics, replies)) - {EXAMPLES_KEY}):
        values = [metrics(reply).get(key, math.nan) for reply in replies]
        finite = {i: value for i, value in enumerate(values) if np.all(np.isfinite(value))}
        shape = statistics.mode(map(np.shape, finite.values())) if finite else None
        usable = {i: value for i, value in finite.items() if np.shape(value) == shape}
        if len(usable) < len(replies):
            weights = [metrics(replies[i])[EXAMPLES_KEY] for i in usable]
            mean = np.average(list(usable.values()), axis=0, weights=weights).tolist() if usable else math.nan
            lacking[key] = [i for i in range(len(replies)) if i not in usable]
            for i in lacking[key]:
                metrics(replies[i])[key] = mean
    if len({next(iter(reply.content.metric_records)) for reply in replies}) > 1:  # the record's own name differs
        for reply in replies:
            reply.content["metrics"] = reply.content.pop(next(iter(reply.content.metric_records)))
    return lacking


def align(reply: Message, sent: RecordDict) -> None:
    """Put weights in the order in which they were sent, and float16 into float32, in which a mean keeps its digits."""
    for record, expected in sent.array_records.items():
        for name in expected:  # some strategies go by position
            array = reply.content[record].pop(name)
            half = array.dtype == "float16"
            reply.content[record][name] = Array(array.numpy().astype(np.float32)) if half else array


def as_sent(arrays: ArrayRecord, sent: ArrayRecord) -> ArrayRecord:
    """Give each array the dtype in which it was sent. Means are floats, and that of three sevens may be 6.99: round.

    Raises ValueError where the strategy has made NaN or infinite numbers of finite ones, or another array.
    """
    result = {}
    for name, array in arrays.items():
        if name not in sent or tuple(array.shape) != tuple(sent[name].shape):
            raise ValueError(f"the strategy made {name} {tuple(array.shape)}, which was not sent like that")
        value, dtype = array.numpy(), np.dtype(sent[name].dtype)
        if dtype.kind in "biu" and value.dtype.kind == "f":
            value = np.rint(value)  # a scalar where the array has no dimension
        cast = np.asarray(value, dtype)
        if not (np.all(np.isfinite(value)) and np.all(np.isfinite(cast))):
            raise ValueError(f"the strategy made NaN or infinite numbers in {name}, though no reply holds any")
        result[name] = Array(cast)
    return ArrayRecord(result)


def payload(messages: Iterable[Message]) -> int:
    """Return the bytes of all weights in some messages, without headers."""
    records = [record for message in messages for record in message.content.array_records.values()]
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for record in records for a in record.values())


def model_sha256(state: Mapping[str, Any]) -> str:
    """Return a hash over name, dtype, shape and bytes of each NumPy array or tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = np.asarray(tensor)
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
