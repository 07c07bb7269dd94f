"""The server, as in basic, but the model is made, tested and written in child processes, which give all memory back.

It tests the model of each round on the test split, so the clients need not. See README.md.
"""

from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import delegate
import work
from memory import Measured

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds. `grid` reaches the clients that are connected."""
    config = context.run_config
    execute = partial(delegate.execute, config)  # NEW vs basic: in a child, if `isolation` says so

    # 1. The model that everybody starts from.
    initial_arrays = delegate.to_record(execute(work.initial_arrays, config["seed"]))  # NEW vs basic: made in a child

    # 2. How clients are chosen, and how their replies are put together. Flower samples a fraction of the clients, but
    #    no fewer than a minimum. A billionth of them is none, so the minimum is the exact number.
    strategy = FedAvg(
        fraction_train=1e-9,
        fraction_evaluate=1e-9 if config["client-evaluation"] else 0.0,  # NEW vs basic: off, since the server tests
        min_train_nodes=config["sampled-clients"],
        min_evaluate_nodes=config["sampled-clients"],
        min_available_nodes=config["min-clients"],
        weighted_by_key="num-examples",
    )

    # NEW vs basic: the server tests the weights of each round, on the test split, in a child.
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        metrics, cost = execute(work.evaluate_on_test_split, delegate.to_numpy(arrays), delegate.device_of(config))
        run.note_memory("server", {"memory of server": work.resident(), **cost})
        return MetricRecord(metrics)

    # 3. The rounds: train, average, evaluate. Guarded waits for the clients, leaves out replies that can't be used,
    #    and writes each round to history.json.
    run = Measured(strategy, context)  # NEW vs basic: Guarded, which also writes down the memory that the round took
    result = run.start(
        grid=grid,
        initial_arrays=initial_arrays,
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"local-epochs": config["local-epochs"], "learning-rate": config["learning-rate"]}),
        timeout=config["round-timeout"],
        evaluate_fn=evaluate,  # NEW vs basic
    )

    # 4. What is left: the trained model, as a plain PyTorch state dict.
    # NEW vs basic: written in a child, too
    execute(work.write_model, run.folder / "model.pt", delegate.to_numpy(result.arrays))
