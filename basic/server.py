"""The server: in each round it sends the model to some clients, and averages the weights that come back.

That average, weighted by each client's number of examples, is FedAvg (McMahan et al., 2017, arXiv:1602.05629). The
server never sees an example. Its settings (`[tool.flwr.app.config]` in pyproject.toml) are in `context.run_config`.
"""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from cifar_utils import Net
from rounds.guarded import Guarded

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds. `grid` reaches the clients that are connected."""
    config = context.run_config

    # 1. The model that everybody starts from.
    torch.manual_seed(config["seed"])
    initial_arrays = ArrayRecord(Net().state_dict())

    # 2. How clients are chosen, and how their replies are put together. Flower samples a fraction of the clients, but
    #    no fewer than a minimum. A billionth of them is none, so the minimum is the exact number.
    strategy = FedAvg(
        fraction_train=1e-9,
        fraction_evaluate=1e-9,
        min_train_nodes=config["sampled-clients"],
        min_evaluate_nodes=config["sampled-clients"],
        min_available_nodes=config["min-clients"],
        weighted_by_key="num-examples",
    )

    # 3. The rounds: train, average, evaluate. Guarded waits for the clients, leaves out replies that can't be used,
    #    and writes each round to history.json. Without it, `strategy.start(grid=grid, ...)` trains just as well.
    run = Guarded(strategy, context)
    result = run.start(
        grid=grid,
        initial_arrays=initial_arrays,
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"local-epochs": config["local-epochs"], "learning-rate": config["learning-rate"]}),
        timeout=config["round-timeout"],
    )

    # 4. What is left: the trained model, as a plain PyTorch state dict.
    torch.save(result.arrays.to_torch_state_dict(), run.folder / "model.pt")
