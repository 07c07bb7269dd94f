"""Refuses settings that can't work, before anything starts. Imports in a function take seconds: only where needed."""

import importlib.util
import os
import sys
from typing import Any

from launcher.project import UsageError


def check_strategy(config: dict[str, Any]) -> None:
    """Refuse what a strategy can't do."""
    strategy, sampled, malicious = config["strategy"], config["sampled-clients"], config["malicious-clients"]
    if strategy == "krum" and sampled < 2 * malicious + 3:  # Blanchard et al., 2017: 2f + 2 < n
        raise UsageError(
            f"krum withstands {malicious} malicious clients only among at least {2 * malicious + 3}, and SAMPLED is "
            f"{sampled}: sample more, or lower malicious-clients"
        )
    private = config["dp-noise"] > 0 or config["dp-target-epsilon"] > 0
    if private and config["learning-rate"] == 0:
        raise UsageError("dp-noise needs a learning-rate above 0: Flower divides each update by its norm to clip it")
    if private and strategy != "fedavg":
        raise UsageError(f"dp-noise goes with strategy=fedavg alone, not with {strategy}: its noise fits a plain mean")
    if config["personal-layers"] and strategy == "krum":
        raise UsageError(
            "personal-layers don't go with krum: the one client's weights that it keeps fit only that client's layers"
        )


def check_privacy(config: dict[str, Any], clients: int) -> dict[str, Any]:
    """Return the config with the noise that dp-target-epsilon asks for. Raises UsageError where it can't be counted."""
    if not config["dp-noise"] and not config["dp-target-epsilon"]:
        return config
    if config["dp-delta"] * clients >= 1:  # else to give away one client's data, drawn at random, would be private
        raise UsageError(f"dp-delta={config['dp-delta']} must be below 1 / CLIENTS, which is {1 / clients:g}")
    if config["dp-target-epsilon"] and config["dp-repeatable"]:
        raise UsageError("dp-target-epsilon with dp-repeatable: noise that anybody can draw again hides nothing")
    if importlib.util.find_spec("dp_accounting") is None:
        how = f"pip --python {sys.executable} install dp-accounting"
        raise UsageError(f"the package dp-accounting, which counts what privacy dp-noise buys, is not installed: {how}")
    from privacy import with_noise

    try:
        return dict(with_noise(config))
    except ValueError as error:
        raise UsageError(str(error)) from None


def check_model(name: str) -> None:
    from models import MODELS

    if name not in MODELS:
        raise UsageError(f"model must be one of {', '.join(MODELS)}, not {name!r}")


def check_personal(model: str, layers: str) -> list[str]:
    """Return the names of the personal weights. Raises UsageError where they can't be."""
    from models import make_model
    from personal import personal_names

    try:
        return personal_names(make_model(model).state_dict(), layers)
    except ValueError as error:
        raise UsageError(f"personal-layers={layers}: {error}") from None


def check_weights(path: str, model: str, layers: str) -> None:
    """Refuse an `init-from` that is missing, is no file of weights, or holds another model's, or NaN."""
    import torch

    from models import make_model

    if not os.path.isfile(path):
        raise UsageError(f"init-from: there is no file {path}")
    net = make_model(model)
    own = {name: net.state_dict()[name] for name in check_personal(model, layers)}  # a file may be without them
    try:
        weights = torch.load(path, map_location="cpu", weights_only=True)
        net.load_state_dict({**own, **weights})
        broken = [name for name, tensor in net.state_dict().items() if not torch.isfinite(tensor).all()]
    except Exception as error:  # whatever unpickling a stranger's file has to say
        reason = str(error).strip().splitlines()[-1].strip() if str(error).strip() else type(error).__name__
        raise UsageError(f"init-from: {path} does not hold the weights of model={model}: {reason}") from error
    if broken:
        raise UsageError(f"init-from: {path} holds NaN or infinite numbers in {', '.join(broken)}")
