"""The server of `basic`, and what a real one adds; each addition is marked NEW.

It starts from a seed or a file, picks the strategy and the model by name, sends each round a config of its own,
evaluates what it has just averaged, keeps the best model, may leave the clients layers of their own or add noise and
count the privacy that it buys, and can be resumed after a crash. Its settings (`[tool.flwr.app.config]` in
pyproject.toml) are in `context.run_config`.
"""

import numpy as np
import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy.strategy_utils import aggregate_metricrecords

import cifar_utils
from checkpoint import Resumable
from models import make_model
from personal import shared
from schedules import Scheduled
from strategies import make_strategy

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds. `grid` reaches the clients that are connected."""
    config = context.run_config

    # 1. The model that everybody starts from.
    torch.manual_seed(config["seed"])
    net = make_model(config["model"])  # NEW vs basic: by name, from models.py
    if config["init-from"]:  # NEW vs basic: pre-trained weights (of a file from elsewhere, read nothing but weights)
        weights = torch.load(config["init-from"], map_location="cpu", weights_only=True)
        net.load_state_dict(weights, strict=not config["personal-layers"])
    weights = shared(net.state_dict(), config["personal-layers"])  # NEW vs basic: personal layers never come here
    initial_arrays = ArrayRecord(weights)

    # 2. How clients are chosen, and how their replies are put together.
    strategy = make_strategy(config, aggregate_metrics)  # NEW vs basic: by name, from strategies.py
    strategy = Scheduled(strategy, config)  # NEW vs basic: each round is sent a config of its own, schedules.py

    # 3. The rounds: train, average, evaluate. Guarded waits for the clients, leaves out replies that can't be used,
    #    and writes each round to history.json.
    run = Resumable(strategy, context)  # NEW vs basic: it also keeps what a resume needs, and the best model
    result = run.start(
        grid=grid,
        initial_arrays=initial_arrays,
        num_rounds=config["num-server-rounds"],
        timeout=config["round-timeout"],
        evaluate_fn=make_evaluate(config),  # NEW vs basic: the server tests the model too, after each round
    )

    # 4. What is left: the trained model, as a plain PyTorch state dict. NEW vs basic: the best one is in best.pt.
    #    With personal layers, it is what all share; each client's own are where personal.py says.
    torch.save(result.arrays.to_torch_state_dict(), run.folder / "model.pt")


def make_evaluate(config):
    """NEW vs basic: return the server's evaluation, on test pictures that no client holds.

    YOUR DATA: a loader over your own; where the server has nothing to test on, `return None`, and the clients' figures
    take its place. So it is with personal layers: the server has no whole model then.
    """
    if config["personal-layers"]:
        return None
    images, labels = cifar_utils.load_split("test")
    rows = slice(100 if config["toy"] else None)
    testloader = cifar_utils.Pictures(np.array(images[rows]), labels[rows]).loader(512)
    net = make_model(config["model"])

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Test `arrays`: the ones that were just averaged, not those that the run began with."""
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(cifar_utils.test(net, testloader, config["device"]))

    return evaluate


def aggregate_metrics(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """NEW vs basic: put the clients' metrics together: the weighted mean of each, and who is worst and best off.

    A mean hides the client that the model fails; with non-IID data there is often one. Clients are ranked by accuracy
    where there is one, else by loss. Metrics count by examples, even where `weighted_by_key` gives each client's
    weights an equal say.
    """
    means = aggregate_metricrecords(replies, "num-examples")
    means.pop(weighted_by_key, None)
    records = [next(iter(reply.metric_records.values())) for reply in replies]
    cards = [reply.config_records.get("client", {}) for reply in replies]  # the mod `named` says whose, and how long
    numbers = [name for name, mean in means.items() if not isinstance(mean, list)]  # a metric may be a list
    means["num-examples"] = sum(record["num-examples"] for record in records)
    if seconds := [card["seconds"] for card in cards if isinstance(card.get("seconds"), float)]:
        means["slowest-seconds"] = max(seconds)
    if key := next((name for name in ("accuracy", "own_accuracy", "loss", "own_loss") if name in numbers), None):
        clients = [card.get("partition-id", -1) for card in cards]
        ranking = sorted(zip([record[key] for record in records], clients, strict=True), reverse="loss" in key)
        measure = key.removeprefix("own_")
        for place, (value, client) in (("worst", ranking[0]), ("best", ranking[-1])):
            means.update({f"{place}-{measure}": value, f"{place}-client": client})
    return means
