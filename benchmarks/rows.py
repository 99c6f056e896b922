"""What a benchmark yields: rows of the table, and curves to plot. All of it is plain data."""

import statistics


def ratio(figure, what, subject, rival, ours, theirs, target=None, note=""):
    """A row that compares two lists of measurements, round by round.

    `target` is the largest ratio that will do, or a pair of the smallest and the largest.
    """
    pairs = zip(ours, theirs, strict=True)
    return {
        **_row(figure, what, subject, rival, target, note),
        "unit": "x",
        "values": [one / other for one, other in pairs],
        "raw": {subject: ours, rival: theirs},
    }


def value(figure, what, subject, values, unit, target=None, note=""):
    """A row of a quantity with a unit of its own."""
    return {**_row(figure, what, subject, "", target, note), "unit": unit, "values": values}


def failure(figure, what, subject, rival, reason, target=None):
    """A row of something that does not run."""
    row = _row(figure, what, subject, rival, target, f"does not run: {reason}")
    return {**row, "unit": "x", "values": []}


def curve(figure, what, x, y, x_label, y_label):
    """Lines to plot: `y` is a dict of lists, one value for each in `x`."""
    return {
        "kind": "curve",
        "figure": figure,
        "what": what,
        "x": x,
        "y": y,
        "x_label": x_label,
        "y_label": y_label,
    }


def _row(figure, what, subject, rival, target, note):
    if target is not None and not isinstance(target, (tuple, list)):
        target = (None, target)
    return {
        "kind": "row",
        "figure": figure,
        "what": what,
        "subject": subject,
        "rival": rival,
        "target": target,
        "note": note,
    }


def median(row):
    return statistics.median(row["values"]) if row["values"] else None


def reached(row):
    """Whether the median keeps the target; None where there is no target."""
    if row["target"] is None:
        return None
    if not row["values"]:
        return False
    low, high = row["target"]
    return (low is None or low <= median(row)) and median(row) <= high


def compare(figure, what, race, against, targets=None):
    """Rows of all contestants of a race beside each one in `against`; `targets` is by pairs of names."""
    times, failures = race
    targets = targets or {}
    for rival in against:
        others = [name for name in (*times, *failures) if name != rival]
        for name in others:
            # Beside other rivals than the first, only what has a target says something new.
            target = targets.get((name, rival))
            if rival != against[0] and target is None:
                continue
            if name in times and rival in times:
                yield ratio(figure, what, name, rival, times[name], times[rival], target)
            else:
                why = failures.get(name) or f"{rival}: {failures[rival]}"
                yield failure(figure, what, name, rival, why, target)
