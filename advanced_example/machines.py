"""Commands for a run on several machines: a server that clients reach as SERVER, and a machine for each client.

`./run.sh --dry-run` prints them. Nothing here starts anything: no process has a hold on those of other machines.
"""

import shlex
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import tomli_w

from cifar_data import DATASETS
from launcher import commands
from trust import registrations

HERE = Path()
PORT, NODE_PORT = 8000, 9094  # Flower's own defaults
TEXT = """\
# --- On several machines: paste each block in a copy of this folder; SERVER is the server's name or address.

# On each machine: the packages and the data, once; the last line in each shell.
python3 launcher/environment.py requirements.txt {prepare}
export PATH="$PWD/.venv/bin:$PATH" DATASET={data} FLWR_HOME="$PWD/flwr-home"

# On the server, once: where it is, and what to do.
mkdir -p flwr-home
cat > flwr-home/config.toml <<END
[superlink]
default = "machines"

[superlink.machines]
{connection}END
cat > run-config.toml <<'END'
{config}END
{keys}
# 1. The server. It writes the rounds into runs/, where it was started.
{server}
{register}
# 2. A client, of {clients}: another machine's has another number.
{client}

# 3. The run, from another shell on the server, as soon as the clients are there.
flwr run . --stream --run-config run-config.toml

# 4. A look, from there too.
flwr ls
cat runs/latest/history.json
"""
KEYS = """
# On the server, once: keys. Copy keys/ca.crt and keys/client-0 to the machine of client 0, and so on.
python3 security.py keys {clients} SERVER
"""
REGISTER = """
# Whom to let in, each time that the server is started; from another shell on it.
{commands}
"""


def instructions(run: Any) -> str:
    """Return what to type where."""
    settings = run.settings
    run = SimpleNamespace(settings=settings, extension=run.extension, run_dir=HERE)
    port = settings.port or PORT
    data = "cifar10" if settings.dataset == "auto" else settings.dataset  # with "auto", machines could differ
    # The shell fills PWD in, since Flower wants a whole path here.
    trust = {"root-certificates": "$PWD/keys/ca.crt"} if settings.secure else {"insecure": True}
    register = "\n".join(shlex.join(command) for command in registrations(run).values())
    return TEXT.format(
        prepare=f"cifar_utils.py {data}" if data in DATASETS else "-c ''",  # the example's own is its own matter
        data=shlex.quote(data),
        keys=KEYS.format(clients=settings.clients) if settings.secure else "",
        server=shlex.join(commands.superlink(run, port, host="0.0.0.0")),
        connection=tomli_w.dumps({"address": f"SERVER:{port}", **trust}),
        config=tomli_w.dumps(settings.config),
        register=REGISTER.format(commands=register) if register else "",
        clients=settings.clients,
        client=shlex.join(commands.supernode(run, 0, port, NODE_PORT, host="SERVER")),
    )
