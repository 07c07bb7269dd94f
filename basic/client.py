"""The client: it trains the model that it is sent on its own data, and sends back the weights, never the data.

Flower calls `train` and `evaluate` once for each message from the server. `context.node_config` says which client this
is, `context.run_config` holds the settings of the run, from pyproject.toml.
"""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch.utils.data import DataLoader

import cifar_utils
from rounds.mods import named, seeded

app = ClientApp(mods=[named, seeded])  # replies say whose they are; the same command gives the same model


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the number of examples."""
    # 1. What the server sent: the weights, and the settings of this round.
    net = load_model(message)
    config, device = message.content["config"], context.run_config["device"]

    # 2. Plain PyTorch.
    trainloader, _ = load_data(context)
    train_loss = cifar_utils.train(net, trainloader, config["local-epochs"], config["learning-rate"], device=device)

    # 3. The reply. The server averages weights and loss, each client counting by num-examples.
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(trainloader.dataset)})
    reply = RecordDict({"arrays": ArrayRecord(net.state_dict()), "metrics": metrics})
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on the examples that this client keeps out of training."""
    net = load_model(message)
    _, testloader = load_data(context)
    tested = cifar_utils.test(net, testloader, context.run_config["device"])
    metrics = MetricRecord({**tested, "num-examples": len(testloader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message) -> cifar_utils.Net:
    """Return the global model, as the server sent it. A client keeps nothing from one round to the next."""
    net = cifar_utils.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net


def load_data(context: Context) -> tuple[DataLoader, DataLoader]:
    """Return this client's own examples: those it trains on, and those it keeps for evaluation."""
    return cifar_utils.load_client_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        batch_size=context.run_config["batch-size"],
        seed=context.run_config["seed"],
    )
