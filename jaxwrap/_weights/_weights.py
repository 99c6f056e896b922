"""Two pytrees of one owner, `params` and `state`, as Keras variables."""

from __future__ import annotations

import copy
import dataclasses
import math
from collections.abc import Callable, Collection, Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import jax
import keras
import numpy as np

from jaxwrap._dtypes import kind
from jaxwrap._pytree import Structure, is_leaf_array, key_name, partition
from jaxwrap._typing import PyTree
from jaxwrap._weights._axes import check_rank, names_of_axes
from jaxwrap._weights._checks import check_rules, check_tied
from jaxwrap._weights._leaf import Leaf
from jaxwrap._weights._leaves import Leaves, fill, fill_with
from jaxwrap._weights._names import unique_names
from jaxwrap._weights._patterns import match
from jaxwrap._weights._rules import Rule, Rules
from jaxwrap._weights._table import ModuleTable, WeightRow, WeightTable
from jaxwrap._weights._targets import Target, of_leaf, of_variable
from jaxwrap._weights._variables import Initial, Source, as_copies, assign

Join = Callable[[PyTree, PyTree], PyTree]


class Dtypes(NamedTuple):
    """The dtypes of float leaves.

    Attributes:
        variable: The dtype of float variables.
        compute: The dtype that JAX functions see float parameters in. None for the variable's own.
        keep: Whether float leaves that are not float32 keep their dtype.
    """

    variable: str
    compute: str | None
    keep: bool

    def apply(self, leaf: Leaf) -> None:
        """Set `stored` and `cast` of a leaf, under its rule."""
        if kind(leaf.dtype) == "float":
            if leaf.dtype == "float32" or not self.keep:
                leaf.stored = self.variable
            # Never state: a running mean in 16 bits stops moving.
            if leaf.is_params and leaf.rule.autocast is not False:
                leaf.cast = self.compute
        if leaf.rule.dtype is not None and leaf.accepts("dtype", leaf.rule.dtype):
            leaf.stored = leaf.rule.dtype


class Plan(NamedTuple):
    """The weights of an owner before there are variables.

    Attributes:
        structures: The structures of `params` and `state`.
        leaves: The leaves of both, params first.
        params_count: The number of leaves of the params.
        rules: The rules for leaves. `freeze` adds to them.
    """

    structures: tuple[Structure, Structure]
    leaves: list[Leaf]
    params_count: int
    rules: Rules

    @classmethod
    def of(
        cls,
        trees: tuple[PyTree, PyTree],
        specs: Any,
        join: Join,
        rules: Rules,
        dtypes: Dtypes,
        seed: int,
    ) -> tuple[Plan, list[Any]]:
        """Describe two pytrees. Return the plan, and the values of the leaves.

        Args:
            trees: `params` and `state` with the initial values.
            specs: The names of the axes of the leaves: see `Adapter.unbox`.
            join: Makes one pytree of both, which gives each leaf its path.
            rules: The rules for leaves.
            dtypes: The dtypes of float leaves.
            seed: The seed of parts that are drawn.

        Raises:
            ValueError: If a rule matches no leaf, or none that it can apply to.
        """
        (params, first), (state, second) = (partition(tree, is_leaf_array) for tree in trees)
        values = [*params, *state]
        leaves = [
            Leaf.of("/".join(path), value, place < len(params))
            for place, (path, value) in enumerate(
                zip(_paths((first, second), join), values, strict=True)
            )
        ]
        resolved = rules.resolve([leaf.path for leaf in leaves])
        check_rules(rules, leaves)
        for leaf, rule, axes in zip(leaves, resolved, names_of_axes(trees, specs), strict=True):
            leaf.rule, leaf.seed, leaf.axes = rule, seed, axes
            dtypes.apply(leaf)
        check_tied(leaves)
        return cls((first, second), leaves, len(params), rules), values


class Weights:
    """The variables of an owner: two pytrees, in one order, params first.

    Attributes:
        params: The leaves of the parameters.
        state: The leaves of the state.
        leaves: All leaves, in the order of the variables.
    """

    def __init__(
        self,
        owner: Any,
        plan: Plan,
        initials: Sequence[Sequence[Initial]],
        source: Source = as_copies,
    ):
        """Make the variables.

        Args:
            owner: Its name begins the paths of the variables, and it must still track them.
            plan: The weights.
            initials: The variables of each leaf.
            source: See `create_variables`.

        Raises:
            ValueError: If a rule has the layout of a leaf of another rank, or one that does not fit the mesh.
        """
        for leaf in plan.leaves:
            if leaf.rule.layout is not None:
                check_rank(leaf.path, leaf.shape, leaf.rule.layout)
        fill_with(owner, plan.leaves, initials, source=source)
        self.leaves, self._rules = plan.leaves, plan.rules
        split = self.leaves[: plan.params_count], self.leaves[plan.params_count :]
        self.params, self.state = map(Leaves, plan.structures, split)
        for leaf in self.leaves:
            leaf.obey(leaf.rule)

    def copied(self, find: Callable[[keras.Variable], keras.Variable]) -> Weights:
        """Return the same leaves, with the variables that `find` returns."""
        other = copy.copy(self)
        other.params, other.state = self.params.copied(find), self.state.copied(find)
        other.leaves = [*other.params.leaves, *other.state.leaves]
        return other

    @property
    def variables(self) -> list[keras.Variable]:
        """All variables, those of the parameters first."""
        return [*self.params.variables, *self.state.variables]

    def by_path(self) -> dict[str, keras.Variable]:
        """Return the variables by their paths below the owner."""
        return {
            name: variable
            for leaf in self.leaves
            for name, variable in zip(leaf.names, leaf.variables, strict=True)
        }

    def targets(self, whole: Collection[str] | None = None) -> dict[str, Target]:
        """Return what files are read into, by path.

        Args:
            whole: The paths of leaves of parts to take as wholes, because a file has them. Of other leaves, the parts
                are taken. None for all.
        """
        targets: dict[str, Target] = {}
        for leaves in (self.params, self.state):
            for place, leaf in enumerate(leaves.leaves):
                if leaf.layout is None or whole is None or leaf.path in whole:
                    targets[leaf.path] = of_leaf(leaves, place)
                else:
                    targets |= zip(leaf.names, map(of_variable, leaf.variables), strict=True)
        return targets

    def matching(self, pattern: str) -> list[Leaf]:
        """Return the leaves that a pattern matches. ValueError if there are none."""
        return [self.leaves[index] for index in match(pattern, [leaf.path for leaf in self.leaves])]

    def rebuild(
        self, owner: Any, pairs: Sequence[tuple[str, Rule]]
    ) -> Iterator[tuple[keras.Variable, ...]]:
        """Add rules, and make the variables of the leaves that they match again, with the present values.

        One leaf after the other, so that a base that does not fit twice into memory can be quantized.

        Args:
            owner: See `__init__`.
            pairs: Patterns and rules that set `reparametrize`.

        Yields:
            After each leaf, the variables that are no longer used. Let go of them before the next.

        Raises:
            ValueError: If a rule matches no leaf, or none that it can apply to. Nothing has changed then.
        """
        check_rules(Rules(pairs), self.leaves)
        changed: dict[int, Rule] = {}
        for pattern, rule in pairs:
            for place in match(pattern, [leaf.path for leaf in self.leaves]):
                if self.leaves[place].can_train:
                    changed[place] = changed.get(place, self.leaves[place].rule).then(rule)

        def again(place: int) -> Leaf:
            leaf = self.leaves[place]
            return dataclasses.replace(
                leaf,
                rule=changed.get(place, leaf.rule),
                layout=None,
                variables=(),
                held=leaf.place(),
            )

        check_tied([again(place) for place in range(len(self.leaves))])
        for place in changed:
            # Only to see whether it can be done, before anything is changed.
            again(place).initials(self.params.read_leaf(place))
        name, path = next((name, variable.path) for name, variable in self.by_path().items())
        *outer, _ = path.removesuffix(f"/{name}").split("/")
        self._rules.pairs += pairs
        for place in sorted(changed):
            leaf = again(place)
            fill(owner, [leaf], [self.params.read_leaf(place)], outer)
            removed = self.leaves[place].variables
            self.leaves[place] = leaf
            self.params = Leaves(self.params.structure, self.leaves[: len(self.params.leaves)])
            leaf.obey(leaf.rule)
            yield removed
            del removed

    # Training.

    def set_trainable(self, trainable: bool) -> None:
        """Set `trainable` on every leaf that no rule freezes."""
        for leaf in self.leaves:
            leaf.set_trainable(trainable)

    def freeze(self, pattern: str, trainable: bool = False) -> None:
        """Add a rule that sets `trainable` on the parameters that a pattern matches."""
        rule = Rule(trainable=trainable)
        check_rules(Rules([(pattern, rule)]), self.leaves)
        for leaf in self.matching(pattern):
            leaf.obey(rule)
        # From now on it is one of the rules that a config holds.
        self._rules.pairs.append((pattern, rule))

    def table(self, trained: Iterable[keras.Variable]) -> WeightTable:
        """Return a row for each variable."""
        ids = set(map(id, trained))
        return WeightTable(
            WeightRow(
                v.path, tuple(v.shape), v.dtype, id(v) in ids, math.prod(v.shape), leaf.divided(v)
            )
            for leaf in self.leaves
            for v in leaf.variables
        )

    def sums(self, trained: Iterable[keras.Variable], depth: int) -> ModuleTable:
        """Return a row for all variables whose paths below the owner begin with the same `depth` names."""
        groups = []
        for name, row in zip(self.by_path(), self.table(trained), strict=True):
            outer = row.path.removesuffix(name)
            groups.append((outer + "/".join(name.split("/")[:depth]), row))
        return ModuleTable.of(groups)

    # Values.

    def write(self, params: PyTree, state: PyTree) -> None:
        """Assign values to all variables, or to none.

        Raises:
            ValueError: If structure, shapes or dtypes differ, with a line for each difference.
        """
        checked = [self.params.check(params), self.state.check(state)]
        if problems := [line for _, lines in checked for line in lines]:
            raise ValueError(
                "these variables do not fit the weights. No weight has been changed. Cast or reshape what differs.\n"
                + "\n".join(problems)
            )
        arrays: list[np.ndarray] = [array for part, _ in checked for array in part]
        for variable, array in zip(self.variables, arrays, strict=True):
            assign(variable, array)

    def in_order(self) -> list[str]:
        """Return the paths in the order in which Keras's own layers number weights."""
        return [
            leaf.path
            for trains in (True, False)
            for leaf in self.leaves
            if leaf.can_train is trains
        ]


class _Place:
    """Stands for a leaf where only its path is wanted."""


def _paths(structures: Sequence[Structure], join: Join) -> list[tuple[str, ...]]:
    """Return the names above each leaf in the joined tree, made unique."""
    # Objects of our own: an adapter may put them anywhere, and `id` finds them.
    places = [[_Place() for _ in structure.array_paths()] for structure in structures]
    joined = join(*(s.unflatten(part) for s, part in zip(structures, places, strict=True)))
    found = {
        id(leaf): tuple(map(key_name, path)) or ("value",)
        for path, leaf in jax.tree_util.tree_leaves_with_path(joined)
    }
    if any(id(place) not in found for part in places for place in part):
        raise ValueError(
            "`join` of the adapter drops leaves of the params or of the state. Return a pytree that holds all of them."
        )
    return unique_names([found[id(place)] for part in places for place in part])
