"""The table of figures: what measures each, on which backends, and in which process."""

import dataclasses
import importlib
import traceback

from benchmarks import process, rows

ALL = ("jax", "tensorflow", "torch", "numpy")
TRAINING = ALL[:3]
ON_GPU = ["eager", "gradient"]


@dataclasses.dataclass(frozen=True)
class Figure:
    """`where` is "shared": the one process of its backend; "fresh": one of its own; "parent": it starts its own."""

    target: str
    backends: tuple[str, ...] = ALL
    where: str = "shared"


FIGURES = {
    "eager": Figure("inference:eager"),
    "eager-tree": Figure("inference:eager_tree"),
    "optimizer": Figure("optimizers:optimizer", TRAINING),
    "gradient": Figure("training:gradient", ("torch",)),
    "fit": Figure("training:fit", TRAINING),
    "cost": Figure("cost:cost", ("jax",)),
    "build": Figure("build:build"),
    "leaves": Figure("growth:leaves"),
    "shapes": Figure("growth:shapes", where="fresh"),
    "calls": Figure("growth:calls", where="fresh"),
    "memory": Figure("memory:memory", where="parent"),
    "import": Figure("startup:imports", where="parent"),
    "first-step": Figure("startup:first_step", TRAINING, where="parent"),
}


def measure(names, backend, device="cpu", **settings):
    """All of these figures on one backend: rows and curves."""
    names = [name for name in names if backend in FIGURES[name].backends]
    shared = [name for name in names if FIGURES[name].where == "shared"]
    items = []
    if shared:
        arguments = {"names": shared, **settings}
        items += _guarded(
            "all", lambda: process.call("figures:measure_here", backend, device, **arguments)
        )
    for name in names:
        figure = FIGURES[name]
        if figure.where == "fresh":
            made = _guarded(name, lambda f=figure: process.call(f.target, backend, **settings))
        elif figure.where == "parent":
            made = _guarded(name, lambda f=figure: load(f)(backend, **settings))
        else:
            continue
        show(made)
        items += made
    return [{**item, "backend": backend} for item in items]


def measure_here(names, **settings):
    """The figures that share a process. Those in the way of the others are named and passed over."""
    for name in names:
        items = _guarded(name, lambda name=name: load(FIGURES[name])(**settings))
        show(items)
        yield from items


def load(figure):
    module, name = figure.target.split(":")
    return getattr(importlib.import_module(f"benchmarks.{module}"), name)


def _guarded(name, run):
    items = []
    try:
        items.extend(run())
    except Exception as error:
        traceback.print_exc()
        items += getattr(error, "items", [])
        items.append(rows.failure(name, name, "the benchmark", "", f"{error}"[:200]))
    return items


def show(items):
    for item in items:
        if item["kind"] == "row":
            middle = rows.median(item)
            found = item["note"] if middle is None else f"{middle:.3g} {item['unit']}"
            beside = f" beside {item['rival']}" if item["rival"] else ""
            print(f"  {item['what']}: {item['subject']}{beside}: {found}", flush=True)
