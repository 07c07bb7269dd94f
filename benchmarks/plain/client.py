"""The work of basic's client as tutorials write it, to compare with: a loader per picture, and nothing but Flower."""

import numpy as np
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from per_picture import load
from torch.utils.data import DataLoader

import cifar_utils

app = ClientApp()


@app.train()
def train(message: Message, context: Context) -> Message:
    config = message.content["config"]
    net = cifar_utils.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    batches, _ = load_data(context)
    loss = cifar_utils.train(net, batches, config["local-epochs"], config["learning-rate"])
    metrics = MetricRecord({"train_loss": loss, "num-examples": len(batches.dataset)})
    return Message(RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics}), reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    net = cifar_utils.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    _, batches = load_data(context)
    metrics = MetricRecord({**cifar_utils.test(net, batches), "num-examples": len(batches.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_data(context: Context) -> tuple[DataLoader, DataLoader]:
    """The examples that basic's client has."""
    client, clients = (int(context.node_config[key]) for key in ("partition-id", "num-partitions"))
    batch_size, seed = context.run_config["batch-size"], context.run_config["seed"]
    images, labels = cifar_utils.load_split("train")
    rows = cifar_utils.partition(labels, clients, seed)[client]
    held_out, kept = np.split(np.random.default_rng([seed, client]).permutation(rows), [len(rows) // 10])
    return load(images[kept], labels[kept], batch_size), load(images[held_out], labels[held_out], 512, shuffle=False)
