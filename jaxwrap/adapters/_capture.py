"""Activations inside a module, as further outputs of its layer."""

from __future__ import annotations

import dataclasses
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from jaxwrap._errors import check_types
from jaxwrap._layer import CallResult
from jaxwrap._typing import PyTree
from jaxwrap._weights._patterns import compile_pattern, match


class Capture:
    """The modules whose outputs a layer returns.

    Args:
        patterns: Regular expressions for whole paths of modules.

    Raises:
        ValueError: If they are not a tuple of regular expressions.
    """

    def __init__(self, patterns: Sequence[str]):
        check_types(capture=(patterns, "a tuple of names"))
        self.patterns = tuple(patterns)
        self._compiled = [compile_pattern(pattern) for pattern in self.patterns]

    def __bool__(self) -> bool:
        return bool(self.patterns)

    def matches(self, path: str) -> bool:
        """Whether to return the output of the module at this path."""
        return any(pattern.fullmatch(path) for pattern in self._compiled)

    def check(self, paths: Iterable[str]) -> None:
        """Raise ValueError for a pattern that matches none of these paths of modules."""
        paths = list(dict.fromkeys(paths))
        for pattern in self.patterns:
            try:
                match(pattern, paths, example="encoder/.*")
            except ValueError as error:
                raise ValueError(
                    f"`capture` names modules that the call runs, but {error}"
                ) from error

    def add(self, result: CallResult, values: Mapping[str, tuple[PyTree, ...]]) -> CallResult:
        """Return a result with the outputs of modules by path: a tuple for a module that ran more than once."""
        captured = {
            path: outputs[0] if len(outputs) == 1 else outputs for path, outputs in values.items()
        }
        return dataclasses.replace(result, outputs=(result.outputs, captured))


class LinenCapture:
    """What one call of a Linen module captures, by Linen's `capture_intermediates`."""

    def __init__(self, capture: Capture):
        self._capture = capture
        self._ran: list[str] = []

    def filter(self, module: Any, method: str) -> bool:
        """Return whether Linen must keep the output of a method."""
        if method != "__call__" or not module.path:
            return False
        path = "/".join(module.path)
        self._ran.append(path)
        return self._capture.matches(path)

    def take(self, changed: Mapping[str, PyTree]) -> tuple[dict[str, PyTree], dict[str, Any]]:
        """Return the collections without the captured outputs, and these.

        Raises:
            ValueError: If a pattern matches no module that ran, or Linen has lost the output.
        """
        self._capture.check(self._ran)
        values: dict[str, Any] = {}
        rest = _without_calls(changed.get("intermediates", {}), (), values)
        if lost := {path for path in self._ran if self._capture.matches(path)} - values.keys():
            raise ValueError(
                f"`capture` names {sorted(lost)[0]!r}, which runs inside a transformation of Linen that does not pass "
                "on the collection 'intermediates'. For `nn.scan` or `nn.vmap`, write "
                'variable_axes={..., "intermediates": 0}.'
            )
        others = {name: tree for name, tree in changed.items() if name != "intermediates"}
        return {**others, "intermediates": rest} if rest else others, values


def _without_calls(tree: PyTree, path: tuple[str, ...], values: dict[str, Any]) -> dict[str, Any]:
    """Return what modules have sown, and move what Linen has captured to `values`."""
    rest = {}
    for name, node in tree.items():
        if name == "__call__":
            values["/".join(path)] = node
        elif isinstance(node, Mapping):
            if below := _without_calls(node, (*path, name), values):
                rest[name] = below
        else:
            rest[name] = node
    return rest


class NnxCapture(Capture):
    """The submodules of an NNX module whose outputs a layer returns.

    They keep their outputs in variables of their own, which `nnx.jit`, `nnx.remat` and the like pass on. `nnx.capture`
    would change the classes of modules, for all threads, and what `sow` does.
    """

    def __init__(self, patterns: Sequence[str]):
        super().__init__(patterns)
        # One class for each class, since NNX compares them.
        self._classes: dict[type, type] = {}

    def check_module(self, module: Any) -> None:
        """Raise ValueError for a pattern that matches no submodule."""
        self.check(path for path, _ in _submodules(module))

    def record(self, module: Any) -> None:
        """Make the submodules of a module, which nobody else has, keep their outputs."""
        for path, submodule in _submodules(module):
            if self.matches(path):
                cls = type(submodule)
                if cls not in self._classes:
                    self._classes[cls] = _recording(cls)
                object.__setattr__(submodule, "__class__", self._classes[cls])

    def take(self, module: Any) -> dict[str, tuple[PyTree, ...]]:
        """Take the outputs out of the submodules, by their paths.

        Raises:
            ValueError: If a pattern matches no submodule that ran.
        """
        from flax import nnx

        kept = nnx.to_flat_state(nnx.pop(module, _variable_type()))
        values = {"/".join(map(str, path[:-1])): variable.get_value() for path, variable in kept}
        self.check(values)
        return values


def _submodules(module: Any) -> list[tuple[str, Any]]:
    from flax import nnx

    return [("/".join(map(str, path)), one) for path, one in nnx.iter_modules(module) if path]


_ATTRIBUTE = "captured_outputs"


def _variable_type() -> Any:
    from flax import nnx

    return nnx.variable_type_from_name("jaxwrap_captured", allow_register=True)


def _recording(cls: type) -> type:
    def call(self: Any, *args: Any, **kwargs: Any) -> Any:
        outputs = cls.__call__(self, *args, **kwargs)
        kept = getattr(self, _ATTRIBUTE, None)
        before = () if kept is None else kept.get_value()
        setattr(self, _ATTRIBUTE, _variable_type()((*before, outputs)))
        return outputs

    return type(cls)(cls.__name__, (cls,), {"__call__": call, "__module__": cls.__module__})
