"""An optimizer ⇄ its config, and its variables by path."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import keras

from jaxwrap._errors import describe, naming
from jaxwrap._serialization import deserialize, one_config, serialize, serialize_by_name
from jaxwrap._training._rate import EXAMPLE
from jaxwrap._weights._files import load, save, stored_paths
from jaxwrap._weights._names import unique_names
from jaxwrap._weights._targets import of_variable

KERAS_ARGUMENTS = (
    "name",
    "weight_decay",
    "clipnorm",
    "clipvalue",
    "global_clipnorm",
    "use_ema",
    "ema_momentum",
    "ema_overwrite_frequency",
    "loss_scale_factor",
    "gradient_accumulation_steps",
)


def get_config(optimizer: Any) -> dict[str, Any]:
    """Return the arguments of the constructor as JSON.

    Raises:
        TypeError: If the transformation cannot be saved.
    """
    with one_config("optimizer", describe(optimizer)):
        return {
            "transformation": _source_config(optimizer._own.recipe),
            "learning_rate": optimizer._rate_config(),
            **{name: getattr(optimizer, name) for name in KERAS_ARGUMENTS},
        }


def _source_config(recipe: Any) -> Any:
    if not recipe.is_ready:
        return serialize(recipe.source, "transformation")
    return serialize_by_name(
        recipe.source,
        "transformation",
        "consists of functions, and nothing says how it was made",
        f"Pass the function that makes it: {EXAMPLE}, or one of your own that is registered: "
        '`@jaxwrap.register_serializable("my_package")`. `model.save_weights` works without',
    )


def read_config(cls: Any, config: Mapping[str, Any], custom_objects: Any) -> dict[str, Any]:
    """Return the arguments of the constructor from a config."""
    config = dict(config)
    with naming(f"{cls.__name__} {config.get('name')!r}"):
        source = deserialize(config.pop("transformation", None), "transformation")
        rate = cls._rate_from_config(config.pop("learning_rate", None), custom_objects)
    return {"transformation": source, "learning_rate": rate, **config}


def save_variables(optimizer: Any, store: Any) -> None:
    """Write the variables under their paths."""
    save(store, _by_path(optimizer), {})


def load_variables(optimizer: Any, store: Any) -> None:
    """Read the variables by path, or in order if the layers have other names."""
    own = _by_path(optimizer)
    saved = stored_paths(store)
    if len(saved) != len(own):
        built = "" if optimizer.built else " It is not built yet: `optimizer.build(variables)`."
        warnings.warn(
            f"{describe(optimizer)} has {len(own)} variables, and the file {len(saved)} for it. Nothing is loaded, and "
            f"the optimizer starts from the beginning.{built}",
            stacklevel=3,
        )
        return
    if set(saved) != set(own):
        # The same model, made again in one process, has other automatic names.
        own = dict(zip(saved, own.values(), strict=True))
    targets = {path: of_variable(variable) for path, variable in own.items()}
    load(store, lambda _: targets, list(own), {})


def _by_path(optimizer: Any) -> dict[str, keras.Variable]:
    prefix = f"{optimizer.name}/"
    paths = [tuple(v.path.removeprefix(prefix).split("/")) for v in optimizer.variables]
    return dict(zip(map("/".join, unique_names(paths)), optimizer.variables, strict=True))
