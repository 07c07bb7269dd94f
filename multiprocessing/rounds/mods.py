"""Mods for a ClientApp: Flower passes each message through them on its way to client.py and back."""

import os
import random
import sys
import time
import traceback

import numpy as np
from flwr.app import ConfigRecord, Context, Error, Message, MessageType, RecordDict
from flwr.clientapp.typing import ClientAppCallable
from flwr.common.constant import ErrorCode

from rounds.replies import CARD, one_line


def named(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Put this client's partition id, and more, on each reply and in front of each error.

    Flower draws new node ids for each run. The partition id lets a server order the replies, and sample the same
    clients when the command is run again. A message without content asks for just that.
    """
    partition_id, began = context.node_config.get("partition-id"), time.monotonic()
    try:
        reply = call_next(message, context) if message.content else Message(RecordDict(), reply_to=message)
        if not isinstance(reply, Message):
            raise TypeError(f"a function in client.py returned {type(reply).__name__} in place of a Message")
        if reply.has_error():
            raise RuntimeError(reply.error.reason)
    except (Exception, SystemExit) as error:
        traceback.print_exc()  # into this client's log; an error that is raised reaches the server as a whole traceback
        reason = one_line(f"{type(error).__name__}: {error}")
        error = Error(ErrorCode.CLIENT_APP_RAISED_EXCEPTION, f"partition {partition_id}: {reason}")
        return Message(error, reply_to=message)
    said = {key: context.node_config.get(key) for key in ("partition-id", "num-partitions")}  # no path of its data
    said |= {"dataset": os.environ.get("DATASET"), "device": device(context), "seconds": time.monotonic() - began}
    said |= reply.content.config_records.get(CARD, {})
    reply.content[CARD] = ConfigRecord({key: value for key, value in said.items() if value is not None})
    return reply


def device(context: Context) -> str | None:
    """Return the name of what PyTorch has computed on in this process; None without PyTorch."""
    torch = sys.modules.get("torch")
    if torch is None:
        return None
    if torch.cuda.is_initialized():
        gpu = torch.cuda.get_device_properties()
        return f"{gpu.name}, {gpu.total_memory / 2**30:.0f} GiB"
    is_mps = context.run_config.get("device") in ("auto", "mps") and torch.backends.mps.is_available()
    return "mps" if is_mps else "cpu"


def seeded(message: Message, context: Context, call_next: ClientAppCallable) -> Message:
    """Seed PyTorch, NumPy and Python: shuffling, dropout and augmentation repeat when the command does."""
    import torch  # a client that works in child processes uses `message_seed` there, and has no PyTorch itself

    seed = message_seed(message, context)
    torch.manual_seed(seed)
    np.random.seed(seed)
    random.seed(seed)
    return call_next(message, context)


def message_seed(message: Message, context: Context) -> int:
    """Return a number below 2**32 that follows from the run's seed, the round, the client and the phase."""
    configs = message.content.config_records.values()
    server_round = next((config["server-round"] for config in configs if "server-round" in config), 0)
    phase = int(message.metadata.message_type == MessageType.TRAIN)
    entropy = [context.run_config.get("seed", 0), server_round, context.node_config.get("partition-id", 0), phase]
    return int(np.random.SeedSequence(entropy).generate_state(1)[0])
