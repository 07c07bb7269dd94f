"""Copies of the examples become other projects by what is marked, and tools/check_template.py finds what is wrong."""

import ast
import json
import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT, copy_example, environment

MARKED = {"YOUR MODEL": {"NUM_CLASSES", "Net"}, "YOUR DATA": {"load_split", "to_inputs"}}
MARKED["YOUR TRAINING STEP"] = {"train", "test"}


def check(folder: Path, data_dir: Path, *options: str) -> tuple[int, dict[str, tuple[str, str]]]:
    """The exit status of the check, and what it says: {name: (mark, text)}."""
    command = [sys.executable, ROOT / "tools" / "check_template.py", folder, *options]
    done = subprocess.run(command, env=environment(data_dir, DATASET=""), capture_output=True, text=True)
    assert done.stderr == ""
    lines = [
        re.fullmatch(r"(ok|risk|FAIL|-) +(one round|batch norm|\w+) +(.+)", line) for line in done.stdout.splitlines()
    ]
    return done.returncode, {line[2]: (line[1], line[3]) for line in lines}


def definitions(source: str) -> dict[str, slice]:
    """The lines of each definition at the top level of a module, by name."""
    found = {}
    for node in ast.parse(source).body:
        names = [node.name] if hasattr(node, "name") else [getattr(to, "id", "") for to in getattr(node, "targets", ())]
        first = min([node.lineno, *(decorator.lineno for decorator in getattr(node, "decorator_list", ()))])
        found |= dict.fromkeys(names, slice(first - 1, node.end_lineno))
    return found


def put(file: Path, source: str) -> None:
    """Replace definitions in a module by others of the same names."""
    for name, place in definitions(source).items():
        text = file.read_text()
        lines = text.splitlines()
        lines[definitions(text)[name]] = source.splitlines()[place]
        file.write_text("\n".join(lines) + "\n")


def edit(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1, f"{old!r} is not once in {file.name}"
    file.write_text(file.read_text().replace(old, new))


def own_data(folder: Path) -> None:
    edit(folder / "pyproject.toml", 'dataset = "auto"', 'dataset = "own"')


# --- Three other projects --------------------------------------------------------------------------------------------

TRANSFORMER = '''
class Net(nn.Module):
    """A transformer over the sixteen patches of a picture."""

    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Conv2d(3, 32, 8, stride=8)
        self.position = nn.Parameter(torch.zeros(16, 32))
        layer = nn.TransformerEncoderLayer(32, 4, 64, dropout=0.0, batch_first=True)
        self.encoder = nn.TransformerEncoder(layer, 2)
        self.head = nn.Linear(32, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.head(self.encoder(self.embed(x).flatten(2).transpose(1, 2) + self.position).mean(1))
'''

TABLE = '''
NUM_CLASSES = 3

class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, NUM_CLASSES))

def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """The first thousand lines of a table, or the rest; the class stands in the last column."""
    table = np.loadtxt(dataset.data_dir() / "table.csv", delimiter=",", skiprows=1, dtype=np.float32)
    rows = table[:1000] if split == "train" else table[1000:]
    return rows[:, :-1], rows[:, -1].astype(np.int64)

def to_inputs(rows: Tensor) -> Tensor:
    return (rows - 5.0) / 3.0
'''

REGRESSION = '''
class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

def load_split(split: str) -> tuple[np.ndarray, np.ndarray]:
    """Numbers, and the sum of their squares."""
    inputs = np.random.default_rng(0).normal(size=(500, 4)).astype(np.float32)
    return inputs, (inputs**2).sum(1, keepdims=True)

def to_inputs(rows: Tensor) -> Tensor:
    return rows

def train(net, batches, epochs: int, learning_rate: float) -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    net.train()
    total, seen = 0.0, 0
    for _ in range(epochs):
        for inputs, targets in batches:
            optimizer.zero_grad()
            loss = F.mse_loss(net(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
            seen += len(targets)
    return total / seen

@torch.no_grad()
def test(net, batches) -> dict[str, float]:
    net.eval()
    errors = torch.cat([net(inputs) - targets for inputs, targets in batches])
    return {"loss": errors.square().mean().item(), "mean-absolute-error": errors.abs().mean().item()}
'''


@pytest.fixture
def transformer(tmp_path: Path, data_dir: Path) -> tuple[Path, Path]:
    """Another model: advanced_example with a transformer. Returns the folder and its DATA_DIR."""
    folder = copy_example("advanced_example", tmp_path / "my project")
    put(folder / "cifar_utils.py", TRANSFORMER)
    edit(folder / "pyproject.toml", 'dataset = "auto"', 'dataset = "synthetic"')  # no download in a test
    return folder, data_dir


@pytest.fixture
def table(tmp_path: Path) -> tuple[Path, Path]:
    """Other data: multiprocessing with a table of numbers, and a network for it."""
    folder = copy_example("multiprocessing", tmp_path / "my project")
    put(folder / "cifar_utils.py", TABLE)
    own_data(folder)
    rng = np.random.default_rng(0)
    labels = rng.integers(0, 3, 1200)
    rows = np.column_stack([rng.normal(3 * labels[:, None], 1, (1200, 4)), labels])
    (tmp_path / "data").mkdir()
    np.savetxt(tmp_path / "data" / "table.csv", rows, "%.3f", delimiter=",", header="a,b,c,d,class", comments="")
    return folder, tmp_path / "data"


@pytest.fixture
def regression(tmp_path: Path) -> tuple[Path, Path]:
    """Another task: basic with numbers to predict, and so with no accuracy."""
    folder = copy_example("basic", tmp_path / "my project")
    put(folder / "cifar_utils.py", REGRESSION)
    own_data(folder)
    return folder, tmp_path / "data"


def test_the_places_to_change_are_marked() -> None:
    """The three projects change nothing else; what is marked stands under its mark."""
    changed = {name for source in (TRANSFORMER, TABLE, REGRESSION) for name in definitions(source)}
    assert changed == set().union(*MARKED.values())
    text = (ROOT / "basic" / "cifar_utils.py").read_text()
    for mark, names in MARKED.items():
        for name in names:
            above = text.splitlines()[: definitions(text)[name].start]
            marks = [match for line in above if (match := re.match(r"# (?:(YOUR [A-Z ]+):|---)", line))]
            assert marks[-1][1] == mark, name  # no other mark, and no headline, comes between
    for row in re.findall(r"^.*marked `YOUR .*$", (ROOT / "README.md").read_text(), re.M):
        named, mark = re.search(r"\| (.*)marked `(YOUR [A-Z ]+)`", row).groups()
        assert set(re.findall(r"`(\w+)`", named)) <= MARKED[mark], row
    for example in ("basic", "advanced_example", "multiprocessing"):
        assert re.search('dataset = "auto".*YOUR DATA: "own"', (ROOT / example / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("project", "options"),
    [
        ("transformer", ["--quick"]),
        pytest.param("transformer", [], marks=pytest.mark.slow),
        ("table", []),
        ("regression", []),
    ],
)
def test_a_copy_becomes_another_project(project: str, options: list[str], request: pytest.FixtureRequest) -> None:
    folder, data_dir = request.getfixturevalue(project)
    status, said = check(folder, data_dir, *options)
    assert status == 0, said
    assert {mark for mark, _ in said.values()} == {"ok"}
    if options:
        return
    history = json.loads((folder / "runs/latest/history.json").read_text())
    figures = history["rounds"][-1]["evaluate" if project == "regression" else "server"]
    if project == "regression":
        assert "accuracy" not in history
        assert figures["mean-absolute-error"] > 0
        assert f"dataset own, loss {figures['loss']:.3f}, " in said["one round"][1]
        assert figures["loss"] < 20  # of 24: the mean of the squared targets
    else:
        assert history["accuracy"] == figures["accuracy"]
    if project == "table":
        assert history["accuracy"] > 0.5  # of three classes


# --- What would go wrong ---------------------------------------------------------------------------------------------

NET, UTILS = "        self.fc3 = nn.Linear(84, NUM_CLASSES)\n", "cifar_utils.py"
BROKEN = {
    "too few outputs": ("basic", UTILS, NET, NET.replace("NUM_CLASSES", "9"), "targets", "let the last layer have one"),
    "a label out of range": (
        "basic",
        UTILS,
        "    return dataset.load_split(split)",
        "    images, labels = dataset.load_split(split)\n    return images, labels + 1",
        "targets",
        "targets go from 1 to 10, and the model has 10 outputs: number the classes from 0",
    ),
    "NaN": (
        "basic",
        UTILS,
        "loss = F.cross_entropy(net(images), labels)",
        "loss = (F.cross_entropy(net(images), labels) - 9).sqrt()",
        "step",
        "the training loss is nan",
    ),
    "a lambda": (
        "multiprocessing",
        "work.py",
        "def _model(",
        "evaluate = lambda arrays, data: ({}, {})\n\n\ndef _model(",
        "children",
        "work.evaluate can't be sent to a child process",
    ),
    "a renamed key": (
        "basic",
        "client.py",
        "ArrayRecord(net.state_dict())",
        'ArrayRecord({f"module.{name}": value for name, value in net.state_dict().items()})',
        "client",
        "weights differ in their names: missing ['conv1.bias'",
    ),
    "a layer too small": ("basic", UTILS, "nn.Linear(16 * 5 * 5, 120)", "nn.Linear(16, 120)", "fit", "YOUR MODEL"),
    "a name with an underscore": (
        "basic",
        "pyproject.toml",
        'name = "basic"',
        'name = "my_app"',
        "settings",
        "hyphens",
    ),
    "a typing error": ("basic", UTILS, NET, NET + "        self.fc4 = nn.Liner(1, 1)\n", "model", "at cifar_utils.py:"),
    "numbers of another shape": (
        "basic",
        UTILS,
        "    return dataset.load_split(split)",
        "    images, labels = dataset.load_split(split)\n    return images, labels.astype(np.float32)",
        "targets",
        "targets[:, None]",
    ),
    "examples left out": (
        "basic",
        UTILS,
        "    return np.array_split(rng.permutation(len(labels)), num_partitions)",
        "    return np.array_split(rng.permutation(len(labels) - 1), num_partitions)",
        "data",
        "exactly one client",
    ),
    "no accuracy": (
        "advanced_example",
        UTILS,
        '    return {"loss": total_loss / seen, "accuracy": correct / seen}',
        '    return {"loss": total_loss / seen}',
        "step",
        "which is asked for at checkpoint.py:",
    ),
    "weights that don't move": ("basic", UTILS, "            optimizer.step()\n", "", "step", "optimizer.step()?"),
}
QUICK = ("too few outputs", "a label out of range", "NaN", "a lambda", "a renamed key")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in BROKEN]
)
def test_what_is_wrong_is_found_and_the_fix_named(kind: str, tmp_path: Path, data_dir: Path) -> None:
    example, file, old, new, name, text = BROKEN[kind]
    folder = copy_example(example, tmp_path / example)
    edit(folder / "pyproject.toml", 'dataset = "auto"', 'dataset = "synthetic"')
    if example == "multiprocessing":
        edit(folder / "pyproject.toml", "clients = 100              #", "clients = 10               #")  # 600 pictures
    edit(folder / file, old, new)
    status, said = check(folder, data_dir)
    assert status == 1
    assert [found for found, (mark, _) in said.items() if mark == "FAIL"] == [name]
    assert text in said[name][1]
    assert said["one round"] == ("-", f"not tried, since {'client' if name != 'client' else name} did not pass")


def test_batch_norm_is_a_risk_and_no_failure(tmp_path: Path, data_dir: Path) -> None:
    folder = copy_example("basic", tmp_path / "basic")
    edit(folder / "pyproject.toml", 'dataset = "auto"', 'dataset = "synthetic"')
    edit(folder / UTILS, NET, NET + "        self.norm = nn.BatchNorm1d(84)\n")
    edit(folder / UTILS, "F.relu(self.fc2(x))", "F.relu(self.norm(self.fc2(x)))")
    status, said = check(folder, data_dir, "--quick")
    assert status == 0, said
    assert said["batch norm"][0] == "risk"
    assert "norm: " in said["batch norm"][1]
    assert {mark for name, (mark, _) in said.items() if name != "batch norm"} == {"ok"}


@pytest.mark.parametrize("words", [[], ["nowhere"], [str(ROOT)]])
def test_what_is_no_copy_is_refused(words: list[str]) -> None:
    command = [sys.executable, ROOT / "tools" / "check_template.py", *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "Usage:" in done.stderr
    assert "FOLDER must be a copy of an example" in done.stderr
