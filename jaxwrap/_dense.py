"""Errors for ragged and sparse tensors, which JAX functions do not take. No library is imported to know them."""

from __future__ import annotations

from typing import Any

_SPARSE = "sparse {{}}. JAX functions take dense arrays: pass `{}`."
_RAGGED = (
    "ragged {{}}. JAX functions take arrays whose rows have one length: pass `{}`, and a mask if the padding must "
    "not count."
)

# By the first part of the type's module and the type's name.
_REMEDIES = {
    ("tensorflow", "RaggedTensor"): _RAGGED.format("tensor.to_tensor()"),
    ("tensorflow", "SparseTensor"): _SPARSE.format("tf.sparse.to_dense(tensor)"),
    ("tensorflow", "IndexedSlices"): _SPARSE.format("tf.convert_to_tensor(tensor)"),
}


def check_dense(leaf: Any) -> None:
    """Raise TypeError for a ragged or sparse tensor of any library."""
    kind = type(leaf)
    package = kind.__module__.partition(".")[0]
    remedy = _REMEDIES.get((package, kind.__name__))
    if package == "scipy" and kind.__module__.startswith("scipy.sparse"):
        remedy = _SPARSE.format("array.toarray()")
    elif package == "jax" and hasattr(leaf, "todense"):
        remedy = _SPARSE.format("array.todense()")
    elif package == "torch" and getattr(leaf, "is_nested", False):
        remedy = _RAGGED.format("torch.nested.to_padded_tensor(tensor, 0.0)")
    elif package == "torch" and str(getattr(leaf, "layout", "torch.strided")) != "torch.strided":
        remedy = _SPARSE.format("tensor.to_dense()")
    if remedy:
        raise TypeError(f"received a {remedy.format(kind.__name__)}")
