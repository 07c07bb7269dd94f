"""Makes what a server and its clients send each other in tests of replies, as Flower makes it off the wire."""

import io

import numpy as np
from flwr.app import Array, ArrayRecord, ConfigRecord, Error, Message, MessageType, Metadata, MetricRecord, RecordDict
from paths import BASIC  # noqa: F401  (makes the modules of basic importable)

from rounds.replies import fault

NAN, INF = float("nan"), float("inf")


def weights(**changes):
    """The weights of a small model; a change replaces one of them, None leaves it out."""
    whole = {"weight": np.ones((2, 3), np.float32), "bias": np.ones(3, np.float32), "steps": np.array(7)} | changes
    return {name: value for name, value in whole.items() if value is not None}


def arrays(**changes):
    return ArrayRecord(
        {name: value if isinstance(value, Array) else Array(value) for name, value in weights(**changes).items()}
    )


def metrics(**changes):
    return MetricRecord({"train_loss": 1.5, "num-examples": 100} | changes)


def request(kind=MessageType.TRAIN):
    """What the server sends; made as Flower makes it where it comes from the wire."""
    metadata = Metadata(
        run_id=1,
        message_id="m",
        src_node_id=1,
        dst_node_id=2,
        reply_to_message_id="",
        group_id="",
        created_at=0.0,
        ttl=1e9,
        message_type=kind,
    )
    return Message(content=RecordDict({"arrays": arrays()}), metadata=metadata)


def reply(content, kind=MessageType.TRAIN):
    return Message(RecordDict(content), reply_to=request(kind))


def trained(**changes):
    """A good reply to a training request, but for the records that are given."""
    content = {"arrays": arrays(), "metrics": metrics()} | changes
    return reply({name: record for name, record in content.items() if record is not None})


def failed(reason, code=1):
    return Message(Error(code, reason), reply_to=request())


def told(message):
    """Why a reply to a training request can't be used."""
    return fault(message, request().content)


def saved(value, **options):
    """The bytes that numpy writes, declared as they should be."""
    file = io.BytesIO()
    np.save(file, value, **options)
    return Array("float32", (3,), "numpy.ndarray", file.getvalue())


def carded(**said):
    """A reply with what the mod `named` puts on it, where nothing else is said."""
    whole = {"partition-id": 1, "num-partitions": 3, "dataset": "cifar10"} | said
    return trained(client=ConfigRecord({key: value for key, value in whole.items() if value is not None}))


def replies(*records):
    return [trained(metrics=record) for record in records]
