"""Runs server.py and client.py of advanced_example in this process: Flower's objects, and no engine between them."""

import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
from flwr.app import Context, Message, RecordDict
from flwr.serverapp import Grid
from flwr.supercore.task_identity import TaskIdentity
from paths import advanced

from rounds import history
from state import get_random_state, set_random_state

Watch = Callable[[Message], None] | None


class LocalGrid(Grid):
    """Calls the clients one after another as soon as messages are sent. `watch` sees each message before it goes."""

    def __init__(self, clients: int, run_config: dict[str, Any], watch: Watch = None) -> None:
        self.app, self.watch = advanced("client").app, watch
        self.contexts = {
            100 + i: Context(
                run_id=1,
                node_id=100 + i,
                node_config={"partition-id": i, "num-partitions": clients},
                state=RecordDict(),
                run_config=run_config,
            )
            for i in range(clients)
        }
        self.waiting: dict[str, Message] = {}
        self.sent: list[Message] = []
        self.replies: list[Message] = []

    def get_node_ids(self) -> list[int]:
        return list(self.contexts)

    def push_messages(self, messages: Iterable[Message]) -> list[str]:
        messages = list(messages)
        for message in messages:
            if self.watch:
                self.watch(message)
            self.sent.append(message)
            message.metadata.__dict__["_message_id"] = str(len(self.sent))  # as Flower's own grids do
            before = get_random_state()  # a client has a process of its own
            self.replies.append(self.app(message, self.contexts[message.metadata.dst_node_id]))
            set_random_state(before)
            self.waiting[message.metadata.message_id] = self.replies[-1]
        return [message.metadata.message_id for message in messages]

    def pull_messages(self, message_ids: Iterable[str]) -> list[Message]:
        return [self.waiting.pop(identity) for identity in message_ids if identity in self.waiting]

    def send_and_receive(self, messages: Iterable[Message], *, timeout: float | None = None) -> list[Message]:
        return self.pull_messages(self.push_messages(messages))

    def set_run(self, run: Any) -> None: ...

    run = property(lambda self: None)

    def create_message(self, *arguments: Any, **options: Any) -> Message:
        raise NotImplementedError


def begin(folder: Path, clients: int) -> None:
    """Make a run's folder as the launcher does."""
    (folder / "logs").mkdir(parents=True)
    known = {"schema": 1, "example": "advanced-example", "clients": clients, "dataset": "synthetic", "examples": 600}
    history.save(folder, {**known, "status": "running", "started": time.time(), "rounds": []})


def play(folder: Path, clients: int, run_config: dict[str, Any], watch: Watch = None) -> LocalGrid:
    """Run all rounds, or those that are left, in a run's folder; return the grid, which has what was said."""
    torch.set_num_threads(1)  # as in a run; more wait for one another
    if not folder.exists():
        begin(folder, clients)
    grid = LocalGrid(clients, run_config, watch)
    context = Context(run_id=1, node_id=0, node_config={}, state=RecordDict(), run_config=run_config)
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv(history.RUN_FOLDER, str(folder))
        for name in ("task_id", "run_id", "node_id"):  # without these, Flower makes no messages
            patch.setattr(TaskIdentity, f"_{name}", 1)
        advanced("server").app(grid, context)
    return grid
