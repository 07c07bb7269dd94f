"""The server, as in basic, but it never touches PyTorch or the GPU: a child process does, and is gone when it is done.

What a process has once put on a GPU, its CUDA context above all, it keeps until it ends, and the server lives as long
as the run. So it only passes NumPy arrays on. See README.md; `work.py` has what the children do.
"""

from functools import partial

from flwr.app import ArrayRecord, ConfigRecord, Context, MetricRecord
from flwr.serverapp import Grid, ServerApp
from flwr.serverapp.strategy import FedAvg

import work
from launcher.grid import RunGrid
from launcher.results import write_model

app = ServerApp()


@app.main()
def main(grid: Grid, context: Context) -> None:
    """Run all rounds. `grid` reaches the clients that are connected."""
    config = context.run_config
    execute = partial(work.execute, config)  # NEW vs basic: runs a function in a child process

    # 1. The model that everybody starts from.
    # NEW vs basic: a child makes it, since that takes PyTorch.
    initial_arrays = work.to_record(execute(work.initial_arrays, config["seed"]))

    # 2. How clients are chosen and their replies put together. Flower samples max(fraction * clients, minimum) of
    #    them: with next to no fraction, the minimum is the exact number.
    strategy = FedAvg(
        fraction_train=1e-9,
        # NEW vs basic: the clients test only where that is asked for; 0.0 turns it off.
        fraction_evaluate=1e-9 if config["client-evaluation"] else 0.0,
        min_train_nodes=config["sampled-clients"],
        min_evaluate_nodes=config["sampled-clients"],
        min_available_nodes=config["min-clients"],
        weighted_by_key="num-examples",
    )

    # 3. The rounds: train, average, evaluate. RunGrid waits for the clients, leaves out replies that can't be used,
    #    and writes each round to history.json.
    run = RunGrid(grid, context)

    # NEW vs basic: the server tests the weights of each round, on the test split, in a child.
    def evaluate(server_round: int, arrays: ArrayRecord) -> MetricRecord:
        metrics, memory = execute(work.evaluate_on_test_split, work.to_numpy(arrays))
        run.note_memory({"server": work.resident(), **{f"server's {name}": mib for name, mib in memory.items()}})
        return MetricRecord(metrics)

    result = strategy.start(
        grid=run,
        initial_arrays=initial_arrays,
        num_rounds=config["num-server-rounds"],
        train_config=ConfigRecord({"local-epochs": config["local-epochs"], "learning-rate": config["learning-rate"]}),
        timeout=config["round-timeout"],
        evaluate_fn=run.recorded(evaluate),  # NEW vs basic
    )

    # 4. What is left: the trained model, as a plain PyTorch state dict in model.pt.
    run.save(result.arrays, write=partial(execute, write_model))  # NEW vs basic: in a child, too
