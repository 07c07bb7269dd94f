"""What the READMEs say is so: their commands run, their links lead somewhere, what they name is in the code.

All of it is taken from their text. A command of a new kind fails until TRIED_BY says how it is tried.
"""

import os
import re
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest
from runs import ROOT, environment, write_dataset

from cifar_data.shapes import draw_shapes
from launcher import arguments, project

READMES = [*sorted(ROOT.glob("*.md")), *sorted(ROOT.glob("*/README.md"))]
NAMING = [page for page in READMES if page.name != "RECIPES.md"]  # its code, which test_recipes.py runs, is its own
EXAMPLES = sorted(path.parent for path in ROOT.glob("*/server.py"))
PROGRAM = (
    r"(?:[A-Z][A-Z0-9_]*=\S+ +)*"  # such as ENGINE=simulation
    r"(?:\./(?:run|test)\.sh|python3?|pip|cp|cd|git|flwr|flower-\w+|ssh\S*|scp|pre-commit|source|export|pkill)"
)
SOURCES = "\n".join(
    path.read_text()
    for pattern in (
        "*.sh",
        "*.toml",
        "*/*.py",
        "*/launcher/*.py",
        "*/rounds/*.py",
        "*/cifar_data/*.py",
        "*/pyproject.toml",
        "*/requirements.txt",
        "*/.gitignore",
    )
    for path in ROOT.glob(pattern)
    if path.parent.name != "tests"
)


class Command(NamedTuple):
    """A command in a README, without its comment."""

    readme: Path
    line: int
    text: str
    refused: bool  # the text shows an error under it

    @property
    def cwd(self) -> Path:
        """Where a reader types it: beside the README, but what copies a whole example, in the collection's folder."""
        return ROOT if self.text.startswith("cp -r") else self.readme.parent

    def __str__(self) -> str:
        return f"{self.readme.relative_to(ROOT)}:{self.line}: {self.text}"


def blocks(readme: Path) -> Iterator[tuple[int, list[str]]]:
    """The fenced blocks: the number of the first line in each, and its lines."""
    lines = readme.read_text().splitlines()
    fences = [number for number, line in enumerate(lines) if line.lstrip().startswith("```")]
    assert len(fences) % 2 == 0, f"{readme}: a fence is open"
    for first, last in zip(fences[::2], fences[1::2], strict=True):
        yield first + 2, lines[first + 1 : last]


def spans(readme: Path) -> Iterator[tuple[int, str]]:
    """The `code` between the fences, with its line's number; a link's text is not code."""
    text = re.sub(r"^```.*?^```", lambda block: "\n" * block[0].count("\n"), readme.read_text(), flags=re.M | re.S)
    for match in re.finditer(r"`([^`]+)`", text):
        yield text.count("\n", 0, match.start()) + 1, " ".join(match[1].split())


def commands(readme: Path) -> Iterator[Command]:
    """All lines of blocks that begin with a program, and all code in the text that does and goes on."""
    found = []
    for first, lines in blocks(readme):
        typed = re.sub(r"\\\n\s*", "", "\n".join(lines)).splitlines()  # a line that ends in \ goes on in the next
        for line, following in zip(typed, [*typed[1:], ""], strict=True):
            if re.match(rf"(?:\$ )?{PROGRAM}(?= |$)", line):
                number = first + next(i for i, text in enumerate(lines) if line.startswith(text.removesuffix("\\")))
                found.append((number, line.removeprefix("$ "), following.startswith("error: ")))
    found += [(number, code, False) for number, code in spans(readme) if re.match(rf"{PROGRAM} .*[\w=.]", code)]
    for number, line, refused in sorted(found):
        text = re.sub(r"\s+#.*", "", line).removesuffix(" ...").strip()
        if not re.search(r"[\[<]|\b(EXAMPLE|FOLDER)\b", text):  # else it is a pattern for commands
            yield Command(readme, number, text, refused)


COMMANDS = list({(c.readme, c.text): c for readme in READMES for c in reversed([*commands(readme)])}.values())[::-1]


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_nothing_is_left_to_fill_in(readme: Path) -> None:
    assert re.findall(r"(?<!\w)@[A-Z]+\b|TODO|TBD|FIXME", readme.read_text()) == []


# --- Commands --------------------------------------------------------------------------------------------------------


def shell(text: str, cwd: Path, **env: str) -> subprocess.CompletedProcess[str]:
    """Run a command as a reader types it; `python` is the one that runs the tests."""
    path = f"{Path(sys.executable).parent}{os.pathsep}{os.environ['PATH']}"
    return subprocess.run(["bash", "-c", text], cwd=cwd, env=env | {"PATH": path}, capture_output=True, text=True)


def dry_run(command: Command, home: Path) -> None:
    text = command.text if "--help" in command.text else f"{command.text} --dry-run"
    env = environment(home / "data", HOME=str(home), PYTHONDONTWRITEBYTECODE="1")
    done = shell(text, command.cwd, **env)
    assert done.returncode == (2 if command.refused else 0), f"{command}\n{done.stderr}"


def version(command: Command, home: Path) -> None:
    """./test.sh hands its arguments on to pytest, which is what runs this."""
    done = shell(f"{command.text} --version", command.readme.parent, **environment(home))
    assert (done.returncode, done.stdout[:7]) == (0, "pytest "), done.stderr


def options(command: Command, home: Path) -> None:
    """A benchmark takes hours: its file is there, and knows the options."""
    script, *words = command.text.split()[1:]
    source = (ROOT / script).read_text()
    compile(source, script, "exec")
    assert all(f'"{word.partition("=")[0]}"' in source for word in words if word.startswith("--"))


def in_sync(command: Command, home: Path) -> None:
    done = shell("python tools/sync.py --check", ROOT, **environment(home))
    assert done.returncode == 0, done.stderr


# How a command is tried in the quick part: a function, or the tests that do it.
TRIED_BY = {
    r"(.* )?resume=.*": "test_resume.py",
    r".*\bmy_example\b.*": "test_contributing.py",
    r"flwr ls --format json": "test_runs.py",
    r"flwr run \. --stream --federation-config .*": "test_by_hand.py",
    r"flwr run": "test_by_hand.py",
    r"cp -r basic ~/my-project|python -c .*resnet18.*": "test_recipes.py",
    r"pkill -f local-superlink/superlink\.log": "test_by_hand.py",
    r"python3 security\.py keys .*|flower-\w+ .*|flwr (supernode register .*|run .*|ls)": "test_machines.py",
    r"pre-commit install": "test_contributing.py",
    r"pip install pre-commit": "test_contributing.py",  # what it would run
    r"pip install dp-accounting": "test_privacy.py",  # what needs it
    r".* strategy=fedtrimmedavg .*": "test_advanced.py",  # of an exercise
    r"RAY_ADDRESS=.*": "test_cluster.py",
    r"([A-Z0-9_]+=\S+ )*\./run\.sh( .*)?": dry_run,
    r"cp -r (\S+) (\S+) && \S+/run\.sh( .*)?": dry_run,
    r"\./test\.sh( .*)?": version,
    r"python tools/sync\.py( --check)?": in_sync,
    r"python tools/check_template\.py .*": "test_check_template.py",
    r"python tools/report\.py .*": "test_report.py",
    r"python tools/verify\.py .*": "test_benchmarks.py",
    r"python benchmarks/\w+\.py( .*)?": options,
    r"python cifar_utils\.py( \w+)?": "test_dataset.py",
}


def test_the_pages_are_short() -> None:
    lines = {path: len(path.read_text().splitlines()) for path in READMES}
    assert lines[ROOT / "README.md"] <= 120
    assert {path: lines[path] for folder in EXAMPLES if lines[path := folder / "README.md"] > 100} == {}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_fit_a_terminal_of_80_columns(readme: Path) -> None:
    typed = [line for _, lines in blocks(readme) for line in lines if re.match(rf"(?:\$ )?{PROGRAM}(?= |$)", line)]
    assert [line for line in typed if len(line) > 80] == []


def test_there_are_commands() -> None:
    assert {command.readme for command in COMMANDS} >= {
        ROOT / "README.md",
        *(folder / "README.md" for folder in EXAMPLES),
    }


@pytest.mark.parametrize("command", COMMANDS, ids=str)
def test_each_command_is_one_that_works(command: Command, tmp_path: Path) -> None:
    how = next((how for pattern, how in TRIED_BY.items() if re.fullmatch(pattern, command.text)), None)
    assert how, f"{command}: say in TRIED_BY how to test it"
    if callable(how):
        how(command, tmp_path)
    else:
        assert (ROOT / "tests" / how).is_file()


@pytest.fixture(scope="module")
def clone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A copy of the collection, and beside it a DATA_DIR with enough pictures for any command."""
    folder = tmp_path_factory.mktemp("clone") / "collection"
    shutil.copytree(ROOT, folder, ignore=shutil.ignore_patterns("runs", ".venv*", "__pycache__", ".git", ".*_cache"))
    for name in ("synthetic", "cifar10"):  # pictures under CIFAR-10's name, so that nothing is downloaded
        write_dataset(folder.parent / "data" / name, draw_shapes(12_000, seed=1), draw_shapes(500, seed=2), name=name)
    return folder


NO_RUN = r"RAY_ADDRESS=|my_example|--help|--dry-run|resume=|strategy=fedtrimmedavg"
REAL = [c for c in COMMANDS if "run.sh" in c.text and not re.search(NO_RUN, c.text)]


@pytest.mark.slow
@pytest.mark.parametrize("command", REAL, ids=str)
def test_each_run_completes(command: Command, clone: Path, tmp_path: Path) -> None:
    """As it stands in the text, but in a simulation, on drawn pictures; where there are keys, with real processes."""
    cwd = clone / command.cwd.relative_to(ROOT)
    engine = {} if "SECURE=1" in command.text else {"ENGINE": "simulation"}
    done = shell(command.text, cwd, **environment(clone.parent / "data", HOME=str(tmp_path), **engine))
    status = 1 if "child-memory=20" in command.text else 2 if command.refused else 0  # the first is an exercise
    assert done.returncode == status, f"{command}\n{done.stdout}{done.stderr}"


# --- Links -----------------------------------------------------------------------------------------------------------


def anchors(page: Path) -> set[str]:
    """The anchors that GitHub gives to a page's headlines."""
    headlines = re.findall(r"^#+ +(.+)$", re.sub(r"^```.*?^```", "", page.read_text(), flags=re.M | re.S), re.M)
    slugs = [re.sub(r"[^\w\- ]", "", headline.lower()).replace(" ", "-") for headline in headlines]
    return {slug if slugs[:n].count(slug) == 0 else f"{slug}-{slugs[:n].count(slug)}" for n, slug in enumerate(slugs)}


@pytest.mark.parametrize("readme", READMES, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_link_leads_somewhere(readme: Path) -> None:
    text = re.sub(r"^```.*?^```", "", readme.read_text(), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match("[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        page = readme.parent / path if path else readme
        assert page.exists(), f"{readme}: {target}"
        if anchor:
            assert page.suffix == ".md" and anchor in anchors(page), f"{readme}: {target}"  # noqa: PT018


# --- Names -----------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("readme", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_each_setting_can_be_set(readme: Path) -> None:
    """`key=value` in the text is taken by the README's example, or by one of them where it is the collection's."""
    folders = [readme.parent] if readme.parent in EXAMPLES else EXAMPLES
    for line, code in spans(readme):
        if not re.fullmatch(r"[a-z][a-z-]*=\S+( [a-z][a-z-]*=\S+)*", code) or code in ("key=value", "partition-id=0"):
            continue
        faults = []
        for folder in folders:
            known = tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["flwr"]["app"]["config"]
            try:
                if code.endswith("=..."):
                    assert code[:-4] in known, f"unknown key {code[:-4]!r}"
                else:
                    arguments.parse(code.split(), folder, environment={})
            except (AssertionError, project.UsageError) as error:
                faults.append(str(error))
        assert len(faults) < len(folders), f"{readme}:{line}: {code}: {faults}"


@pytest.mark.parametrize("readme", NAMING, ids=lambda path: str(path.relative_to(ROOT)))
def test_what_is_named_is_in_the_code(readme: Path) -> None:
    """Files, settings-like-this, VARIABLES and functions() that stand as code in the text."""
    sources = SOURCES
    if readme.name == "CONTRIBUTING.md":  # it speaks of the tests too
        sources += "".join(path.read_text() for path in ROOT.glob("tests/*.py"))
    for line, code in spans(readme):
        names = []
        if re.fullmatch(r"[a-z]+(-[a-z]+)+|[A-Z][A-Z0-9]*_[A-Z0-9_]+|[a-z]+_[a-z_]+(\(\))?", code):
            names = [code.removesuffix("()")]
        elif match := re.fullmatch(r"[\w./-]*?([\w.-]+\.(?:py|sh|json|toml|md|pt|png|html|csv|txt))", code):
            if any((folder / code).exists() for folder in (readme.parent, ROOT, ROOT / "tests", *EXAMPLES)):
                continue
            names = [match[1]]
        elif match := re.fullmatch(r"\S*/([a-z-]+?)\d*\.log", code):
            names = [match[1]]
        for name in names:
            assert name in sources, f"{readme}:{line}: {code} is nowhere in the code"
