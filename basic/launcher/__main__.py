"""./run.sh comes here: check what is asked for, find an environment that has the packages, then run."""

import importlib
import signal
import sys
from pathlib import Path

FOLDER = Path(__file__).resolve().parents[1]
sys.path[0] = str(FOLDER)  # this file is run by its path, from whatever folder the user is in

from launcher import arguments, engine, environment, values  # noqa: E402
from launcher.processes import SIGNALS, Stopped, stop  # noqa: E402


def main(words: list[str]) -> int:
    """Return the exit status: 0 completed, 1 failed, 2 wrong arguments, 128+N ended by signal N."""
    for number in SIGNALS:
        signal.signal(number, stop)
    try:
        settings = arguments.parse(words, FOLDER)
        if isinstance(settings, str):
            print(settings, end="")
            return 0
        if not settings.dry_run:
            environment.ensure(FOLDER)
        settings = preflight(settings)
        if settings.dry_run:
            return engine.dry_run(settings)
        from launcher import checks  # needs the packages, as what follows does

        for warning in checks.check(settings):
            print(f"WARNING: {warning}", file=sys.stderr)
        from launcher.run import Run

        return Run(settings).go()
    except Stopped as stopped:  # before anything was started
        return 128 + stopped.args[0]
    except values.UsageError as error:
        print(f"error: {error}", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if "--dry-run" not in words:
            raise
        print(f"error: to check that takes {error.name}: a run without --dry-run installs it", file=sys.stderr)
        return 1
    except (OSError, environment.SetupError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1


def preflight(settings: arguments.Settings) -> arguments.Settings:
    """Let the example refuse or complete the settings, where it has a module for that."""
    for module, function in (("preflight", "check"), ("capacity", "plan")):
        if (FOLDER / f"{module}.py").is_file():
            settings = getattr(importlib.import_module(module), function)(settings)
    return settings


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
