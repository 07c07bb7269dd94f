#!/usr/bin/env python3
"""Tell what would go wrong in a copy of an example, after its model, data or training step were changed.

Usage:
    python tools/check_template.py FOLDER            # ends with a real round of two clients
    python tools/check_template.py FOLDER --quick    # without that round

One line a check; each that fails says what to change. Exit status: 0 nothing failed, 1 something did, 2 no such folder.
"""

import importlib
import inspect
import json
import math
import os
import pickle
import re
import subprocess
import sys
import tomllib
import traceback
from collections.abc import Callable, Iterator
from itertools import islice
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS = 2  # of training, to see whether it works at all


class Fault(Exception):
    """What would go wrong; the text says what to change."""


class Risk(Exception):
    """What may go wrong."""


class FirstBatches:
    """The first batches of a loader, which is otherwise the same."""

    def __init__(self, batches: Any) -> None:
        self.batches = batches

    def __iter__(self) -> Iterator[Any]:
        return islice(iter(self.batches), STEPS)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.batches, name)


# --- The checks: each takes what earlier ones have found, and returns what it has seen -------------------------------


def settings(p: SimpleNamespace) -> str:
    from flwr.common.config import validate_config

    from launcher import arguments

    project = tomllib.loads((p.folder / "pyproject.toml").read_text())
    valid, errors, _ = validate_config(project, project_dir=p.folder)
    if not valid:
        raise Fault("pyproject.toml is no Flower App: " + "; ".join(errors))
    if not re.fullmatch(r"[A-Za-z][A-Za-z0-9-]{0,31}", name := project["project"]["name"]):
        raise Fault(f"[project] name is {name!r}: Flower takes letters, digits and hyphens, at most 32")
    done = run_sh(p, "--dry-run")
    if done.returncode != 0:
        raise Fault(f"./run.sh --dry-run does not take it: {last_error(done)}")
    p.settings = arguments.parse([], p.folder)
    p.config, p.clients = p.settings.config, p.settings.clients
    return f"a Flower App, and ./run.sh takes it: {p.clients} clients, dataset {p.settings.dataset}"


def modules(p: SimpleNamespace) -> str:
    import torch
    from flwr.clientapp import ClientApp
    from flwr.serverapp import ServerApp

    torch.set_num_threads(1)  # as in a run
    p.utils, p.client, server = (importlib.import_module(name) for name in ("cifar_utils", "client", "server"))
    for module, kind in ((p.client, ClientApp), (server, ServerApp)):
        if not isinstance(getattr(module, "app", None), kind):
            raise Fault(f"{module.__name__}.py has no `app` that is a {kind.__name__}: Flower looks for it")
    return "cifar_utils.py, client.py and server.py can be imported"


def make_model(p: SimpleNamespace) -> Any:
    if (p.folder / "models.py").is_file():
        return importlib.import_module("models").make_model(p.config["model"])
    return p.utils.Net()


def model(p: SimpleNamespace) -> str:
    import torch
    from flwr.app import ArrayRecord

    p.net, other = make_model(p), make_model(p)
    before = p.net.state_dict()
    if not before:
        raise Fault("the model has no weights: assign layers to attributes, or put a list of them in nn.ModuleList")
    after = ArrayRecord(before).to_torch_state_dict()
    for name, tensor in before.items():
        back = after[name]
        if (back.dtype, back.shape) != (tensor.dtype, tensor.shape):
            raise Fault(f"{name} comes back as {back.dtype} {tuple(back.shape)}, not {tensor.dtype} {tensor.shape}")
        if not torch.equal(back, tensor.cpu()) and not tensor.isnan().any():
            raise Fault(f"{name} comes back with other values")
        if not tensor.float().isfinite().all():
            raise Fault(f"{name} begins with NaN or infinite numbers: look at how the model makes it")
    try:
        other.load_state_dict(after)
    except RuntimeError as error:
        raise Fault(f"a second model takes other weights: {error}. Name its layers alike each time") from error
    size = sum(tensor.numel() for tensor in before.values())
    return f"{len(before)} arrays, {size:,} numbers in all, survive the way to a client and back"


def batch_norm(p: SimpleNamespace) -> str:
    import torch

    kind = torch.nn.modules.batchnorm._BatchNorm
    found = [name for name, layer in p.net.named_modules() if isinstance(layer, kind) and layer.track_running_stats]
    if found:
        raise Risk(
            f"{', '.join(found)}: means and variances of one client's data are kept there, and averaged they may fit "
            "none; GroupNorm or LayerNorm keeps none"
        )
    return "no running statistics"


def data(p: SimpleNamespace) -> str:
    import numpy as np

    from launcher import DATASETS, dataset

    name = p.settings.dataset
    os.environ["DATASET"] = dataset.prepare(name)["name"] if name in DATASETS else name
    server_tests = any('load_split("test")' in source for source in sources(p).values())
    p.targets = []
    for split in ("train", "test") if server_tests else ("train",):
        inputs, targets = p.utils.load_split(split)
        if len(inputs) != len(targets):
            raise Fault(f"load_split({split!r}) returns {len(inputs)} inputs and {len(targets)} targets")
        p.targets.append(np.asarray(targets))
    p.options = {}
    if (p.folder / "partitions.py").is_file():
        p.options = importlib.import_module("partitions").partitioner(p.config)
    if not hasattr(p.utils, "partition"):
        return f"{len(p.targets[0])} training examples"
    parts = p.utils.partition(p.targets[0], p.clients, p.config["seed"], **p.options)
    if not np.array_equal(np.sort(np.concatenate(parts)), np.arange(len(p.targets[0]))):
        raise Fault("`partition` must give each example to exactly one client; some are left out, or given twice")
    return f"{len(p.targets[0])} training examples, each of them one of {p.clients} clients'"


def loader(p: SimpleNamespace) -> str:
    p.data = {"batch_size": p.config["batch-size"], "seed": p.config["seed"], "server_round": 1, **p.options}
    p.batches, p.held_out = p.utils.load_partition(0, p.clients, **p.data)
    for kind, batches in (("training", p.batches), ("evaluation", p.held_out)):
        if not batches.num_examples > 0:
            raise Fault(f"load_partition gives client 0 no {kind} examples: more data, or fewer clients")
        inputs, targets = next(iter(batches))
        if len(inputs) != len(targets):
            raise Fault(f"a {kind} batch has {len(inputs)} inputs and {len(targets)} targets")
        for what, tensor in (("inputs", inputs), ("targets", targets)):
            if not tensor.float().isfinite().all():
                raise Fault(f"the {what} of a {kind} batch hold NaN or infinite numbers: clean them in load_split")
    p.inputs, p.outputs_wanted = next(iter(p.batches))
    return f"a batch has inputs {shape(p.inputs)} and targets {shape(p.outputs_wanted)}"


def fit(p: SimpleNamespace) -> str:
    import torch

    p.net.to(p.utils.best_device())
    try:
        with torch.no_grad():
            p.outputs = p.net.eval()(p.inputs)
    except (RuntimeError, TypeError, IndexError, ValueError) as error:
        raise Fault(
            f"the model can't take a batch {shape(p.inputs)}: {last_line(error)}. Change the first layers of Net "
            "(YOUR MODEL), or what to_inputs makes of a batch (YOUR DATA)"
        ) from error
    if len(p.outputs) != len(p.inputs):
        raise Fault(f"the model makes {shape(p.outputs)} of {len(p.inputs)} inputs: the first dimension is the batch's")
    return f"the model makes {shape(p.outputs)} of it"


def targets(p: SimpleNamespace) -> str:
    wanted = p.outputs_wanted
    if wanted.is_floating_point():
        if p.outputs.shape != wanted.shape:
            raise Fault(
                f"the model's output is {shape(p.outputs)} and the targets are {shape(wanted)}: a loss would compare "
                "each with each. Give both the same shape: targets[:, None] in load_split, or .squeeze(1) in the model"
            )
        return "numbers in the shape of the model's output"
    if p.outputs.ndim != 2 or wanted.ndim != 1:
        return "not one class each: nothing to compare"
    least, most = min(int(t.min()) for t in p.targets), max(int(t.max()) for t in p.targets)
    if least < 0 or most >= p.outputs.shape[1]:
        raise Fault(
            f"targets go from {least} to {most}, and the model has {p.outputs.shape[1]} outputs: number the classes "
            "from 0 in load_split, and let the last layer have one output a class (NUM_CLASSES)"
        )
    return f"classes {least} to {most}, and the model has {p.outputs.shape[1]} outputs"


def step(p: SimpleNamespace) -> str:
    import torch

    before = {name: value.detach().clone() for name, value in p.net.named_parameters()}
    rate = p.config["learning-rate"]
    loss = p.utils.train(p.net, FirstBatches(p.batches), epochs=1, learning_rate=rate)
    broken = [name for name, value in p.net.named_parameters() if not value.isfinite().all()]
    if not finite(loss) or broken:
        raise Fault(
            f"after {STEPS} steps the training loss is {loss}"
            + f", and {broken[0]} is no number" * bool(broken)
            + ": lower "
            f"learning-rate (now {rate}), or look for log(0), a division by 0 or a root of a negative number in `train`"
        )
    if all(torch.equal(value, before[name]) for name, value in p.net.named_parameters()):
        raise Fault("no weight has changed: does `train` call backward() and optimizer.step()?")
    p.metrics = p.utils.test(p.net, FirstBatches(p.held_out))
    if not isinstance(p.metrics, dict) or "loss" not in p.metrics:
        raise Fault(f'`test` must return figures by name, "loss" among them, not {p.metrics!r}')
    if wrong := {name: value for name, value in p.metrics.items() if not finite(value)}:
        raise Fault(f"`test` returns {wrong}: each must be a finite number, as float or int (.item() makes one)")
    if "accuracy" not in p.metrics:
        places = [
            f"{name}:{number}"
            for name, source in sources(p).items()
            for number, line in enumerate(source.splitlines(), 1)
            if '"accuracy"' in line
        ]
        if places:
            raise Fault(f'`test` returns no "accuracy", which is asked for at {", ".join(places)}: take "loss" there')
    return f"training loss {loss:.3f}; `test` returns " + ", ".join(f"{k} {v:.3f}" for k, v in p.metrics.items())


def children(p: SimpleNamespace) -> str:
    if not (p.folder / "isolation.py").is_file():
        return "none: this folder has no isolation.py"
    work = importlib.import_module("work")
    found = [(name, value) for name, value in vars(work).items() if not name.startswith("_")]
    for name, function in found:
        if inspect.isfunction(function):
            try:
                same = pickle.loads(pickle.dumps(function)) is function
            except Exception:  # a lambda, a function in a function, or one under another name
                same = False
            if not same:
                raise Fault(
                    f"work.{name} can't be sent to a child process, which finds a function by its module and its name: "
                    f"make it `def {name}(...)` at the top level of a module, no lambda and nothing inside a function"
                )
    return "the functions of work.py can be sent to a child process"


def client(p: SimpleNamespace) -> str:
    """The client's own code, asked as the server asks it, its replies judged as the server judges them."""
    from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, Metadata, RecordDict

    from launcher.replies import fault

    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        content = RecordDict({"arrays": ArrayRecord(make_model(p).state_dict())})
        content["config"] = ConfigRecord({**p.config, "server-round": 1})
        node = {"partition-id": 0, "num-partitions": p.clients}
        context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config=p.config)
        way = {"message_id": "m", "src_node_id": 1, "dst_node_id": 2, "reply_to_message_id": "", "group_id": ""}
        metadata = Metadata(run_id=1, **way, created_at=0.0, ttl=1e9, message_type=kind)
        reply = p.client.app(Message(content=content, metadata=metadata), context)
        if reason := fault(reply, content):
            raise Fault(f"the server would refuse what `{kind}` in client.py replies: {reason}")
    return "the server takes what `train` and `evaluate` reply"


def one_round(p: SimpleNamespace) -> str:
    done = run_sh(p, ENGINE="simulation")
    if done.returncode != 0:
        raise Fault(f"`ENGINE=simulation ./run.sh 2 2 2 1` ended with {done.returncode}: {last_error(done)}")
    history = json.loads((p.folder / "runs/latest/history.json").read_text())
    last = history["rounds"][-1]
    failures = [
        failure["reason"] for phase in ("train", "evaluate") for failure in last.get(phase, {}).get("failures", ())
    ]
    if failures:
        raise Fault(f"a client failed: {failures[0]}")
    return done.stdout.splitlines()[-1]


# Each with the checks that must have passed before it, and where to look when it ends in an error of its own.
CHECKS: tuple[tuple[Callable[[SimpleNamespace], str], tuple[str, ...], str], ...] = (
    (settings, (), "compare pyproject.toml with the example's"),
    (modules, ("settings",), "the import must work by itself: `python -c 'import client, server'` in the folder"),
    (model, ("modules",), "Net (YOUR MODEL) must be made without arguments, and hold arrays that NumPy has"),
    (batch_norm, ("model",), ""),
    (data, ("modules",), "load_split and partition (YOUR DATA); a file needs an absolute path"),
    (loader, ("data",), "load_partition and Batches (YOUR DATA)"),
    (fit, ("model", "loader"), "Net (YOUR MODEL)"),
    (targets, ("fit",), "load_split (YOUR DATA)"),
    (step, ("targets",), "train and test (YOUR TRAINING STEP)"),
    (children, ("modules",), "work.py"),
    (client, ("step", "children"), "client.py"),
    (one_round, ("client",), "runs/latest/logs"),
)


# --- Helpers ---------------------------------------------------------------------------------------------------------


def sources(p: SimpleNamespace) -> dict[str, str]:
    """The folder's own modules, without the shared one."""
    return {path.name: path.read_text() for path in sorted(p.folder.glob("*.py")) if path.name != "cifar_utils.py"}


def run_sh(p: SimpleNamespace, *options: str, **environment: str) -> subprocess.CompletedProcess[str]:
    command = [str(p.folder / "run.sh"), "2", "2", "2", "1", *options]
    return subprocess.run(
        command,
        env={**os.environ, "PYTHON": sys.executable, **environment},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
    )


def last_error(done: subprocess.CompletedProcess[str]) -> str:
    errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")]
    return errors[-1].removeprefix("error: ") if errors else done.stderr.strip()[-500:]


def finite(value: Any) -> bool:
    return isinstance(value, int | float) and math.isfinite(value)


def shape(tensor: Any) -> str:
    return f"{tuple(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def last_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[-1].rstrip(".")


def explain(error: BaseException, p: SimpleNamespace, hint: str) -> str:
    """An error that no check foresaw: what, where in the folder, and where to look."""
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename.startswith(str(p.folder))]
    own = [frame for frame in frames if "/launcher/" not in frame.filename] or frames
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    return f"{type(error).__name__}{place}: {last_line(error)}. Look at {hint}"


def check(folder: Path, quick: bool) -> int:
    """Run the checks, print a line for each, and return the exit status."""
    p = SimpleNamespace(folder=folder)
    passed: set[str] = set()
    failed = False
    for function, needs, hint in CHECKS:
        name = function.__name__
        mark, said = "ok", ""
        if quick and function is one_round:
            continue
        if missing := [need for need in needs if need not in passed]:
            mark, said = "-", f"not tried, since {missing[0]} did not pass"
        else:
            try:
                said = function(p)
            except Risk as risk:
                mark, said = "risk", str(risk)
            except Fault as fault:
                mark, said = "FAIL", str(fault)
            except (Exception, SystemExit) as error:
                mark, said = "FAIL", explain(error, p, hint)
        if mark in ("ok", "risk"):
            passed.add(name)
        failed |= mark == "FAIL"
        print(f"{mark:5}{name.replace('_', ' '):11}{' '.join(said.split())}", flush=True)
    return int(failed)


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--quick"]
    folder = Path(words[0]).resolve() if len(words) == 1 else Path()
    if len(words) != 1 or not (folder / "launcher" / "environment.py").is_file():
        print(f"{__doc__}\nerror: FOLDER must be a copy of an example, with its launcher/", file=sys.stderr)
        return 2
    sys.path[0] = str(folder)  # the folder's own modules, and nothing of tools/
    from launcher import environment

    environment.ensure(folder)  # may start this command again, with an interpreter that has the packages
    return check(folder, quick="--quick" in sys.argv[1:])


if __name__ == "__main__":
    sys.exit(main())
