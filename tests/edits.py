"""Changes copies of an example as a user does, line by line."""

from pathlib import Path


def edit(file: Path, *changes: tuple[str, str]) -> None:
    """Replace texts in a file, each of which must be there once."""
    text = file.read_text()
    for old, new in changes:
        assert text.count(old) == 1, f"{old!r} is not once in {file.name}"
        text = text.replace(old, new)
    file.write_text(text)
