"""Contestants timed side by side: each round measures all of them, one right after the other."""

import gc
import math
import random
import time


def race(makers, rounds, seconds, check=None, lasting=0):
    """Seconds per call of each contestant in each round, or why it does not run.

    Args:
        makers: For each name a function that prepares the contestant and returns what is to be timed. That one returns
            only when its result is ready.
        rounds: How many rounds.
        seconds: How long a measurement lasts at least; the call is repeated to fill it.
        check: Is called with each name and the result of a first call, and raises if it is wrong.
        lasting: How many seconds the rounds last at least, together. More rounds tell smaller differences apart.

    Returns:
        Two dicts by name: lists of times, and reasons.
    """
    calls, failures = {}, {}
    for name, make in makers.items():
        try:
            run = make()
            result = run()
            if check is not None:
                check(name, result)
            calls[name] = (run, _repetitions(run, seconds))
        except Exception as error:
            failures[name] = reason(error)
    times = {name: [] for name in calls}
    begin = time.perf_counter()
    for index, order in enumerate(orders(calls)):
        if index >= rounds and time.perf_counter() - begin > lasting:
            break
        for name in order:
            times[name].append(_time(*calls[name]))
    return times, failures


def race_in_both_orders(makers, rounds, seconds, lasting):
    """As `race`, but all contestants are made twice, the second time in the opposite order.

    What is made later lies elsewhere in memory, and the same layer then takes up to 2% less.
    """
    both = (makers.items(), reversed(makers.items()))
    halves = [race(dict(order), rounds, seconds, lasting=lasting) for order in both]
    failures = {name: why for _, half in halves for name, why in half.items()}
    runs = [name for name in makers if name not in failures]
    return {name: [one for half, _ in halves for one in half[name]] for name in runs}, failures


def orders(names):
    """The order of each round, drawn. Nothing comes right after itself: it would find its data in the cache."""
    rng, order = random.Random(0), list(names)
    while order:
        last = order[-1]
        rng.shuffle(order)
        while len(order) > 1 and order[0] == last:
            rng.shuffle(order)
        yield tuple(order)


def reason(error):
    first = (str(error).strip().splitlines() or [""])[0]
    return f"{type(error).__name__}: {first[:160]}"


def _repetitions(run, seconds):
    """How often to call, so that it lasts. A call that lasts long enough has been warmed up by the first one."""
    once = _time(run, 1)
    if once < seconds:
        once = min(_time(run, 1) for _ in range(3))
    return max(1, math.ceil(seconds / once))


def _time(run, repetitions):
    # The collector stays on, because objects that need it are a cost of the call. It looks at none of those that the
    # other contestants keep.
    gc.freeze()
    try:
        if repetitions > 1:
            run()
        begin = time.perf_counter()
        for _ in range(repetitions):
            run()
        return (time.perf_counter() - begin) / repetitions
    finally:
        gc.collect()
