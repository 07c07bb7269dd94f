"""What several tests share: the --slow option, a tiny data set, and runs of an example in a copy of its folder."""

import subprocess
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pytest
from paths import BASIC  # noqa: F401  (makes the modules of basic importable)
from runs import write_dataset

from cifar_data.shapes import draw_shapes


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption("--slow", action="store_true", help="also run the tests that take minutes")


def pytest_configure(config: pytest.Config) -> None:
    config.option.loadscopereorder = False  # pytest-xdist would test the files with most tests first


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """How many files to test at a time, also on two cores: a run waits for much of its time, a long one for most."""
    return 5 if config.getoption("--slow") else 3


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Let the files that run examples come first: they take longest, and no core is to be idle at the end."""
    items.sort(key=lambda item: not hasattr(item.module, "copy_example"))
    if not config.getoption("--slow"):
        for item in items:
            if "slow" in item.keywords:
                item.add_marker(pytest.mark.skip(reason="long: ./test.sh --slow"))


@pytest.fixture(scope="session")
def data_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A DATA_DIR with a stand-in of 600 training and 100 test pictures, so that a round takes no time."""
    root = tmp_path_factory.mktemp("data")
    write_dataset(root / "synthetic", draw_shapes(600, seed=0), draw_shapes(100, seed=1))
    return root


@pytest.fixture
def small_disk(tmp_path: Path) -> Iterator[Path]:
    """A disk of its own, of 20 MiB, to be filled up."""
    disk = tmp_path / "disk"
    disk.mkdir()
    if subprocess.run(["mount", "-t", "tmpfs", "-o", "size=20m", "tmpfs", disk], capture_output=True).returncode != 0:
        pytest.skip("may not mount a small disk here")
    yield disk
    subprocess.run(["umount", disk], check=True)


@pytest.fixture(scope="session")
def rng() -> np.random.Generator:
    return np.random.default_rng(0)
