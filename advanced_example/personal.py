"""Personal layers: weights that each client keeps to itself, while the rest of the model is federated.

This is FedPer (Arivazhagan et al., 2019, arXiv:1912.00818): a client trains all layers together, and only the shared
ones travel. FedRep (Collins et al., 2021, arXiv:2102.07078) comes next: it trains the personal layers first, then the
shared ones.

A client's own layers are in Flower's `context.state`, which both engines keep for each client over the rounds of a run.
No message holds them. They also go into a file on the client's machine, for each of the last two rounds in which it
trained: a resumed run finds them there, and so do you.
"""

import io
import os
import re
from collections.abc import Iterable, Mapping
from pathlib import Path

import torch
from flwr.app import ArrayRecord, Context, Message, MessageType
from torch import Tensor

from models import make_model
from rounds import history

RECORD = "personal-layers"  # the client's own, in its context.state
KEPT = 2  # files a client: the round that a crash breaks off is trained again, from the one before


def personal_names(names: Iterable[str], layers: str) -> list[str]:
    """Return which weights of a state dict are personal: `layers` lists names, or what stands before a dot in them.

    Raises ValueError where the model has no such weights, or nothing would be left to share.
    """
    names = list(names)
    asked = [layer.strip() for layer in layers.split(",") if layer.strip()]
    for layer in asked:
        if not any(is_part(name, layer) for name in names):
            known = ", ".join(dict.fromkeys(name.partition(".")[0] for name in names))
            raise ValueError(f"the model has no {layer!r}; it has {known}")
    found = [name for name in names if any(is_part(name, layer) for layer in asked)]
    if len(found) == len(names):
        raise ValueError("that is the whole model, and nothing is left to share")
    return found


def is_part(name: str, layer: str) -> bool:
    return name == layer or name.startswith(f"{layer}.")


def shared(state: Mapping[str, Tensor], layers: str) -> dict[str, Tensor]:
    """Return what travels of a state dict: all but the personal layers."""
    own = set(personal_names(state, layers))
    return {name: tensor for name, tensor in state.items() if name not in own}


# --- The client ------------------------------------------------------------------------------------------------------


def recall(message: Message, context: Context) -> dict[str, Tensor]:
    """Return this client's own layers as it left them; of the run's first model where it hasn't trained yet.

    They are in its state, or in a file where the run was resumed, which begins with empty states. What was trained in
    the round that broke off does not count: that round comes again.
    """
    if not (layers := context.run_config["personal-layers"]):
        return {}
    if RECORD in context.state:
        return context.state[RECORD].to_torch_state_dict()
    evaluates = message.metadata.message_type == MessageType.EVALUATE  # after the training of the same round
    last = message.content["config"]["server-round"] - (0 if evaluates else 1)
    if done := [path for path in files(context) if round_of(path) <= last]:
        return torch.load(done[-1], weights_only=True)
    with torch.random.fork_rng(devices=[]):  # what the client draws next stays its own
        torch.manual_seed(context.run_config["seed"])
        state = make_model(context.run_config["model"]).state_dict()
    return {name: state[name] for name in personal_names(state, layers)}


def remember(state: Mapping[str, Tensor], message: Message, context: Context) -> dict[str, Tensor]:
    """Keep this client's own layers of a trained state dict for its next round; return the rest, which is sent."""
    layers = context.run_config["personal-layers"]
    if own := {name: state[name].cpu() for name in personal_names(state, layers)}:
        context.state[RECORD] = ArrayRecord(own)
        client, server_round = context.node_config["partition-id"], message.content["config"]["server-round"]
        content = io.BytesIO()
        torch.save(own, content)
        path = folder(context) / f"client-{client}-round-{server_round}.pt"
        path.parent.mkdir(parents=True, exist_ok=True)
        history.write_whole(path, content.getvalue())
        for old in files(context)[:-KEPT]:
            old.unlink()
    return shared(state, layers)


def folder(context: Context) -> Path:
    """Return where this machine's clients keep their layers: in the run's folder if it is here, else below ./runs."""
    run = os.environ.get(history.RUN_FOLDER)
    return Path(run, "personal") if run else Path("runs", f"personal-{context.run_id}")


def files(context: Context) -> list[Path]:
    """Return this client's files, the newest round last."""
    return sorted(folder(context).glob(f"client-{context.node_config['partition-id']}-round-*.pt"), key=round_of)


def round_of(path: Path) -> int:
    return int(re.findall(r"\d+", path.name)[-1])
