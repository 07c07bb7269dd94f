"""Draws the picture of a run: history.png."""

import io
import os
from pathlib import Path

os.environ["MPLBACKEND"] = "agg"  # whatever the user's is: a picture is drawn into a file
import matplotlib.pyplot as plt

from rounds.history import History, write_whole


def draw(history: History, path: Path) -> None:
    """Draw loss and accuracy by round; line styles tell curves apart without colour."""

    def points(part: str, key: str) -> list[tuple[int, float]]:
        return [(entry["round"], entry[part][key]) for entry in history["rounds"] if key in entry.get(part, {})]

    styles = {"train": ("clients, training", "#0072B2", "o:"), "evaluate": ("clients, held out", "#D55E00", "s-")}
    styles["server"] = ("server, test set", "#009E73", "^--")  # colours by Okabe and Ito, 2008
    panels = {
        label: [(*style, points(part, key)) for part, style in styles.items()]
        for label, key in (("loss per example", "loss"), ("accuracy", "accuracy"))
    }
    plt.rcParams["text.parse_math"] = False  # a name may hold a $
    figure, all_axes = plt.subplots(1, len(panels), figsize=(4.5 * len(panels), 3.6), layout="constrained")
    for axes, (label, curves) in zip(all_axes, panels.items(), strict=True):
        for name, colour, style, curve in curves:
            if curve:
                axes.plot(*zip(*curve, strict=True), style, color=colour, label=name)
        axes.set(xlabel="round", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
        axes.grid(alpha=0.3)
        if axes.lines:
            axes.legend()
    dataset = "stand-in of drawn shapes, not CIFAR-10" if history["dataset"] == "synthetic" else history["dataset"]
    figure.suptitle(f"{history['example']}: {history['clients']} clients, {history['sampled']} a round, {dataset}")
    drawn = io.BytesIO()
    figure.savefig(drawn, format="png", dpi=120)
    write_whole(path, drawn.getvalue())
    plt.close(figure)
