"""One value for the state of all replicas."""

from __future__ import annotations

from collections.abc import Sequence

import keras

from jaxwrap._bridge import get_bridge
from jaxwrap._dtypes import inexact
from jaxwrap._weights._variables import assign_all, current_values


def sync(variables: Sequence[keras.Variable], how: str) -> None:
    """Assign to variables the mean over all replicas, or the value of the first replica.

    Args:
        variables: The variables.
        how: "mean", which takes what is not float from the first replica; or "first".

    Raises:
        ValueError: For another word.
        RuntimeError: If replicas do not know each other here. Nothing has changed then.
    """
    check_how(how)
    averaged = [v for v in variables if how == "mean" and inexact(v.dtype)]
    copied = [v for v in variables if how == "first" or not inexact(v.dtype)]
    for part in filter(None, (averaged, copied)):
        values = get_bridge().agreed(current_values(part), part is averaged)
        if values is not None:
            assign_all(part, values)


def check_how(how: str) -> None:
    """Raise ValueError for a word that `sync` does not know."""
    if how not in ("mean", "first"):
        raise ValueError(f"`how` must be 'mean' or 'first'; received {how!r}.")
