"""A mod for ClientApps that lets one client fail on purpose, to see what a run makes of it."""

from flwr.app import Context, Message
from flwr.clientapp.typing import ClientAppCallable


def flaky(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Let the client that `flaky-client` names fail in each round with an even number."""
    mine = context.run_config["flaky-client"] == context.node_config["partition-id"]
    if mine and message.content["config"]["server-round"] % 2 == 0:
        raise RuntimeError("this client fails in even rounds, because flaky-client says so")
    return call_next(message, context)
