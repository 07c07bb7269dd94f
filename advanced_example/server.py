"""The server of `basic`, and what a real one adds; each addition is marked NEW.

It starts from a seed or a file, picks the strategy and the model by name, sends each round a config of its own,
evaluates what it has just averaged, keeps the best model, and can be resumed after a crash. Its settings
(`[tool.flwr.app.config]` in pyproject.toml) are in `context.run_config`.
"""

import torch
from flwr.app import ArrayRecord, Context, MetricRecord, RecordDict
from flwr.serverapp import Grid, ServerApp

import cifar_utils
from checkpoint import Checkpoint
from launcher.grid import RunGrid
from models import make_model
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
        net.load_state_dict(torch.load(config["init-from"], map_location="cpu", weights_only=True))
    initial_arrays = ArrayRecord(net.state_dict())

    # 2. How clients are chosen and their replies put together.
    run = RunGrid(grid, context)
    strategy = make_strategy(config, run.aggregated(aggregate_metrics))  # NEW vs basic: by name, from strategies.py

    # NEW vs basic: a run that was broken off goes on after its last whole round, with all that the next one needs.
    checkpoint = Checkpoint(run, strategy)
    done, arrays = checkpoint.restore() or (0, initial_arrays)

    # NEW vs basic: the server tests the model too, before round 1 and after each round.
    evaluate = make_evaluate(config)

    # 3. The rounds: train, average, evaluate. RunGrid waits for the clients, leaves out replies that can't be used,
    #    and writes each round to history.json.
    result = Scheduled(strategy, config, rounds_done=done).start(  # NEW vs basic: a config for each round, schedules.py
        grid=run,
        initial_arrays=arrays,
        num_rounds=config["num-server-rounds"] - done,
        timeout=config["round-timeout"],
        evaluate_fn=checkpoint.after_each_round(run.recorded(evaluate)),  # NEW vs basic
    )

    # 4. What is left: the trained model in model.pt, and, NEW vs basic, the best of all rounds in best.pt.
    run.save(result.arrays or arrays)  # no new arrays: all rounds were done before this resume


def make_evaluate(config):
    """NEW vs basic: return the server's evaluation, on test pictures that no client holds."""
    images, labels = cifar_utils.load_split("test")
    rows = slice(100 if config["toy"] else None)
    batches = cifar_utils.Batches(images[rows].copy(), labels[rows], 512, cifar_utils.best_device())
    net = make_model(config["model"]).to(cifar_utils.best_device())

    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        """Loss and accuracy of `arrays`: the ones that were just averaged, not those that the run began with."""
        net.load_state_dict(arrays.to_torch_state_dict())
        return MetricRecord(cifar_utils.test(net, batches))

    return evaluate


def aggregate_metrics(replies: list[RecordDict], weighted_by_key: str) -> MetricRecord:
    """NEW vs basic: put the clients' own metrics together: the weighted mean of each, and who is worst and best off.

    A mean hides the client that the model fails; with non-IID data there is often one. Metrics count by examples, even
    where `weighted_by_key` gives each client's weights an equal say.
    """
    records = [reply["metrics"] for reply in replies]
    clients = [reply["client"]["partition-id"] for reply in replies]
    total = sum(record["num-examples"] for record in records)
    means = {key: sum(r[key] * r["num-examples"] for r in records) / total for key in records[0]}
    del means["num-examples"]
    means.pop(weighted_by_key, None)
    # YOUR TRAINING STEP: where the task has no accuracy, rank by the loss, here and in checkpoint.py.
    accuracy = "accuracy" if "accuracy" in means else "own_accuracy"
    ranking = sorted(zip([record[accuracy] for record in records], clients, strict=True))
    return MetricRecord(
        {
            **means,
            "num-examples": total,
            "slowest-seconds": max(record["seconds"] for record in records),
            "worst-accuracy": ranking[0][0],
            "worst-client": ranking[0][1],
            "best-accuracy": ranking[-1][0],
            "best-client": ranking[-1][1],
        }
    )
