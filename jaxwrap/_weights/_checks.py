"""Whether rules fit the leaves that they match, before anything is made."""

from __future__ import annotations

from collections.abc import Sequence

from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._patterns import match
from jaxwrap._weights._reparametrization import Tied
from jaxwrap._weights._rules import Rules


def check_rules(rules: Rules, leaves: Sequence[Leaf]) -> None:
    """Raise ValueError for a rule that does not match any leaf that it can apply to."""
    for pattern, rule in rules.pairs:
        matched = [leaves[index] for index in match(pattern, [leaf.path for leaf in leaves])]
        for field, value in rule.set_fields().items():
            if not any(leaf.accepts(field, value) for leaf in matched):
                raise ValueError(
                    f"the rule for {pattern!r} sets {field}={value!r}, which applies to none of the leaves that it "
                    f"matches: {', '.join(f'{leaf.path} ({leaf.dtype})' for leaf in matched[:5])}. "
                    "All fields but `dtype`, `aggregation` and `layout` are for float leaves of the parameters, "
                    "`dtype` for leaves of its own kind: a float dtype for float leaves. A mean or a sum of replicas "
                    "is for float leaves."
                )


def check_tied(leaves: Sequence[Leaf]) -> None:
    """Raise ValueError for a tied leaf whose other leaf does not exist, is tied itself, or has another shape."""
    by_path = {leaf.path: leaf for leaf in leaves if leaf.is_params}
    for leaf in leaves:
        if not isinstance(form := leaf.form, Tied):
            continue
        other = by_path.get(form.path)
        if other is None or isinstance(other.form, Tied):
            problem = "no leaf of the parameters" if other is None else "tied itself"
            raise ValueError(
                f"{leaf.path} is tied to {form.path!r}, which is {problem}. The paths are "
                f"{', '.join(list(by_path)[:10])}."
            )
        shape = other.shape[::-1] if form.transpose else other.shape
        if (shape, other.stored) != (leaf.shape, leaf.stored):
            raise ValueError(
                f"{leaf.path} is {leaf.stored}{leaf.shape}, and {form.path}, which it is tied to"
                f"{', transposed' if form.transpose else ''}, {other.stored}{shape}. Tie leaves of one shape and dtype."
            )
