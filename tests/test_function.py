"""wrap_function on the backend under test, against the unwrapped function and its vjp."""

import functools
import gc
import weakref

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest
from backends import to_numpy
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import jaxwrap

pytestmark = [pytest.mark.quick, pytest.mark.each_jax, pytest.mark.lowered]


def several(x, w, index, unused):
    """Float, int and bool outputs; one that depends on nothing; an unused input."""
    return [jnp.sin(x) @ w, index + 1, x > 0, jnp.arange(3.0), (w**2).sum()]


def array(*shape, dtype="float32", seed=0):
    values = np.random.default_rng(seed).standard_normal(shape)
    return (values * 3).astype(dtype)


ARGUMENTS = [array(2, 4), array(4, 3, seed=1), np.arange(5, dtype="int32"), array(6, seed=2)]


def call(fn, backend, *arguments):
    return to_numpy(fn(*backend.tensors(list(arguments))))


def test_values_and_dtypes(mode, backend):
    if mode == "batch":
        mode = "graph"  # see the next test
    compiled = backend.compile(jaxwrap.wrap_function(several), mode, ARGUMENTS)
    expected = several(*map(jnp.asarray, ARGUMENTS))
    for one, two in zip(call(compiled, backend, *ARGUMENTS), expected, strict=True):
        assert one.dtype == two.dtype
        np.testing.assert_allclose(one, two, 1e-6, 1e-6)


@pytest.mark.only("tensorflow")
def test_an_unknown_size_that_the_function_has_to_know(backend):
    compiled = backend.compile(jaxwrap.wrap_function(several), "batch", ARGUMENTS)
    with pytest.raises(ValueError, match=r"float32\[None, 3\].*unknown"):
        compiled(*backend.tensors(ARGUMENTS))  # the batch of `w` has to be the width of `x`


@pytest.mark.only("tensorflow")
def test_a_call_that_tensorflow_has_no_handler_for(backend):
    def fn(x):
        return jnp.linalg.eigvalsh(x @ x.T + jnp.eye(3))

    x = array(3, 3)
    wrapped = jaxwrap.wrap_function(fn)
    np.testing.assert_allclose(to_numpy(wrapped(*backend.tensors([x]))), fn(x), 1e-5, 1e-5)
    with pytest.raises(NotImplementedError, match=r"lapack_ssyevd_ffi.*run_eagerly=True"):
        backend.compile(wrapped, "graph")(*backend.tensors([x]))


@pytest.mark.parametrize("dtype", ["float32", "complex64"])
@pytest.mark.parametrize(
    "options",
    [(True, False, False), (False, True, False), (True, True, True), (False, False, True)],
)
def test_cholesky_and_triangular_solve(mode, backend, options, dtype):
    lower, transpose, conjugate = options

    def fn(x, y):
        matrix = x @ jnp.conj(x.mT) + 3 * jnp.eye(3, dtype=dtype)
        factor = jax.scipy.linalg.cholesky(matrix, lower=lower)
        solve = functools.partial(jax.lax.linalg.triangular_solve, lower=lower)
        left = solve(factor, y, left_side=True, transpose_a=transpose, conjugate_a=conjugate)
        right = solve(factor, y.mT, unit_diagonal=True, transpose_a=transpose)
        return factor, left, right

    args = [array(2, 3, 3).astype(dtype), array(2, 3, 1).astype(dtype)]
    if dtype == "complex64":
        args = [a * (1 + 0.3j * np.sin(np.arange(3))[:, None]).astype(dtype) for a in args]
    compiled = backend.compile(jaxwrap.wrap_function(fn), mode, args)
    for one, two in zip(call(compiled, backend, *args), fn(*map(jnp.asarray, args)), strict=True):
        np.testing.assert_allclose(one, two, 1e-4, 1e-5)


@pytest.mark.trains
@pytest.mark.parametrize("graph", [False, True])
def test_gradients_of_cholesky(graph, backend):
    def fn(x, y):
        factor = jnp.linalg.cholesky(x @ x.mT + 3 * jnp.eye(3))
        return [jax.scipy.linalg.cho_solve((factor, True), y)]

    args = [array(2, 3, 3), array(2, 3, 1)]
    mode = "graph" if graph else "eager"
    actual = backend.vjp(jaxwrap.wrap_function(fn), args, (0, 1), [args[1]], mode)
    _, pullback = jax.vjp(fn, *map(jnp.asarray, args))
    for one, two in zip(actual, pullback([jnp.asarray(args[1])]), strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-4, 1e-5)


@pytest.mark.trains
def test_gradients(mode, backend):
    if mode == "batch":
        mode = "graph"
    rng = np.random.default_rng(3)
    floats = [rng.standard_normal(shape).astype("float32") for shape in [(2, 3), (3,), ()]]
    cotangents = [floats[0], None, None, floats[1], floats[2]]
    actual = backend.vjp(jaxwrap.wrap_function(several), ARGUMENTS, (0, 1, 3), cotangents, mode)

    def float_outputs(x, w, unused):
        outputs = several(x, w, ARGUMENTS[2], unused)
        return [outputs[0], outputs[3], outputs[4]]

    _, pullback = jax.vjp(float_outputs, *(ARGUMENTS[index] for index in (0, 1, 3)))
    for one, two in zip(actual, pullback([jnp.asarray(c) for c in floats]), strict=True):
        np.testing.assert_allclose(
            np.zeros_like(two) if one is None else to_numpy(one), two, 1e-5, 1e-5
        )


@pytest.mark.trains
def test_gradient_penalty(mode, backend):
    def energy(x, w):
        return (jnp.tanh(x @ w) ** 2).sum()

    arrays = [array(3, 4), array(4, 2, seed=1)]
    expected = jax.grad(lambda x, w: (jax.grad(energy)(x, w) ** 2).sum(), (0, 1))(*arrays)
    if mode == "batch":
        weights = arrays.pop()
        energy_of, expected = jaxwrap.wrap_function(lambda x: energy(x, weights)), expected[:1]
    else:
        energy_of = jaxwrap.wrap_function(energy)
    for one, two in zip(backend.penalty(energy_of, arrays, mode), expected, strict=True):
        np.testing.assert_allclose(to_numpy(one), two, 1e-5, 1e-5)


@pytest.mark.trains
def test_complex_gradients_follow_the_backend(backend):
    """JAX's cotangents are the conjugates of what TensorFlow and PyTorch propagate; a real loss shows it."""

    def loss(x, y):
        z = jnp.fft.fft(x + 1j * y) * jnp.exp(1j * x)
        return [z.real**2 + z.imag * x]

    def split(x, y):
        return [jax.lax.complex(x, y)]

    def join(z):
        return [jnp.abs(jnp.fft.fft(z) * jnp.exp(2j * z)) ** 2]

    first, second = jaxwrap.wrap_function(split), jaxwrap.wrap_function(join)
    x, y = array(5) / 9, array(5, seed=1) / 9
    ones = [np.ones(5, "float32")]
    for composed, reference in (
        (jaxwrap.wrap_function(loss), loss),
        (lambda x, y: second(*first(x, y)), lambda x, y: join(*split(x, y))),
    ):
        actual = backend.vjp(composed, [x, y], (0, 1), ones)
        _, pullback = jax.vjp(reference, x, y)
        for one, two in zip(actual, pullback([jnp.ones(5)]), strict=True):
            np.testing.assert_allclose(to_numpy(one), two, 1e-4, 1e-4)


@pytest.mark.parametrize("shape", [(), (0,), (2, 0, 3), (2, 3)], ids=str)
@pytest.mark.parametrize(
    "dtype", ["float32", "float16", "bfloat16", "bool", "int8", "uint8", "int16", "int32"]
)
def test_dtypes_and_shapes(dtype, shape, mode, backend):
    value = array(*shape, dtype=jnp.dtype(dtype))

    def fn(x):
        return {"same": x, "where": jnp.where(x > 0, x, x), "none": None}

    compiled = (
        backend.compile(jaxwrap.wrap_function(fn), mode, [value])
        if shape
        else jaxwrap.wrap_function(fn)
    )
    outputs = call(compiled, backend, value)
    assert outputs["none"] is None
    for name in ("same", "where"):
        assert outputs[name].dtype == value.dtype
        np.testing.assert_array_equal(outputs[name], value)


def test_64_bits_become_32_as_in_jax(mode, backend):
    arrays = [np.arange(3), np.arange(3.0)]
    compiled = backend.compile(jaxwrap.wrap_function(lambda i, x: (i + 1, x * 2)), mode, arrays)
    whole, real = call(compiled, backend, *arrays)
    assert (whole.dtype, real.dtype) == ("int32", "float32")
    np.testing.assert_array_equal(whole, [1, 2, 3])


@pytest.mark.only("tensorflow", "torch")
def test_gradient_of_a_64_bit_argument_has_its_dtype(backend):
    (gradient,) = backend.vjp(
        jaxwrap.wrap_function(lambda x: [x**2]), [np.arange(3.0)], (0,), [np.ones(3)]
    )
    assert to_numpy(gradient).dtype == "float64"
    np.testing.assert_allclose(to_numpy(gradient), [0, 2, 4])


def test_static_leaves_reach_the_function_as_they_are(backend):
    seen = []

    def fn(x, *, flag, scale, activation, options):
        seen.append((flag, scale, activation, options))
        return (activation(x) * scale if flag else x, options["name"], flag)

    wrapped = jaxwrap.wrap_function(fn)
    x = backend.tensors(array(3))
    for flag in (True, 1, False):
        value, name, same = wrapped(
            x, flag=flag, scale=2, activation=jnp.tanh, options={"name": "n", "none": None}
        )
        assert (name, same, type(same)) == ("n", flag, type(flag))
        expected = np.tanh(array(3)) * 2 if flag else array(3)
        np.testing.assert_allclose(to_numpy(value), expected, 1e-6)
    assert seen[0] == (True, 2, jnp.tanh, {"name": "n", "none": None})


def test_static_leaf_that_cannot_be_hashed():
    wrapped = jaxwrap.wrap_function(lambda x: x)
    with pytest.raises(TypeError, match=r"argument x/1 is a set.*hash"):
        wrapped((np.ones(2), {1, 2}))


def test_errors_name_the_parameter_of_the_function():
    def fn(first, /, second, *rest, third=None):
        return second

    wrapped, x, bad = jaxwrap.wrap_function(fn), np.ones(2, "float32"), np.array(["a"])
    for args, kwargs, name in (
        ((bad, x), {}, "first"),
        ((x, {"w": bad}), {}, "second/w"),
        ((x, x, x, [bad]), {}, r"rest\[1\]/0"),
        ((x, x), {"third": bad}, "third"),
    ):
        with pytest.raises(TypeError, match=f"^fn: argument {name}"):
            wrapped(*args, **kwargs)


def test_outputs_are_ordinary_tensors(backend):
    output = jaxwrap.wrap_function(lambda x: x + 1)(*backend.tensors([array(3)]))
    assert type(output) is type(keras.ops.ones(3) + 1)


def test_signature_and_name_are_the_function_s():
    assert jaxwrap.wrap_function(several).__name__ == "several"
    assert jaxwrap.wrap_function(several).__doc__ == several.__doc__


def test_many_shapes_compile_once_each_and_nothing_outlives_the_function(backend):
    traces = 0

    def fn(x):
        nonlocal traces
        traces += 1
        return x * 2

    wrapped = jaxwrap.wrap_function(fn)
    for _ in range(2):
        for size in range(20):
            assert call(wrapped, backend, np.ones(size, "float32")).shape == (size,)
    assert traces == 20
    alive = weakref.ref(fn)
    del wrapped, fn
    gc.collect()
    assert alive() is None


def test_static_values_do_not_add_up(backend, monkeypatch):
    """What is compiled for ever new static values is dropped in its turn."""
    monkeypatch.setattr("jaxwrap._function._MAX_KEPT", 4)

    class Factor:
        def __init__(self, value):
            self.value = value

    wrapped = jaxwrap.wrap_function(lambda x, factor: x * factor.value)
    inputs, alive = backend.tensors(np.ones(3, "float32")), []
    for number in range(12):
        factor = Factor(number)
        np.testing.assert_array_equal(to_numpy(wrapped(inputs, factor)), np.full(3, number))
        alive.append(weakref.ref(factor))
    del factor
    gc.collect()
    assert [one() is not None for one in alive] == [False] * 8 + [True] * 4


def test_writing_to_an_output_changes_nothing_else(backend):
    constant = jnp.arange(3.0)
    given = np.arange(3.0, dtype="float32")
    wrapped = jaxwrap.wrap_function(lambda x: (x, x, constant))
    x = backend.tensors(given)
    outputs = wrapped(x)
    if backend.name in ("torch", "numpy"):
        for output in outputs:
            output += 5
    for value in (x, given, constant):
        np.testing.assert_array_equal(to_numpy(value), [0, 1, 2])
    for value in wrapped(x):
        np.testing.assert_array_equal(to_numpy(value), [0, 1, 2])


def test_nan_passes_through(mode, backend):
    value = np.array([1, np.nan, np.inf, -np.inf], "float32")
    compiled = backend.compile(jaxwrap.wrap_function(lambda x: x * 1), mode, [value])
    np.testing.assert_array_equal(call(compiled, backend, value), value)


def leaves():
    return st.one_of(
        st.none(),
        st.sampled_from(["a", "b", 1, 2.5, True]),
        st.tuples(
            st.sampled_from(["float32", "int32", "bool"]), st.lists(st.integers(0, 3), max_size=2)
        ).map(lambda pair: np.ones(pair[1], pair[0])),
    )


def nests(children):
    return st.one_of(
        st.lists(children, max_size=3),
        st.tuples(children, children),
        st.dictionaries(st.sampled_from("xyz"), children, max_size=3),
    )


@settings(
    max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture]
)
@given(st.recursive(leaves(), nests, max_leaves=6))
def test_any_pytree_comes_back(tree):
    def tensor(leaf):
        return keras.ops.convert_to_tensor(leaf) if isinstance(leaf, np.ndarray) else leaf

    def check(one, two):
        if isinstance(two, np.ndarray):
            assert to_numpy(one).dtype == two.dtype
            np.testing.assert_array_equal(to_numpy(one), two)
        else:
            assert (one, type(one)) == (two, type(two))

    back = jaxwrap.wrap_function(lambda tree: tree)(jax.tree.map(tensor, tree))
    jax.tree.map(check, back, tree)


@pytest.mark.parametrize("layout", ["transposed", "strided", "expanded", "negated"])
def test_any_memory_layout(layout, backend):
    base = backend.tensors(array(4, 4))
    if backend.name == "torch":
        import torch

        value = {
            "transposed": base.T,
            "strided": base[::2, 1:],
            "expanded": base[:1].expand(3, 4),
            "negated": torch.view_as_complex(base.reshape(4, 2, 2)).conj().imag,
        }[layout]
    else:
        value = {
            "transposed": base[:, ::1],
            "strided": base[::2, 1:],
            "expanded": keras.ops.broadcast_to(base[:1], (3, 4)),
            "negated": -base,
        }[layout]
    np.testing.assert_array_equal(
        to_numpy(jaxwrap.wrap_function(lambda x: x + 0)(value)), to_numpy(value)
    )


def test_a_bridge_that_lacks_a_part_cannot_be_made():
    from jaxwrap._bridge import Bridge

    class Half(Bridge):
        name = "half"

        def is_concrete(self, leaf):
            return True

    with pytest.raises(TypeError, match=r"abstract.*copies.*wrap"):
        Half()


# Ragged and sparse tensors.


def irregular(kind):
    """A ragged or sparse tensor, and what the error names as its remedy."""
    if kind == "scipy":
        sparse = pytest.importorskip("scipy.sparse")
        return sparse.csr_matrix(
            np.eye(3, dtype="float32")
        ), r"sparse csr_matrix.*`array.toarray\(\)`"
    if kind in ("ragged", "tf-sparse"):
        import tensorflow as tf

        if kind == "ragged":
            return tf.ragged.constant(
                [[1.0, 2.0], [3.0]]
            ), r"ragged RaggedTensor.*to_tensor\(\).*mask"
        return tf.sparse.from_dense(
            np.eye(3, dtype="float32")
        ), r"sparse SparseTensor.*tf.sparse.to_dense"
    import torch

    if kind == "nested":
        rows = [torch.ones(2), torch.ones(3)]
        return torch.nested.nested_tensor(rows), r"ragged Tensor.*to_padded_tensor.*mask"
    return torch.eye(3).to_sparse(), r"sparse Tensor.*`tensor.to_dense\(\)`"


KINDS = [
    "scipy",
    *(pytest.param(kind, marks=pytest.mark.only("tensorflow")) for kind in ("ragged", "tf-sparse")),
    *(pytest.param(kind, marks=pytest.mark.only("torch")) for kind in ("nested", "torch-sparse")),
]


@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_function_refuses_ragged_and_sparse_tensors(kind):
    tensor, remedy = irregular(kind)

    def double(x):
        return x * 2

    with pytest.raises(TypeError, match="double: argument x: received a " + remedy):
        jaxwrap.wrap_function(double)(tensor)


@pytest.mark.parametrize("built", [False, True])
@pytest.mark.filterwarnings("ignore:The PyTorch API of nested tensors")
@pytest.mark.parametrize("kind", KINDS)
def test_a_layer_refuses_ragged_and_sparse_tensors(kind, built):
    tensor, remedy = irregular(kind)
    layer = jaxwrap.JaxLayer(lambda params, inputs: inputs * params, params=np.ones(3, "float32"))
    if built:
        layer(np.ones((3, 3), "float32"))
    with pytest.raises(TypeError, match="(?s)JaxLayer 'jax_layer.*received a " + remedy):
        layer(tensor)


@pytest.mark.only("tensorflow")
@pytest.mark.parametrize("whole", [False, True])
def test_a_permutation_of_an_unknown_batch(backend, whole):
    def shuffle(x):
        return jax.random.permutation(jax.random.key(0), x if whole else x.shape[0])

    compiled = backend.compile(jaxwrap.wrap_function(shuffle), "batch", [array(4, 3)])
    remedy = r"(?s)shuffle: .*`batch_size` in keras.Input.*unknown size 0 of float32\[None, 3\]"
    with pytest.raises(ValueError, match=remedy):
        compiled(*backend.tensors([array(4, 3)]))
