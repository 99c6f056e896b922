"""The names that a file may hold, and what they stand for. Nothing else is ever made of a string in a file."""

from __future__ import annotations

import importlib
import sys
from collections.abc import Callable
from typing import Any, TypeVar

import keras

_Registered = TypeVar("_Registered")

# What our decorator has registered: Keras's own takes functions, and classes that have `get_config`, only.
_OBJECTS: dict[str, Any] = {}

# Names of libraries that a file may hold, by the module that they are public in: functions of arrays without side
# effects, dtypes, and classes that only hold data and such functions. They are looked up here, never imported by the
# name in a file; the first module that has an object names it.
_LIBRARY_NAMES = {
    "jax.nn": (
        "celu dot_product_attention elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu "
        "log_sigmoid log_softmax logsumexp mish one_hot relu relu6 selu sigmoid silu soft_sign softmax softplus "
        "sparse_plus sparse_sigmoid squareplus standardize swish tanh"
    ),
    "jax.nn.initializers": "ones zeros",
    "jax.numpy": (
        "abs absolute add all any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin bfloat16 bool_ "
        "cbrt ceil clip complex128 complex64 concatenate conj cos cosh cumprod cumsum divide dot einsum exp exp2 "
        "expm1 float16 float32 float64 float8_e4m3b11fnuz float8_e4m3fn float8_e4m3fnuz float8_e5m2 float8_e5m2fnuz "
        "floor hypot imag int16 int32 int64 int8 log log10 log1p log2 logaddexp matmul max maximum mean median min "
        "minimum multiply negative power prod real reciprocal round sign sin sinc sinh sqrt square std "
        "subtract sum tan tanh true_divide uint16 uint32 uint64 uint8 var where"
    ),
    "jax.lax": (
        "Precision abs add conv_general_dilated cos dot dot_general erf erf_inv erfc exp expm1 floor integer_pow "
        "lgamma log log1p logistic max min mul neg pmax pmean pmin psum reduce_precision rsqrt sin sqrt stop_gradient "
        "sub tan tanh"
    ),
    "jax.scipy.special": "erf erfc expit log_ndtr logit logsumexp ndtr",
    "flax.linen": (
        "BatchApply BatchNorm Bidirectional Conv ConvLSTMCell ConvLocal ConvTranspose Dense DenseGeneral Dropout "
        "Einsum Embed Fp8DirectDotGeneralOp Fp8DotGeneralOp Fp8Einsum GRUCell GroupNorm InstanceNorm LSTMCell "
        "LayerNorm MGUCell MultiHeadAttention MultiHeadDotProductAttention NANOOFp8DotGeneralOp OptimizedLSTMCell "
        "PReLU RMSNorm RNN SelfAttention Sequential SimpleCell SpectralNorm WeightNorm avg_pool "
        "dot_product_attention max_pool normalize"
    ),
    "flax.linen.dtypes": "promote_dtype",
    "flax.core": "FrozenDict",
    "flax.nnx": (
        "BatchNorm BatchStat Bidirectional Cache Conv ConvTranspose Dropout Einsum Embed GRUCell GroupNorm "
        "InstanceNorm Intermediate LSTMCell LayerNorm Linear LinearGeneral LoRA LoRALinear LoRAParam "
        "MultiHeadAttention OptimizedLSTMCell PReLU Param Perturbation RMSNorm RNN Sequential SimpleCell "
        "SpectralNorm Variable WeightNorm avg_pool dot_product_attention max_pool"
    ),
    "haiku.initializers": (
        "Constant Identity Orthogonal RandomNormal RandomUniform TruncatedNormal UniformScaling VarianceScaling"
    ),
    "equinox": "is_array is_inexact_array",
    "equinox.nn": (
        "AdaptiveAvgPool1d AdaptiveAvgPool2d AdaptiveAvgPool3d AdaptiveMaxPool1d AdaptiveMaxPool2d AdaptiveMaxPool3d "
        "AvgPool1d AvgPool2d AvgPool3d BatchNorm Conv Conv1d Conv2d Conv3d ConvTranspose ConvTranspose1d "
        "ConvTranspose2d ConvTranspose3d Dropout Embedding GRUCell GroupNorm Identity LSTMCell Lambda LayerNorm "
        "Linear MLP MaxPool1d MaxPool2d MaxPool3d MultiheadAttention PReLU RMSNorm RotaryPositionalEmbedding "
        "Sequential SpectralNorm WeightNorm"
    ),
    # Optax: factories of transformations, and functions of arrays.
    "optax": (
        "adabelief adadelta adafactor adagrad adam adamax adamaxw adamw adan amsgrad fromage lamb lars lbfgs lion "
        "noisy_sgd novograd optimistic_adam_v2 optimistic_gradient_descent polyak_sgd radam rmsprop rprop sgd "
        "sign_sgd signum sm3 yogi"
    ),
    "optax.contrib": (
        "acprop ademamix adopt cocob dadapt_adamw dpsgd galore madgrad momo momo_adam muon prodigy schedule_free_adamw "
        "schedule_free_sgd simplified_ademamix sophia"
    ),
    "optax.losses": (
        "binary_dice_loss cosine_distance cosine_similarity dice_loss generalized_kl_divergence "
        "hinge_loss huber_loss kl_divergence kl_divergence_with_log_targets l2_loss log_cosh "
        "multiclass_generalized_dice_loss multiclass_hinge_loss multiclass_perceptron_loss multiclass_sparsemax_loss "
        "ntxent perceptron_loss poly_loss_cross_entropy ranking_softmax_loss safe_softmax_cross_entropy "
        "sigmoid_binary_cross_entropy sigmoid_focal_loss softmax_cross_entropy "
        "softmax_cross_entropy_with_integer_labels sparsemax_loss squared_error"
    ),
    "numpy": (
        "bool_ complex128 complex64 float16 float32 float64 int16 int32 int64 int8 uint16 uint32 uint64 uint8"
    ),
    "builtins": "bool complex float int",
    "collections": "OrderedDict",
    "keras.regularizers": "L1 L1L2 L2 OrthogonalRegularizer",
    "keras.constraints": "MaxNorm MinMaxNorm NonNeg UnitNorm",
}
# Functions that return functions, which are saved as the call that made them.
_LIBRARY_FACTORIES = {
    "jax.nn.initializers": (
        "constant delta_orthogonal normal orthogonal truncated_normal uniform variance_scaling"
    ),
    "flax.linen": "with_logical_partitioning with_partitioning",
    "optax.schedules": (
        "constant_schedule exponential_decay join_schedules piecewise_constant_schedule polynomial_schedule "
        "cosine_decay_schedule"
    ),
}


def _table(names: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {
        f"{module}.{name}": (module, name)
        for module, all_ in names.items()
        for name in all_.split()
    }


_NAMES = _table(_LIBRARY_NAMES)
_FACTORIES = _table(_LIBRARY_FACTORIES)


def register_serializable(
    package: str, name: str | None = None
) -> Callable[[_Registered], _Registered]:
    """Gives an object a name by which files may refer to it: a function, a class, a Haiku transform, an enum.

    Loading looks names up and never imports anything, so an object has to be registered when a file is written and,
    under the same name, when it is read. Classes need no `get_config`: the fields of a dataclass (a Linen or an Equinox
    module is one), of a namedtuple or of an enum are saved by themselves. What
    `keras.saving.register_keras_serializable` has registered, jaxwrap finds as well.

    Args:
        package: What keeps names of different origins apart: the name of your package, say.
        name: The name; by default the object's own.

    Returns:
        A decorator, which returns what it is given. For an object that is there already, call it:
        `register_serializable("mine", "encoder")(encoder)`.

    Raises:
        TypeError: For a package or a name that is no string, or an object that has no name of its own if none is given.

    Example:
        >>> import flax.linen as nn, jaxwrap
        >>> @jaxwrap.register_serializable("docs")
        ... class Net(nn.Module):
        ...     width: int = 8
        ...     @nn.compact
        ...     def __call__(self, x):
        ...         return nn.Dense(self.width)(x)
        >>> layer = jaxwrap.FlaxLayer(Net(width=3))
        >>> jaxwrap.FlaxLayer.from_config(layer.get_config()).module.width
        3
    """

    def register(obj: _Registered) -> _Registered:
        own = name if name is not None else getattr(obj, "__name__", None)
        for what, value in (("package", package), ("name", own)):
            if not isinstance(value, str) or not value:
                raise TypeError(
                    f"register_serializable: expected a string for `{what}`, received {value!r}, for {obj!r}."
                )
        _OBJECTS[f"{package}>{own}"] = obj
        return obj

    return register


def name_of(obj: Any) -> str | None:
    """The name by which a file may refer to an object, if there is one."""
    for name, registered in (*_OBJECTS.items(), *keras.saving.get_custom_objects().items()):
        if registered is obj:
            return name
    for full, (module, name) in _NAMES.items():
        # A library that has not been imported has made no object.
        if getattr(sys.modules.get(module), name, None) is obj:
            return full
    return None


def find(name: Any) -> Any:
    """What a name in a file stands for.

    Raises:
        ValueError: If it is not registered, and none of the names of libraries that a file may hold.
    """
    if isinstance(name, str):
        if name in _OBJECTS:
            return _OBJECTS[name]
        if (registered := keras.saving.get_registered_object(name)) is not None:
            return registered
        if name in _NAMES:
            return _load(*_NAMES[name])
    raise ValueError(
        f"the name {name!r} is not registered. Import what defines and registers it before loading, with "
        "`jaxwrap.register_serializable(package, name)` say. Names are never imported from a file."
    )


def factory_name(obj: Any) -> str | None:
    """The name of the library's factory that made a function, if there is one."""
    code = getattr(getattr(obj, "__code__", None), "co_qualname", "")
    maker, _, inner = code.partition(".<locals>.")
    if not inner:
        return None
    for full, (module, name) in _FACTORIES.items():
        factory = getattr(sys.modules.get(module), name, None)
        if name == maker and getattr(factory, "__globals__", None) is obj.__globals__:
            return full
    return None


def find_factory(name: Any) -> Callable[..., Any]:
    """The factory of that name. Raises ValueError if it is none of those that a file may hold."""
    if isinstance(name, str) and name in _FACTORIES:
        return _load(*_FACTORIES[name])
    raise ValueError(
        f"{name!r} is no factory that a file may name; there are {', '.join(_FACTORIES)}."
    )


def _load(module: str, name: str) -> Any:
    try:
        return getattr(importlib.import_module(module), name)
    except ImportError as error:
        raise ValueError(
            f"{module}.{name} cannot be had, as {error.name!r} is not installed."
        ) from error
