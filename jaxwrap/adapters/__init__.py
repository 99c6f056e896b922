"""One adapter per JAX library: each turns a module into the `init_fn` and `call_fn` of a `JaxLayer`."""

from jaxwrap.adapters._linen import FlaxLayer

__all__ = ["FlaxLayer"]
