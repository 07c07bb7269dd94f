"""The client of `basic`, and what it adds; each addition is marked NEW.

It does what the server's config for the round says, and tells more of itself than the loss.
"""

import time

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from torch import Tensor, nn

import cifar_utils
from augmentation import Augmented
from flaky import flaky
from launcher.name_tag import tagged_client_app
from models import make_model
from partitions import partitioner
from poisoning import poisoning

TOY_EXAMPLES = 10

app = tagged_client_app()  # Flower's ClientApp; each reply says which client it is from


@app.train(mods=[flaky, poisoning])  # NEW vs basic: lets one client fail, or do harm, on purpose
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and how many examples they saw."""
    started = time.monotonic()
    config = message.content["config"]
    net = load_model(message, context)
    batches, held_out = load_data(context, server_round=config["server-round"])
    train_loss = cifar_utils.train(
        net,
        Augmented(batches) if context.run_config["augment"] else batches,  # NEW vs basic: pictures shifted, mirrored
        epochs=config["local-epochs"],  # NEW vs basic: this, and the learning rate, differ from round to round
        learning_rate=config["learning-rate"],
        penalty=proximal_term(net, config.get("proximal-mu", 0.0)),  # NEW vs basic: sent by FedProx alone
    )
    # NEW vs basic: how well this client's own model does on its own held-out examples, before it is averaged away
    own = {f"own_{name}": value for name, value in cifar_utils.test(net, held_out).items()}
    metrics = {"train_loss": train_loss, **own}
    reply = RecordDict(
        {
            "arrays": ArrayRecord(net.state_dict()),
            # The server weighs this client's weights, and its loss, by num-examples.
            "metrics": MetricRecord(
                {**metrics, "seconds": time.monotonic() - started, "num-examples": batches.num_examples}
            ),
        }
    )
    return Message(content=reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on examples that this client kept out of training."""
    started = time.monotonic()
    net = load_model(message, context)
    _, batches = load_data(context)
    # NEW vs basic: as many batches as the server asks for, and num-examples says how many examples that were
    shorten(batches, message.content["config"]["evaluate-steps"] * context.run_config["batch-size"])
    batches.batch_size = context.run_config["batch-size"]
    metrics = MetricRecord({**cifar_utils.test(net, batches), "num-examples": batches.num_examples})
    metrics["seconds"] = time.monotonic() - started
    return Message(content=RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message, context: Context) -> nn.Module:
    """The global model, as the server sent it. A client keeps nothing from one round to the next."""
    net = make_model(context.run_config["model"])  # NEW vs basic: by name, from models.py
    net.load_state_dict(message.content["arrays"].to_torch_state_dict())
    return net.to(cifar_utils.best_device())


def load_data(context: Context, server_round: int = 0) -> tuple[cifar_utils.Batches, cifar_utils.Batches]:
    """This client's own examples, as (training, evaluation) batches."""
    batches = cifar_utils.load_partition(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        batch_size=context.run_config["batch-size"],
        seed=context.run_config["seed"],
        server_round=server_round,
        **partitioner(context.run_config),  # NEW vs basic: iid, dirichlet or shards
    )
    if context.run_config["toy"]:  # NEW vs basic: next to no data, to try things in seconds
        for part in batches:
            shorten(part, TOY_EXAMPLES)
    return batches


def shorten(batches: cifar_utils.Batches, num_examples: int) -> None:
    """NEW vs basic: keep the first examples alone, or all where there are not so many."""
    batches.images, batches.labels = batches.images[:num_examples], batches.labels[:num_examples]


def proximal_term(net: nn.Module, mu: float):
    """NEW vs basic: FedProx's mu / 2 * ||w - w_global||^2 as a function, or None (Li et al., 2020, equation 2)."""
    if mu == 0:
        return None
    start = [weights.detach().clone() for weights in net.parameters()]

    def term() -> Tensor:
        pairs = zip(net.parameters(), start, strict=True)
        return mu / 2 * torch.stack([(weights - old).square().sum() for weights, old in pairs]).sum()

    return term
