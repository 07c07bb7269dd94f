"""The rooms of an example's folder: imports go one way, what runs before any package is there needs none, and sizes."""

import ast
import subprocess
import sys
import tomllib

import pytest
from paths import ROOT

ROOMS = ("cifar_data", "rounds", "launcher")
MOST_LINES, MOST_IN_ALL = 160, 2428  # each copy inherits them: these may fall, and rise only for good reason
EXAMPLES = sorted(path.parents[1] for path in ROOT.glob("*/rounds/__init__.py"))  # those that are laid out so
each_example = pytest.mark.parametrize("folder", EXAMPLES, ids=lambda folder: folder.name)

# What may be imported of an example's folder, by room or file; an example's own files may import one another.
ALLOWED = {
    "cifar_data": {"cifar_data"},
    "cifar_utils": {"cifar_data"},
    "rounds": {"rounds"},
    "launcher": {"launcher", "cifar_data", "rounds"},
    "launcher -> rounds": {"rounds.history"},
}
# What run.sh starts before there is any package, in the Python that it finds, and what must stay as simple.
BEFORE_PACKAGES = ("launcher.__main__", "launcher.environment", "rounds.history")


def module(path, folder):
    """The dotted name under which a file is imported."""
    return ".".join(path.relative_to(folder).with_suffix("").parts).removesuffix(".__init__")


def files(folder):
    """The example's Python files by module name."""
    found = [*folder.glob("*.py"), *(path for room in ROOMS for path in (folder / room).rglob("*.py"))]
    return {module(path, folder): path for path in found}


def imports(path, modules, top_level=False):
    """The modules that a file imports, also inside functions unless it is `top_level` only: names of other packages,
    and for a module of the example its whole name."""
    tree = ast.parse(path.read_text())
    nodes = tree.body if top_level else ast.walk(tree)
    found = set()
    for node in nodes:
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            assert node.level == 0, f"{path}: a relative import"
            inner = {f"{node.module}.{alias.name}" for alias in node.names} & set(modules)
            others = {alias.name for alias in node.names if f"{node.module}.{alias.name}" not in modules}
            found |= inner | ({node.module} if others else set())
    return found


def room(name):
    return name.partition(".")[0]


def launch_module(folder):
    return tomllib.loads((folder / "pyproject.toml").read_text())["tool"]["launcher"].get("extension")


def test_there_are_examples():
    assert ROOT / "basic" in EXAMPLES


@each_example
def test_imports_go_one_way(folder):
    modules, found = files(folder), []
    for name, path in modules.items():
        for other in imports(path, modules) & set(modules):
            allowed = ALLOWED.get(room(name))
            if allowed is None:  # an example's own file: server, client and what they need
                good = room(other) != "launcher" or is_part_of(launch_module(folder), name, modules)
            elif room(name) == "launcher" and room(other) == "rounds":
                good = other in ALLOWED["launcher -> rounds"]
            else:
                good = room(other) in allowed
            if not good:
                found.append(f"{name} -> {other}")
    assert found == []


def is_part_of(extension, name, modules):
    """Whether a file is an example's extension of the launcher, or belongs to it: it isn't imported from elsewhere."""
    if extension is None:
        return False
    reached, others = reach([extension], modules), reach(["server", "client"], modules)
    return name in reached and name not in others


def reach(names, modules, top_level=False):
    """All modules of the example that some import, directly or not."""
    found, waiting = set(), list(names)
    while waiting:
        name = waiting.pop()
        if name in modules and name not in found:
            found.add(name)
            waiting += imports(modules[name], modules, top_level)
    return found


@each_example
def test_server_and_client_never_reach_the_launcher(folder):
    assert {room(name) for name in reach(["server", "client"], files(folder))} >= {"server", "client", "rounds"}
    assert "launcher" not in {room(name) for name in reach(["server", "client"], files(folder))}


@each_example
def test_no_module_imports_itself_by_way_of_others(folder):
    modules = files(folder)
    direct = {name: imports(path, modules) & set(modules) for name, path in modules.items()}
    circles = [name for name in modules if name in reach(direct[name], modules)]
    assert circles == []


@each_example
def test_what_runs_before_the_packages_are_there_needs_none(folder):
    modules = files(folder)
    for name in reach(BEFORE_PACKAGES, modules, top_level=True):
        others = imports(modules[name], modules, top_level=True) - set(modules)
        assert {room(other) for other in others} <= set(sys.stdlib_module_names), name


@each_example
def test_it_is_so_in_a_python_without_packages(folder):
    """An error of the user's is said before anything is installed, and so is --help."""
    code = (
        "import runpy, sys; sys.argv[1:] = ['no number']; runpy.run_path('launcher/__main__.py', run_name='__main__')"
    )
    command = [sys.executable, "-I", "-S", "-B", "-c", code]
    done = subprocess.run(command, cwd=folder, env={}, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: CLIENTS must be a whole number from 1 to 1000000, not 'no number'\n"


def test_the_rooms_are_small():
    lines = {
        str(path.relative_to(ROOT)): len(path.read_text().splitlines())
        for room in ROOMS
        for path in (ROOT / "basic" / room).rglob("*.py")
    }
    assert {name: count for name, count in lines.items() if count > MOST_LINES} == {}
    assert sum(lines.values()) <= MOST_IN_ALL, lines


@each_example
def test_each_file_says_what_it_is_for_in_its_first_line(folder):
    for path in files(folder).values():
        first = (ast.get_docstring(ast.parse(path.read_text())) or "").splitlines()
        assert first, path
        assert first[0].endswith((".", ":", ";")), f"{path}: {first[0]}"
