"""`python -m benchmarks`: measures, and writes the results."""

import argparse
from pathlib import Path

from benchmarks import figures, machine, plots, report


def parse_args():
    parser = argparse.ArgumentParser(prog="python -m benchmarks", description=__doc__)
    parser.add_argument("--device", choices=("cpu", "gpu"), default="cpu")
    parser.add_argument("--backends", help="names with commas")
    parser.add_argument("--only", nargs="+", choices=figures.FIGURES)
    parser.add_argument("--rounds", type=int, default=9, help="at least 7 for results to keep")
    parser.add_argument("--seconds", type=float, default=0.1, help="of one measurement, at least")
    parser.add_argument("--output", type=Path)
    arguments = parser.parse_args()
    on_gpu = arguments.device == "gpu"
    folder = Path(__file__).parent / "results"
    arguments.output = arguments.output or (folder / "gpu" if on_gpu else folder)
    arguments.only = arguments.only or (figures.ON_GPU if on_gpu else [*figures.FIGURES])
    arguments.backends = arguments.backends or ("torch" if on_gpu else ",".join(figures.ALL))
    if on_gpu and not (
        set(arguments.only) <= set(figures.ON_GPU) and arguments.backends == "torch"
    ):
        parser.error(f"on a GPU there are {', '.join(figures.ON_GPU)}, on torch")
    return arguments


def main():
    arguments = parse_args()
    arguments.output.mkdir(parents=True, exist_ok=True)
    about = {**machine.describe(), "rounds": arguments.rounds, "seconds": arguments.seconds}
    items = []
    for backend in arguments.backends.split(","):
        print(backend, flush=True)
        items += figures.measure(
            arguments.only,
            backend,
            arguments.device,
            rounds=arguments.rounds,
            seconds=arguments.seconds,
        )
        # After each backend, since the next one takes long.
        report.write(arguments.output, about, items)
        plots.write(arguments.output, items)
    print(f"results are in {arguments.output}")


if __name__ == "__main__":
    main()
