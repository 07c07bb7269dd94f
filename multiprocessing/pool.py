"""Lets Flower's simulation use a Ray cluster: Ray calls `join` when it connects, in the process that runs the rounds.

In Flower's own pool, an actor that has died stays, and fails one message after the other at once, so that a round in
which a node dies loses most of its clients. Here it leaves the pool, and the others do its work.
"""

import json
import os
import sys
import time
from typing import Any

import ray
from flwr.server.superlink.fleet.vce.backend import raybackend
from flwr.simulation.ray_transport.ray_actor import BasicActorPool
from ray.exceptions import RayActorError

from cluster import RUNTIME_ENV

POLL = 0.05  # seconds between two looks for an idle actor


class LastingPool(BasicActorPool):
    """A pool that dead actors leave."""

    def submit(self, actor_fn: Any, job: Any) -> Any:
        """Wait for an idle actor: there are fewer than Flower's threads once one has died."""
        while self.num_actors > 0:
            try:
                return super().submit(actor_fn, job)
            except IndexError:
                time.sleep(POLL)
        raise RuntimeError("no actor of the cluster is left")

    def add_actor_back_to_pool(self, future: Any) -> None:
        """Take an actor back that has answered. One that has not is asked if it lives, which Ray knows after seconds.

        Raises RuntimeError, which becomes the reason why the client failed, where it is dead.
        """
        actor = self._future_to_actor.pop(future)
        try:
            if isinstance(sys.exception(), RayActorError):
                ray.get(actor.__ray_ready__.remote())
            self.pool.append(actor)
        except RayActorError:
            self.num_actors -= 1
            raise RuntimeError("what played this client has died: a process on a node, or the node itself") from None


def join(runtime_env: dict[str, Any]) -> dict[str, Any]:
    """Return what the actors get: Flower's own runtime environment, and the run's."""
    raybackend.BasicActorPool = LastingPool
    ours = json.loads(os.environ[RUNTIME_ENV])
    return {**runtime_env, **ours, "env_vars": {**runtime_env["env_vars"], **ours["env_vars"]}}
