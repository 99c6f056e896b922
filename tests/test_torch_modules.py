"""What PyTorch's modules and optimizers see of a layer."""

import copy
import warnings

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

import jaxwrap
from jaxwrap import JaxLayer

pytestmark = pytest.mark.only("torch")


def dropout(params, state, rng, inputs, training):
    """Count calls, and drop half of the inputs in training."""
    outputs = inputs @ params["w"]
    if training:
        outputs = jnp.where(jax.random.bernoulli(rng, 0.5, outputs.shape), outputs, 0)
    return outputs, {"calls": state["calls"] + 1, "flag": ~state["flag"]}


def init(rng, inputs):
    values = {"w": jnp.ones((inputs.shape[-1], 8))}
    return values, {"calls": jnp.zeros((), "int32"), "flag": jnp.zeros((), bool)}


def make(**options):
    layer = JaxLayer(dropout, init, seed=0, **options)
    layer.build((None, 3))
    return layer


def test_parameters_are_what_can_be_trained():
    import torch

    layer = make(name="layer")
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
    assert {p.dtype for p in net.parameters()} == {torch.float32}
    assert torch.nn.utils.parameters_to_vector(net.parameters()).shape == (9 + 3 + 24,)
    seed = layer.seed_generator.state
    assert any(value is seed.value for value in net.buffers())
    assert {v.path for v in layer.variables} == {
        name.removeprefix("_torch_params.") for name in layer.state_dict()
    }


def test_buffers_are_saved_and_loaded():
    import torch

    one, other = make(name="layer"), make(name="layer")
    for _ in range(3):
        expected_from = copy.deepcopy(one.state_dict())
        expected = one(torch.ones(2, 3), training=True)
    other.load_state_dict(expected_from)
    assert int(other.state["calls"].value) == 2
    torch.testing.assert_close(other(torch.ones(2, 3), training=True), expected)
    for key, value in one.state_dict().items():
        torch.testing.assert_close(other.state_dict()[key], value)


@pytest.mark.parametrize("given", [False, True])
def test_lbfgs_trains_a_layer_that_draws(given):
    import torch

    values = init(None, np.ones((1, 3)))
    layer = JaxLayer(dropout, params=values[0], state=values[1]) if given else make()
    optimizer = torch.optim.LBFGS(layer.parameters(), lr=0.5)

    def closure():
        optimizer.zero_grad()
        loss = (layer(torch.eye(3), training=False) - 3).square().mean()
        loss.backward()
        return loss

    for _ in range(5):
        optimizer.step(closure)
    np.testing.assert_allclose(layer.get_variables()["params"]["w"], np.full((3, 8), 3), 1e-3)


def test_a_moved_module_keeps_its_variables():
    import torch

    layer = make()
    # As `to("cuda")` does, this puts a new tensor in the place of each.
    layer._apply(lambda tensor: tensor.clone())
    held = {id(value) for value in (*layer.parameters(), *layer.buffers())}
    assert held == {id(variable.value) for variable in layer.variables}
    layer(torch.ones(2, 3), training=True)
    assert sum(int(value) for name, value in layer.state_dict().items() if "calls" in name) == 1


def linear(params, inputs):
    """Multiply by a matrix."""
    return inputs @ params["w"]


def linear_init(rng, inputs):
    return {"w": jnp.ones((inputs.shape[-1], 2))}


@pytest.mark.parametrize("is_nested", [False, True])
def test_variables_that_an_optimizer_misses_warn(is_nested):
    import torch

    layer = JaxLayer(linear, linear_init, name="late")
    inner = keras.Sequential([layer]) if is_nested else layer
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.Sequential(inner))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with pytest.warns(UserWarning, match=r"late.*optimizer of PyTorch.*layer\.build"):
        net(torch.ones(2, 3))
    assert len(optimizer.param_groups[0]["params"]) == 2
    with warnings.catch_warnings():
        warnings.simplefilter("error", UserWarning)
        net(torch.ones(2, 3))


def _after_build(torch):
    layer = JaxLayer(linear, linear_init)
    layer.build((None, 3))
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(2, 3)).sum().backward()
    return optimizer


def _given(torch):
    layer = JaxLayer(linear, params={"w": np.ones((3, 2), "float32")})
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), layer)
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    net(torch.ones(2, 3)).sum().backward()
    return optimizer


def _without_grad(torch):
    net = torch.nn.Sequential(torch.nn.Linear(3, 3), JaxLayer(linear, linear_init))
    optimizer = torch.optim.SGD(net.parameters(), 0.1)
    with torch.no_grad():
        net(torch.ones(2, 3))
    return optimizer


def _of_another_net(torch):
    other = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    torch.nn.Sequential(torch.nn.Linear(3, 3), JaxLayer(linear, linear_init))(torch.ones(2, 3))
    JaxLayer(linear, linear_init)(torch.ones(2, 3))
    return optimizer


def _fit(torch):
    other = torch.nn.Linear(3, 3)
    optimizer = torch.optim.SGD(other.parameters(), 0.1)
    model = keras.Sequential([keras.layers.Dense(3), JaxLayer(linear, linear_init)])
    model.compile(keras.optimizers.SGD(0.1), "mse")
    model.fit(np.ones((4, 3), "float32"), np.ones((4, 2), "float32"), verbose=0)
    return optimizer


def _functional(torch):
    inputs = keras.Input((3,))
    model = keras.Model(inputs, JaxLayer(linear, linear_init)(keras.layers.Dense(3)(inputs)))
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    model(torch.ones(2, 3)).sum().backward()
    return optimizer


@pytest.mark.parametrize(
    "use", [_after_build, _given, _without_grad, _of_another_net, _fit, _functional]
)
def test_no_warning_where_no_optimizer_misses_anything(use):
    import torch

    with warnings.catch_warnings():
        warnings.filterwarnings("error", ".*optimizer of PyTorch")
        use(torch)


def show(inputs, training):
    """Return 1 in training and 0 in inference."""
    return jnp.full_like(inputs, float(training))


def _directly(torch, layer):
    return layer


def _in_torch(torch, layer):
    return torch.nn.Sequential(torch.nn.Sequential(layer))


def _in_keras(torch, layer):
    # Built by the first call, with symbolic tensors.
    return torch.nn.Sequential(keras.Sequential([keras.Sequential([layer])]))


def _in_functional(torch, layer):
    inputs = keras.Input((3,))
    return torch.nn.Sequential(keras.Model(inputs, layer(inputs)))


@pytest.mark.parametrize("place", [_directly, _in_torch, _in_keras, _in_functional])
def test_layers_follow_the_mode_of_torch(place):
    import torch

    inputs = torch.zeros(2, 3)
    net = place(torch, JaxLayer(show))
    assert not net.train()(inputs).any()
    assert jaxwrap.follow_torch_mode(net) is net
    # Twice, since the second call of a kind takes the short way.
    for _ in range(2):
        assert net.train()(inputs).all()
        assert not net.eval()(inputs).any()


@pytest.mark.parametrize("is_unbuilt", [False, True])
def test_a_mode_is_not_kept_in_a_functional_model(is_unbuilt):
    import torch

    net = torch.nn.Sequential(keras.Sequential([JaxLayer(show)]))
    if not is_unbuilt:
        net(torch.zeros(2, 3))
    jaxwrap.follow_torch_mode(net.train())
    assert net(torch.zeros(2, 3)).all()
    assert not net.eval()(torch.zeros(2, 3)).any()


def test_passed_training_wins_over_the_mode():
    import torch

    inputs = torch.zeros(2, 3)
    layer = jaxwrap.follow_torch_mode(JaxLayer(show))
    model = keras.Sequential([layer])
    for _ in range(2):
        assert not layer.train()(inputs, training=False).any()
        assert not model.train()(inputs, training=False).any()
        assert not model.predict(inputs, verbose=0).any()
        assert layer.eval()(inputs, training=True).all()
        assert model.eval()(inputs, training=True).all()
        assert not layer(inputs, training=None).any()


def test_only_modules_have_a_mode():
    with pytest.raises(TypeError, match=r"torch\.nn\.Module.*received a int.*training="):
        jaxwrap.follow_torch_mode(3)


def test_functional_call_reaches_the_variables():
    """Gradients by parameters that `torch.func` passes, against JAX; the layer has its own values again after it."""
    import torch

    layer = JaxLayer(
        lambda params, inputs: jnp.tanh(inputs @ params["w"]),
        lambda rng, inputs: {"w": jax.random.normal(rng, (inputs.shape[-1], 8))},
        seed=0,
        name="layer",
    )
    layer.build((None, 3))
    net = torch.nn.Sequential(layer)
    inputs = torch.ones(2, 3)
    before = net(inputs)
    params = {name: value.detach() * 2 for name, value in net.named_parameters()}

    def loss(params):
        return torch.func.functional_call(net, params, (inputs,)).sum()

    (gradient,) = torch.func.grad(loss)(params).values()
    w = layer.get_variables()["params"]["w"]
    expected = jax.grad(lambda w: jnp.tanh(np.ones((2, 3)) @ w).sum())(2 * w)
    np.testing.assert_allclose(gradient, expected, 1e-5, 1e-6)
    torch.testing.assert_close(net(inputs), before)
    state = {name: value * 3 for name, value in net.state_dict().items()}
    net.load_state_dict(state, assign=True)
    np.testing.assert_allclose(layer.get_variables()["params"]["w"], 3 * w, 1e-6)
