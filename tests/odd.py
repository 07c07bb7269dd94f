"""Two mods that let each client misbehave in a way of its own. A test copies this file beside client.py."""

import sys
from typing import NoReturn

import numpy as np
from flwr.app import Array, Context, Error, Message, MessageType
from flwr.clientapp.typing import ClientAppCallable

NAN = float("nan")
HONEST = 2  # the first clients do nothing wrong

# What client.py does to its reply to a training message: weights and numbers that make the whole reply useless ...
BROKEN = {
    "NaN weights": lambda reply: put(reply, np.full(10, NAN, np.float32)),
    "another shape": lambda reply: put(reply, np.ones(1, np.float32)),
    "half precision": lambda reply: put(reply, np.ones(10, np.float16)),
    "double precision": lambda reply: put(reply, np.full(10, 1e300)),
    "another dtype said": lambda reply: setattr(reply.content["arrays"]["fc3.bias"], "dtype", "torch.float32"),
    "a weight less": lambda reply: reply.content["arrays"].__delitem__("fc3.bias"),
    "no weights": lambda reply: reply.content.__delitem__("arrays"),
    "no examples": lambda reply: reply.content["metrics"].update({"num-examples": 0}),
    "a million examples": lambda reply: reply.content["metrics"].update({"num-examples": 1_000_000}),
    "raises": lambda reply: put(reply, 1 / 0),
    "exits": lambda reply: sys.exit("no data here"),
    "raises in lines": lambda reply: fail("\x1b[31ma bad\n  client\x1b[0m"),
    "no message": lambda reply: reply.content,
    "another kind": lambda reply: another_kind(put(reply, np.full(10, NAN, np.float32))),
}
# ... and metrics that are no reason to refuse the rest.
METRICS = {
    "NaN metric": lambda reply: reply.content["metrics"].update(auc=NAN),
    "endless metric": lambda reply: reply.content["metrics"].update(auc=-float("inf")),
    "a metric less": lambda reply: reply.content["metrics"].__delitem__("auc"),
    "a longer list": lambda reply: reply.content["metrics"].update(f1=[0.0, 0.0, 0.0]),
    "a metric in a list": lambda reply: reply.content["metrics"].update(auc=[0.5]),
    "our words": lambda reply: reply.content["metrics"].update(
        {"left_out": 1.0, "by_client": 2.0, "partition-id": 3.0, "config": 4.0}
    ),
}
# What it says of itself in each of its replies, also when it is asked; None takes the word away.
IDENTITIES = {
    "text": {"partition-id": "9" * 5000},
    "bytes": {"partition-id": b"1"},
    "a list": {"partition-id": [1]},
    "NaN": {"partition-id": NAN},
    "huge": {"partition-id": 2**62},
    "negative": {"partition-id": -1},
    "missing": {"partition-id": None},
    "other partitions": {"num-partitions": 5},
    "other data": {"dataset": "cifar10"},
}
ODD_TIMES = "odd times"
OUTSIDE = "raises outside"  # of our mods, which can't say who it was
TWIN = "NaN twin"  # says the id of the one with NaN weights, and has them, too: either of them is refused for its id
COPY = "a copy of the first"  # says so later only, and its own id when it is asked
SILENT = "silent"  # says nothing of itself, as a client without mods
BUSY = "an error"  # in place of a reply
OTHERS = [ODD_TIMES, OUTSIDE, TWIN, COPY, SILENT, BUSY]
NAMES = [f"honest {i}" for i in range(HONEST)] + [*BROKEN, *METRICS, *IDENTITIES, *OTHERS]


def broken(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Change what client.py replies. The last mod: what it raises is what client.py raises."""
    reply = call_next(message, context)
    partition_id, name = context.node_config["partition-id"], NAMES[context.node_config["partition-id"]]
    said = {"auc": partition_id / 10, "f1": [partition_id / 10, 1.0], "clients": 99.0, "failures": 98.0}
    reply.content["metrics"].update(said)
    if message.metadata.message_type == MessageType.TRAIN:
        if name == BUSY:
            return Message(Error(99, "my GPU is busy"), reply_to=message)
        reply.content["metrics"]["loss"] = 2.0
        put(reply, np.full(10, partition_id, np.float32))
        changes = {**BROKEN, **METRICS, TWIN: BROKEN["NaN weights"]}
        return changes.get(name, lambda reply: None)(reply) or reply
    return reply


def odd(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Change what a client says of itself. The first mod: it sees what the others have said."""
    name = NAMES[context.node_config["partition-id"]]
    if name == OUTSIDE and message.content:  # without content, the server asks who it is
        fail("raised outside")
    reply = call_next(message, context)
    if reply.has_error():
        return reply
    said = {**IDENTITIES.get(name, {})}
    if name == COPY and message.content:
        said = {"partition-id": 0}
    if name == TWIN:
        said = {"partition-id": NAMES.index("NaN weights")}
    if name == ODD_TIMES:
        said = {"seconds": b"long", "began": NAN, "device": b"gpu"}
    for key, value in said.items():
        if value is None:
            del reply.content["client"][key]
        else:
            reply.content["client"][key] = value
    if name == SILENT:
        del reply.content["client"]
    return reply


def fail(text: str) -> NoReturn:
    raise ValueError(text)


def put(reply: Message, bias: np.ndarray) -> Message:
    reply.content["arrays"]["fc3.bias"] = Array(bias)
    return reply


def another_kind(reply: Message) -> Message:
    reply.metadata.message_type = MessageType.EVALUATE
    return reply
