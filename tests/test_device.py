"""What the clients compute on: asked for by one word, and said in the run."""

import importlib
import subprocess
import sys
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from flwr.app import ArrayRecord, ConfigRecord, Context, Message, MessageType, Metadata, RecordDict
from paths import ROOT

import cifar_utils
from launcher import screen
from launcher.project import read_project, run_config
from rounds import history, mods

FOLDERS = ("basic", "advanced_example", "multiprocessing")


# --- One word --------------------------------------------------------------------------------------------------------


def test_a_device_that_is_named_is_taken_and_auto_takes_what_there_is(monkeypatch: pytest.MonkeyPatch) -> None:
    assert cifar_utils.best_device("cuda") == torch.device("cuda")
    assert cifar_utils.best_device("cpu") == torch.device("cpu")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert cifar_utils.best_device() == torch.device("cuda")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    assert cifar_utils.best_device() == torch.device("mps")
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: False)
    assert cifar_utils.best_device() == torch.device("cpu")


@pytest.mark.parametrize("folder", FOLDERS)
def test_all_examples_have_the_word_and_say_what_it_may_be(folder: str) -> None:
    command = [sys.executable, ROOT / folder / "launcher" / "__main__.py", "device=gpu", "--dry-run"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (2, "error: device must be one of auto, cpu, cuda, mps, not 'gpu'\n")


@pytest.mark.parametrize("folder", ["basic", "advanced_example"])
def test_the_clients_pass_it_on(folder: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """PyTorch's "meta" device computes nothing: what reaches it has passed all the way."""
    asked = {"device": "meta", "toy": True, "evaluate-steps": 1}
    config = {**run_config(read_project(ROOT / folder)), **asked}
    rng_images = torch.zeros(100, 3, 32, 32, dtype=torch.uint8).numpy(), torch.arange(100).numpy() % 10
    monkeypatch.setattr(cifar_utils, "load_split", lambda split: rng_images)
    monkeypatch.syspath_prepend(ROOT / folder)
    own = ("client", *(path.stem for path in (ROOT / "advanced_example").glob("*.py") if path.stem != "cifar_utils"))
    for name in own:
        monkeypatch.delitem(sys.modules, name, raising=False)
    client = importlib.import_module("client")
    for name in own:
        sys.modules.pop(name, None)  # for other tests, a `client` is another folder's
    used = []
    monkeypatch.setattr(client.cifar_utils, "best_device", lambda wanted: used.append(wanted) or torch.device("cpu"))
    node = {"partition-id": 0, "num-partitions": 2}
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config=config)
    arrays = ArrayRecord(cifar_utils.Net().state_dict())
    for kind in (MessageType.TRAIN, MessageType.EVALUATE):
        content = RecordDict({"arrays": arrays, "config": ConfigRecord({**config, "local-epochs": 1})})
        way = {"message_id": "m", "src_node_id": 1, "dst_node_id": 2, "reply_to_message_id": "", "group_id": ""}
        metadata = Metadata(run_id=1, **way, created_at=0.0, ttl=1e9, message_type=kind)
        reply = client.app(Message(content=content, metadata=metadata), context)
        assert not reply.has_error(), reply.error.reason
        assert used.pop() == "meta"
        assert set(used) <= {"meta"}


# --- What was used ---------------------------------------------------------------------------------------------------


def said(**config: str) -> str | None:
    return mods.device(SimpleNamespace(run_config=config))


def test_a_client_says_what_it_has_computed_on(monkeypatch: pytest.MonkeyPatch) -> None:
    assert said(device="auto") == "cpu"
    monkeypatch.setattr(torch.backends.mps, "is_available", lambda: True)
    assert (said(device="auto"), said(device="cpu")) == ("mps", "cpu")
    card = SimpleNamespace(name="NVIDIA A100-SXM4-40GB", total_memory=42_298_834_944)
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda: card)
    assert said(device="auto") == "NVIDIA A100-SXM4-40GB, 39 GiB"
    monkeypatch.delitem(sys.modules, "torch")
    assert said(device="auto") is None


def test_the_device_is_printed_once_and_before_the_rounds(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    printer = screen.Printer(tmp_path, 2)
    entry = {"seconds": 1.0, "train": {"clients": 2, "failures": []}}
    for number in (1, 2):
        rounds = [{"round": i + 1, **entry} for i in range(number)]
        history.save(tmp_path, {"device": "NVIDIA Pretence, 40 GiB", "config": {}, "rounds": rounds})
        printer.show()
    out, err = capsys.readouterr()
    assert [line.split()[0] for line in out.splitlines()] == ["Device:", "round", "1", "2"]
    assert out.startswith("Device: NVIDIA Pretence, 40 GiB\n")
    assert err == ""
