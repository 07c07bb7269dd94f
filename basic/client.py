"""The client: it trains the model that it is sent on its own data, and sends back the weights, never the data.

Flower calls `train` and `evaluate` once for each message from the server. Which part of the data is this client's own
stands in `context.node_config`; the settings of the run, from pyproject.toml, stand in `context.run_config`.
"""

from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict

import cifar_utils
from launcher.name_tag import tagged_client_app

app = tagged_client_app()  # Flower's ClientApp; each reply says which client it is from


@app.train()
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and how many examples they saw."""
    net = load_model(message)
    batches, _ = load_data(context, server_round=message.content["config"]["server-round"])
    train_loss = cifar_utils.train(
        net,
        batches,
        epochs=message.content["config"]["local-epochs"],
        learning_rate=message.content["config"]["learning-rate"],
    )
    reply = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            # The server weighs this client's weights, and its loss, by num-examples.
            "metrics": MetricRecord({"train_loss": train_loss, "num-examples": batches.num_examples}),
        }
    )
    return Message(content=reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on examples that this client kept out of training."""
    net = load_model(message)
    _, batches = load_data(context)
    metrics = MetricRecord({**cifar_utils.test(net, batches), "num-examples": batches.num_examples})
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message) -> cifar_utils.Net:
    """The global model, as the server sent it. A client keeps nothing from one round to the next."""
    net = cifar_utils.Net()
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net.to(cifar_utils.best_device())


def load_data(context: Context, server_round: int = 0) -> tuple[cifar_utils.Batches, cifar_utils.Batches]:
    """This client's own examples, as (training, evaluation) batches."""
    return cifar_utils.load_partition(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        batch_size=context.run_config["batch-size"],
        seed=context.run_config["seed"],
        server_round=server_round,
    )
