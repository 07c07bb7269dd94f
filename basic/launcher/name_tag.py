"""A ClientApp that says which client a reply, or an error, is from, and what it cost."""

import resource
import sys
import time

from flwr.app import ConfigRecord, Context, Message, RecordDict
from flwr.clientapp import ClientApp
from flwr.clientapp.typing import ClientAppCallable


def tagged_client_app() -> ClientApp:
    """Flower's ClientApp, with `name_tag` around all that it does, and an answer for who asks no more than the name."""
    app = ClientApp(mods=[name_tag])

    @app.query()
    def answer(message: Message, context: Context) -> Message:
        return Message(content=RecordDict(), reply_to=message)

    return app


def name_tag(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Put the partition id on each reply, and in front of each error.

    Flower's node ids are drawn at random for each run, so the server can tell its clients apart, order their replies
    and sample the same ones again only by what they say of themselves.
    """
    partition_id = int(context.node_config["partition-id"])
    began = time.time()
    try:
        reply = call_next(message, context)
    except Exception as error:
        raise RuntimeError(f"partition {partition_id}: {type(error).__name__}: {error}") from error
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / (2**20 if sys.platform == "darwin" else 2**10)  # MiB
    cost = {"began": began, "seconds": time.time() - began, "memory": peak}
    reply.content["client"] = ConfigRecord({"partition-id": partition_id, **cost})
    return reply
