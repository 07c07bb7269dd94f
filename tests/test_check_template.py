"""Tests tools/check_template.py: what is wrong with a small project is found, and the fix said first."""

import re
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from runs import ROOT, copy_example
from template_helpers import CHECK, check, edit, marks, own_data, put, remove

SMALL = '''
NUM_CLASSES = 3

class Net(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, NUM_CLASSES)

    def forward(self, x: Tensor) -> Tensor:
        return self.last(F.relu(self.hidden(x)))

def load_client_data(partition_id, num_partitions, batch_size, seed):
    """Clients with 8, 9 and 8 examples to train on."""
    size = 9 + partition_id % 2
    rng = np.random.default_rng(partition_id)
    inputs, labels = torch.from_numpy(rng.normal(size=(size, 4)).astype(np.float32)), torch.arange(size) % 3
    data = torch.utils.data.TensorDataset(inputs, labels)
    tenth = max(1, size // 10)
    parts = torch.utils.data.random_split(data, [size - tenth, tenth], torch.Generator().manual_seed(seed))
    return DataLoader(parts[0], batch_size, shuffle=True), DataLoader(parts[1], batch_size)
'''


@pytest.fixture
def small(tmp_path: Path) -> Path:
    folder = copy_example("basic", tmp_path / "small")
    put(folder / "cifar_utils.py", SMALL)
    own_data(folder)
    edit(folder / "pyproject.toml", "batch-size = 32 ", "batch-size = 4 ")
    return folder


ODD = '''
class Net(nn.Module):
    """A large part that nobody trains or sends, and an adapter; half of it is of other types."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.backbone = nn.Embedding(100, 16, padding_idx=0).requires_grad_(False)
        self.adapter = nn.Linear(16, 1)
        self.register_buffer("order", torch.arange(16).flip(0))
        self.register_buffer("flags", torch.tensor([True, False]))

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        mean = (self.backbone(ids) * mask[..., None]).sum(1) / mask.sum(1, keepdim=True)
        return self.adapter(mean[:, self.order])[:, 0]

def load_client_data(partition_id, num_partitions, batch_size, seed):
    """Dicts of one sentence each, as of Hugging Face; a loader of PyTorch's own, with workers."""
    rng = np.random.default_rng(partition_id)
    data = []
    for i in range(13 + partition_id):
        ids = torch.from_numpy(rng.integers(1, 100, 6))
        data.append({"input_ids": ids, "attention_mask": (torch.arange(6) < 3 + i % 3).long(), "labels": i % 2})
    return DataLoader(data[3:], batch_size, shuffle=True, num_workers=2), DataLoader(data[:3], batch_size)

def train(net, trainloader, epochs: int, learning_rate: float, device: str = "auto") -> float:
    optimizer = torch.optim.SGD(net.adapter.parameters(), lr=learning_rate)
    for _ in range(epochs):
        total = 0.0
        for batch in trainloader:
            optimizer.zero_grad()
            outputs = net(batch["input_ids"], batch["attention_mask"])
            loss = F.binary_cross_entropy_with_logits(outputs, batch["labels"].float())
            loss.backward()
            optimizer.step()
            total += loss.item()
    return total / len(trainloader)

@torch.no_grad()
def test(net, testloader, device: str = "auto") -> dict[str, float]:
    total, correct = 0.0, 0
    for batch in testloader:
        outputs = net(batch["input_ids"], batch["attention_mask"])
        total += F.binary_cross_entropy_with_logits(outputs, batch["labels"].float()).item()
        correct += int(((outputs > 0) == batch["labels"]).sum())
    return {"loss": total / len(testloader), "accuracy": correct / len(testloader.dataset), "auc": float("nan")}
'''


@pytest.mark.parametrize("options", [["--quick"], pytest.param([], marks=pytest.mark.slow)])
def test_what_runs_is_not_refused(small: Path, tmp_path: Path, options: list[str]) -> None:
    """A part of the weights, dict batches, one output with integer labels, no load_split, workers, means of batches."""
    put(small / "cifar_utils.py", ODD)
    edit(small / "pyproject.toml", "batch-size = 4 ", "batch-size = 3 ")
    remove(small / "cifar_utils.py", "load_split", "Pictures", "partition")
    sent = "state_dict() | dict.fromkeys(['backbone.weight'])"
    part = "{k: v for k, v in %s.state_dict().items() if not k.startswith('backbone')}"
    edit(small / "server.py", "ArrayRecord(Net().state_dict())", f"ArrayRecord({part % 'Net()'})")
    edit(small / "client.py", "ArrayRecord(net.state_dict())", f"ArrayRecord({part % 'net'})")
    edit(small / "client.py", "to_torch_state_dict())", "to_torch_state_dict(), strict=False)")
    status, said = check(small, tmp_path, *options)
    assert status == 0, (said, sent)
    assert marks(said) == {"ok"}, said


NET = "self.hidden, self.last = nn.Linear(4, 8), nn.Linear(8, NUM_CLASSES)"
UTILS, PROJECT, SERVER, CLIENT = "cifar_utils.py", "pyproject.toml", "server.py", "client.py"
RETURN = '    return {"loss": total_loss / seen, "accuracy": correct / seen}'
LOSS = "loss = F.cross_entropy(net(images), labels)"
BROKEN = {  # (file, what is there, what comes in its place), ...: the check that fails, and what it says first
    "a label out of range": (
        [(UTILS, "torch.arange(size) % 3", "torch.arange(size) % 3 + 1")],
        "steps",
        r"Number the classes from 0 .*: IndexError at cifar_utils.py:\d+: Target 3 is out of bounds \(client \d in",
    ),
    "a layer too small": (
        [(UTILS, "nn.Linear(4, 8)", "nn.Linear(5, 8)")],
        "steps",
        r"Look at forward \(Net, YOUR MODEL\): RuntimeError .*batches: \(4, 4\) float32, \(4,\) int64 and \(1, 4\)",
    ),
    "a typing error": (
        [(UTILS, "nn.Linear(4, 8)", "nn.Liner(4, 8)")],
        "steps",
        r"Look at __init__ \(Net, YOUR MODEL\): AttributeError at cifar_utils.py:",
    ),
    "NaN": ([(UTILS, LOSS, f"{LOSS}\n            loss = (loss - 9).sqrt()")], "steps", "Lower learning-rate, or look"),
    "a renamed key": (
        [(CLIENT, "ArrayRecord(net.state_dict())", 'ArrayRecord({f"m.{k}": v for k, v in net.state_dict().items()})')],
        "steps",
        "Reply as the server expects it: .* weights have other names than those sent: ",
    ),
    "weights that don't move": ([(UTILS, "            optimizer.step()\n", "")], "steps", "Call backward"),
    "bfloat16": (
        [(SERVER, "ArrayRecord(Net().state_dict())", "ArrayRecord(Net().bfloat16().state_dict())")],
        "steps",
        "Keep the weights in float32 .* can't send bfloat16: TypeError at server.py:",
    ),
    "a last batch of one": (
        [(UTILS, NET, f"{NET}\n        self.last = nn.Sequential(nn.BatchNorm1d(8), self.last)")],
        "steps",
        r"Pass drop_last=True to the training DataLoader.*\(client 1 in `train`",
    ),
    "nothing to evaluate on": (
        [(UTILS, "tenth = max(1, size // 10)", "tenth = size // 10")],
        "steps",
        r"Give each client .*, max\(1, a tenth\) to test on: Zero.*\(client [02] in `evaluate`.* and none\)",
    ),
    "one number against each": (
        [(UTILS, LOSS, "loss = F.mse_loss(net(images)[:, :1], labels.float())")],
        "steps",
        "Give output and targets one shape, by",
    ),
    "an accuracy of 923": (
        [(UTILS, RETURN, RETURN.replace("correct / seen", "923 * correct + 923"))],
        "steps",
        r"Divide by all that was counted in `test`.* `evaluate` of client \d says accuracy \d+",
    ),
    "sums of means": (
        [(UTILS, "total_loss += loss.item() * len(labels)", "total_loss += loss.item() / 9")],
        "losses",
        r"Divide sums by what was summed .* training loss is 0\.0\d+ and the test loss 1\.",
    ),
    "an underscore": ([(PROJECT, 'name = "basic"', 'name = "my_app"')], "settings", "Compare pyproject.toml"),
    "a negative rate": ([(PROJECT, "learning-rate = 0.02", "learning-rate = -1.0")], "settings", "Mend pyproject.toml"),
    "a test module": ([(CLIENT, "import cifar_utils\n", "import cifar_utils\nimport test_bed\n")], "files", "Rename"),
}
QUICK = ("a label out of range", "a last batch of one", "an accuracy of 923", "sums of means")


@pytest.mark.parametrize(
    "kind", [kind if kind in QUICK else pytest.param(kind, marks=pytest.mark.slow) for kind in BROKEN]
)
def test_what_is_wrong_is_found_and_the_fix_said_first(kind: str, small: Path, tmp_path: Path) -> None:
    edits, name, text = BROKEN[kind]
    (small / "test_bed.py").write_text("")
    for file, old, new in edits:
        edit(small / file, old, new)
    status, said = check(small, tmp_path)
    assert status == 1
    assert [found for found, lines in said.items() if lines[-1][0] == "FAIL"] == [name]
    assert re.match(text, said[name][-1][1]), said
    assert said["one round"] == [("-", "not tried, since losses did not pass")]


STRATEGY = """
class Mine(FedAvg):
    def aggregate_fit(self, server_round, results, failures):
        raise RuntimeError


"""


def test_what_is_silent_is_a_risk(small: Path, data_dir: Path) -> None:
    """A method of another time, BatchNorm, files that stay behind, a dependency that nobody installs."""
    edit(small / SERVER, "app = ServerApp()\n", f"{STRATEGY}app = ServerApp()\n")
    edit(small / SERVER, "strategy = FedAvg(", "strategy = Mine(")
    edit(small / UTILS, NET, f"{NET}\n        self.last = nn.Sequential(nn.BatchNorm1d(8), self.last)")
    edit(small / UTILS, "batch_size, shuffle=True), DataLoader(parts", "5, shuffle=True), DataLoader(parts")
    edit(small / PROJECT, '"flwr[simulation]==1.42.0"', '"flwr[simulation]==1.42.0", "nowhere>=1"')
    edit(small / PROJECT, 'dataset = "own"  ', 'dataset = "synthetic"  ')
    np.save(small / "data.npy", np.zeros(3))
    (small / "unused_test.py").write_text("")
    status, said = check(small, data_dir, "--quick")
    assert status == 0, said
    risks = {name: [text for mark, text in lines if mark == "risk"] for name, lines in said.items()}
    assert risks == {
        "settings": ["Put nowhere into requirements.txt too: nobody installs `dependencies`"],
        "files": [
            "Read 1 .npy by paths that begin in this folder, not by __file__: "
            "Flower does not take data.npy along. If you do that already, all is well"
        ],
        "modules": ["Rename Mine.aggregate_fit, which nobody calls: it is aggregate_train now"],
        "steps": [
            'Put dataset = "own" into pyproject.toml: nobody reads CIFAR-10, and yet it is fetched and named',
            "Try GroupNorm for BatchNorm (last.0.running_var): averaged statistics fit no client whose data differ",
        ],
        "folders": [],
        "losses": [],
    }


FOLDERS = """
def load_client_data(partition_id, num_partitions, batch_size, seed):
    from torchvision.datasets import ImageFolder

    class Clinic(ImageFolder):
        def find_classes(self, directory):
            return CLASSES, {name: i for i, name in enumerate(CLASSES)}

    to_numbers = lambda picture: torch.from_numpy(np.array(picture, np.float32)[0, :, 0] / 255)
    data = Clinic(f"clinics/{partition_id}", to_numbers, allow_empty=True)
    return DataLoader(data, batch_size, shuffle=True), DataLoader(data, batch_size)
"""


@pytest.mark.slow
@pytest.mark.parametrize("one_list", [True, False])
def test_class_folders_that_differ_are_told(small: Path, tmp_path: Path, one_list: bool) -> None:
    """With one list of classes, what is missing or misspelled; without, that labels mean another class elsewhere."""
    from PIL import Image

    put(small / UTILS, FOLDERS)
    edit(small / UTILS, "NUM_CLASSES = 3", 'NUM_CLASSES = 3\nCLASSES = ["fox", "owl", "rat"]')
    for client, names in enumerate((["fox", "owl", "rat"], ["fox", "rat"], ["fox", "owl", "Rat"])):
        for name in names:
            (small / f"clinics/{client}/{name}").mkdir(parents=True)
            for i in range(4):
                Image.new("RGB", (4, 4), (60 * i, 0, 0)).save(small / f"clinics/{client}/{name}/{i}.png")
    if not one_list:
        edit(
            small / UTILS,
            "return CLASSES, {name: i for i, name in enumerate(CLASSES)}",
            "return super().find_classes(directory)",
        )
    status, said = check(small, tmp_path, "--quick")
    assert status == int(not one_list), said
    if one_list:
        assert [text for mark, text in said["folders"] if mark == "risk"] == [
            "Look for owl of client 1: it has no such folder",
            "Rename Rat of client 2, or it stays unread: the classes are fox, owl, rat",
            "Look for rat of client 2: it has no such folder",
        ]
    else:
        assert said["folders"][-1] == (
            "FAIL",
            "Take labels from one list of classes in the project, not from the names of a client's folders: from 0 on, "
            "they are fox, owl, rat for client 0 and fox, rat for client 1",
        )


@pytest.mark.parametrize("words", [[], ["nowhere"], [str(ROOT)]])
def test_what_is_no_copy_is_refused(words: list[str]) -> None:
    command = [sys.executable, CHECK, *words]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 2
    assert "FOLDER must be a copy of an example" in done.stderr
