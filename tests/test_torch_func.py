"""`torch.func`, forward-mode AD and `vmap` of functions and layers, against JAX's own transformations."""

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy

from jaxwrap import JaxLayer, wrap_function

pytestmark = pytest.mark.only("torch")

RNG = np.random.default_rng(0)
X, M, B = (RNG.standard_normal(shape).astype("float32") for shape in [(3,), (3, 3), (5, 3)])


def function(x, matrix):
    return jnp.sin(x) @ matrix * jnp.tanh(x).sum()


def scalar(x, matrix):
    return function(x, matrix).sum()


def tensors(*arrays):
    return tuple(map(keras.ops.convert_to_tensor, arrays))


def assert_same(actual, expected):
    actual = jax.tree.leaves(to_numpy(jax.tree.map(lambda t: t.detach(), actual)))
    expected = jax.tree.leaves(expected)
    for one, two in zip(actual, expected, strict=True):
        assert one.shape == two.shape
        np.testing.assert_allclose(one, two, 1e-4, 1e-5)


def grad(t, f):
    return t.grad(lambda *a: f(*a).sum(), (0, 1))


def twice(first, second):
    return lambda t, f: getattr(t, first)(getattr(t, second)(lambda *a: f(*a).sum()))


# Made from `torch.func` or `jax`, whose functions have the same names and arguments here.
TRANSFORMATIONS = {
    "grad": grad,
    "vjp": lambda t, f: lambda x, m: t.vjp(f, x, m)[1](x * 2),
    "jvp": lambda t, f: lambda x, m: t.jvp(f, (x, m), (x * 2, m * 3)),
    "jvp of one": lambda t, f: lambda x, m: t.jvp(lambda x: f(x, m), (x,), (x * 2,)),
    "jacrev": lambda t, f: t.jacrev(f, 1),
    "jacfwd": lambda t, f: t.jacfwd(f, 1),
    "hessian": lambda t, f: t.hessian(lambda *a: f(*a).sum()),
    "rev rev": twice("jacrev", "jacrev"),
    "rev fwd": twice("jacrev", "jacfwd"),
    "fwd fwd": twice("jacfwd", "jacfwd"),
    "grad of vmap": lambda t, f: t.grad(
        lambda x, m: t.vmap(f, (None, 0))(x, m.reshape(3, 3, 1)).sum(), (0, 1)
    ),
    "third": lambda t, f: t.jacrev(t.hessian(lambda x, m: f(x, m).sum())),
}

MAPPED = {
    "plain": lambda t, f: f,
    "grad": grad,
    "hessian": TRANSFORMATIONS["hessian"],
    "jvp": TRANSFORMATIONS["jvp"],
    "vmap": lambda t, f: lambda x, m: t.vmap(f, (None, 0))(x, m.reshape(3, 3, 1)),
}


@pytest.mark.quick
@pytest.mark.parametrize("name", TRANSFORMATIONS)
def test_transformations(name):
    import torch

    make = TRANSFORMATIONS[name]
    expected = make(jax, function)(X, M)
    assert_same(make(torch.func, wrap_function(function))(*tensors(X, M)), expected)
    with torch.no_grad():
        assert_same(make(torch.func, wrap_function(function))(*tensors(X, M)), expected)


@pytest.mark.quick
@pytest.mark.parametrize("name", MAPPED)
def test_vmap(name):
    import torch

    make, wrapped = MAPPED[name], wrap_function(function)
    many = np.stack([M, M * 2], 1)
    for axes, arrays in [((0, None), (B, M)), ((None, 1), (X, many)), ((1, 1), (B[:2].T, many))]:
        expected = jax.vmap(make(jax, function), axes)(*arrays)
        assert_same(torch.vmap(make(torch.func, wrapped), axes)(*tensors(*arrays)), expected)


def test_vectorized_map():
    wrapped, (matrix, batch) = wrap_function(function), tensors(M, B)
    actual = keras.ops.vectorized_map(lambda x: wrapped(x, matrix), batch)
    assert_same(actual, jax.vmap(function, (0, None))(B, M))


@pytest.mark.parametrize("recorded", [True, False])
def test_forward_mode(recorded):
    import torch
    from torch.autograd import forward_ad

    wrapped, (x, matrix, tangent) = wrap_function(function), tensors(X, M, M[0])
    expected = jax.jvp(lambda x: function(x, M), (X,), (M[0],))
    x.requires_grad_(recorded)
    with torch.set_grad_enabled(recorded), forward_ad.dual_level():
        results = forward_ad.unpack_dual(wrapped(forward_ad.make_dual(x, tangent), matrix))
        assert_same((results.primal, results.tangent), expected)
        assert forward_ad.unpack_dual(wrapped(x, matrix)).tangent is None
        if recorded:  # reverse over forward

            def derivative(x):
                return jax.jvp(lambda x: function(x, M), (x,), (M[0],))[1].sum()

            gradient = torch.autograd.grad(results.tangent.sum(), x)
            assert_same(gradient, [jax.grad(derivative)(X)])


def test_the_vmap_of_autograd():
    """`torch.autograd` maps over its own derivatives by an older `vmap`."""
    import torch

    wrapped, (x, matrix) = wrap_function(function), tensors(X, M)
    jacobian, hessian = torch.autograd.functional.jacobian, torch.autograd.functional.hessian
    expected = jax.jacrev(function)(X, M)
    for options in (
        {},
        {"vectorize": True},
        {"vectorize": True, "strategy": "forward-mode"},
    ):
        assert_same(jacobian(lambda x: wrapped(x, matrix), x, **options), expected)
    x.requires_grad_()
    rows = torch.autograd.grad(wrapped(x, matrix), x, torch.eye(3), is_grads_batched=True)
    assert_same(rows, [expected])
    for options in ({}, {"vectorize": True}):
        actual = hessian(lambda x: wrapped(x, matrix).sum(), x.detach(), **options)
        assert_same(actual, jax.hessian(scalar)(X, M))


def test_the_tape_around_a_transformation():
    import torch

    wrapped, (x, matrix) = wrap_function(function), tensors(X, M)
    x.requires_grad_()
    inner = torch.func.grad(lambda x: wrapped(x, matrix).sum())(x)
    expected = jax.grad(lambda x: jax.grad(scalar)(x, M).sum())(X)
    assert_same(torch.autograd.grad(inner.sum(), x), [expected])
    _, pullback = torch.func.vjp(lambda x: wrapped(x, matrix), x)  # its level is gone when called
    (inner,) = pullback(matrix[0])
    expected = jax.grad(lambda x: jax.vjp(lambda x: function(x, M), x)[1](M[0])[0].sum())(X)
    assert_same(torch.autograd.grad(inner.sum(), x), [expected])


def test_complex_numbers():
    """JAX's tangents are torch's, and its cotangents are their conjugates."""
    import torch

    def cubed(z):
        return jnp.abs(z) ** 2 * z

    z = (X + 1j * M[0]).astype("complex64")
    (tensor,) = tensors(z)
    wrapped = wrap_function(cubed)
    actual = torch.func.jvp(wrapped, (tensor,), (tensor * 1j,))
    assert_same(actual, jax.jvp(cubed, (z,), (z * 1j,)))
    _, pullback = torch.func.vjp(wrapped, tensor)
    expected = jax.vjp(cubed, z)[1](np.conj(z * 1j))[0].conj()
    assert_same(pullback(tensor * 1j), [expected])


def test_other_outputs():
    """Integers have no derivative, and outputs that are the same for all examples come back for each."""
    import torch

    def several(x):
        return {"twice": x * 2, "place": jnp.argmax(x), "ones": jnp.ones(2)}

    wrapped, (x, batch) = wrap_function(several), tensors(X, B)
    assert_same(torch.vmap(wrapped)(batch), jax.vmap(several)(B))
    gradient = torch.func.grad(lambda x: wrapped(x)["twice"].sum())(x)
    assert_same(gradient, np.full(3, 2, "float32"))
    values, tangents = torch.func.jvp(wrapped, (x,), (x,))
    assert_same(values, several(X))
    assert_same([tangents["twice"], tangents["ones"]], [X * 2, np.zeros(2)])
    assert not tangents["place"].any()


def dense(params, inputs):
    return jnp.tanh(inputs @ params["w"])


def layer_of(matrix):
    return JaxLayer(dense, params={"w": matrix})


def test_the_inputs_of_a_layer():
    import torch

    layer, (x, batch) = layer_of(M), tensors(X, B)

    def function(x):
        return dense({"w": M}, x)

    for _ in range(2):  # the second call takes the short way
        layer(batch)
        assert_same(torch.func.jacrev(layer)(x), jax.jacrev(function)(X))
        assert_same(torch.func.jacfwd(layer)(x), jax.jacfwd(function)(X))
        actual = torch.func.hessian(lambda x: layer(x).sum())(x)
        assert_same(actual, jax.hessian(lambda x: function(x).sum())(X))
        assert_same(torch.vmap(torch.func.jacrev(layer))(batch), jax.vmap(jax.jacrev(function))(B))


def test_gradients_of_each_example():
    """By Keras's `stateless_call`, since `torch.func.functional_call` does not reach Keras variables."""
    import torch

    layer, (batch,) = layer_of(M), tensors(B)
    layer(batch)

    def loss(values, x):
        return layer.stateless_call(values, [], x)[0].sum()

    values = [variable.value.detach() for variable in layer.trainable_variables]
    actual = torch.vmap(torch.func.grad(loss), (None, 0))(values, batch)
    expected = jax.vmap(jax.grad(lambda w, x: dense({"w": w}, x).sum()), (None, 0))(M, B)
    assert_same(actual, [expected])
    many = np.stack([M, M * 2])  # an ensemble
    actual = torch.vmap(lambda w: layer.stateless_call([w], [], batch)[0])(*tensors(many))
    assert_same(actual, jax.vmap(lambda w: dense({"w": w}, B))(many))


def counting(params, state, inputs, training):
    new = {"count": state["count"] + 1, "sum": state["sum"] + inputs.sum()} if training else state
    return inputs * params["scale"], new


def counter():
    zero, one = np.zeros((), "float32"), np.ones((), "float32")
    return JaxLayer(counting, params={"scale": one}, state={"count": zero, "sum": zero})


def state_of(layer):
    return {name: float(value) for name, value in layer.get_variables()["state"].items()}


def test_state_under_a_transformation():
    """It is written once for a call. What would be another value for each example is refused."""
    import torch

    layer, (x, batch) = counter(), tensors(X, B)
    for times in (1, 2):
        torch.func.grad(lambda x: layer(x, training=True).sum())(x)
        assert state_of(layer) == pytest.approx({"count": times, "sum": times * X.sum()}, 1e-4)
    assert_same(torch.vmap(layer)(batch), B)
    before = state_of(layer)
    for mapped in (
        torch.vmap(lambda x: layer(x, training=True)),
        torch.vmap(torch.func.grad(lambda x: layer(x, training=True).sum())),
    ):
        with pytest.raises(RuntimeError, match=r"(?s)JaxLayer.*one value.*stateless_call"):
            mapped(batch)
    assert state_of(layer) == before
    values = [[v.value for v in part] for part in (layer.trainable_variables, layer.tracked_state)]
    actual = torch.vmap(lambda x: layer.stateless_call(*values, x, training=True)[1][1])(batch)
    assert_same(actual, before["sum"] + B.sum(1))


def noisy(params, inputs, rng, training):
    return inputs + jax.random.normal(rng, inputs.shape) if training else inputs


def test_random_numbers_under_vmap():
    """All examples get the same, as for a key that JAX does not map, so torch's flag must allow that."""
    import torch

    layer, (batch,) = JaxLayer(noisy, params={}, seed=0), tensors(B)
    layer(batch)

    def call(x):
        return layer(x, training=True)

    noise = to_numpy(torch.vmap(call, randomness="same")(batch)) - B
    np.testing.assert_allclose(noise, np.broadcast_to(noise[0], noise.shape), 1e-4, 1e-5)
    assert np.abs(noise).max() > 0.1
    seed = to_numpy(layer.seed_generator.state.value)
    for randomness in ("different", "error"):
        with pytest.raises(RuntimeError, match=f'(?s)JaxLayer.*"{randomness}".*"same"'):
            torch.vmap(call, randomness=randomness)(batch)
    np.testing.assert_array_equal(to_numpy(layer.seed_generator.state.value), seed)
    assert_same(torch.vmap(layer)(batch), B)
