"""Flax models of Hugging Face's transformers."""

from __future__ import annotations

import dataclasses
import difflib
import functools
import inspect
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import keras

from jaxwrap._errors import check_types, naming
from jaxwrap._layer import Adapter, CallResult, JaxLayer
from jaxwrap._layer._signature import AUTO
from jaxwrap._serialization import deserialize, serialize
from jaxwrap._serialization._allowed import TRANSFORMERS
from jaxwrap._serialization._names import load
from jaxwrap._serialization._nodes import PLAIN
from jaxwrap._typing import PyTree
from jaxwrap.adapters._arguments import ModuleArguments, select_output

# What the adapter passes, or a layer does not have.
_OWN = ("params", "past_key_values", "return_dict", "dropout_rng", "indices_rng", "gumbel_rng")
# Of the configuration: they concern PyTorch, which would be imported for them.
_OTHERS = ("dtype", "torch_dtype")
_MOST_LAYERS = 1000


@keras.saving.register_keras_serializable(package="jaxwrap")
@dataclasses.dataclass(frozen=True, eq=False)
class Transformers(Adapter):
    """The adapter of Flax models of transformers. `from_transformers` documents the fields.

    It calls the model itself, which fills in the arguments that are missing, as each architecture needs them.
    """

    model: Any
    inputs: Sequence[str] | None = None
    output: str | None = None

    draws = "in training"

    def __post_init__(self) -> None:
        if not is_flax_model(self.model):
            raise TypeError(
                "expected a Flax model of Hugging Face's transformers, such as `FlaxBertModel`, which versions before "
                f"5 have; received a {type(self.model).__name__}."
            )
        check_types(
            inputs=(self.inputs, "a tuple of names or None"), output=(self.output, "a name or None")
        )
        _ = self._signature  # raise early

    @functools.cached_property
    def _parameters(self) -> dict[str, inspect.Parameter]:
        return dict(inspect.signature(self.model.__call__).parameters)

    @functools.cached_property
    def _arguments(self) -> ModuleArguments:
        return ModuleArguments(self._parameters, AUTO, _OWN)

    @functools.cached_property
    def _signature(self) -> inspect.Signature:
        known = self._arguments.signature.parameters
        if self.inputs is None:
            return inspect.Signature(list(known.values()))
        for name in self.inputs:
            if name not in known:
                near = difflib.get_close_matches(name, known, n=1)
                raise ValueError(
                    f"`inputs` names {name!r}, which {type(self.model).__name__} does not take."
                    f"{f' Did you mean {near[0]!r}?' if near else ''} It takes {', '.join(known)}."
                )
        empty = inspect.Parameter.empty
        return inspect.Signature([known[name].replace(default=empty) for name in self.inputs])

    @functools.cached_property
    def _has_stats(self) -> bool:
        # The other models have parameters alone, without a name above them.
        return set(self.model.params_shape_tree) == {"params", "batch_stats"}

    def signature(self) -> inspect.Signature:
        """Return the arguments of the model that the caller passes."""
        return self._signature

    def initial(self) -> tuple[PyTree, PyTree] | None:
        """Return the values of the model, unless it was made without."""
        return self.split(self.model.params) if self.model._is_initialized else None

    def init(self, keys: PyTree, inputs: Mapping[str, PyTree]) -> tuple[PyTree, PyTree]:
        """Call `init_weights`, with the shape of the model's own."""
        return self.split(self.model.init_weights(keys, self.model.input_shape))

    def call(
        self,
        params: PyTree,
        state: PyTree,
        keys: PyTree,
        inputs: Mapping[str, PyTree],
        training: bool,
    ) -> CallResult:
        """Call the model."""
        own = {"params": self.join(params, state), "return_dict": True}
        if keys is not None:
            streams = [name for name in self._parameters if name.endswith("_rng")]
            own |= {name: jax.random.fold_in(keys, n) for n, name in enumerate(streams)}
            if "dropout_rng" in streams:
                own["dropout_rng"] = keys
        outputs = self._arguments.call(self.model.__call__, inputs, training, **own)
        if self._has_stats and training:
            outputs, state = outputs
        chosen = select_output(outputs, self.output)
        if chosen is None:
            raise ValueError(
                f"the model returns None for `output={self.output!r}`. Ask for it: set `output_attentions` or "
                "`output_hidden_states` of its `config`, or pass it in the call."
            )
        return CallResult(chosen, state)

    def join(self, params: PyTree, state: PyTree) -> PyTree:
        """Make one pytree, as `model.params` is."""
        return {**params, **state} if state else params

    def split(self, variables: Any) -> tuple[PyTree, PyTree]:
        """Split a pytree as `model.params` is."""
        from flax.core import unfreeze

        if not isinstance(variables, Mapping):
            raise ValueError(
                f"expected a dict, as `model.params` and `get_variables` are; received a {type(variables).__name__}."
            )
        variables = unfreeze(dict(variables))
        if not self._has_stats:
            return variables, None
        names = ("params", "batch_stats")
        params, state = ({n: variables[n]} if n in variables else {} for n in names)
        # What does not belong there is an error of structure.
        return {**{n: v for n, v in variables.items() if n not in names}, **params}, state

    def get_config(self) -> dict[str, Any]:
        """Return the name of the class and the configuration as data."""
        cls, config = type(self.model), json.loads(self.model.config.to_json_string(use_diff=False))
        return {
            "model": {
                "class": cls.__name__ if _is_known(cls) else serialize(cls, "model"),
                "configuration": {n: v for n, v in config.items() if n not in _OTHERS},
                "input_shape": jax.tree_util.tree_map(int, _lists(self.model.input_shape)),
                "dtype": jnp.dtype(self.model.dtype).name,
                "options": _module_options(self.model.module),
            },
            "inputs": None if self.inputs is None else list(self.inputs),
            "output": self.output,
        }

    @classmethod
    def fields_from_config(cls, config: Mapping[str, Any]) -> dict[str, Any]:
        """Return the fields, with a model that has no values."""
        return {**config, "model": _read_model(config["model"])}


def from_transformers(
    hf_model: Any,
    inputs: Sequence[str] | None = None,
    output: str | None = None,
    *,
    params: PyTree = None,
    **kwargs: Any,
) -> JaxLayer:
    """Make a Keras layer of a Flax model of Hugging Face's transformers, on every Keras backend.

    The layer takes the arguments of the model. As the model does, it fills in masks, positions and token types that are
    missing. Dropout is on in training. The weights have the paths that they have in `hf_model.params`, and
    `layer.get_variables()` gives them back in that form: `hf_model.save_pretrained(folder, params=...)` takes them. A
    file holds the configuration as data, and the name of the class. Versions of transformers before 5 have Flax models.

    Args:
        hf_model: The model, such as `FlaxBertForSequenceClassification.from_pretrained(...)`.
        inputs: The names of the arguments that the layer takes, in order. By default all that the model has; those with
            a default may be left out.
        output: The name of the one output to return, such as "logits". By default the layer returns all.
        params: The weights, for a model that was made with `_do_init=False`.
        **kwargs: The other arguments of `JaxLayer`: `name`, `seed`, `rules`, `dtype`, ...

    Raises:
        TypeError: If `hf_model` is not such a model.
        ValueError: If the model has no argument of a name in `inputs`.

    Example:
        >>> import numpy as np, jaxwrap
        >>> from transformers import BertConfig, FlaxBertForSequenceClassification
        >>> config = BertConfig(
        ...     vocab_size=20, hidden_size=8, num_hidden_layers=1, num_attention_heads=2, intermediate_size=8
        ... )
        >>> layer = jaxwrap.from_transformers(FlaxBertForSequenceClassification(config), output="logits")
        >>> tuple(layer(np.ones((3, 5), "int32")).shape)
        (3, 2)
    """
    with naming("from_transformers"):
        adapter = Transformers(hf_model, inputs, output)
        if params is not None:
            kwargs["params"], kwargs["state"] = adapter.split(params)
    return JaxLayer(adapter, **kwargs)


def is_flax_model(obj: Any) -> bool:
    """Whether an object is a Flax model of transformers, without importing it."""
    return any(
        cls.__name__ == "FlaxPreTrainedModel" and cls.__module__.startswith("transformers.")
        for cls in type(obj).__mro__
    )


def _is_known(cls: type) -> bool:
    return cls.__name__ in TRANSFORMERS and cls.__module__.startswith("transformers.")


def _lists(shape: Any) -> Any:
    return [_lists(size) for size in shape] if isinstance(shape, (tuple, list)) else shape


def _tuples(shape: Any) -> Any:
    return tuple(_tuples(size) for size in shape) if isinstance(shape, (tuple, list)) else shape


def _module_fields(cls: Any) -> dict[str, Any]:
    """Return the fields of a Linen class that are options beside the configuration, with their defaults."""
    common = ("config", "dtype", "parent", "name")
    return {
        field.name: field.default for field in dataclasses.fields(cls) if field.name not in common
    }


def _module_options(module: Any) -> dict[str, Any]:
    """Return the options of a module that are not its defaults."""
    defaults = _module_fields(type(module))
    options = {name: getattr(module, name) for name in defaults}
    options = {name: value for name, value in options.items() if value != defaults[name]}
    for name, value in options.items():
        if type(value) not in PLAIN:
            raise TypeError(
                f"cannot be saved: `{name}` of {type(module).__name__} is {value!r}, and only numbers and strings are "
                "data. Put it into the configuration."
            )
    return options


def _read_model(config: Mapping[str, Any]) -> Any:
    """Make a model without values of what a config holds.

    Raises:
        ValueError: If the class is not a known one, or the config holds what such a model does not have.
    """
    name = config["class"]
    # The name is a member of our list, and never a path to import.
    if isinstance(name, str) and name not in TRANSFORMERS:
        raise ValueError(f"{name!r} is not one of the Flax models that jaxwrap loads.")
    try:
        cls = load("transformers", name) if isinstance(name, str) else deserialize(name, "model")
    except AttributeError:
        raise ValueError(
            f"{name} needs transformers before version 5, which has no Flax models any more."
        ) from None
    if not any(base.__name__ == "FlaxPreTrainedModel" for base in getattr(cls, "__mro__", ())):
        raise ValueError(f"{cls!r} is not a Flax model of transformers.")
    options = dict(config["options"])
    if unknown := set(options) - set(_module_fields(cls.module_class)):
        raise ValueError(f"{cls.__name__} has no options {sorted(unknown)}.")
    _check_counts(config["configuration"])
    return cls(
        cls.config_class.from_dict(dict(config["configuration"])),
        input_shape=_tuples(config["input_shape"]),
        dtype=jnp.dtype(config["dtype"]),
        _do_init=False,
        **options,
    )


def _check_counts(config: Mapping[str, Any]) -> None:
    """Raise ValueError if a configuration repeats layers so often that a machine is busy for years."""
    for name, value in config.items():
        if isinstance(value, Mapping):
            _check_counts(value)
            continue
        counts = value if isinstance(value, list) else [value]
        is_count = any(word in name for word in ("layer", "depth", "block", "stack"))
        if is_count and any(isinstance(n, (int, float)) and n > _MOST_LAYERS for n in counts):
            raise ValueError(
                f"this config has {name}={value!r}; expected at most {_MOST_LAYERS} layers."
            )
