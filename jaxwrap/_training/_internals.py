"""The parts of an optimizer, in a plain object that Keras and TensorFlow do not look into."""

from __future__ import annotations

import contextlib
import dataclasses
import threading
from collections.abc import Iterator
from typing import Any

from jaxwrap._function import wrap_function
from jaxwrap._training._transformation import Recipe


class Call(threading.local):
    """One step, from the loss to the update. Each thread has its own.

    Attributes:
        extra: Extra arguments of the transformation, while gradients are applied.
        loss: The loss of this step, if the transformation needs it.
        is_applying: Whether gradients are being applied, when Keras may ask for a learning rate that does not exist.
    """

    def __init__(self):
        self.extra: dict[str, Any] = {}
        self.loss: Any = None
        self.is_applying = False

    @contextlib.contextmanager
    def arguments(self, extra: dict[str, Any]) -> Iterator[None]:
        """Keep extra arguments for one step, and forget them and the loss after it."""
        if extra:
            self.extra = extra
        try:
            yield
        finally:
            self.extra, self.loss = {}, None

    def keep_loss(self, loss: Any) -> None:
        """Keep the loss for this step."""
        self.loss = loss


@dataclasses.dataclass
class Internals:
    """The parts of an `OptaxOptimizer`.

    Attributes:
        recipe: How to get the transformation.
        step: The compiled update, or None before building.
        places: The places of the variables in the update, by Keras's keys.
        call: What belongs to one step.
        is_from_file: Whether the optimizer has been made from a config, whose sizes may not fit into memory.
        schedule: The last Optax schedule that was asked, and the same on tensors.
    """

    recipe: Recipe
    step: Any = None
    places: dict[Any, int] = dataclasses.field(default_factory=dict)
    call: Call = dataclasses.field(default_factory=Call)
    is_from_file: bool = False
    schedule: tuple[Any, Any] = (None, None)

    def rate_at(self, schedule: Any, step: Any) -> Any:
        """Return the learning rate of an Optax schedule, which computes in JAX, for a tensor."""
        known, on_tensors = self.schedule
        # Made once, as it is compiled once.
        if known is not schedule:
            on_tensors = wrap_function(schedule)
            self.schedule = (schedule, on_tensors)
        return on_tensors(step)
