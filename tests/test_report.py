"""Tests tools/report.py: the page on a run, a failed one too, and on several; and that ./run.sh makes it."""

import itertools
import json
import os
import re
import shutil
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path
from typing import Any

import forked
import pytest
from paths import ROOT
from runs import Launch, copy_example, finished

REPORT = ROOT / "tools" / "report.py"
HOSTILE = "<script>alert(1)</script> $x_{$ \" ' & {{ 7 * 7 }} \x1b[31mred"


def client(partition: int, **said: Any) -> dict[str, Any]:
    return {"partition-id": partition, "seconds": 1.5, "num-examples": 100 * (partition + 1), **said}


def phase(*rows: dict[str, Any], failures: tuple = (), **means: float) -> dict[str, Any]:
    return {**means, "clients": len(rows), "failures": list(failures), "by_client": list(rows)}


def recorded(**changes: Any) -> dict[str, Any]:
    """A history of two rounds, in the second of which a client failed."""
    failure = {"partition-id": 1, "reason": "RuntimeError: no more memory"}
    first = {
        "round": 1,
        "seconds": 10.0,
        "bytes": 2_000_000,
        "memory": {"client": 300.0},
        "train": phase(client(0, train_loss=2.0), client(1, train_loss=2.2), loss=2.133),
        "evaluate": phase(client(0, loss=1.9, accuracy=0.25), loss=1.9, accuracy=0.25),
    }
    second = {
        **first,
        "round": 2,
        "train": phase(client(0, train_loss=1.5), failures=(failure,), loss=1.5),
        "evaluate": phase(client(0, loss=1.4, accuracy=0.5), loss=1.4, accuracy=0.5),
    }
    whole = {
        "schema": 1,
        "example": "basic",
        "engine": "simulation",
        "dataset": "cifar10",
        "dataset_source": "torchvision",
        "status": "completed",
        "started": 1_790_000_000.0,
        "startup_seconds": 6.0,
        "seconds": 30.0,
        "clients": 2,
        "min_clients": 2,
        "sampled": 2,
        "command": "ENGINE=simulation DATASET=cifar10 ./run.sh 2 2 2 2",
        "config": {"num-server-rounds": 2, "learning-rate": 0.02},
        "rounds": [first, second],
        "accuracy": 0.5,
        "model_sha256": "0123456789abcdef" * 4,
        "versions": {"python": "3.11.7", "flwr": "1.41.0"},
    }
    return {key: value for key, value in {**whole, **changes}.items() if value is not None}


@pytest.fixture
def write(tmp_path: Path):
    """Write a history as a run's folder; return the folder."""

    def write_run(name: str = "20260921-000000-1", **changes: Any) -> Path:
        folder = tmp_path / "basic" / "runs" / name
        (folder / "logs").mkdir(parents=True)
        (folder / "history.json").write_text(json.dumps(recorded(**changes)))
        return folder

    return write_run


class Page(HTMLParser):
    """What a browser would make of the page, as far as the tests ask."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.feed(text)

    def handle_starttag(self, tag: str, attributes: list[tuple[str, str | None]]) -> None:
        self.tags.append((tag, dict(attributes)))

    def handle_data(self, data: str) -> None:
        if self.tags and self.tags[-1][0] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(" ".join(self.words).split())

    def all(self, *names: str) -> list[dict[str, str | None]]:
        return [attributes for tag, attributes in self.tags if tag in names]


def run_report(*words: object) -> subprocess.CompletedProcess[str]:
    return forked.run(REPORT, *words)


def page(*runs: Path) -> Page:
    output = runs[0] / "report.html"
    done = run_report(*runs, "--output", output)
    assert (done.returncode, done.stdout, done.stderr) == (0, f"report: {output.resolve()}\n", "")
    text = output.read_text()
    assert "�" not in text
    return Page(text)


def assert_self_contained(found: Page) -> None:
    """Nothing is loaded from anywhere, nothing runs, and the page forbids both."""
    assert found.all("script", "iframe", "object", "embed", "form", "base", "video", "audio") == []
    for tag, attributes in found.tags:
        for name, value in attributes.items():
            assert not name.startswith("on"), (tag, name)
            if name in ("src", "srcset", "href", "action", "data", "poster", "xlink:href"):
                assert value.startswith(("data:", "#")), (tag, name, value[:80])
    policies = [m["content"] for m in found.all("meta") if m.get("http-equiv") == "Content-Security-Policy"]
    assert policies == ["default-src 'none'; img-src data:; style-src 'unsafe-inline'"]


def test_a_recorded_run(write) -> None:
    found = page(write())
    assert_self_contained(found)
    for said in (
        "It completed 2 rounds with 2 clients on cifar10 and reached accuracy 0.500, in 30.0 s.",
        "ENGINE=simulation DATASET=cifar10 ./run.sh 2 2 2 2",
        "2 train 1 RuntimeError: no more memory",
        "0123456789abcdef" * 4,
        "4.00 MB",
        "client: 300 MiB",
        "learning-rate",
        "1.41.0",
        "torchvision",
    ):
        assert said in found.text, said
    assert "NOT CIFAR-10" not in found.text


def test_a_task_without_accuracy(write) -> None:
    rounds = recorded()["rounds"]
    for entry in rounds:
        del entry["evaluate"]["accuracy"]
    found = page(write(rounds=rounds, accuracy=None))
    assert "on cifar10 and reached loss 1.400, in 30.0 s." in found.text
    assert len(found.all("img")) == 1


def test_a_metric_that_is_no_number_is_said_and_not_drawn(write) -> None:
    """A history has null for NaN: in a mean, or in one client's reply, whose metric is then left out of the mean."""
    rounds = recorded()["rounds"]
    rounds[0]["evaluate"] |= {"loss": None, "auc": 0.75, "left_out": {"auc": [1]}}
    rounds[0]["evaluate"]["by_client"][0]["auc"] = None
    found = page(write(rounds=rounds))
    assert "not a number" in found.text
    assert "0.750" in found.text  # of the metrics, all have a column
    assert "1 evaluate 1 no usable auc; the rest of its reply counts" in found.text
    (loss,) = [image["alt"] for image in found.all("img") if image["alt"].startswith("Loss by round.")]
    assert "clients, held out: 1.400 to 1.400." in loss  # the second round alone


def test_device_cluster_and_privacy_are_facts(write) -> None:
    privacy = {"epsilon": 3.5, "delta": 1e-05, "unit": "client", "neighbours": "add or remove one"}
    text = page(write(device="NVIDIA H100", ray={"nodes": 2}, privacy=privacy)).text
    for said in ("device of the clients NVIDIA H100", "ray: nodes 2", "privacy: epsilon 3.5", "privacy: unit client"):
        assert said in text, said


def test_it_finds_the_packages_by_itself(write) -> None:
    """As when it is started with the system's Python: -S hides all that is installed beside it."""
    if not (ROOT / ".venv" / "bin" / "python").exists():
        pytest.skip("the collection has no .venv here")
    folder = write()
    bare = [sys.executable, "-I", "-S", REPORT, folder]
    environment = {key: value for key, value in os.environ.items() if key != "PYTHON"}
    done = subprocess.run(bare, env=environment, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    assert (folder / "report.html").is_file()


def test_headings_pictures_and_tables_can_be_read_aloud(write) -> None:
    for found in (page(write()), page(write("one"), write("two"))):
        levels = [int(tag[1]) for tag, _ in found.tags if re.fullmatch(r"h[1-6]", tag)]
        assert levels[0] == 1
        assert levels.count(1) == 1
        assert all(b - a <= 1 for a, b in itertools.pairwise(levels))
        assert found.all("html") == [{"lang": "en"}]
        assert len(found.all("img")) >= 2
        assert all(len(image["alt"]) > 20 for image in found.all("img"))
        assert len(found.all("table")) == len(found.all("caption"))
        assert all(head["scope"] in ("col", "row") for head in found.all("th"))
        assert [m["content"] for m in found.all("meta") if m.get("name") == "viewport"]


def test_the_stand_in_cannot_be_missed(write) -> None:
    found = page(write(dataset="synthetic"))
    assert found.text.index("NOT CIFAR-10") < found.text.index("It completed")  # above all else, and in the title
    assert "(NOT CIFAR-10)" in found.words[found.words.index(next(w for w in found.words if w.strip()))]
    assert found.all("p")[0] == {"class": "stand-in"}


def test_a_failed_run_says_why(write) -> None:
    folder = write(
        status="failed", reason="round 2: no client could train", log="run", accuracy=None, model_sha256=None
    )
    log = "started\nTraceback (most recent call last):\nOutOfMemory: \x1b[91mno room\x1b[0m\n"
    (folder / "logs" / "run.log").write_text(log)
    found = page(folder)
    assert_self_contained(found)
    assert "It failed after 2 of 2 rounds: round 2: no client could train" in found.text
    assert "Traceback (most recent call last): OutOfMemory: no room" in found.text
    assert "none, since no model was saved" in found.text


def test_a_run_that_failed_before_its_first_round(write) -> None:
    gone = dict.fromkeys(("startup_seconds", "accuracy", "model_sha256", "versions", "command", "dataset_source"))
    found = page(write(status="failed", reason="port 8000 is in use", rounds=[], **gone))
    assert "It failed after 0 of 2 rounds: port 8000 is in use" in found.text


def test_a_run_that_was_stopped_or_killed(write) -> None:
    assert "It was stopped after 2 of 2 rounds: SIGINT" in page(write("a", status="stopped", reason="SIGINT")).text
    assert "still running or was killed" in page(write("b", status="running", seconds=None)).text


def test_hostile_text_is_text(write) -> None:
    """In settings, names, errors, the log; and a log that is named outside of the run's folder is not read."""
    rounds = recorded()["rounds"]
    rounds[1]["train"]["failures"][0]["reason"] = HOSTILE
    folder = write(
        **dict.fromkeys(
            ("example", "engine", "dataset", "dataset_source", "command", "reason", "model_sha256"), HOSTILE
        ),
        status="failed",
        rounds=rounds,
        config={"init-from": HOSTILE, HOSTILE: HOSTILE},
        versions={"python": HOSTILE},
        log="../history",
    )
    (folder / "history.log").write_text("a log that is not one of the run's")
    (folder / "logs" / "history.log").write_text(HOSTILE)
    for found in (page(folder), page(folder, write("other"))):
        assert_self_contained(found)
        assert found.text.count("<script>alert(1)</script>") > 8
        assert "{{ 7 * 7 }}" in found.text
        assert "not one of the run's" not in found.text


def test_several_runs_on_one_page(write, tmp_path: Path) -> None:
    one = write("one", config={"num-server-rounds": 2, "learning-rate": 0.02})
    two = write("two", dataset="synthetic", accuracy=0.75, config={"num-server-rounds": 2, "learning-rate": 0.1})
    found = page(one, two)
    assert_self_contained(found)
    assert "learning-rate 0.02 0.1" in found.text
    assert "num-server-rounds 2 2" not in found.text.split("1: basic, one")[0]  # the same in both
    assert "Different data sets." in found.text
    assert {"#run-1", "#run-2"} <= {link["href"] for link in found.all("a")}
    assert {"run-1", "run-2"} == {section["id"] for section in found.all("section")}
    assert len(found.all("img")) == 6  # loss and accuracy of both, and of each
    done = subprocess.run([sys.executable, REPORT, one, two], cwd=tmp_path, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert (tmp_path / "report.html").is_file()


@pytest.mark.parametrize("content", [None, "", "[]", '{"rounds": 3}', '{"rounds": [3]}'])
def test_what_is_no_run_is_refused(tmp_path: Path, content: str | None) -> None:
    if content is not None:
        (tmp_path / "history.json").write_text(content)
    done = run_report(tmp_path)
    assert done.returncode == 1
    assert done.stderr.startswith(f"error: {tmp_path} is no run that can be read: ")
    assert not (tmp_path / "report.html").exists()


# --- After a run -----------------------------------------------------------------------------------------------------


def copy_collection(folder: Path) -> Path:
    """Copy the collection, with one example."""
    copy_example("basic", folder / "basic")
    shutil.copytree(ROOT / "tools", folder / "tools")
    for name in ("run.sh", "requirements.txt"):
        shutil.copy(ROOT / name, folder)
    return folder


@pytest.mark.slow  # test_runs.py has a run that completes, and looks at its page
def test_it_makes_one_after_a_failed_run_and_a_bad_report_changes_nothing(tmp_path: Path, data_dir: Path) -> None:
    collection = copy_collection(tmp_path / "collection")

    def start() -> tuple[Launch, Path]:
        run = finished(collection, "basic", 1, 1, 1, 1, data_dir=data_dir, ENGINE="simulation")
        return run, (collection / "basic" / "runs" / "latest").resolve()

    client = collection / "basic" / "client.py"
    client.write_text(client.read_text().replace("    net = load_model(message)\n", "    raise OSError('disk')\n", 1))
    run, folder = start()
    assert run.process.returncode == 1
    assert "It failed after 0 of 1 rounds: " in Page((folder / "report.html").read_text()).text
    (collection / "tools" / "report.py").write_text("raise SystemExit(3)\n")
    run, _ = start()
    assert run.process.returncode == 1
    assert "OSError: disk" in run.stderr
