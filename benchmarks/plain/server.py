"""FedAvg as tutorials write it, to compare with."""

import torch
from flwr.app import ArrayRecord, ConfigRecord, Context
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

from cifar_utils import Net

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    config = context.run_config
    torch.manual_seed(config["seed"])
    strategy = FedAvg(min_available_nodes=config["min-clients"])
    result = strategy.start(
        grid=grid,
        initial_arrays=ArrayRecord(Net().state_dict()),
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"local-epochs": config["local-epochs"], "learning-rate": config["learning-rate"]}),
    )
    accuracy = result.evaluate_metrics_clientapp[config["num-server-rounds"]]["accuracy"]
    print(f"accuracy {accuracy:.3f}")
