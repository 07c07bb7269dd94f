"""Where ./run.sh comes in: checks the arguments, finds an environment with the packages, then runs."""

import os
import signal
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path[0] = str(FOLDER)  # this file is run by its path, from whatever folder the user is in

from launcher import arguments, environment, extension  # noqa: E402
from launcher.processes import Stopped, heed, stop  # noqa: E402
from launcher.project import UsageError  # noqa: E402
from launcher.screen import say  # noqa: E402


def main(words: list[str]) -> int:
    """Return the exit status: 0 completed, 1 failed, 2 wrong arguments, 128+N ended by signal N."""
    while (number := os.open(os.devnull, os.O_RDWR)) < 3:  # closed, by `>&-`: the next file would be taken for it
        os.set_inheritable(number, True)
    os.close(number)
    sys.stdout = sys.__stdout__ = sys.stdout or os.fdopen(1, "w")
    sys.stderr = sys.stderr or os.fdopen(2, "w")
    for stream in (sys.stdout, sys.stderr):
        stream.reconfigure(errors="backslashreplace", line_buffering=True)  # a terminal may lack a character
    # One thread a process: with one for each core, processes slow one another down four times; the last bits of a sum
    # depend on the number of threads; and a process with threads can't fork.
    os.environ |= dict.fromkeys(("OMP_NUM_THREADS", "MKL_NUM_THREADS", "OPENBLAS_NUM_THREADS"), "1")
    os.environ |= {"FLWR_TELEMETRY_ENABLED": "0", "FLWR_DISABLE_UPDATE_CHECK": "1"}
    heed(stop)
    try:
        settings = arguments.parse(words, FOLDER)
        environment.ensure(FOLDER)
        own = extension.load(settings.project)
        if settings.secure and own.connection is extension.FUNCTIONS["connection"]:
            raise UsageError("SECURE=1 is for an example that makes keys: advanced_example")
        settings = own.check(settings)
        from launcher.guard import guarded
        from launcher.run import Run  # it needs the packages

        run = Run(settings, own)
        return run.show() if settings.dry_run else guarded(run)
    except Stopped as stopped:  # by a signal, before the run or after it
        return 128 + stopped.args[0]
    except (UsageError, OSError, RuntimeError) as error:  # SetupError is one
        say(f"error: {error}", error=True)
        return 2 if isinstance(error, UsageError) else 1
    finally:
        heed(signal.SIG_IGN)  # the exit status stands


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
