"""The results as pictures: ratios beside their targets, and what grows."""

import matplotlib

from benchmarks import rows

matplotlib.use("Agg")
from matplotlib import pyplot as plt


def write(folder, items):
    table = [item for item in items if item["kind"] == "row" and item["unit"] == "x"]
    _ratios(folder / "ratios.png", [row for row in table if row["target"] and row["values"]])
    curves = [item for item in items if item["kind"] == "curve"]
    for name in dict.fromkeys((curve["figure"], curve["what"]) for curve in curves):
        path = folder / f"growth-{'-'.join(name).replace(' ', '-')}.png"
        _growth(path, [curve for curve in curves if (curve["figure"], curve["what"]) == name])


def _ratios(path, table):
    """A dot for each median with a line for the spread, and a mark at the target."""
    if not table:
        return
    figure, axes = plt.subplots(figsize=(10, 1 + 0.3 * len(table)), layout="constrained")
    for height, row in enumerate(reversed(table)):
        color = "tab:green" if rows.reached(row) else "tab:red"
        axes.plot([min(row["values"]), max(row["values"])], [height] * 2, color=color, alpha=0.5)
        axes.plot(rows.median(row), height, "o", color=color)
        axes.plot(row["target"][1], height, "|", color="black", markersize=14)
    axes.set_yticks(range(len(table)), [_label(row) for row in reversed(table)], fontsize=8)
    axes.set_xscale("log")
    axes.set_xlabel("ratio: dots are medians, lines run over all rounds, black marks are targets")
    axes.grid(axis="x", which="both", alpha=0.3)
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _label(row):
    return f"{row['what']} ({row['backend']}), beside {row['rival']}"


def _growth(path, curves):
    figure, axes = plt.subplots(figsize=(7, 4.5), layout="constrained")
    colors = dict(zip(("jax", "tensorflow", "torch", "numpy"), plt.cm.tab10.colors, strict=False))
    for curve in curves:
        for style, (name, values) in zip(("-", "--", ":"), curve["y"].items(), strict=False):
            color = colors[curve["backend"]]
            label = f"{curve['backend']}, {name}"
            axes.plot(curve["x"], values, style, color=color, label=label)
    axes.set_xlabel(curves[0]["x_label"])
    axes.set_ylabel(curves[0]["y_label"])
    axes.set_title(curves[0]["what"])
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.3)
    axes.legend(fontsize=8)
    figure.savefig(path, dpi=120)
    plt.close(figure)
