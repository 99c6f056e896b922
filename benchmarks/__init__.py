"""Measures jaxwrap beside JAX itself and beside its rivals: `python -m benchmarks`; docs/performance.md says more."""
