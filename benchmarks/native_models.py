"""The models once more, in the backend's own layers: torch's on torch, Keras's on the others."""

import keras

from benchmarks.backends import BACKEND
from benchmarks.models import MODELS, RESNET_BLOCKS

if BACKEND == "torch":
    import torch
    from torch import nn
    from torch.nn import functional


def keras_mlp():
    x = inputs = keras.Input((64,))
    for _ in range(9):
        hidden = keras.layers.Dense(64)(keras.layers.LayerNormalization(epsilon=1e-6)(x))
        # Flax's gelu is the approximate one.
        x = x + keras.layers.Activation(lambda x: keras.ops.gelu(x, approximate=True))(hidden)
    return keras.Model(inputs, keras.layers.Dense(16)(x))


def keras_resnet():
    layers = keras.layers

    def conv(x, width, size, stride):
        x = layers.ZeroPadding2D(size // 2)(x) if size > 1 else x
        x = layers.Conv2D(width, size, stride, use_bias=False)(x)
        return layers.BatchNormalization(momentum=0.9, epsilon=1e-5)(x)

    inputs = keras.Input(MODELS["resnet"].shape)
    x = layers.ReLU()(conv(inputs, 64, 7, 2))
    # After a ReLU, padding with zeros changes no maximum.
    x = layers.MaxPooling2D(3, 2)(layers.ZeroPadding2D(1)(x))
    for width, stride in RESNET_BLOCKS:
        y = conv(layers.ReLU()(conv(x, width, 3, stride)), width, 3, 1)
        x = x if stride == 1 else conv(x, width, 1, stride)
        x = layers.ReLU()(x + y)
    return keras.Model(inputs, layers.Dense(16)(layers.GlobalAveragePooling2D()(x)))


def torch_mlp():
    class Residual(nn.Sequential):
        def forward(self, x):
            return x + functional.gelu(super().forward(x), approximate="tanh")

    blocks = (Residual(nn.LayerNorm(64, eps=1e-6), nn.Linear(64, 64)) for _ in range(9))
    return nn.Sequential(*blocks, nn.Linear(64, 16))


def torch_resnet():
    def conv(before, width, size, stride):
        layer = nn.Conv2d(before, width, size, stride, padding=size // 2, bias=False)
        return nn.Sequential(layer, nn.BatchNorm2d(width, eps=1e-5, momentum=0.1))

    class Block(nn.Module):
        def __init__(self, before, width, stride):
            super().__init__()
            self.first = conv(before, width, 3, stride)
            self.second = conv(width, width, 3, 1)
            self.short = nn.Identity() if stride == 1 else conv(before, width, 1, stride)

        def forward(self, x):
            y = self.second(functional.relu(self.first(x)))
            return functional.relu(self.short(x) + y)

    parts, before = [conv(3, 64, 7, 2), nn.ReLU(), nn.MaxPool2d(3, 2, 1)], 64
    for width, stride in RESNET_BLOCKS:
        parts.append(Block(before, width, stride))
        before = width
    return nn.Sequential(*parts, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(512, 16))


def torch_transformer():
    model = MODELS["transformer"]

    class Attention(nn.MultiheadAttention):
        def forward(self, x):
            return super().forward(x, x, x, need_weights=False)[0]

    class Transformer(nn.Module):
        def __init__(self, vocabulary=8192, width=256):
            super().__init__()
            self.embed = nn.Embedding(vocabulary, width)
            self.positions = nn.Parameter(torch.randn(*model.shape, width) / 50)
            self.branches = nn.ModuleList(
                nn.Sequential(nn.LayerNorm(width, eps=1e-6), *branch)
                for _ in range(4)
                for branch in (
                    [Attention(width, 4, batch_first=True)],
                    [nn.Linear(width, 4 * width), nn.GELU("tanh"), nn.Linear(4 * width, width)],
                )
            )
            self.norm = nn.LayerNorm(width, eps=1e-6)
            self.head = nn.Linear(width, 16)

        def forward(self, tokens):
            x = self.embed(tokens) + self.positions
            for branch in self.branches:
                x = x + branch(x)
            return self.head(self.norm(x).mean(axis=1))

    return Transformer()


def keras_layers(name):
    """What makes the model in Keras's layers; None where nothing does."""
    return {"mlp": keras_mlp, "resnet": keras_resnet}.get(name)


def own_layers(name):
    """The name of the rival, and what makes the model; None where there is none."""
    if BACKEND == "torch":
        made = {"mlp": torch_mlp, "resnet": torch_resnet, "transformer": torch_transformer}
        return ("torch.nn", made[name]) if name in made else None
    make = keras_layers(name)
    return None if make is None else ("keras.layers", make)
