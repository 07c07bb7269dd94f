"""The plan of a run on a Ray cluster, of which nothing but its description is there."""

import inspect
from pathlib import Path

import pytest
from plans import capacity, launch, machine, project_folder, settings, write_run  # noqa: F401

from cluster import Cluster, Node
from launcher.project import UsageError
from pool import LastingPool, raybackend


def made(*cores: int, gpus: int = 0, memory: float = 8000) -> Cluster:
    return Cluster("192.0.2.1:6379", tuple(Node(f"192.0.2.{i}", n, gpus, memory) for i, n in enumerate(cores, 1)))


def test_the_plan_counts_the_cores_of_the_cluster(folder: Path) -> None:
    asked = settings(folder, 100, 100, 50, 5)
    alone, joined = (capacity.make_plan(asked, where) for where in (None, made(8, 24)))
    assert (alone.at_once, joined.at_once) == (4, 32)
    assert "on 2 nodes of the Ray cluster at 192.0.2.1:6379 (32 cores, 0 GPUs)" in str(joined)
    assert capacity.seconds(asked, None, 32, made(8, 24)) < capacity.seconds(asked, None, 4)
    assert capacity.make_plan(settings(folder, 100, 100, 10, 5), made(8, 24)).at_once == 10


def test_a_run_on_a_cluster_tells_how_long_one_without_takes(folder: Path) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, 8, 5, at_once=8, ray={"cpus": 8})
    asked = settings(folder, 100, 100, 8, 5)
    before = capacity.last_run(asked)
    assert capacity.seconds(asked, before, 8, made(8)) == pytest.approx(40)
    assert capacity.seconds(asked, before, 4) > 50  # half as many at once


def test_a_node_without_the_memory_is_named(folder: Path) -> None:
    with pytest.raises(UsageError, match=r"^node 192\.0\.2\.2 would have 64 clients at once, .* fewer --num-cpus$"):
        capacity.make_plan(settings(folder, 100, 100, 4, 5), made(8, 64))


def test_ray_gives_the_gpus_out(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked = settings(folder, 100, 100, 50, 5)
    found = []
    for slots in ("", "4"):
        monkeypatch.setenv("GPU_SLOTS", slots)
        monkeypatch.setattr(launch, "joined", made(16, 16, gpus=2), raising=False)
        monkeypatch.setattr(launch, "plan", capacity.make_plan(asked, launch.joined), raising=False)
        found.append((launch.plan.at_once, launch.federation(None)["client-resources-num-gpus"]))
    assert found == [(4, 1), (16, 0.25)]
    assert launch.federation(None)["init-args-num-cpus"] is None  # which Ray refuses where it joins a cluster
    with pytest.raises(UsageError, match="have no GPU"):
        capacity.make_plan(settings(folder, "device=cuda"), made(4))


def test_flower_still_makes_its_pool_as_the_one_that_takes_its_place() -> None:
    assert "self.pool = BasicActorPool(" in inspect.getsource(raybackend.RayBackend.build)
    assert issubclass(LastingPool, raybackend.BasicActorPool)
    for name in ("submit", "add_actor_back_to_pool", "fetch_result_and_return_actor_to_pool"):
        assert f"self.pool.{name}(" in inspect.getsource(raybackend.RayBackend.process_message)
