"""Takes out of replies what a strategy can't average, and gives the averaged weights the dtypes that were sent."""

import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Mapping
from typing import Any

import numpy as np
from flwr.app import Array, ArrayRecord, Message

from rounds.replies import EXAMPLES_KEY, metrics


def settle(replies: list[Message]) -> tuple[dict[str, Any], dict[str, list[int]]]:
    """Take metrics that not every reply has out of all replies, since strategies average only what all of them have.

    Returns their means over the replies that have them, weighted by examples; and, for each of these metrics, the
    positions in `replies` of those that lack it or whose value isn't a finite number (or a list as long as most).
    """
    means, lacking = {}, {}
    for key in sorted({key for reply in replies for key in metrics(reply)} - {EXAMPLES_KEY}):
        forms = [_form(metrics(reply).get(key)) for reply in replies]
        common = Counter(form for form in forms if form).most_common(1)
        have = [reply for reply, form in zip(replies, forms, strict=True) if common and form == common[0][0]]
        if len(have) < len(replies):
            lacking[key] = [i for i, form in enumerate(forms) if not common or form != common[0][0]]
            if have:
                weights = [metrics(reply)[EXAMPLES_KEY] for reply in have]
                means[key] = np.average([metrics(reply)[key] for reply in have], axis=0, weights=weights).tolist()
            for reply in replies:
                metrics(reply).pop(key, None)
    if len({next(iter(reply.content.metric_records)) for reply in replies}) > 1:  # the record's own name differs
        for reply in replies:
            reply.content["metrics"] = reply.content.pop(next(iter(reply.content.metric_records)))
    return means, lacking


def _form(value: Any) -> str | None:
    if value is None or not np.all(np.isfinite(value)):
        return None
    return f"list of {len(value)}" if isinstance(value, list) else "number"


def widen(reply: Message) -> None:
    """Turn float16 weights into float32, in which a mean of them keeps its digits."""
    for name, record in reply.content.array_records.items():
        if any(array.dtype == "float16" for array in record.values()):
            wide = {k: np.float32 if array.dtype == "float16" else array.dtype for k, array in record.items()}
            reply.content[name] = ArrayRecord({k: Array(a.numpy().astype(wide[k])) for k, a in record.items()})


def as_sent(arrays: ArrayRecord, sent: ArrayRecord) -> ArrayRecord:
    """Give each array the dtype in which it was sent: means are floats, and 7 * 1/3 * 3 is 6.99..., so round integers.

    Raises ValueError where the strategy has made NaN or infinite numbers of finite ones.
    """
    result = {}
    for name, array in arrays.items():
        value, dtype = array.numpy(), np.dtype(sent[name].dtype)
        value = np.rint(value) if dtype.kind in "biu" else value  # a scalar where the array has no dimension
        result[name] = Array(np.asarray(value, dtype))
        if not np.all(np.isfinite(result[name].numpy())):
            raise ValueError(f"the strategy made NaN or infinite numbers in {name}, though no reply holds any")
    return ArrayRecord(result)


def payload(messages: Iterable[Message]) -> int:
    """Return the bytes of all weights in some messages, without headers."""
    records = [record for message in messages for record in message.content.array_records.values()]
    return sum(math.prod(a.shape) * np.dtype(a.dtype).itemsize for record in records for a in record.values())


def model_sha256(state: Mapping[str, Any]) -> str:
    """Return a hash over name, dtype, shape and bytes of each NumPy array or tensor, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in sorted(state.items()):
        array = np.asarray(tensor.detach() if hasattr(tensor, "detach") else tensor, order="C")
        digest.update(f"{name} {array.dtype} {array.shape} ".encode() + array.tobytes())
    return digest.hexdigest()
