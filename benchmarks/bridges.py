"""Other ways to call a JAX function on torch tensors, so that `torch.autograd` can follow.

All take `apply(params, inputs)`, a pytree of JAX arrays for its params, and return the callable and its torch params.
"""

import inspect

import jax

try:
    import torch
except ImportError:
    torch = None

from benchmarks.backends import BACKEND


def to_torch(array):
    return torch.from_dlpack(array)


def to_jax(tensor):
    return jax.dlpack.from_dlpack(tensor.detach().contiguous())


def own_parameters(params):
    """The leaves as torch parameters with storage of their own."""
    leaves, structure = jax.tree_util.tree_flatten(params)
    return [torch.nn.Parameter(to_torch(leaf).clone()) for leaf in leaves], structure


def dlpack(apply, params, kept=False):
    """What one writes in an afternoon: everything goes over dlpack at each call, forward and vjp are jitted.

    With `kept` the aliases of the parameters are made only once. Training is then wrong as soon as a parameter gets
    other storage: it is what the time can come down to without care, and without Keras.
    """
    parameters, structure = own_parameters(params)
    aliases = [to_jax(parameter) for parameter in parameters] if kept else None

    def flat(inputs, *leaves):
        return apply(structure.unflatten(leaves), inputs)

    plain = jax.jit(flat)
    linearized = jax.jit(lambda inputs, *leaves: jax.vjp(lambda *p: flat(inputs, *p), *leaves))
    pull_back = jax.jit(lambda pullback, cotangent: pullback(cotangent))

    class Bridge(torch.autograd.Function):
        @staticmethod
        def forward(ctx, inputs, *tensors):
            arrays = aliases or map(to_jax, tensors)
            outputs, ctx.pullback = linearized(to_jax(inputs), *arrays)
            return to_torch(jax.block_until_ready(outputs))

        @staticmethod
        def backward(ctx, cotangent):
            gradients = pull_back(ctx.pullback, to_jax(cotangent))
            return None, *map(to_torch, jax.block_until_ready(gradients))

    def call(inputs):
        if torch.is_grad_enabled():
            return Bridge.apply(inputs, *parameters)
        arrays = aliases or map(to_jax, parameters)
        return to_torch(jax.block_until_ready(plain(to_jax(inputs), *arrays)))

    return call, parameters


def kept_dlpack(apply, params):
    return dlpack(apply, params, kept=True)


def jax2torch(apply, params):
    """The package of this name. It binds what it is given, so the function has one name for each leaf."""
    from jax2torch import jax2torch as bridge

    parameters, structure = own_parameters(params)

    def flat(inputs, *leaves):
        return apply(structure.unflatten(leaves), inputs)

    jitted = jax.jit(flat)

    def named(inputs, *leaves):
        return jitted(inputs, *leaves)

    kind = inspect.Parameter.POSITIONAL_ONLY
    names = ["inputs", *(f"leaf_{index}" for index in range(len(parameters)))]
    named.__signature__ = inspect.Signature([inspect.Parameter(name, kind) for name in names])
    bridged = bridge(named)
    return lambda inputs: bridged(inputs, *parameters), parameters


def torchax(apply, params):
    """The package of this name: its tensors hold JAX arrays, and all of torch runs on them."""
    import torchax
    from torchax import interop

    environment = torchax.default_env()
    leaves, structure = jax.tree_util.tree_flatten(params)
    with environment:
        parameters = [torch.nn.Parameter(interop.torch_view(leaf)) for leaf in leaves]

    def flat(inputs, *leaves):
        return apply(structure.unflatten(leaves), inputs)

    plain = interop.torch_view(jax.jit(flat))
    recorded = interop.j2t_autograd(jax.jit(flat))
    cached = {}

    def call(inputs):
        if id(inputs) not in cached:
            cached[id(inputs)] = interop.torch_view(to_jax(inputs))
        with environment:
            called = recorded if torch.is_grad_enabled() else plain
            outputs = called(cached[id(inputs)], *parameters)
        jax.block_until_ready(interop.jax_view(outputs))
        return outputs

    return call, parameters


def torch_jax_interop(apply, params):
    """The package of this name. It holds the parameters, and calls `jax.vjp` in each call, without gradients too."""
    from torch_jax_interop import WrappedJaxFunction

    module = WrappedJaxFunction(jax.jit(apply), params, clone_params=True)
    aligned = {}

    def call(inputs):
        # It refuses memory that JAX would have to copy, such as NumPy's. Torch aligns its own.
        if id(inputs) not in aligned:
            aligned[id(inputs)] = inputs.clone()
        return module(aligned[id(inputs)])

    return call, list(module.parameters())


def bridges():
    """Those that this backend has a use for, by name."""
    if BACKEND != "torch":
        return {}
    return {
        "dlpack bridge": dlpack,
        "dlpack bridge, kept aliases": kept_dlpack,
        "torch-jax-interop": torch_jax_interop,
        "jax2torch": jax2torch,
        "torchax": torchax,
    }
