"""What this example adds to a run: the plan, the fork server, a share of a GPU, a Ray cluster, a picture of memory.

launcher/extension.py lists these functions, and says when each is called.
"""

import json
import os
import shutil
import sys
from pathlib import Path
from textwrap import shorten
from typing import Any

import capacity
import cluster
from isolation import FORK_SERVER, ChildDied, run_isolated
from launcher.arguments import Settings
from launcher.processes import Failed
from launcher.project import UsageError
from rounds import history

GPU_LIMIT = "FLOWER_EXAMPLE_GPU_MIB"  # as work.py calls it, which needs NumPy
TOO_OLD = "remove .venv and name a PyTorch build that has code for this GPU, such as TORCH_BACKEND=cu126"

# What of a run's environment the clients on the other nodes of a cluster need, too. Their DATA_DIR is their own.
FOR_NODES = ("DATASET", FORK_SERVER, history.RUN_FOLDER, "OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS")
FOR_NODES += ("CIFAR10_URL", "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO", "PYTHONIOENCODING", "PYTHONUNBUFFERED")

plan: capacity.Plan
joined: cluster.Cluster | None  # that which RAY_ADDRESS names


def check(settings: Settings) -> Settings:
    """Print the plan. Raises UsageError where the run can't fit into the machine, or the cluster can't be used."""
    global plan, joined
    address = os.environ.get(cluster.ADDRESS) if settings.engine == "simulation" else None
    try:
        joined = cluster.find(address) if address else None
    except cluster.NoCluster as error:
        raise UsageError(str(error)) from None
    plan = capacity.make_plan(settings, joined)
    print(plan, flush=True)
    return settings


def prepare(run: Any) -> None:
    """Start the fork server, from which children are forked, and let the run see the GPUs that it is to use."""
    shared, config, environment = plan.sharing, run.settings.config, run.environment
    run.history["at_once"] = plan.at_once
    if joined:
        return prepare_nodes(run)
    if shared.gpus:
        run.history["gpus"] = shared.gpus  # and what was free there before the run, for memory.py
        environment["CUDA_VISIBLE_DEVICES"] = ",".join(shared.gpus)
        environment.setdefault("CUDA_DEVICE_ORDER", "PCI_BUS_ID")  # the order in which nvidia-smi has numbered them
        environment["GPU_SLOTS"] = str(min(shared.slots, plan.at_once))  # how many can meet there
        if shared.limit:
            environment[GPU_LIMIT] = f"{shared.limit:.0f}"
    elif config["device"] == "cpu":
        environment["CUDA_VISIBLE_DEVICES"] = ""
    history.save(run.run_dir, run.history)
    if config["isolation"]:
        sockets = [str(run.temporary / f"fork-{i}") for i in range(max(1, len(shared.gpus)))]
        environment[FORK_SERVER] = os.pathsep.join(sockets)
        run.needed.add("fork-server")
        at_once = str(shared.slots if shared.gpus else 0)
        run.command("fork-server", [sys.executable, str(run.settings.folder / "fork_server.py"), at_once, *sockets])


def prepare_nodes(run: Any) -> None:
    """Let Flower join the cluster, and start what makes its nodes ready, each with a fork server of its own."""
    config, environment = run.settings.config, run.environment
    run.history["ray"] = joined.record()
    run.history["command"] = f"{cluster.ADDRESS}={joined.address} {run.history['command']}"
    history.save(run.run_dir, run.history)
    if config["isolation"]:
        environment[FORK_SERVER] = f"{run.temporary}-node/fork"
    environment[cluster.RUNTIME_ENV] = cluster.runtime_env(run.settings.folder, environment, FOR_NODES)
    environment |= {cluster.ADDRESS: joined.address, cluster.HOOK: "pool.join"}
    words = [environment["DATASET"], config["device"], str(int(config["isolation"])), str(ready_file(run))]
    run.needed.add("nodes")
    run.command("nodes", [sys.executable, str(run.settings.folder / "nodes.py"), "serve", *words])


def ready_file(run: Any) -> Path:
    return run.temporary / "nodes.json"


def wait_for_nodes(run: Any) -> None:
    """Wait until all nodes are ready. Raises Failed, with the node and the reason, where one can't be used."""
    while (status := run.processes.statuses.get("nodes")) is None and not ready_file(run).exists():
        run.processes.pause(0.1)
    if not ready_file(run).exists():
        raise Failed(f"what makes the nodes of the cluster ready ended with status {status}", "nodes")
    if error := json.loads(ready_file(run).read_text()).get("error"):
        raise Failed(error)


def after_superlink(run: Any) -> None:
    """Let a child try each GPU before the clients come. Raises Failed, with what to do, where one can't be used."""
    if joined:
        return wait_for_nodes(run)
    config, sockets = run.settings.config, run.environment.get(FORK_SERVER, "").split(os.pathsep)
    if not config["isolation"] or not (plan.sharing.gpus or config["device"] == "cuda"):
        return
    import work  # NumPy, which a dry run need not have

    while not os.path.exists(sockets[-1]):  # it is still importing
        if (status := run.processes.statuses.get("fork-server")) is not None:
            raise Failed(f"the fork server ended with status {status}", "fork-server")
        run.processes.pause(0.1)
    for i in range(len(sockets)):
        try:
            limits = {"timeout": config["child-timeout"], "environment": run.environment}
            run_isolated(work.try_device, config["device"], number=i, **limits)
        except (ChildDied, RuntimeError, TimeoutError) as error:
            name, reason = list(plan.sharing.gpus or "0")[i], shorten(str(error), 200, placeholder=" ...").rstrip(".")
            advice = f"{TOO_OLD}, or take device=cpu" if "no kernel image" in reason else "take device=cpu"
            raise Failed(f"a child tried GPU {name}, in vain: {reason}. To go on: {advice}") from None


def federation(run: Any) -> dict[str, Any]:
    """Let Ray play as many clients at once as the plan says. It need not know of GPUs: a child picks its own.

    A cluster has the cores that it was started with, and gives its GPUs out itself.
    """
    if joined:
        share = 1 / plan.sharing.slots if plan.sharing.slots else None
        return {"init-args-num-cpus": None, "client-resources-num-gpus": share}
    return {"init-args-num-cpus": plan.at_once}


def cleanup(run: Any) -> None:
    if joined:
        shutil.rmtree(f"{run.temporary}-node", ignore_errors=True)  # of a fork server that was ended as it started
    if joined and run.history["status"] == "completed":
        print(f"  on {joined}", flush=True)
    if any(entry.get("memory") for entry in run.history["rounds"]):
        from memory import draw  # imports Flower

        draw(run.history, run.run_dir / "memory.png")
