"""Takes the code of RECIPES.md from the page, applies it to copies of `basic` as the page says, and runs them."""

import ast
import importlib.util
import json
import re
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
import torch
from runs import ROOT, Launch, copy_example, environment, finished
from template_helpers import check, definitions, edit, marks, own_data

PAGE = (ROOT / "RECIPES.md").read_text()
FILES = "cifar_utils.py", "server.py", "client.py"


# --- From the page to a project --------------------------------------------------------------------------------------


def blocks(title: str) -> list[tuple[str, str, str]]:
    """Return the code under a headline: (file, language, code). A block belongs to the last file that was named."""
    section = re.search(rf"^## {title}\n(.*?)(?=^## |\Z)", PAGE, re.M | re.S)[1]
    found, file = [], ""
    for text, language, code in re.findall(r"(.*?)```(\w*)\n(.*?)```", section, re.S):
        named = [name for name in re.findall(r"`([\w.]+)`:", text) if name in FILES]
        file = named[-1] if named else file
        found.append((file, language, code))
    return found


def follow(folder: Path, title: str) -> None:
    """Change a copy of `basic` as a recipe says."""
    for file, language, code in blocks(title):
        if language == "python":
            put(folder / file, code)
        elif language == "diff":
            old = "".join(line[1:] for line in code.splitlines(keepends=True) if line[0] in "- ")
            new = "".join(line[1:] for line in code.splitlines(keepends=True) if line[0] in "+ ")
            edit(folder / file, old, new)


def put(file: Path, code: str) -> None:
    """Replace definitions of the same name, put new ones above the next that replaces one, and imports to the top."""
    text, waiting = file.read_text(), ""
    for node in ast.parse(code).body:
        (name,) = names_of(node) or [""]
        source = "".join(code.splitlines(keepends=True)[first_line(node) : node.end_lineno])
        if isinstance(node, ast.Import | ast.ImportFrom):
            text = text.replace("\nimport torch\n", f"\n{source}import torch\n", 1)
        elif (old := definitions(text).get(name)) is not None:
            lines = text.splitlines(keepends=True)
            lines[old] = [waiting, source]
            text, waiting = "".join(lines), ""
        else:
            waiting += f"{source}\n\n"
    assert not waiting
    file.write_text(text)


def first_line(node: ast.AST) -> int:
    return min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))]) - 1


def names_of(node: ast.AST) -> list[str]:
    """Return what a statement defines; of several names, which are all new, the first."""
    return list(definitions(ast.unparse(node)))[:1]


@pytest.fixture
def project(tmp_path: Path) -> Path:
    """A copy of `basic`, as somebody makes it who has run it before."""
    folder = copy_example("basic", tmp_path / "my project")
    (folder / "runs" / "20200101-000000-1").mkdir(parents=True)
    (folder / "runs" / "latest").symlink_to("20200101-000000-1")
    return folder


def run(folder: Path, *words: object, data_dir: Path | None = None) -> Launch:
    """Check the project, and run it."""
    status, said = check(folder, data_dir or folder.parent, "--quick")
    assert status == 0, said
    assert marks(said) <= {"ok", "risk"}
    data = {"data_dir": data_dir} if data_dir else {"data_dir": folder.parent, "DATASET": ""}
    done = finished(folder, *words, cwd=folder.parent, **data)
    assert done.process.returncode == 0, done.stdout + done.stderr
    assert (folder / "runs" / "latest").resolve() == done.run_dir
    return done


def evaluated(launch: Launch) -> list[dict[str, Any]]:
    return [entry["evaluate"] for entry in launch.history["rounds"]]


def imported(folder: Path, monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """Import the project's cifar_utils.py, under a name of its own, with the project's folder as the current one."""
    monkeypatch.chdir(folder)
    spec = importlib.util.spec_from_file_location("cifar_utils_of_a_recipe", folder / "cifar_utils.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def load(utils: ModuleType, path: Path, **options: Any) -> torch.nn.Module:
    net = utils.Net()
    net.load_state_dict(torch.load(path, weights_only=True), **options)
    return net.eval()


# --- The recipes -----------------------------------------------------------------------------------------------------


def write_tables(folder: Path, clients: int = 3) -> None:
    """Write the clients' tables, in which one column decides; the third client has no patient with label 1."""
    rng = np.random.default_rng(0)
    (folder / "tables").mkdir()
    for client in range(clients):
        table = rng.normal((50, 120, 25), (15, 20, 5), (300, 3))
        labels = table[:, 1] > (999 if client == 2 else 120)
        rows = np.column_stack([table, labels])
        np.savetxt(
            folder / f"tables/client-{client}.csv", rows, "%.2f", ",", header="age,pressure,bmi,label", comments=""
        )


@pytest.mark.slow
def test_tables(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """An AUC that one client can't have takes nothing else from it, and is averaged over the others."""
    follow(project, "Tables")
    own_data(project)
    write_tables(project)
    launch = run(project, 3, 3, 3, 4, "learning-rate=0.1")
    last = evaluated(launch)[-1]
    by_client = last["by_client"]
    assert last["clients"] == 3
    assert last["failures"] == []
    assert last["left_out"] == {"auc": [2]}
    assert by_client[2]["auc"] is None
    assert last["auc"] == pytest.approx((by_client[0]["auc"] + by_client[1]["auc"]) / 2)  # 30 rows held out by each
    assert last["accuracy"] == pytest.approx(np.mean([row["accuracy"] for row in by_client]))
    assert last["accuracy"] > 0.85
    assert last["auc"] > 0.95
    assert "dataset own, accuracy" in launch.stdout

    utils = imported(project, monkeypatch)
    assert utils.auc(torch.tensor([0.1, 0.4, 0.35, 0.8]), torch.tensor([0.0, 0, 1, 1])) == pytest.approx(0.75)
    assert np.isnan(utils.auc(torch.tensor([0.1, 0.4]), torch.zeros(2)))
    net = load(utils, launch.run_dir / "model.pt")
    assert (net(torch.tensor([[50.0, 160.0, 25.0], [50.0, 80.0, 25.0]])) > 0).tolist() == [True, False]


@pytest.mark.slow
def test_divided_data_and_a_server_without_any_in_advanced_example(tmp_path: Path) -> None:
    """The page says what to leave out; the clients' figures are then the run's."""
    folder = copy_example("advanced_example", tmp_path / "my project")
    follow(folder, "Tables")
    own_data(folder)
    write_tables(folder, 5)
    server = folder / "server.py"
    assert "leave `evaluate_fn` out" in PAGE
    text, count = re.subn(r"^        evaluate_fn=.*\n", "", server.read_text(), flags=re.M)
    assert count == 1
    server.write_text(text)
    launch = run(folder, 3, 3, 3, 2)
    assert [set(entry) & {"train", "evaluate", "server"} for entry in launch.history["rounds"]] == [
        {"train", "evaluate"},
        {"train", "evaluate"},
    ]
    last = evaluated(launch)[-1]
    assert (last["clients"], last["left_out"]) == (3, {"auc": [2]})
    assert launch.history["accuracy"] == last["accuracy"]
    assert (launch.run_dir / "best.pt").exists()


@pytest.mark.slow
def test_folders_of_pictures(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A client without the first class labels the second as the others do; only the last layer travels."""
    from PIL import Image
    from torchvision import models

    follow(project, "Folders of pictures")
    own_data(project)
    torch.manual_seed(0)
    resnet = models.resnet18()
    resnet(torch.randn(8, 3, 64, 64))  # in training mode: BatchNorm measures its statistics
    torch.save(resnet.state_dict(), project / "resnet18.pt")
    rng = np.random.default_rng(0)
    for client, classes in enumerate((("benign", "malignant"), ("malignant",), ("benign", "malignant"))):
        for name in classes:
            folder = project / f"pictures/client-{client}/{name}"
            folder.mkdir(parents=True)
            for i in range(12):
                picture = rng.integers(0, 60, (40, 50, 3), dtype=np.uint8)
                picture[..., 0 if name == "malignant" else 1] += 180  # red is malignant, green benign
                Image.fromarray(picture).save(folder / f"{i}.jpg")
    launch = run(project, 3, 3, 3, 3, "local-epochs=2", "batch-size=4", "learning-rate=0.002")
    assert launch.history["rounds"][0]["bytes"] == 9 * 4 * (2 * 512 + 2)  # to 3 clients, back, and for evaluation
    assert evaluated(launch)[-1]["accuracy"] == 1.0

    utils = imported(project, monkeypatch)
    state = torch.load(launch.run_dir / "model.pt", weights_only=True)
    assert set(state) == {"resnet.fc.weight", "resnet.fc.bias"}
    net = load(utils, launch.run_dir / "model.pt", strict=False)
    red, green = (Image.new("RGB", (50, 40), colour) for colour in ((210, 30, 30), (30, 210, 30)))
    classes = net(torch.stack([utils.AS_IMAGENET(red), utils.AS_IMAGENET(green)])).argmax(1)
    assert [utils.CLASSES[i] for i in classes] == ["malignant", "benign"]


@pytest.mark.slow
def test_text(project: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A word decides, wherever it stands; and what a sentence is padded with changes nothing."""
    follow(project, "Text")
    own_data(project)
    edit(project / "pyproject.toml", "learning-rate = 0.02 ", "learning-rate = 0.003 ")
    rng = np.random.default_rng(0)
    (project / "texts").mkdir()
    for client in range(3):
        lines = []
        for i in range(150):
            words = [f"word{number}" for number in rng.integers(0, 50, rng.integers(1, 12))]
            words.insert(rng.integers(0, len(words) + 1), ("dreadful", "lovely")[i % 2])
            lines.append(f"{i % 2}\t{' '.join(words)}\n")
        (project / f"texts/client-{client}.tsv").write_text("".join(lines))
    launch = run(project, 3, 3, 3, 6, "batch-size=8", "local-epochs=2")
    assert evaluated(launch)[-1]["accuracy"] > 0.9

    utils = imported(project, monkeypatch)
    net = load(utils, launch.run_dir / "model.pt")
    short, long = utils.to_ids("A lovely day"), utils.to_ids("it was dreadful " + "word1 " * 9)
    both, alone = utils.collate([(short, 1), (long, 0)]), utils.collate([(short, 1)])
    with torch.no_grad():
        logits, (one,) = net(both["ids"], both["mask"]), net(alone["ids"], alone["mask"])
    assert logits.argmax(1).tolist() == [1, 0]
    assert torch.allclose(logits[0], one, atol=1e-5)


@pytest.mark.slow
def test_a_strategy_of_your_own(project: Path, data_dir: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """best.pt has the lowest loss of all rounds, as measured here; the run stops three rounds later."""
    follow(project, "A strategy of your own")
    edit(project / "pyproject.toml", 'dataset = "auto"', 'dataset = "synthetic"')
    launch = run(project, 3, 3, 3, 40, "learning-rate=0.1", "local-epochs=3", data_dir=data_dir)
    losses = [entry["loss"] for entry in evaluated(launch)]
    best = min(losses)
    assert len(losses) == losses.index(best) + 1 + 3 < 40
    assert f"basic: {len(losses)} rounds, 3 clients" in launch.stdout

    monkeypatch.setenv("DATA_DIR", str(data_dir))
    monkeypatch.setenv("DATASET", "synthetic")
    utils = imported(project, monkeypatch)
    net = load(utils, launch.run_dir / "best.pt")
    tests = [utils.load_client_data(client, 3, 32, 2026)[1] for client in range(3)]  # 20 pictures each
    assert np.mean([utils.test(net, loader, "cpu")["loss"] for loader in tests]) == pytest.approx(best, rel=1e-4)


WRITER = '''
"""Stands in for TensorBoard where it is not installed."""

import json


class SummaryWriter:
    def __init__(self, folder):
        folder.mkdir()
        self.file = (folder / "log.jsonl").open("w")

    def add_scalar(self, name, value, step):
        self.file.write(json.dumps([name, value, step]) + "\\n")

    def flush(self):
        self.file.flush()
'''


@pytest.mark.slow
def test_logging(project: Path, data_dir: Path) -> None:
    follow(project, "Logging")
    edit(project / "pyproject.toml", 'dataset = "auto"', 'dataset = "synthetic"')
    installed = importlib.util.find_spec("tensorboard") is not None
    if not installed:
        (project / "writer.py").write_text(WRITER)
        edit(project / "server.py", "from torch.utils.tensorboard import", "from writer import")
    launch = run(project, 2, 2, 2, 2, data_dir=data_dir)
    folder = launch.run_dir / "tensorboard"
    if installed:
        from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

        log = EventAccumulator(str(folder))
        log.Reload()
        logged = [(name, event.value, event.step) for name in log.Tags()["scalars"] for event in log.Scalars(name)]
    else:
        logged = [json.loads(line) for line in (folder / "log.jsonl").read_text().splitlines()]
    found = {(name, step): pytest.approx(value, rel=1e-5) for name, value, step in logged}
    assert found == {
        (f"{phase}/{name}", entry["round"]): entry[phase][name.removeprefix("train_")]
        for entry in launch.history["rounds"]
        for phase, names in (("train", ["train_loss"]), ("evaluate", ["loss", "accuracy"]))
        for name in names
    }
    row = next(line for line in PAGE.splitlines() if line.startswith("| `self.writer.add_scalar"))
    for call in re.findall(r"`((?:mlflow|wandb)[^`]+)`", row):
        ast.parse(call)


# --- The rest of the page --------------------------------------------------------------------------------------------


def test_a_client_is_told_where_its_data_is(project: Path) -> None:
    """By --node-config; Flower's own reading of the words on the page comes to client.py's load_data."""
    from flwr.app import Context, Message, Metadata, RecordDict
    from flwr.common.config import parse_config_args

    from rounds.mods import named

    follow(project, "Folders of pictures")
    follow(project, "Data on other machines")
    (command,) = re.findall(r"^flower-supernode .*\\\n +--node-config '(.*)'$", PAGE, re.M)
    node = parse_config_args([command])
    code = f"""
import types, client
client.cifar_utils.load_client_data = lambda *args, **options: print(args, options)
config = {{"batch-size": 4, "seed": 1}}
client.load_data(types.SimpleNamespace(node_config={node!r}, run_config=config))
"""
    command = [sys.executable, "-c", code]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.stdout == "(0, 3) {'batch_size': 4, 'seed': 1, 'folder': '/srv/pictures'}\n", done.stderr

    way = {"message_id": "m", "src_node_id": 1, "dst_node_id": 2, "reply_to_message_id": "", "group_id": ""}
    question = Message(
        metadata=Metadata(run_id=1, **way, created_at=0.0, ttl=1e9, message_type="train"), content=RecordDict()
    )
    context = Context(run_id=1, node_id=2, node_config=node, state=RecordDict(), run_config={"device": "cpu"})
    said = named(question, context, lambda message, context: message).content["client"]
    assert (said["partition-id"], said["num-partitions"]) == (0, 3)
    assert "/srv/pictures" not in said.values()  # as the page promises


def test_the_trained_model_is_used_as_the_pages_say(project: Path) -> None:
    lines = ["import torch", "from cifar_utils import Net", "x = torch.ones(2, 3, 32, 32)"]
    for seed, page in enumerate(("RECIPES.md", "README.md")):
        codes = re.findall(r"```python\n(.*?)```", (ROOT / page).read_text(), re.S)
        lines += [f"torch.manual_seed({seed})", "net = Net()", "torch.save(net.state_dict(), 'runs/latest/model.pt')"]
        lines += ["wanted = net.eval()(x)", next(code for code in codes if "model.pt" in code)]
        lines += [f"print('{page}', torch.equal(net(x), wanted))"]
    command = [sys.executable, "-c", "\n".join(lines)]
    done = subprocess.run(command, cwd=project, env=environment(project), capture_output=True, text=True)
    assert done.stdout == "RECIPES.md True\nREADME.md True\n", done.stderr


def test_each_recipe_is_about_a_page(project: Path) -> None:
    for title in re.findall(r"^## (.*)$", PAGE, re.M):
        section = PAGE.split(f"## {title}\n")[1].split("\n## ")[0]
        assert len(section.splitlines()) <= 85, title
