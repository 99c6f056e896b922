"""The options of a layer, checked before anything is made."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from jaxwrap._errors import check_types
from jaxwrap._layer._seeds import check_impl


class Options(NamedTuple):
    """The options that a config holds. `JaxLayer` documents them.

    Attributes:
        seed: The seed, or None.
        platforms: The platforms to compile for, or None for the present one.
        key_impl: The implementation of keys, or None for raw keys.
        keep_dtypes: Whether float leaves that are not float32 keep their dtype.
        distinct_masks: Whether replicas draw numbers of their own, or None for what the backend does.
    """

    seed: int | None
    platforms: tuple[str, ...] | None
    key_impl: str | None
    keep_dtypes: bool
    distinct_masks: bool | None

    @classmethod
    def checked(
        cls,
        seed: Any,
        platforms: Any,
        key_impl: Any,
        keep_dtypes: bool | None,
        distinct_masks: Any,
        keras_arguments: Mapping[str, Any],
    ) -> Options:
        """Check the arguments of a constructor.

        Raises:
            ValueError: For one of another type, or a key implementation that JAX does not have.
        """
        # Whoever passes `dtype` wants that dtype.
        if keep_dtypes is None:
            keep_dtypes = keras_arguments.get("dtype") is None
        check_types(
            seed=(seed, "an integer or None"),
            native_serialization_platforms=(platforms, "a tuple of names or None"),
            key_impl=(key_impl, "a name or None"),
            keep_dtypes=(keep_dtypes, "a bool"),
            distinct_masks=(distinct_masks, "a bool or None"),
            trainable=(keras_arguments.get("trainable", True), "a bool"),
        )
        check_impl(key_impl)
        return cls(seed, tuple(platforms or ()) or None, key_impl, keep_dtypes, distinct_masks)

    def get_config(self) -> dict[str, Any]:
        """Return the arguments of the constructor."""
        config = self._asdict()
        config["native_serialization_platforms"] = config.pop("platforms")
        return config


def check_flags(update_state_in_inference: Any, supports_masking: Any) -> None:
    """Raise ValueError for an argument that is not a bool."""
    check_types(
        update_state_in_inference=(update_state_in_inference, "a bool"),
        supports_masking=(supports_masking, "a bool"),
    )
