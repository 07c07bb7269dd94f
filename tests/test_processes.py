"""The processes of a run: each is started, watched and ended, with all that it has started in turn."""

import os
import subprocess
import sys
from pathlib import Path

from paths import BASIC

# Leads a session, as the launcher does, and starts processes in it.
LEADER = """
import os, sys, time
from pathlib import Path
from launcher import session
from launcher.processes import Failed, Processes
folder = Path(sys.argv[1])
started = Processes(folder / "runs" / "x")
"""


def lead(code: str, tmp_path: Path) -> Path:
    """Run code in which `started` are the processes of a run in `folder`; return the folder of their logs."""
    (tmp_path / "runs" / "x" / "logs").mkdir(parents=True)
    command = [sys.executable, "-c", LEADER + code, tmp_path]
    subprocess.run(
        command, env={**os.environ, "PYTHONPATH": str(BASIC)}, check=True, timeout=100, start_new_session=True
    )
    return tmp_path / "runs" / "x" / "logs"


def test_each_has_a_log_a_status_and_the_example_s_folder(tmp_path: Path) -> None:
    code = """
started.start("good", ["sh", "-c", "pwd; echo error >&2"])
started.start("bad", ["sh", "-c", "exit 3"])
started.start("killed", ["sh", "-c", "kill -9 $$"])
started.start("none", ["no-such-command"])
started.start("odd", ["echo", "\\0"])
assert [started.wait(name, 20) for name in ("good", "bad", "killed", "none", "odd")] == [0, 3, -9, 127, 127]
"""
    logs = lead(code, tmp_path)
    assert (logs / "good.log").read_text() == f"{BASIC}\nerror\n"
    assert (logs / "odd.log").read_text() == "echo: embedded null byte\n"
    assert (logs / "none.log").read_text() == "no-such-command: [Errno 2] No such file or directory\n"


def test_waiting_has_an_end(tmp_path: Path) -> None:
    code = """
started.start("long", ["sleep", "60"])
assert "long" not in started.statuses
try:
    started.wait("long", 0.3)
except Failed as error:
    started.log("said").write_text(str(error))
session.end(os.getpid())
"""
    assert (lead(code, tmp_path) / "said.log").read_text() == "long has not ended within 0 s"


def test_who_ignores_a_request_is_killed_with_those_it_has_started(tmp_path: Path) -> None:
    code = """
started.start("stubborn", ["sh", "-c", "trap '' TERM; sleep 60 & echo $! $$; while :; do sleep 1; done"])
started.start("orphan", ["sh", "-c", "sleep 60 & echo $!"])
assert started.wait("orphan", 20) == 0
while not started.log("stubborn").read_text():
    time.sleep(0.05)
pids = [int(pid) for name in ("stubborn", "orphan") for pid in started.log(name).read_text().split()]
assert all(Path(f"/proc/{pid}").exists() for pid in pids)
began = time.monotonic()
session.end(os.getpid())
assert time.monotonic() - began < 15
living = [pid for pid in pids if Path(f"/proc/{pid}").exists()]
assert [pid for pid in living if ") Z " not in Path(f"/proc/{pid}/stat").read_text()] == []
"""
    lead(code, tmp_path)


def test_none_of_many_is_missed(tmp_path: Path) -> None:
    code = """
names = [f"{i}" for i in range(500)]
for name in names:
    started.start(name, ["true"], quiet=False)
assert [started.wait(name, 60) for name in names] == [0] * 500
"""
    lead(code, tmp_path)


def test_a_name_that_is_no_text_hides_nobody(tmp_path: Path) -> None:
    """Linux cuts a process's name at 15 bytes, which may be in the middle of a character."""
    (tmp_path / ("\u00e4" * 8)).symlink_to("/bin/sleep")
    code = """
started.start("odd", [str(folder / ("\u00e4" * 8)), "60"])
session.end(os.getpid())
assert started.statuses == {"odd": -15}
"""
    lead(code, tmp_path)
