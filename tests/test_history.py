"""Tests what server and launcher exchange through files in a run's folder, and how the server waits by it."""

import os
import time
from pathlib import Path

import pytest
from flwr.app import Message
from reply_helpers import carded, request

from rounds import history
from rounds.patient_grid import PatientGrid

# --- history.json ----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("text", ["", "{", "[]", "3", "{}", '{"rounds": 3}', '{"rounds": {}}', "\x00"])
def test_a_history_that_is_not_whole_is_no_history(text: str, tmp_path: Path) -> None:
    (tmp_path / "history.json").write_text(text)
    with pytest.raises(ValueError):  # noqa: PT011, the words are json's for some
        history.load(tmp_path)


def test_a_history_comes_back_as_strict_json(tmp_path: Path) -> None:
    numbers = {"nan": float("nan"), "list": [float("inf"), (1, -float("inf"))], "one": 1.5, "none": None}
    history.save(tmp_path, {"rounds": [numbers]})
    assert history.load(tmp_path)["rounds"] == [{"nan": None, "list": [None, [1, None]], "one": 1.5, "none": None}]
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_what_can_not_be_written_leaves_the_old_file(tmp_path: Path) -> None:
    history.save(tmp_path, {"rounds": []})
    with pytest.raises(TypeError):
        history.save(tmp_path, {"rounds": [b"bytes"]})
    assert history.load(tmp_path) == {"rounds": []}
    assert [path.name for path in tmp_path.iterdir()] == ["history.json"]


def test_the_final_accuracy_is_the_newest_and_the_server_s_where_it_evaluates() -> None:
    rounds = [
        {"round": 0, "server": {"accuracy": 0.1}},
        {"round": 1, "evaluate": {"accuracy": 0.2, "loss": 2.0}, "server": {"accuracy": 0.3}},
        {"round": 2, "evaluate": {"accuracy": 0.4, "loss": None}, "train": {"loss": 3.0}},
    ]
    assert history.final({"rounds": rounds}, "accuracy") == 0.4
    assert history.final({"rounds": rounds}, "loss") == 2.0  # the newest that is a number
    assert history.final({"rounds": rounds[:2]}, "accuracy") == 0.3
    rounds.append({"round": 3, "evaluate": {"accuracy": [0.5, 0.6]}})  # one for each class
    assert history.final({"rounds": rounds}, "accuracy") == 0.4
    assert history.final({"rounds": []}, "accuracy") is None


# --- The folder ------------------------------------------------------------------------------------------------------


def test_the_newest_folder_is_linked(tmp_path: Path) -> None:
    folder = history.make_run_folder(tmp_path / "runs")
    assert folder.name.endswith(f"-{os.getpid()}")
    assert (folder / "logs").is_dir()
    assert os.readlink(tmp_path / "runs" / "latest") == folder.name
    time.sleep(1.1)  # the name has seconds
    newer = history.make_run_folder(tmp_path / "runs")
    assert (tmp_path / "runs" / "latest").resolve() == newer
    assert {path.name for path in (tmp_path / "runs").iterdir()} == {"latest", folder.name, newer.name}


def test_one_at_a_time_has_a_folder(tmp_path: Path) -> None:
    lock = history.claim(tmp_path)
    assert lock is not None
    assert history.claim(tmp_path) is None
    os.close(lock)
    assert history.claim(tmp_path) is not None


def test_progress_is_the_newest(tmp_path: Path) -> None:
    history.tell_progress(tmp_path, 1, "train", 0, 3)  # no folder for it: no matter
    assert history.progress(tmp_path) is None
    (tmp_path / "logs").mkdir()
    history.tell_progress(tmp_path, 1, "train", 0, 3)
    history.tell_progress(tmp_path, 2, "evaluate", 3, 3)
    assert history.progress(tmp_path) == (2, "evaluate", 3, 3)


# --- Who is who ------------------------------------------------------------------------------------------------------


def test_what_is_told_of_clients_comes_back(tmp_path: Path) -> None:
    assert history.clients(tmp_path) == ({}, set())
    history.tell_clients(tmp_path, {2**63: 1, 7: 0}, {2, 1})
    assert history.clients(tmp_path) == ({2**63: 1, 7: 0}, {1, 2})
    (tmp_path / "clients.json").write_text('{"partition-of"')
    assert history.clients(tmp_path) == ({}, set())


class Connecting:
    """A grid whose nodes come and go: each look finds the next list of them, in the end the last again."""

    def __init__(self, *looks: list[int]) -> None:
        self.looks = list(looks)

    def get_node_ids(self) -> list[int]:
        return self.looks.pop(0) if len(self.looks) > 1 else self.looks[0]


def test_the_server_waits_for_those_who_are_still_to_come(tmp_path: Path) -> None:
    """For all but the dead at first, for MIN_CLIENTS later, in the order of partition ids."""
    history.tell_clients(tmp_path, {40: 0, 30: 1, 20: 2, 10: 3}, {3})
    grid = PatientGrid(Connecting([10, 40], [10, 40, 30], [10, 40, 30, 20]), tmp_path, clients=4, min_clients=2)
    assert grid.get_node_ids() == [40, 30, 20]
    grid.grid.looks = [[20], [10, 20], [40, 20], [40, 30, 20]]
    assert grid.get_node_ids() == [40, 20]
    assert grid.node_of == {0: 40, 2: 20}


def test_the_server_gives_up_in_the_end(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("rounds.patient_grid.CONNECT_TIMEOUT", 0.5)
    with pytest.raises(TimeoutError, match="1 clients are connected, and a round needs 2"):
        PatientGrid(Connecting([1]), tmp_path, clients=3, min_clients=2).get_node_ids()


def test_of_two_nodes_that_are_one_client_the_newer_counts(tmp_path: Path) -> None:
    """Flower lists a SuperNode that has crashed for a minute more, beside the one that was started in its place."""
    history.tell_clients(tmp_path, {50: 1, 60: 0, 40: 1}, set())
    grid = PatientGrid(Connecting([40, 50, 60]), tmp_path, clients=2, min_clients=2)
    grid.get_node_ids()
    assert grid.node_of == {0: 60, 1: 40}


class Replying:
    """A grid whose one client dies as soon as it has replied."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder

    def push_messages(self, messages: list[Message]) -> list[str]:
        return ["m"]

    def pull_messages(self, message_ids: list[str]) -> list[Message]:
        history.tell_clients(self.folder, {2: 1}, {1})
        return [carded()]


def test_the_reply_of_a_client_that_has_died_since_counts(tmp_path: Path) -> None:
    """And how far it is is told to nobody where nobody has asked, as of the question who a client is."""
    history.tell_clients(tmp_path, {2: 1}, set())
    grid = PatientGrid(Replying(tmp_path), tmp_path, clients=1, min_clients=1)
    assert len(grid.send_and_receive([request()])) == 1
    history.tell_clients(tmp_path, {2: 1}, set())
    told = []
    grid.report = lambda *counts: told.append(counts)
    grid.send_and_receive([request()])
    assert told == [(0, 1), (1, 1)]
