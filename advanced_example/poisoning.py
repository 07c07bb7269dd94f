"""A mod for ClientApps that lets one client send 100 times its update, to see which strategies that breaks."""

import numpy as np
from flwr.app import Array, ArrayRecord, Context, Message
from flwr.clientapp.typing import ClientAppCallable

FACTOR = 100


def moved(sent: np.ndarray, learned: np.ndarray) -> Array:
    return Array(sent + FACTOR * (learned - sent) if sent.dtype.kind == "f" else learned)


def poisoning(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the client that `poisoning-client` names move the global weights FACTOR times as far as it has learned."""
    reply = call_next(message, context)
    if context.run_config["poisoning-client"] == context.node_config["partition-id"]:
        sent = {name: array.numpy() for name, array in message.content["arrays"].items()}
        learned = reply.content["arrays"]
        reply.content["arrays"] = ArrayRecord(
            {name: moved(sent[name], array.numpy()) for name, array in learned.items()}
        )
    return reply
