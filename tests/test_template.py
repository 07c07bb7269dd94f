"""Tests that copies of the examples become other projects by what is marked."""

import json
import re
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT, copy_example
from template_helpers import check, definitions, edit, marks, own_data, put, remove

MARKED = {"YOUR MODEL": {"NUM_CLASSES", "Net"}, "YOUR DATA": {"load_client_data"}}
MARKED["YOUR TRAINING STEP"] = {"train", "test"}


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

def load_client_data(partition_id, num_partitions, batch_size, seed):
    """A client's own table, whose last column is the class; a path that begins in the project's folder."""
    table = torch.from_numpy(np.loadtxt(f"tables/{partition_id}.csv", delimiter=",", skiprows=1, dtype=np.float32))
    data = [((row[:-1] - 5.0) / 3.0, row[-1].long()) for row in table]
    return DataLoader(data[10:], batch_size, shuffle=True), DataLoader(data[:10], batch_size)
'''

REGRESSION = '''
class Net(nn.Sequential):
    def __init__(self) -> None:
        super().__init__(nn.Linear(4, 16), nn.ReLU(), nn.Linear(16, 1))

def load_client_data(partition_id, num_partitions, batch_size, seed):
    """Numbers, and the sum of their squares."""
    inputs = torch.from_numpy(np.random.default_rng(partition_id).normal(size=(200, 4)).astype(np.float32))
    data = torch.utils.data.TensorDataset(inputs, inputs.square().sum(1, keepdim=True))
    parts = torch.utils.data.random_split(data, [180, 20], torch.Generator().manual_seed(seed))
    return DataLoader(parts[0], batch_size, shuffle=True), DataLoader(parts[1], batch_size)

def train(net, trainloader, epochs: int, learning_rate: float, device: str = "auto") -> float:
    optimizer = torch.optim.Adam(net.parameters(), lr=learning_rate)
    net.train()
    total, seen = 0.0, 0
    for _ in range(epochs):
        for inputs, targets in trainloader:
            optimizer.zero_grad()
            loss = F.mse_loss(net(inputs), targets)
            loss.backward()
            optimizer.step()
            total += loss.item() * len(targets)
            seen += len(targets)
    return total / seen

@torch.no_grad()
def test(net, testloader, device: str = "auto") -> dict[str, float]:
    net.eval()
    errors = torch.cat([net(inputs) - targets for inputs, targets in testloader])
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
    """Data that is already divided: multiprocessing with a table for each client, and a server without test data."""
    folder = copy_example("multiprocessing", tmp_path / "my project")
    put(folder / "cifar_utils.py", TABLE)
    own_data(folder)
    edit(folder / "pyproject.toml", "client-evaluation = false", "client-evaluation = true")
    text = (folder / "pyproject.toml").read_text()
    for key, many, few in (("min-clients", 100, 3), ("sampled-clients", 10, 3), ("clients", 100, 3)):
        text = re.sub(rf"^{key} = {many}\b", f"{key} = {few}", text, flags=re.M)
    (folder / "pyproject.toml").write_text(text)
    edit(folder / "server.py", "        evaluate_fn=evaluate,  # NEW vs basic\n", "")
    rng = np.random.default_rng(0)
    (folder / "tables").mkdir()
    for client in range(3):
        labels = rng.integers(0, 3, 400)
        rows = np.column_stack([rng.normal(3 * labels[:, None], 1, (400, 4)), labels])
        np.savetxt(folder / f"tables/{client}.csv", rows, "%.3f", delimiter=",", header="a,b,c,d,class", comments="")
    return folder, tmp_path / "data"


@pytest.fixture
def regression(tmp_path: Path) -> tuple[Path, Path]:
    """Another task: basic with numbers to predict, and so with no accuracy."""
    folder = copy_example("basic", tmp_path / "my project")
    put(folder / "cifar_utils.py", REGRESSION)
    own_data(folder)
    remove(folder / "cifar_utils.py", "load_split", "partition", "PARTITIONERS", "iid", "shards", "dirichlet")
    return folder, tmp_path / "data"


def test_the_places_to_change_are_marked() -> None:
    """The three projects change nothing else of cifar_utils.py; what is marked stands under its mark."""
    changed = {name for source in (TRANSFORMER, TABLE, REGRESSION) for name in definitions(source)}
    assert changed == set().union(*MARKED.values())
    text = (ROOT / "basic" / "cifar_utils.py").read_text()
    for mark, names in MARKED.items():
        for name in names:
            above = text.splitlines()[: definitions(text)[name].start]
            found = [match for line in above if (match := re.match(r"# (?:(YOUR [A-Z ]+):|---)", line))]
            assert found[-1][1] == mark, name  # no other mark, and no headline, comes between
    for page in ("README.md", "basic/README.md"):
        assert set(re.findall(r"`(YOUR [A-Z ]+)`", (ROOT / page).read_text())) == set(MARKED), page
    for example in ("basic", "advanced_example", "multiprocessing"):
        assert re.search('dataset = "auto".*YOUR DATA: "own"', (ROOT / example / "pyproject.toml").read_text())


@pytest.mark.parametrize(
    ("project", "options"),
    [
        ("transformer", ["--quick"]),
        pytest.param("transformer", [], marks=pytest.mark.slow),
        pytest.param("table", [], marks=pytest.mark.slow),
        ("regression", []),
    ],
)
def test_a_copy_becomes_another_project(project: str, options: list[str], request: pytest.FixtureRequest) -> None:
    folder, data_dir = request.getfixturevalue(project)
    status, said = check(folder, data_dir, *options)
    assert status == 0, said
    assert marks(said) <= ({"ok", "risk"} if project == "table" else {"ok"}), said
    if options:
        return
    history = json.loads((folder / "runs/latest/history.json").read_text())
    figures = history["rounds"][-1]["server" if project == "transformer" else "evaluate"]
    assert figures["clients" if project == "table" else "loss"] is not None
    if project == "regression":
        assert "accuracy" not in history
        assert figures["mean-absolute-error"] > 0
        assert f"dataset own, loss {figures['loss']:.3f}, " in said["one round"][0][1]
        assert figures["loss"] < 20  # of 24: the mean of the squared targets
    else:
        assert history["accuracy"] == figures["accuracy"]
    if project == "table":
        assert history["clients"] == figures["clients"] == 3  # all of the copy's
        assert history["accuracy"] > 0.5  # of three classes
        ((risk, text), _) = said["files"]
        assert risk == "risk"
        assert text.startswith("Read 3 .csv by paths that begin in this folder, not by __file__")
