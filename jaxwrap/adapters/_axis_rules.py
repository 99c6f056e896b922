"""What the logical names of axes in Flax modules mean."""

from __future__ import annotations

import contextlib
from collections.abc import Sequence
from typing import Any

AxisRules = Sequence[tuple[str, str | tuple[str, ...] | None]] | None


def check_axis_rules(rules: Any) -> None:
    """Raise TypeError for what Flax does not take as rules."""
    if rules is None or (isinstance(rules, (tuple, list)) and all(map(_is_rule, rules))):
        return
    raise TypeError(
        "`axis_rules` must be pairs of a logical name and None, an axis of the mesh or a tuple of axes, such as "
        f'(("batch", "data"), ("mlp", "model")); received {rules!r}.'
    )


def axis_rules_scope(rules: AxisRules) -> contextlib.AbstractContextManager[Any]:
    """Enter a scope in which logical names have these meanings. With None, those of the context."""
    if rules is None:
        return contextlib.nullcontext()
    from flax.core.spmd import logical_axis_rules

    return logical_axis_rules(tuple(map(tuple, rules)))  # type: ignore[arg-type]


def _is_rule(rule: Any) -> bool:
    if not isinstance(rule, (tuple, list)) or len(rule) != 2 or not isinstance(rule[0], str):
        return False
    axes = rule[1] if isinstance(rule[1], (tuple, list)) else [rule[1] or ""]
    return all(isinstance(axis, str) for axis in axes)
