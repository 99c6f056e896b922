"""What PyTorch's modules and optimizers see of a layer."""

import copy

import jax
import jax.numpy as jnp
import keras
import numpy as np
import pytest

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
