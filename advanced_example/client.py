"""The client of `basic`, and what it adds; each addition is marked NEW.

It does what the server's config for the round says, and tells more of itself than the loss.
"""

import torch
from flwr.app import ArrayRecord, Context, Message, MetricRecord, RecordDict
from flwr.clientapp import ClientApp
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset

import cifar_utils
from augmentation import Augmented
from flaky import flaky
from models import make_model
from partitions import partitioner
from personal import recall, remember, shared
from poisoning import poisoning
from rounds.mods import named, seeded

TOY_EXAMPLES = 10

app = ClientApp(mods=[named, seeded])  # replies say whose they are; the same command gives the same model


@app.train(mods=[flaky, poisoning])  # NEW vs basic: lets one client fail, or do harm, on purpose
def train(message: Message, context: Context) -> Message:
    """Train the global model on this client's examples; reply with the new weights and the number of examples."""
    # 1. What the server sent: the weights, and the settings of this round.
    net = load_model(message, context)
    config, device = message.content["config"], context.run_config["device"]

    # 2. Plain PyTorch.
    trainloader, testloader = load_data(context)
    batches = Augmented(trainloader) if context.run_config["augment"] else trainloader  # NEW vs basic
    # NEW vs basic: FedProx sends a mu, and holds what is shared near the global model
    penalty = proximal_term(net, config.get("proximal-mu", 0.0), context.run_config["personal-layers"])
    # NEW vs basic: epochs and learning rate differ from round to round, and there may be a penalty
    epochs, rate = config["local-epochs"], config["learning-rate"]
    train_loss = cifar_utils.train(net, batches, epochs, rate, penalty=penalty, device=device)
    # NEW vs basic: how well this client's own model does on its own held-out examples, before it is averaged away
    own = cifar_utils.test(net, testloader, device) if len(testloader.dataset) else {}

    # 3. The reply. The server averages weights and loss, each client counting by num-examples.
    metrics = MetricRecord({"train_loss": train_loss, "num-examples": len(trainloader.dataset)})
    metrics.update({f"own_{name}": value for name, value in own.items()})  # NEW vs basic
    weights = remember(net.state_dict(), message, context)  # NEW vs basic: personal layers stay here; the rest is sent
    reply = RecordDict({"arrays": ArrayRecord(weights), "metrics": metrics})
    return Message(reply, reply_to=message)


@app.evaluate()
def evaluate(message: Message, context: Context) -> Message:
    """Test the global model on the examples that this client keeps out of training."""
    net = load_model(message, context)
    _, testloader = load_data(context)
    # NEW vs basic: on as many batches as the server asks for; num-examples says how many examples that were
    steps = message.content["config"]["evaluate-steps"]
    testloader = shortened(testloader, steps * context.run_config["batch-size"])
    tested = cifar_utils.test(net, testloader, context.run_config["device"])
    metrics = MetricRecord({**tested, "num-examples": len(testloader.dataset)})
    return Message(RecordDict({"metrics": metrics}), reply_to=message)


def load_model(message: Message, context: Context) -> nn.Module:
    """Return the global model, as the server sent it, with this client's personal layers, where there are any."""
    net = make_model(context.run_config["model"])  # NEW vs basic: by name, from models.py
    own = recall(message, context)  # NEW vs basic: what this client has kept from one round to the next
    net.load_state_dict({**message.content["arrays"].to_torch_state_dict(), **own})
    return net


def load_data(context: Context) -> tuple[DataLoader, DataLoader]:
    """Return this client's own examples: those it trains on, and those it keeps for evaluation."""
    trainloader, testloader = cifar_utils.load_client_data(
        context.node_config["partition-id"],
        context.node_config["num-partitions"],
        batch_size=context.run_config["batch-size"],
        seed=context.run_config["seed"],
        **partitioner(context.run_config),  # NEW vs basic: iid, dirichlet or shards
    )
    if context.run_config["toy"]:  # NEW vs basic: next to no data, to try things in seconds
        return shortened(trainloader, TOY_EXAMPLES, shuffle=True), shortened(testloader, TOY_EXAMPLES)
    return trainloader, testloader


def shortened(loader: DataLoader, num_examples: int, shuffle: bool = False) -> DataLoader:
    """NEW vs basic: return a loader of the first examples alone, or of all where there are not so many."""
    subset = Subset(loader.dataset, range(min(num_examples, len(loader.dataset))))
    return DataLoader(subset, loader.batch_size, shuffle=shuffle, collate_fn=loader.collate_fn)


def proximal_term(net: nn.Module, mu: float, personal_layers: str = ""):
    """NEW vs basic: return FedProx's mu / 2 * ||w - w_global||^2 as a function (Li et al., 2020, eq. 2), or None."""
    if mu == 0:
        return None

    def parts():
        return shared(dict(net.named_parameters()), personal_layers).values()

    start = [weights.detach().clone() for weights in parts()]

    def term() -> Tensor:
        pairs = zip(parts(), start, strict=True)
        return mu / 2 * torch.stack([(weights - old.to(weights.device)).square().sum() for weights, old in pairs]).sum()

    return term
