"""Changes copies of examples into other projects, and asks tools/check_template.py about them."""

import ast
import re
from pathlib import Path

import forked
from runs import ROOT, environment

CHECK = ROOT / "tools" / "check_template.py"


def check(folder: Path, data_dir: Path, *options: str) -> tuple[int, dict[str, list[tuple[str, str]]]]:
    """Return the exit status of the check, and what it says: {name: [(mark, text), ...]}."""
    done = forked.run(CHECK, folder, *options, env=environment(data_dir, DATASET=""))
    said: dict[str, list[tuple[str, str]]] = {}
    for line in done.stdout.splitlines():
        mark, name, text = re.fullmatch(r"(ok|risk|FAIL|-) +(one round|\w+) +(.+)", line).groups()
        said.setdefault(name, []).append((mark, text))
    return done.returncode, said


def marks(said: dict[str, list[tuple[str, str]]]) -> set[str]:
    return {mark for lines in said.values() for mark, _ in lines}


def definitions(source: str) -> dict[str, slice]:
    """Return the lines of each definition at the top level of a module, by name."""
    found = {}
    for node in ast.parse(source).body:
        targets = getattr(node, "targets", [getattr(node, "target", None)])
        names = [node.name] if hasattr(node, "name") else [getattr(target, "id", "") for target in targets]
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


def remove(file: Path, *names: str) -> None:
    for name in names:
        lines = file.read_text().splitlines()
        del lines[definitions(file.read_text())[name]]
        file.write_text("\n".join(lines) + "\n")


def edit(file: Path, old: str, new: str) -> None:
    assert file.read_text().count(old) == 1, f"{old!r} is not once in {file.name}"
    file.write_text(file.read_text().replace(old, new))


def own_data(folder: Path) -> None:
    edit(folder / "pyproject.toml", 'dataset = "auto"', 'dataset = "own"')
