"""The client, as in basic, but it never touches PyTorch or the GPU: a child process does, and is gone when it is done.

In a simulation a few long-lived processes play all the clients. What such a process has once put on a GPU, its CUDA
context above all, it keeps until it ends; a child gives it all back after each message. See README.md.
"""

from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp

import delegate
import work
from rounds.mods import message_seed, named

app = ClientApp(mods=[named])  # replies say whose they are; NEW vs basic: the child seeds its generators itself


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the number of examples."""
    # 1. What the server sent: the weights, and the settings of this round.
    config = message.content["config"]

    # 2. Plain PyTorch. NEW vs basic: in a child; NumPy arrays go in and come out, and what it cost.
    arrays, metrics, cost = delegate.execute_for_client(
        context,
        work.train,
        delegate.to_numpy(message.content["arrays"]),
        data_of(context),
        message_seed(message, context),
        delegate.device_of(context.run_config),
        config["local-epochs"],
        config["learning-rate"],
    )

    # 3. The reply. The server averages weights and loss, each client counting by num-examples.
    reply = RecordDict({"arrays": delegate.to_record(arrays), "metrics": MetricRecord(metrics)})
    reply["client"] = cost_record(cost)  # NEW vs basic
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on the examples that this client keeps out of training."""
    metrics, cost = delegate.execute_for_client(
        context,
        work.evaluate,
        delegate.to_numpy(message.content["arrays"]),
        data_of(context),
        message_seed(message, context),
        delegate.device_of(context.run_config),
    )
    return Message(RecordDict({"metrics": MetricRecord(metrics), "client": cost_record(cost)}), reply_to=message)


def data_of(context: Context) -> dict[str, Any]:
    """NEW vs basic: return not this client's own examples, but which they are; the child loads them."""
    return {
        "partition_id": context.node_config["partition-id"],
        "num_partitions": context.node_config["num-partitions"],
        "batch_size": context.run_config["batch-size"],
        "seed": context.run_config["seed"],
    }


def cost_record(cost: work.Cost) -> ConfigRecord:
    """NEW vs basic: return, for the history, where the work was done, and the MiB of this process and its child."""
    return ConfigRecord({"memory of client": work.resident(), **delegate.place(), **cost})
