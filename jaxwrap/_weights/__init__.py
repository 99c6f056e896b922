"""A pytree as Keras variables: by path, under rules, to and from files. Nothing here knows a layer."""

from jaxwrap._weights._leaves import Leaves
from jaxwrap._weights._reparametrization import Reparametrization
from jaxwrap._weights._rules import Rule, Rules
from jaxwrap._weights._state import State
from jaxwrap._weights._weights import Dtypes, Plan, Weights

__all__ = ["Dtypes", "Leaves", "Plan", "Reparametrization", "Rule", "Rules", "State", "Weights"]
