"""GPUs, on a machine without one: which a run uses, how many clients share each, what it tells, and what it refuses.

A small program of these tests stands in for nvidia-smi.
"""

import sys
import time
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from plans import capacity, launch, machine, plan, project_folder, settings, write_run  # noqa: F401

import gpus
import memory
import sharing
from launcher import arguments
from launcher.processes import Failed
from launcher.project import UsageError
from rounds import history

UUIDS = ("GPU-aaaa-1", "GPU-bbbb-2", "GPU-bbbb-3")


@pytest.fixture
def nvidia_smi(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """Return a function that puts on PATH what says of GPUs what nvidia-smi says: the MiB free on each, and UUIDs."""

    def write(*free: object, status: int = 0) -> None:
        free_lines, uuid_lines = ("; ".join(f"echo '{word}'" for word in words) for words in (free, UUIDS[: len(free)]))
        script = f'case "$1" in *memory.free) {free_lines};; *uuid) {uuid_lines};; esac; exit {status}'
        (tmp_path / "bin").mkdir(exist_ok=True)
        (tmp_path / "bin/nvidia-smi").write_text(f"#!/bin/sh\n{script}\n")
        (tmp_path / "bin/nvidia-smi").chmod(0o755)
        monkeypatch.setenv("PATH", str(tmp_path / "bin"))

    return write


@pytest.mark.parametrize(
    ("chosen", "found"),
    [
        (None, {"0": 1000, "1": 2000, "2": 3000}),
        ("", {}),
        ("-1", {}),
        ("1", {"1": 2000}),
        ("2, 0", {"2": 3000, "0": 1000}),
        ("0,7,1", {"0": 1000}),  # CUDA, too, stops at the first that there is not
        ("GPU-aaaa", {"GPU-aaaa": 1000}),
        ("GPU-bbbb-3,0", {"GPU-bbbb-3": 3000, "0": 1000}),
        ("GPU-bbbb", {}),  # it could be two
        ("GPU-cccc", {}),
        ("MIG-5678", {"MIG-5678": None}),
    ],
)
def test_only_gpus_that_are_visible_count(
    chosen: str | None, found: dict[str, float | None], nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(1000, 2000, 3000)
    if chosen is not None:
        monkeypatch.setenv("CUDA_VISIBLE_DEVICES", chosen)
    assert gpus.visible() == found
    assert list(gpus.visible()) == list(found)


def test_where_nvidia_smi_lists_none_there_is_none(nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    assert gpus.visible() == {}  # nor such a program
    nvidia_smi("NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver.", status=9)
    assert gpus.visible() == {}
    nvidia_smi("No devices were found")
    assert gpus.visible() == {}
    nvidia_smi("[N/A]")
    assert gpus.visible() == {"0": None}
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    nvidia_smi(status=9)
    assert gpus.visible() == {}


def test_what_is_in_use_is_on_the_fullest_and_beyond_what_was_before(nvidia_smi: Any) -> None:
    nvidia_smi(1000, 2000, 3000)
    assert gpus.in_use({"0": 1500.0, "1": 2900.0}) == 900
    assert gpus.in_use({"MIG-1": None}) is None


def shared(folder: Path, *words: object, **variables: str) -> sharing.Sharing:
    return capacity.make_plan(settings(folder, *words, **variables)).sharing


def test_a_gpu_takes_as_many_clients_as_its_memory_has_room_for(
    folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(6100)
    assert shared(folder, 100, 100, 10, 5).slots == 6100 // sharing.CLIENT
    assert plan(settings(folder, 100, 100, 10, 5)).count(", room for 4 on the GPU (6.0 GiB free), about") == 1
    monkeypatch.setenv("GPU_SLOTS", "2")
    assert shared(folder, 100, 100, 10, 5).slots == 2


def test_one_word_says_that_there_is_no_gpu(folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(6000)
    assert "GPU" not in plan(settings(folder, "device=cpu"))
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "-1")
    assert "GPU" not in plan(settings(folder))
    with pytest.raises(UsageError, match=r"^device=cuda, and CUDA_VISIBLE_DEVICES hides all GPUs"):
        capacity.make_plan(settings(folder, "device=cuda"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES")
    assert "GPU" in plan(settings(folder, "device=cuda"))


def test_the_gpu_that_is_chosen_counts_and_not_the_fullest(
    folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(500, 9000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "1")
    assert shared(folder, 100, 100, 10, 5).slots == 6


def test_several_gpus_are_all_used(folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(3200, 3100)
    found = capacity.make_plan(settings(folder, 100, 100, 10, 5))
    assert (found.sharing.slots, found.at_once) == (2, 4)
    assert ", room for 2 on each of 2 GPUs (3.0 GiB free), about" in str(found)
    in_place = shared(folder, 100, 100, 10, 5, "isolation=false")  # a process that lives on stays on the first
    assert (list(in_place.gpus), in_place.places) == (["0"], 2)


@pytest.mark.parametrize(("engine", "at_once"), [("simulation", 2), ("deployment", 2)])
def test_the_gpu_limits_those_at_once_in_both_engines(engine: str, at_once: int, folder: Path, nvidia_smi: Any) -> None:
    assert capacity.make_plan(settings(folder, 10, 10, 9, 5, ENGINE=engine)).at_once == (4, 9)[engine == "deployment"]
    nvidia_smi(3200)
    assert capacity.make_plan(settings(folder, 10, 10, 9, 5, ENGINE=engine)).at_once == at_once


def test_memory_of_the_gpu_that_nobody_tells(folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    """One at a time then; the number may be set, and no child is held to a share."""
    nvidia_smi(40000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "MIG-1")
    assert shared(folder).slots == 1
    assert ", room for 1 on the GPU, about" in plan(settings(folder))
    monkeypatch.setenv("GPU_SLOTS", "3")
    assert (shared(folder).slots, shared(folder).limit) == (3, None)


def test_a_child_is_held_to_its_share_where_that_is_set(
    folder: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(8000)
    assert shared(folder).limit is None
    monkeypatch.setenv("GPU_SLOTS", "4")
    assert shared(folder).limit == 2000 - sharing.CONTEXT
    monkeypatch.setenv("GPU_SLOTS", "100")
    assert shared(folder).limit is None


# --- What clients took of a GPU --------------------------------------------------------------------------------------


def run_on_gpu(folder: Path, memory: dict[str, float], sampled: int = 32, **other: Any) -> None:
    write_run(folder, "20260101-000000-1", 100, 100, sampled, 5, memory=memory, gpus={"0": 8000.0}, **other)


def test_what_was_in_use_is_divided_by_those_who_worked_at_once(folder: Path, nvidia_smi: Any) -> None:
    """Five shared 7.5 GB: the next run must not divide that by the 32 that were sampled, nor by the cores."""
    nvidia_smi(8000)
    run_on_gpu(folder, {"GPU at work": 7500, "client's child on GPU": 900}, at_once=5)
    assert shared(folder, 100, 100, 32, 5).slots == 5


def test_a_client_takes_a_context_at_least(folder: Path, nvidia_smi: Any) -> None:
    """If they were not seen at their peak at once, the children's own word counts, and a context beside it."""
    nvidia_smi(8000)
    run_on_gpu(folder, {"GPU at work": 500}, at_once=5)
    assert shared(folder, 100, 100, 32, 5).slots == 8000 // sharing.CONTEXT
    (folder / "runs").rename(folder / "earlier")
    run_on_gpu(folder, {"GPU at work": 500, "client's child on GPU": 1600}, at_once=5)
    assert shared(folder, 100, 100, 32, 5).slots == 8000 // (1600 + sharing.CONTEXT)


def test_two_gpus_share_those_who_worked(folder: Path, nvidia_smi: Any) -> None:
    nvidia_smi(8000, 8000)
    history = {"gpus": {"0": 8000.0, "1": 8000.0}, "at_once": 5, "rounds": [{"memory": {"GPU at work": 6000}}]}
    assert sharing.of_client(history) == 2000


@pytest.mark.parametrize("other", [{}, {"at_once": 5, "memory": {}}])
def test_a_run_that_did_not_measure_is_no_measure(folder: Path, nvidia_smi: Any, other: dict[str, Any]) -> None:
    nvidia_smi(8000)
    memory = other.pop("memory", {"GPU at work": 7500})
    run_on_gpu(folder, memory, **other)
    assert shared(folder, 100, 100, 32, 5).slots == 8000 // sharing.CLIENT


# --- What the run is told --------------------------------------------------------------------------------------------


def prepared(asked: arguments.Settings, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> SimpleNamespace:
    """Return the run, after launch.py has prepared it: its environment, its history, and the fork server's command."""
    (tmp_path / "run").mkdir()
    run = SimpleNamespace(
        **{"settings": asked, "run_dir": tmp_path / "run", "temporary": tmp_path, "needed": set(), "environment": {}},
        history={"rounds": []},
    )
    run.command = lambda name, command: setattr(run, "started", command[2:])
    launch.check(asked)
    launch.prepare(run)
    assert history.load(run.run_dir) == run.history
    return run


def test_the_run_sees_its_gpus_and_the_history_has_what_was_free(
    folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(3200, 9000, 9000)
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,0")
    run = prepared(settings(folder, 100, 100, 10, 5), tmp_path, monkeypatch)
    assert run.environment["CUDA_VISIBLE_DEVICES"] == "2,0"
    assert run.environment["GPU_SLOTS"] == "2"
    assert launch.GPU_LIMIT not in run.environment
    assert (run.history["at_once"], run.history["gpus"]) == (4, {"2": 9000.0, "0": 3200.0})
    sockets = run.environment[launch.FORK_SERVER].split(":")
    assert len(set(sockets)) == 2  # one for each GPU, with two children at most at each
    assert run.started == ["2", *sockets]
    assert launch.federation(run) == {"init-args-num-cpus": 4}  # Ray need not know of GPUs, which it counts otherwise


def test_without_a_gpu_nobody_is_counted(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_SLOTS", "3")
    run = prepared(settings(folder, 100, 100, 10, 5), tmp_path, monkeypatch)
    assert run.started[0] == "0"
    assert list(run.environment) == [launch.FORK_SERVER]
    assert run.history == {"rounds": [], "at_once": 3}
    assert launch.federation(run) == {"init-args-num-cpus": 3}


def test_on_the_cpu_the_gpu_is_hidden(
    folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whatever the code asks for: a line of the user's that takes a GPU unasked, too."""
    nvidia_smi(9000)
    run = prepared(settings(folder, 100, 100, 10, 5, "device=cpu"), tmp_path, monkeypatch)
    assert run.environment["CUDA_VISIBLE_DEVICES"] == ""
    assert "gpus" not in run.history


def test_the_share_that_was_set_reaches_the_children(
    folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(8000)
    monkeypatch.setenv("GPU_SLOTS", "4")
    import work

    run = prepared(settings(folder, 100, 100, 10, 5), tmp_path, monkeypatch)
    assert run.environment[work.GPU_LIMIT] == f"{2000 - sharing.CONTEXT}"


@pytest.mark.parametrize("word", ["0", "-1", "two", "1.5"])
def test_gpu_slots_that_are_no_number(folder: Path, word: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("GPU_SLOTS", word)
    with pytest.raises(UsageError, match=rf"^GPU_SLOTS must be a whole number .*'{word}'"):
        capacity.make_plan(settings(folder))


def test_apples_gpu_is_not_for_children(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with pytest.raises(UsageError, match=r"^device=mps goes with isolation=false"):
        capacity.make_plan(settings(folder, "device=mps"))
    capacity.make_plan(settings(folder, "device=mps", "isolation=false"))


def test_what_a_client_or_the_server_asks_for(monkeypatch: pytest.MonkeyPatch) -> None:
    import delegate

    assert delegate.device_of({"device": "auto", "isolation": True}) == "auto"
    monkeypatch.setattr(sys, "platform", "darwin")
    assert delegate.device_of({"device": "auto", "isolation": True}) == "cpu"
    assert delegate.device_of({"device": "mps", "isolation": False}) == "mps"


# --- A child tries the GPU before the clients come -------------------------------------------------------------------


def tried(
    run: SimpleNamespace, monkeypatch: pytest.MonkeyPatch, error: Exception | None = None, status: int | None = None
) -> list[int]:
    """Let launch.py try; return the numbers of the GPUs that a child has been asked to try."""
    numbers: list[int] = []

    def run_isolated(fn: Any, device: str, number: int, **other: Any) -> str:
        numbers.append(number)
        assert other["environment"] is run.environment
        if error:
            raise error
        return "NVIDIA Pretence"

    monkeypatch.setattr(launch, "run_isolated", run_isolated)
    run.processes = SimpleNamespace(statuses={} if status is None else {"fork-server": status}, pause=time.sleep)
    if status is None:
        for socket in run.environment[launch.FORK_SERVER].split(":"):
            Path(socket).touch()
    launch.after_superlink(run)
    return numbers


def test_each_gpu_is_tried(folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    nvidia_smi(9000, 9000)
    run = prepared(settings(folder), tmp_path, monkeypatch)
    assert tried(run, monkeypatch) == [0, 1]


def test_without_one_nothing_is_tried(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    run = prepared(settings(folder), tmp_path, monkeypatch)
    assert tried(run, monkeypatch) == []
    (tmp_path / "run" / "history.json").unlink()
    (tmp_path / "run").rmdir()
    run = prepared(settings(folder, "device=cuda"), tmp_path, monkeypatch)
    assert tried(run, monkeypatch) == [0]  # nobody lists one, and one is asked for: PyTorch is to say why


def test_a_gpu_that_is_too_old_for_this_pytorch_ends_the_run_with_the_fix(
    folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(9000)
    run = prepared(settings(folder), tmp_path, monkeypatch)
    error = RuntimeError("AcceleratorError: CUDA error: no kernel image is available for execution\nSearch for it")
    with pytest.raises(Failed, match=r"^a child tried GPU 0, in vain: .*no kernel.* TORCH_BACKEND=cu126, or .*cpu$"):
        tried(run, monkeypatch, error)
    with pytest.raises(Failed, match=r"in vain: CUDA out of memory\. To go on: take device=cpu$"):
        tried(run, monkeypatch, RuntimeError("CUDA out of memory."))


def test_a_fork_server_that_refuses_is_not_waited_for(
    folder: Path, tmp_path: Path, nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    nvidia_smi(9000)
    run = prepared(settings(folder), tmp_path, monkeypatch)
    with pytest.raises(Failed, match="the fork server ended with status 1") as caught:
        tried(run, monkeypatch, status=1)
    assert caught.value.log == "fork-server"


# --- Memory on the GPU, from outside ---------------------------------------------------------------------------------


def test_the_most_that_was_in_use_is_seen(nvidia_smi: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(memory, "LOOK", 0.01)
    nvidia_smi(400)
    watch = memory.Watch({"0": 1000.0})
    watch.start()
    deadline = time.monotonic() + 20
    while watch.most is None and time.monotonic() < deadline:
        time.sleep(0.01)
    assert watch.take() == 600


def test_memory_on_the_gpu_has_a_panel_of_its_own_and_each_curve_a_style(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    names = ("client", "client's child", "server", "server's child")
    on_gpu = ("client's child on GPU", "server's child on GPU", "GPU at work", "GPU between rounds")
    rounds = [{"round": i, "memory": dict.fromkeys((*names, *on_gpu), 100.0 * i)} for i in range(3)]
    from matplotlib.axes import Axes

    drawn, plot = [], Axes.plot
    monkeypatch.setattr(
        Axes, "plot", lambda *args, **given: (drawn.append((args[0], args[3], given)), plot(*args, **given))
    )
    memory.draw({"example": "x $1", "clients": 3, "rounds": rounds}, tmp_path / "memory.png")
    assert sorted(given["label"] for _, _, given in drawn) == sorted((*names, *on_gpu))
    assert len({axes for axes, _, _ in drawn}) == 2
    assert len({(axes, style, given["color"]) for axes, style, given in drawn}) == len(drawn)
    head = (tmp_path / "memory.png").read_bytes()[:24]
    assert int.from_bytes(head[16:20]) == 2 * 6 * 120
