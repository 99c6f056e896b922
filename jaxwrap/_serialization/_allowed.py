"""The names of libraries that a file may hold. Review each before you add it: a file can call it with any arguments."""

from __future__ import annotations

# By the module in which a name is public: functions of arrays without side effects, dtypes, and classes that only hold
# data and such functions. Not `einsum`, which may look for the best order of a hundred operands for years. What repeats
# something by a number is bounded in `_loops.py`. The first module that has an object names it.
NAMES_BY_MODULE = {
    "jax.nn": (
        "celu dot_product_attention elu gelu glu hard_sigmoid hard_silu hard_swish hard_tanh identity leaky_relu "
        "log_sigmoid log_softmax logsumexp mish one_hot relu relu6 selu sigmoid silu soft_sign softmax softplus "
        "sparse_plus sparse_sigmoid squareplus standardize swish tanh"
    ),
    "jax.nn.initializers": "ones zeros",
    "jax.numpy": (
        "abs absolute add all any arccos arccosh arcsin arcsinh arctan arctan2 arctanh argmax argmin bfloat16 bool_ "
        "cbrt ceil clip complex128 complex64 concatenate conj cos cosh cumprod cumsum divide dot exp exp2 "
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
# Functions that return functions. A file holds the call, not the function that it returned.
_FACTORIES_BY_MODULE = {
    "jax.nn.initializers": (
        "constant delta_orthogonal normal orthogonal truncated_normal uniform variance_scaling"
    ),
    "flax.linen": "with_logical_partitioning with_partitioning",
    "optax.schedules": (
        "constant_schedule exponential_decay join_schedules piecewise_constant_schedule polynomial_schedule "
        "cosine_decay_schedule"
    ),
}
# The Flax models of Hugging Face, by what they are for. Nothing but `from_transformers` makes them, of data.
_TRANSFORMERS = {
    "EncoderModel": ("MT5 T5"),
    "ForAudioClassification": ("Whisper"),
    "ForCTC": ("Wav2Vec2"),
    "ForCausalLM": (
        "Bart Bert BigBird Bloom Electra GPTJ GPTNeo Gemma Llama Mistral OPT Roberta RobertaPreLayerNorm XGLM "
        "XLMRoberta"
    ),
    "ForConditionalGeneration": (
        "Bart Blenderbot BlenderbotSmall LongT5 MBart MT5 Pegasus T5 Whisper"
    ),
    "ForImageClassification": ("Beit Dinov2 RegNet ResNet ViT"),
    "ForMaskedImageModeling": ("Beit"),
    "ForMaskedLM": (
        "Albert Bert BigBird DistilBert Electra RoFormer Roberta RobertaPreLayerNorm XLMRoberta"
    ),
    "ForMultipleChoice": (
        "Albert Bert BigBird DistilBert Electra RoFormer Roberta RobertaPreLayerNorm XLMRoberta"
    ),
    "ForNextSentencePrediction": ("Bert"),
    "ForPreTraining": ("Albert Bert BigBird Electra Wav2Vec2"),
    "ForQuestionAnswering": (
        "Albert Bart Bert BigBird DistilBert Electra MBart RoFormer Roberta RobertaPreLayerNorm XLMRoberta"
    ),
    "ForSequenceClassification": (
        "Albert Bart Bert BigBird DistilBert Electra MBart RoFormer Roberta RobertaPreLayerNorm XLMRoberta"
    ),
    "ForTokenClassification": (
        "Albert Bert BigBird DistilBert Electra RoFormer Roberta RobertaPreLayerNorm XLMRoberta"
    ),
    "LMHeadModel": ("GPT2"),
    "MTModel": ("Marian"),
    "Model": (
        "Albert Bart Beit Bert BigBird Blenderbot BlenderbotSmall Bloom CLIP CLIPText CLIPVision Dinov2 "
        "DistilBert Electra GPT2 GPTJ GPTNeo Gemma Llama LongT5 MBart MT5 Marian Mistral OPT Pegasus RegNet "
        "ResNet RoFormer Roberta RobertaPreLayerNorm T5 ViT Wav2Vec2 Whisper XGLM XLMRoberta"
    ),
    "ModelWithProjection": ("CLIPText"),
}


def _by_full_name(names: dict[str, str]) -> dict[str, tuple[str, str]]:
    return {
        f"{module}.{name}": (module, name)
        for module, all_ in names.items()
        for name in all_.split()
    }


NAMES = _by_full_name(NAMES_BY_MODULE)
TRANSFORMERS = frozenset(
    f"Flax{family}{purpose}" for purpose, all_ in _TRANSFORMERS.items() for family in all_.split()
)
FACTORIES = _by_full_name(_FACTORIES_BY_MODULE)
