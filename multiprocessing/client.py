"""The client, as in basic, but it never touches PyTorch or the GPU: a child process does, and is gone when it is done.

In a simulation a few long-lived processes play all the clients. What such a process has once put on a GPU, its CUDA
context above all, it keeps until it ends; a child gives it all back after each message. See README.md.
"""

from typing import Any

from flwr.app import ConfigRecord, Context, Message, MetricRecord, RecordDict

import work
from launcher.name_tag import tagged_client_app

app = tagged_client_app()  # Flower's ClientApp; each reply says which client it is from


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and how many examples they saw."""
    # NEW vs basic: load_model, load_data and the training happen in the child; NumPy arrays go in and come out.
    arrays, metrics, memory = work.execute(
        context.run_config,
        work.train,
        work.to_numpy(message.content["arrays"]),
        load_data(context, server_round=message.content["config"]["server-round"]),
        message.content["config"]["local-epochs"],
        message.content["config"]["learning-rate"],
    )
    reply = RecordDict(
        {
            "arrays": work.to_record(arrays),
            # The server weighs this client's weights, and its loss, by num-examples.
            "metrics": MetricRecord(metrics),
            "memory": memory_record(memory),  # NEW vs basic
        }
    )
    return Message(content=reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on examples that this client kept out of training."""
    metrics, memory = work.execute(
        context.run_config,
        work.evaluate,
        work.to_numpy(message.content["arrays"]),
        load_data(context),
    )
    reply = RecordDict({"metrics": MetricRecord(metrics), "memory": memory_record(memory)})
    return Message(content=reply, reply_to=message)


def load_data(context: Context, server_round: int = 0) -> dict[str, Any]:
    """NEW vs basic: not this client's own examples, but which they are; the child loads them."""
    return {
        "partition_id": context.node_config["partition-id"],
        "num_partitions": context.node_config["num-partitions"],
        "batch_size": context.run_config["batch-size"],
        "seed": context.run_config["seed"],
        "server_round": server_round,
    }


def memory_record(memory: work.Numbers) -> ConfigRecord:
    """NEW vs basic: for the history: this process's memory, and the child's, in MiB."""
    return ConfigRecord({"client": work.resident(), **{f"client's {name}": mib for name, mib in memory.items()}})
