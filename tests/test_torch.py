"""What PyTorch's own tools make of a layer: compilers, and processes that load data."""

import gc

import jax
import jax.numpy as jnp
import keras
import models
import numpy as np
import pytest
from backends import to_numpy

from jaxwrap import JaxLayer, Rule

pytestmark = pytest.mark.only("torch")


class Rows:
    """A data set that is pickled for spawned workers."""

    def __len__(self):
        return 12

    def __getitem__(self, index):
        return np.full(5, index, "float32"), np.full(3, index, "float32")


class Around:
    """Makes a torch module of a layer between torch's own, each time with the same weights."""

    def __new__(cls):
        import torch

        class Module(torch.nn.Module):
            def __init__(self):
                super().__init__()
                self.before = torch.nn.Linear(5, 5)
                self.layer = JaxLayer(models.mlp_call, models.mlp_init, seed=0)
                self.layer.build((None, 5))

            def forward(self, inputs):
                return torch.sin(self.layer(torch.tanh(self.before(inputs)))) * 2

        torch.manual_seed(0)
        return Module()


@pytest.mark.parametrize("backend_of_dynamo", ["eager", "aot_eager"])
def test_a_compiled_module_computes_the_same(backend_of_dynamo):
    """The layer is left out of what torch compiles; what is around it is compiled."""
    import torch

    rng = np.random.default_rng(0)
    module = Around()
    compiled = torch.compile(module, backend=backend_of_dynamo)
    for size in (3, 3, 4):
        inputs = torch.tensor(rng.standard_normal((size, 5)).astype("float32"), requires_grad=True)
        weights = [module.before.weight, *(v.value for v in module.layer.trainable_variables)]
        results = []
        for called in (module, compiled):
            outputs = called(inputs)
            gradients = torch.autograd.grad(outputs.sum(), [inputs, *weights])
            results.append([outputs.detach(), *gradients])
        for one, two in zip(*results, strict=True):
            np.testing.assert_allclose(one, two, 1e-5, 1e-6)
        with torch.no_grad():
            np.testing.assert_allclose(module(inputs), compiled(inputs), 1e-5, 1e-6)


@pytest.mark.parametrize("method", ["fork", "spawn"])
def test_workers_load_data_while_a_layer_is_trained(method):
    """Workers are started when JAX has threads; they only load data."""
    import torch

    inputs = keras.Input((5,))
    model = keras.Model(inputs, JaxLayer(models.mlp_call, models.mlp_init, seed=0)(inputs))
    model.compile("sgd", "mse", run_eagerly=True)
    model.predict(np.ones((2, 5), "float32"), verbose=0)
    loader = torch.utils.data.DataLoader(
        Rows(), batch_size=4, num_workers=2, multiprocessing_context=method, timeout=60
    )
    history = model.fit(loader, verbose=0).history
    assert np.isfinite(history["loss"]).all()


@pytest.mark.gpu
def test_tensors_on_a_gpu():
    import torch

    layer = JaxLayer(models.mlp_call, models.mlp_init, seed=0)
    inputs = torch.ones(2, 5, device="cuda", requires_grad=True)
    with keras.device("cuda:0"):
        outputs = layer(inputs)
        outputs.sum().backward()
    assert outputs.is_cuda
    assert inputs.grad.is_cuda
    params = [[leaf["w"], leaf["b"]] for leaf in layer.get_variables()["params"]]
    expected = np.tanh(np.ones((2, 5)) @ params[0][0] + params[0][1]) @ params[1][0] + params[1][1]
    np.testing.assert_allclose(to_numpy(outputs.detach().cpu()), expected, 1e-3, 1e-3)
    with pytest.raises(RuntimeError, match="on several devices: cpu, cuda:0"):
        layer(inputs.detach().cpu())


@pytest.mark.gpu
def test_a_gpu_that_jax_does_not_have(monkeypatch):
    import torch

    from jaxwrap._bridge import _torch_tensors

    monkeypatch.setattr(_torch_tensors, "_jax_has_cuda", lambda: False)
    with pytest.raises(
        RuntimeError, match=r"(?s)on cuda:0, and JAX has.*Install JAX.*keras\.device"
    ):
        _torch_tensors.check_devices([torch.ones(1, device="cuda")])


def test_variables_that_exist_at_construction_are_parameters():
    """An optimizer that is made before the first call trains them, and `load_state_dict` fills them."""
    import torch

    def net(seed):
        params = jax.tree.map(
            np.asarray, models.mlp_init(jax.random.PRNGKey(seed), jnp.ones((1, 5)))
        )
        torch.manual_seed(seed)
        return torch.nn.Sequential(JaxLayer(models.mlp_call, params=params), torch.nn.Linear(3, 1))

    one, two = net(1), net(2)
    assert len(list(one.parameters())) == 6
    optimizer = torch.optim.SGD(one.parameters(), 0.1)
    before = [to_numpy(parameter.detach()).copy() for parameter in one.parameters()]
    inputs = keras.ops.convert_to_tensor(np.ones((4, 5), "float32"))
    one(inputs).sum().backward()
    optimizer.step()
    moved = [
        (old != to_numpy(parameter.detach())).any()
        for old, parameter in zip(before, one.parameters(), strict=True)
    ]
    assert all(moved)
    values = [parameter.detach().clone() for parameter in one.parameters()]
    states = dict(zip(two.state_dict(), one.state_dict().values(), strict=True))
    two.load_state_dict(states)
    for value, parameter in zip(values, two.parameters(), strict=True):
        np.testing.assert_array_equal(to_numpy(value), to_numpy(parameter.detach()))
    np.testing.assert_allclose(to_numpy(two(inputs).detach()), to_numpy(one(inputs).detach()), 1e-6)


def deep(params, inputs):
    for _ in range(8):
        inputs = jnp.sin(inputs @ params)
    return inputs


def test_residuals_are_freed_after_backward():
    """As torch frees those of its own layers, though the loss, and so the graph, is kept."""
    layer = JaxLayer(deep, params=np.eye(256, dtype="float32"))
    inputs = keras.ops.convert_to_tensor(np.ones((512, 256), "float32"))

    def live():
        # What earlier tests have left must not be collected between two counts.
        gc.collect()
        return sum(array.nbytes for array in jax.live_arrays())

    def step(retain):
        loss = (layer(inputs) ** 2).mean()
        loss.backward(retain_graph=retain)
        return loss

    kept = [step(retain=False)]
    before = live()
    kept += [step(retain=False) for _ in range(5)]
    assert live() - before < 2**20
    kept.append(step(retain=True))
    assert live() - before > 2**21
    first = layer.params.value.grad.clone()
    kept[-1].backward()  # again, by the same residuals
    assert (layer.params.value.grad != first).any()
    with pytest.raises(RuntimeError, match="backward through the graph a second time"):
        kept[0].backward()


def test_gradients_under_hooks_of_saved_tensors():
    import torch

    layer = JaxLayer(deep, params=np.eye(8, dtype="float32"))
    inputs = keras.ops.convert_to_tensor(np.ones((4, 8), "float32"))
    layer(inputs).sum().backward()
    expected = layer.params.value.grad.clone()
    layer.params.value.grad = None
    with torch.autograd.graph.saved_tensors_hooks(lambda t: t.clone(), lambda t: t):
        output = layer(inputs).sum()
    output.backward()
    np.testing.assert_allclose(to_numpy(layer.params.value.grad), to_numpy(expected), 1e-5)


def test_a_kept_small_gradient_holds_no_others():
    """Small gradients come from JAX in vectors, of up to 64 KiB of gradients that are alike in size."""
    import torch

    rng = np.random.default_rng(0)
    params = [rng.standard_normal((64, 64)).astype("float32") / 8 for _ in range(9)]
    params += [np.float32(2), np.zeros((), "complex64"), np.ones(3, "complex64")]

    def call(params, inputs):
        *matrices, scale, one, three = params
        for matrix in matrices:
            inputs = jnp.tanh(inputs @ matrix)
        return inputs * scale * jnp.abs(one + three).sum()

    x = rng.standard_normal((2, 64)).astype("float32")
    # Complex leaves as they are.
    plain = {".*": Rule(reparametrize=False)}
    layer = JaxLayer(call, params=params, rules=plain)
    tensors = [variable.value for variable in layer.trainable_variables]
    output = layer(keras.ops.convert_to_tensor(x)).sum()
    gradients = torch.autograd.grad(output, tensors)
    expected = jax.grad(lambda params: call(params, x).sum())(params)
    for actual, value in zip(gradients, expected, strict=True):
        np.testing.assert_allclose(to_numpy(actual), np.conj(value), 1e-3, 1e-4)
    held = [gradient.untyped_storage().nbytes() for gradient in gradients]
    assert max(held) <= 2**16
    vectors = {gradient.untyped_storage().data_ptr() for gradient in gradients}
    assert len(vectors) < 6


def scaled(params, inputs):
    return inputs * params["scale"]


@pytest.mark.parametrize("bit", ["_conj", "_neg_view"])
def test_views_by_a_bit(bit):
    """The conjugate and the negative of a tensor share its memory, which JAX would read without them."""
    import torch

    values = (np.arange(1, 65) * (1 + 2j)).astype("complex64")
    layer = JaxLayer(scaled, params={"scale": values}, rules={".*": Rule(reparametrize=False)})
    tensor = layer.trainable_variables[0].value
    ones = torch.ones(64, dtype=torch.complex64)
    np.testing.assert_allclose(layer(ones).detach(), values)
    tensor.data = getattr(torch, bit)(tensor.data)
    changed = values.conj() if bit == "_conj" else -values
    for inputs in (ones, torch.conj(ones * 2j), torch._neg_view(ones)):
        view = inputs.clone().requires_grad_()
        output = layer(getattr(torch, bit)(view))
        product = getattr(torch, bit)(view) * torch.from_numpy(changed)
        np.testing.assert_allclose(output.detach(), product.detach())
        one, two = (torch.autograd.grad(y, view, torch.conj(y.detach())) for y in (output, product))
        np.testing.assert_allclose(one[0].resolve_conj(), two[0].resolve_conj())


def test_other_strides_at_the_same_place():
    """The transpose of a parameter has its pointer, size and dtype. Calls under autocast see it too."""
    import torch

    values = np.arange(64, dtype="float32").reshape(8, 8)
    layer = JaxLayer(scaled, params={"scale": values})
    tensor, ones = layer.trainable_variables[0].value, torch.ones(8, 8)
    for expected in (values, values.T, values):
        with torch.no_grad(), torch.autocast("cpu"):
            np.testing.assert_allclose(layer(ones), expected)
        with torch.no_grad():
            np.testing.assert_allclose(layer(ones), expected)
            tensor.data = tensor.data.T


def test_state_of_many_kinds():
    """Small arrays cross in vectors by dtype, and scalars, empty and large arrays beside them."""
    import torch

    shapes = {"a": (3,), "b": (2, 2), "scalar": (), "empty": (0, 2), "large": (130, 130)}
    state = {name: np.full(shape, 2, "float32") for name, shape in shapes.items()}
    state |= {"count": np.int32(1), "counts": np.arange(3, dtype="int32")}

    def call(params, state, inputs):
        return inputs * params["scale"], {name: value * 3 for name, value in state.items()}

    layer = JaxLayer(call, params={"scale": np.float32(1)}, state=state)
    with torch.no_grad():
        layer(torch.ones(2), training=True)
    layer(torch.ones(2), training=True)
    for name, value in state.items():
        kept = layer.state[name].value
        np.testing.assert_array_equal(kept, value * 9)
        assert tuple(kept.shape) == np.shape(value)


@pytest.mark.parametrize("name", ["half", "bfloat16", "double"])
@pytest.mark.filterwarnings("ignore:JAX computes float64")
def test_the_dtype_of_a_module_changes(name):
    """Calls and gradients follow, as do those after it has changed back."""
    import torch

    rng = np.random.default_rng(0)
    scale, x = (rng.standard_normal(64).astype("float32") for _ in range(2))
    state = {"last": np.zeros(64, "float32")}

    def call(params, state, inputs, training):
        output = scaled(params, inputs)
        return output, {"last": output if training else state["last"]}

    layer = JaxLayer(call, params={"scale": scale}, state=state)
    inputs = keras.ops.convert_to_tensor(x)

    def check(values):
        tensor = layer.trainable_variables[0].value
        output = layer(inputs, training=True)
        expected = x * to_numpy(values.float())
        np.testing.assert_allclose(to_numpy(output.detach()), expected, 1e-6)
        (gradient,) = torch.autograd.grad(output.sum(), tensor)
        assert gradient.dtype is tensor.dtype
        np.testing.assert_allclose(to_numpy(gradient.float()), x, 1e-2)
        last = layer.get_variables()["state"]["last"]
        np.testing.assert_allclose(last.astype("float32"), expected, 1e-2)

    check(torch.from_numpy(scale))
    moved = getattr(torch.from_numpy(scale), name)()
    getattr(layer, name)()
    assert next(layer.parameters()).dtype is moved.dtype
    check(moved)
    with torch.no_grad():
        layer.trainable_variables[0].value.mul_(2)
    check(moved * 2)
    layer.float()
    check(moved.float() * 2)


def test_a_module_in_float64_is_computed_in_float32(monkeypatch):
    import torch

    from jaxwrap import _dtypes

    monkeypatch.setattr(_dtypes, "_has_warned", False)
    layer = JaxLayer(scaled, params={"scale": np.ones(2, "float32")})
    layer(torch.ones(2))
    layer.double()
    with pytest.warns(UserWarning, match="float64 inputs in float32") as warned:
        layer(torch.ones(2))
    assert warned[0].filename == __file__
