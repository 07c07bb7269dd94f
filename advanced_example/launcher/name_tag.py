"""A mod for ClientApps: says which client a reply, or an error, is from."""

from flwr.app import ConfigRecord, Context, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable


def name_tag(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Put the partition id on each reply and in front of each error, and answer a query with it alone.

    Flower's node ids are drawn at random for each run, so the server can tell its clients apart, order their replies
    and sample the same ones again only by what they say of themselves.
    """
    tag = ConfigRecord({"partition-id": int(context.node_config["partition-id"])})
    if message.metadata.message_type == MessageType.QUERY:
        return Message(content=RecordDict({"client": tag}), reply_to=message)
    try:
        reply = call_next(message, context)
    except Exception as error:
        raise RuntimeError(f"partition {tag['partition-id']}: {type(error).__name__}: {error}") from error
    reply.content["client"] = tag
    return reply
