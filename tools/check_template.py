#!/usr/bin/env python3
"""Tells what would go wrong in a copy of an example, after its model, data or training step were changed.

    python tools/check_template.py FOLDER            # ends with a real round of all clients
    python tools/check_template.py FOLDER --quick    # without that round

A line a check: what to change, then what was found. Exit status: 0 nothing failed, 1 something did, 2 no such folder.
"""

import contextlib
import importlib
import inspect
import io
import json
import logging
import math
import os
import re
import subprocess
import sys
import tempfile
import time
import traceback
import warnings
import zipfile
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import SimpleNamespace
from typing import Any

STEPS = 2  # of training that each client makes here, the last with as few examples as its last step in a run
OLD = {"configure_fit": "configure_train", "aggregate_fit": "aggregate_train", "num_fit_clients": "min_train_nodes"}
OLD["initialize_parameters"] = "`initial_arrays` of `start`"
PLACES = dict.fromkeys(("forward", "__init__"), "Net, YOUR MODEL") | {"load_client_data": "YOUR DATA"}
PLACES |= dict.fromkeys(("train", "test"), "YOUR TRAINING STEP")
FIXES = {  # what to change, by what an error says
    "BFloat16": "Keep the weights in float32 and compute under torch.autocast: Flower can't send bfloat16",
    "more than 1 value per": "Pass drop_last=True to the training DataLoader: BatchNorm can't train on one example",
    "Target .* out of bounds": "Number the classes from 0 (YOUR DATA) and give the last layer an output for each",
    "num_samples=0|division by zero": "Give each client a batch to train on (drop_last?), max(1, a tenth) to test on",
    "target size": "Give output and targets one shape, by targets[:, None] or output.squeeze(1)",
}


class Fault(Exception):
    """What would go wrong; the text says first what to change."""


# --- The checks: each takes what earlier ones have found, and returns what it has seen -------------------------------


def settings(p: SimpleNamespace) -> str:
    """Compare pyproject.toml with the example's"""
    from flwr.cli.build import build_fab_from_disk

    from launcher import arguments

    p.bundled = set(zipfile.ZipFile(io.BytesIO(build_fab_from_disk(p.folder))).namelist())
    run_sh(p, "Mend pyproject.toml", "--dry-run")
    p.settings = arguments.parse([], p.folder)
    p.config, p.clients = p.settings.config, p.settings.clients
    named = [re.match(r"[\w.-]*", line)[0] for line in p.settings.project["project"].get("dependencies", ())]
    installed = (p.folder / "requirements.txt").read_text()
    if lost := [name for name in named if not re.search(rf"^{re.escape(name)}\b", installed, re.M | re.I)]:
        p.warn(f"Put {', '.join(lost)} into requirements.txt too: nobody installs `dependencies`")
    return f"a Flower App, and ./run.sh takes it: {p.clients} clients, dataset {p.settings.dataset}"


def files(p: SimpleNamespace) -> str:
    """Look at what is beside the code"""
    found = [path.relative_to(p.folder) for path in p.folder.rglob("*") if path.is_file()]
    found = [
        path for path in found if not any(part[0] == "." or part in ("runs", "__pycache__") for part in path.parts)
    ]
    code = {str(path): (p.folder / path).read_text() for path in found if path.suffix in (".py", ".md")}
    left = [path for path in found if str(path) not in p.bundled | {"LICENSE", "requirements.txt", "run.sh"}]
    for path in (path for path in left if path.suffix == ".py"):
        pattern = rf"^\s*(import|from) +(\w+\.)*{path.stem}\b"
        if users := [name for name, source in code.items() if re.search(pattern, source, re.M)]:
            raise Fault(f"Rename {path}, which {users[0]} imports: Flower takes no test_*.py, *_test.py or lib/ along")
    if data := [path for path in left if path.suffix != ".py" and f"({path})" not in code.get("README.md", "")]:
        kinds = ", ".join(f"{count} {kind}" for kind, count in Counter(path.suffix for path in data).most_common(4))
        begin = f"Read {kinds} by paths that begin in this folder, not by __file__"
        p.warn(f"{begin}: Flower does not take {data[0]} along. If you do that already, all is well")
    return f"Flower takes {len(p.bundled)} files along"


def modules(p: SimpleNamespace) -> str:
    """Try `python -c 'import client, server'` in the folder"""
    import torch
    from flwr.serverapp.strategy import Strategy

    from cifar_data import DATASETS, prepare

    torch.set_num_threads(1)  # as in a run
    name = p.settings.dataset
    os.environ["DATASET"] = prepare.prepare(name)["name"] if name in DATASETS else name
    p.client, p.server = importlib.import_module("client"), importlib.import_module("server")
    kinds = {found for module in own_modules(p) for found in vars(module).values() if inspect.isclass(found)}
    for found in (kind for kind in kinds if issubclass(kind, Strategy)):
        for old in sorted(OLD.keys() & vars(found).keys()):
            p.warn(f"Rename {found.__name__}.{old}, which nobody calls: it is {OLD[old]} now")
    return "client.py and server.py can be imported"


def steps(p: SimpleNamespace) -> str:
    """Look at what server.py sends and client.py replies"""
    import cifar_data
    from rounds import history

    read, reads = cifar_data.load_split, []
    cifar_data.load_split = lambda *words: reads.append(words) or read(*words)
    with tempfile.TemporaryDirectory() as folder, replaced(p, lambda loaders: [cut(one) for one in loaders]):
        history.save(Path(folder), {"clients": p.clients, "started": time.time(), "rounds": []})
        os.environ[history.RUN_FOLDER] = folder
        serve(p)
    if p.settings.dataset in cifar_data.DATASETS and not reads:
        p.warn('Put dataset = "own" into pyproject.toml: nobody reads CIFAR-10, and yet it is fetched and named')
    if not (trained := p.replies.get("train")):
        raise Fault("Let the strategy in server.py ask clients to train: it asked none")
    client, reply = next(iter(trained.items()))
    sent = p.sent["train"][client].content.array_records
    if all((reply.content[name][key].numpy() == sent[name][key].numpy()).all() for name in sent for key in sent[name]):
        raise Fault("Call backward() and optimizer.step() in `train`: no weight has changed")
    if statistics := [name for record in sent.values() for name in record if name.endswith("running_var")]:
        p.warn(f"Try GroupNorm for BatchNorm ({statistics[0]}): averaged statistics fit no client whose data differ")
    for phase, replies in p.replies.items():
        for client, reply in replies.items():
            judge(f"`{phase}` of client {client}", metrics_of(reply))
    said = metrics_of(next(iter(p.replies.get("evaluate", trained).values())))
    said = ", ".join(f"{key} {value:.3f}" for key, value in said.items() if isinstance(value, float))
    return f"{len(trained)} clients trained {STEPS} steps; the first measured {said}"


def folders(p: SimpleNamespace) -> str:
    """Look at the folders of each client, which name the classes"""
    if not p.classes:
        return "none that name classes"
    (first, (classes, _)), *_ = by_client = sorted(p.classes.items())
    for client, (own, there) in by_client:
        if own != classes:
            raise Fault(
                "Take labels from one list of classes in the project, not from the names of a client's folders: from "
                f"0 on, they are {', '.join(classes)} for client {first} and {', '.join(own)} for client {client}"
            )
        if unknown := ", ".join(sorted(there - set(own))):
            p.warn(f"Rename {unknown} of client {client}, or it stays unread: the classes are {', '.join(own)}")
        if missing := ", ".join(name for name in own if name not in there):
            p.warn(f"Look for {missing} of client {client}: it has no such folder")
    return f"{len(by_client)} clients have folders of the classes {', '.join(classes)}"


def losses(p: SimpleNamespace) -> str:
    """Let `train` and `test` return means over what they count"""
    import torch

    if not (both := p.sent["train"].keys() & p.sent.get("evaluate", {}).keys()):
        return "the clients don't evaluate: nothing to compare"
    questions = [p.sent[phase][min(both)] for phase in ("train", "evaluate")]
    questions[1].content.update(questions[0].content.array_records)  # the same model, not the one that was trained
    for config in questions[0].content.config_records.values():
        config.update({key: 1 for key in config if key == "local-epochs"})
    training = torch.nn.Module.train
    torch.nn.Module.train = lambda self, mode=True: training(self, False)  # no dropout, no BatchNorm by batch
    try:
        with replaced(p, lambda loaders: [cut(loaders[0], steps=1)] * len(loaders)):
            a, b = (metrics_of(ask(p, question)) for question in questions)
    finally:
        torch.nn.Module.train = training
    a, b = a.get("train_loss"), b.get("loss")
    if not isinstance(a, int | float) or not isinstance(b, int | float):
        return 'no "train_loss" and "loss" to compare'
    if abs(a - b) > 0.1 + 3 * min(abs(a), abs(b)):  # four times as large: by far too much for the same model
        raise Fault(
            "Divide sums by what was summed in `train` and `test` (YOUR TRAINING STEP): on the same model and examples "
            f"the training loss is {a:.4g} and the test loss {b:.4g}"
        )
    return f"on the same model and examples, {a:.3f} in training and {b:.3f} in testing"


def one_round(p: SimpleNamespace) -> str:
    """Look into runs/latest/logs"""
    counts = (str(number) for number in (p.clients, p.config["min-clients"], p.config["sampled-clients"], 1))
    lines = run_sh(p, "Look into runs/latest/logs", *counts).splitlines()
    summary = next(line for line in lines if " s -> " in line)
    for entry in json.loads(Path(summary.partition(" s -> ")[2], "history.json").read_text())["rounds"]:
        for phase in ("train", "evaluate", "server"):
            for failure in entry.get(phase, {}).get("failures", ()):
                who = f"client {failure['partition-id']} failed to {phase}"
                raise Fault(f"Look into runs/latest/logs: {who}: {failure['reason']}")
            judge(f"the history of `{phase}`", entry.get(phase, {}))
    return summary


# Each with the check that must have passed before.
CHECKS = {settings: None, files: settings, modules: files, steps: modules, folders: steps, losses: steps}
CHECKS[one_round] = losses


# --- A round in this process -----------------------------------------------------------------------------------------


def serve(p: SimpleNamespace) -> None:
    """Let server.py run one round of all clients, whose code is called in this process."""
    from flwr.app import Context, RecordDict
    from flwr.supercore.task_identity import TaskIdentity

    TaskIdentity.run_id = TaskIdentity.node_id = TaskIdentity.task_id = 1  # of the messages that it sends
    asked = {"num-server-rounds": 1, "min-clients": p.clients, "sampled-clients": p.clients}
    asked |= {"device": "cpu", "isolation": False, "client-evaluation": True}  # all in this process, and both phases
    p.run_config = {key: asked.get(key, value) for key, value in p.config.items()}
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=p.run_config)
    p.server.app(Grid(p), context)


class Grid:
    """Stands in for Flower's grid; a client's node id is its partition id."""

    def __init__(self, p: SimpleNamespace) -> None:
        self.p, self.replies = p, {}

    def get_node_ids(self) -> Iterable[int]:
        return range(self.p.clients)

    def push_messages(self, messages: Iterable[Any]) -> list[str]:
        for message in messages:
            name = message.metadata.__dict__["_message_id"] = str(time.monotonic_ns())
            self.replies[name] = ask(self.p, message)
        return list(self.replies)

    def pull_messages(self, names: Iterable[str]) -> list[Any]:
        return [self.replies.pop(name) for name in names]

    def send_and_receive(self, messages: Iterable[Any], *, timeout: float | None = None) -> list[Any]:
        return self.pull_messages(self.push_messages(messages))


def ask(p: SimpleNamespace, question: Any) -> Any:
    """Let client.py answer, and judge the reply as the server does. Raises Fault."""
    from flwr.app import ConfigRecord, Context, Message, RecordDict

    from rounds import mods
    from rounds.replies import fault

    client, phase, raised = question.metadata.dst_node_id, question.metadata.message_type, []
    if not question.content:  # the server asks who it is
        return Message(RecordDict({"client": ConfigRecord({"partition-id": client})}), reply_to=question)
    mods.traceback = SimpleNamespace(print_exc=lambda: raised.append(sys.exception()))  # what the mod `named` catches
    node = {"partition-id": client, "num-partitions": p.clients}
    context = Context(run_id=1, node_id=client, node_config=node, state=RecordDict(), run_config=p.run_config)
    p.asking, p.loaders = client, []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("error", "Using a target size")  # PyTorch's, of losses that broadcast
            reply = p.client.app(question, context)
        if raised:
            raise raised[0]
    except Exception as error:
        batches = " and ".join(described(next(iter(loader), ())) for loader in p.loaders) or "none"
        raise Fault(f"{explain(error, p)} (client {client} in `{phase}`; its batches: {batches})") from error
    if reason := fault(reply, question.content if phase == "train" else None):
        fix = "Lower learning-rate, or look for log(0)" if "NaN" in reason else "Reply as the server expects it"
        raise Fault(f"{fix}: it would refuse what `{phase}` in client.py replies for client {client}: {reason}")
    p.replies.setdefault(phase, {})[client] = reply
    p.sent.setdefault(phase, {})[client] = question
    return reply


@contextlib.contextmanager
def replaced(p: SimpleNamespace, change: Callable[[list[Any]], list[Any]]) -> Iterator[None]:
    """Let the copy's load_client_data return changed loaders, and note what they are."""
    original = importlib.import_module("cifar_utils").load_client_data

    def load_client_data(*args: Any, **kwargs: Any) -> list[Any]:
        loaders = list(original(*args, **kwargs))
        for data in (getattr(loader, "dataset", None) for loader in loaders):
            while hasattr(data, "dataset"):  # a part of another
                data = data.dataset
            if isinstance(getattr(data, "classes", None), list) and hasattr(data, "root"):
                p.classes[p.asking] = data.classes, {path.name for path in Path(data.root).iterdir() if path.is_dir()}
        p.loaders = change(loaders)
        return p.loaders

    users = [module for module in own_modules(p) if getattr(module, "load_client_data", None) is original]
    for module in users:
        module.load_client_data = load_client_data
    yield
    for module in users:
        module.load_client_data = original


def cut(loader: Any, steps: int = STEPS) -> Any:
    """Return a loader of a few steps, the last as small as it is in the whole; one of another kind is left whole."""
    from torch.utils.data import DataLoader, RandomSampler, SequentialSampler, Subset

    size = getattr(loader, "batch_size", None)
    if type(loader) is not DataLoader or not size or type(loader.sampler) not in (RandomSampler, SequentialSampler):
        return loader
    whole = len(loader.dataset)
    count = min(whole, size if steps == 1 else (steps - 1) * size + (whole % size or size))
    rows = [whole * i // count for i in range(count)]  # from all over: they may be sorted by class
    same = {key: getattr(loader, key) for key in ("batch_size", "collate_fn", "drop_last", "num_workers")}
    return DataLoader(Subset(loader.dataset, rows), shuffle=isinstance(loader.sampler, RandomSampler), **same)


# --- Helpers ---------------------------------------------------------------------------------------------------------


def own_modules(p: SimpleNamespace) -> list[Any]:
    """Return the folder's own modules that are imported, without the rooms of machinery."""
    found = [module for module in list(sys.modules.values()) if getattr(module, "__file__", None)]
    return [module for module in found if Path(module.__file__).parent == p.folder]


def metrics_of(reply: Any) -> dict[str, Any]:
    return {key: value for record in reply.content.metric_records.values() for key, value in record.items()}


def judge(whose: str, metrics: Mapping[str, Any]) -> None:
    """Raise Fault where a loss is no number, or an accuracy no fraction. Other metrics may be NaN for some clients."""
    for key, value in metrics.items():
        if key.endswith("loss") and not (isinstance(value, int | float) and math.isfinite(value)):
            raise Fault(f"Lower learning-rate, or look for log(0) and a division by 0: {whose} says {key} {value}")
        if key.endswith("accuracy") and isinstance(value, int | float) and not 0 <= value <= 1:
            raise Fault(f"Divide by all that was counted in `test`, such as labels.numel(): {whose} says {key} {value}")


def described(batch: Any) -> str:
    """Return the shapes of a batch, of whatever kind."""
    if hasattr(batch, "items"):
        return "{" + ", ".join(f"{key} {described(value)}" for key, value in batch.items()) + "}"
    if isinstance(batch, list | tuple):
        return ", ".join(described(value) for value in batch) or "none"
    return f"{tuple(getattr(batch, 'shape', ()))} {getattr(batch, 'dtype', type(batch).__name__)}".replace("torch.", "")


def run_sh(p: SimpleNamespace, fix: str, *words: str) -> str:
    """Return what ./run.sh prints. Raises Fault."""
    environment = {**p.environment, "PYTHON": sys.executable, "ENGINE": "simulation"}
    options = {"stdin": subprocess.DEVNULL, "capture_output": True, "text": True}
    done = subprocess.run([str(p.folder / "run.sh"), *words], env=environment, **options)
    if done.returncode != 0:
        errors = [line for line in done.stderr.splitlines() if line.startswith("error: ")] or [done.stderr[-500:]]
        raise Fault(f"{fix}: {errors[-1].removeprefix('error: ')}")
    return done.stdout


def explain(error: BaseException, p: SimpleNamespace, otherwise: str = "Look at the error") -> str:
    """Say what to change, where that is known of an error; then what it is, and where in the folder."""
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if Path(frame.filename).parent == p.folder]
    line = (str(error).strip().splitlines() or [""])[-1].rstrip(".")
    place = f" at {Path(own[-1].filename).name}:{own[-1].lineno}" if own else ""
    wheres = [f"Look at {frame.name} ({PLACES[frame.name]})" for frame in own if frame.name in PLACES] or [otherwise]
    fix = next((fix for pattern, fix in FIXES.items() if re.search(pattern, str(error))), wheres[-1])
    return f"{fix}: {type(error).__name__}{place}: {line}"


def check(folder: Path) -> int:
    """Run the checks, print a line for each, and return the exit status."""
    p = SimpleNamespace(folder=folder, environment=dict(os.environ), replies={}, sent={}, classes={})
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # errors of a CPU can be read
    logging.disable(logging.ERROR)
    passed, failed = {None}, False
    for function, needed in CHECKS.items():
        risks: list[str] = []
        p.warn, mark = risks.append, "ok"
        try:
            if needed in passed:
                text = function(p)
                passed.add(function)
            else:
                mark, text = "-", f"not tried, since {needed.__name__} did not pass"
        except (Exception, SystemExit) as error:
            mark, failed = "FAIL", True
            text = str(error) if isinstance(error, Fault) else explain(error, p, str(function.__doc__))
        for kind, words in (*(("risk", risk) for risk in risks), (mark, text)):
            print(f"{kind:5}{function.__name__.replace('_', ' '):10}{' '.join(words.split())}", flush=True)
    return int(failed)


def main() -> int:
    words = [word for word in sys.argv[1:] if word != "--quick"]
    if len(words) < len(sys.argv) - 1:
        del CHECKS[one_round]
    folder = Path(words[0]).resolve() if len(words) == 1 else Path()
    if len(words) != 1 or not (folder / "launcher" / "environment.py").is_file():
        print(f"{__doc__}\nerror: FOLDER must be a copy of an example, with its launcher/", file=sys.stderr)
        return 2
    sys.path[0] = str(folder)  # the folder's own modules, and nothing of tools/
    from launcher import environment

    environment.ensure(folder)  # may start this command again, with an interpreter that has the packages
    os.chdir(folder)  # where relative paths begin in a run
    return check(folder)


if __name__ == "__main__":
    sys.exit(main())
