"""
JAX inside a plain PyTorch loop
===============================

An Equinox module as a part of a ``torch.nn.Module``: with PyTorch's
optimizers, ``train()`` and ``eval()``, ``state_dict`` and L-BFGS. The
same network in PyTorch alone runs beside it.

The data are the 569 breast tumours of scikit-learn: 30 numbers each,
malignant or benign.
"""

import io
import os

# Keras reads this when it is imported.
os.environ["KERAS_BACKEND"] = "torch"

import equinox as eqx
import jax
import matplotlib.pyplot as plt
import torch
from sklearn.datasets import load_breast_cancer
from sklearn.metrics import roc_auc_score, roc_curve
from sklearn.model_selection import train_test_split
from sklearn.preprocessing import StandardScaler

import jaxwrap

data = load_breast_cancer()
train_x, test_x, train_y, test_y = train_test_split(
    data.data, data.target == 0, test_size=0.4, random_state=1
)
scaler = StandardScaler().fit(train_x)


def tensor(array):
    return torch.tensor(array, dtype=torch.float32)


train_x, test_x = map(tensor, map(scaler.transform, (train_x, test_x)))
train_y, test_y = tensor(train_y), tensor(test_y)

# %%
# The module
# ----------
# Equinox modules are written for one example. Dropout needs a key.


class Encoder(eqx.Module):
    hidden: eqx.nn.Linear
    norm: eqx.nn.LayerNorm
    dropout: eqx.nn.Dropout

    def __init__(self, key):
        self.hidden = eqx.nn.Linear(30, 32, key=key)
        self.norm = eqx.nn.LayerNorm(32)
        self.dropout = eqx.nn.Dropout(0.3)

    def __call__(self, x, *, key=None):
        x = jax.nn.relu(self.norm(self.hidden(x)))
        return self.dropout(x, key=key)


# %%
# A PyTorch module around it
# --------------------------
# ``batch=True`` maps the module over a batch, with a key for each
# example. PyTorch sees the parameters after the first call, so make
# that call before the optimizer. ``follow_torch_mode`` lets ``train()``
# and ``eval()`` reach the layer.

torch.manual_seed(0)
encoder = Encoder(jax.random.key(0))
layer = jaxwrap.EquinoxLayer(
    encoder, batch=True, name="encoder", seed=0
)
net = torch.nn.Sequential(layer, torch.nn.Linear(32, 1))
jaxwrap.follow_torch_mode(net)
net(train_x[:1])

for name, parameter in net.named_parameters():
    print(f"{name:<45}{tuple(parameter.shape)}")

# %%
# The same network in PyTorch:

own = torch.nn.Sequential(
    torch.nn.Linear(30, 32),
    torch.nn.LayerNorm(32),
    torch.nn.ReLU(),
    torch.nn.Dropout(0.3),
    torch.nn.Linear(32, 1),
)

# %%
# One loop for both
# -----------------

bce = torch.nn.functional.binary_cross_entropy_with_logits


def train(net, epochs=20):
    examples = torch.utils.data.TensorDataset(train_x, train_y)
    batches = torch.utils.data.DataLoader(examples, 32, shuffle=True)
    optimizer = torch.optim.AdamW(net.parameters(), lr=3e-3)
    net.train()
    for _ in range(epochs):
        for x, y in batches:
            optimizer.zero_grad()
            bce(net(x)[:, 0], y).backward()
            optimizer.step()


def predict(net):
    net.eval()
    with torch.no_grad():
        return net(test_x)[:, 0].sigmoid()


for name, model in (("JAX in PyTorch", net), ("PyTorch", own)):
    train(model)
    area = roc_auc_score(test_y, predict(model))
    print(f"{name:<16}area under the curve {area:.4f}")

# %%
# ``eval()`` switches dropout off, so two predictions are equal. In
# training they differ.

x = test_x[:1]
net.eval()
print(f"eval:  {net(x).item():.4f} {net(x).item():.4f}")
net.train()
print(f"train: {net(x).item():.4f} {net(x).item():.4f}")

# %%
# Save and load
# -------------
# A ``state_dict`` holds the parameters, and the seed of the dropout.

file = io.BytesIO()
torch.save(net.state_dict(), file)

other = Encoder(jax.random.key(1))
layer = jaxwrap.EquinoxLayer(other, batch=True, name="encoder")
again = torch.nn.Sequential(layer, torch.nn.Linear(32, 1))
jaxwrap.follow_torch_mode(again)
again(train_x[:1])

file.seek(0)
print(again.load_state_dict(torch.load(file)))
print("equal:", torch.equal(predict(again), predict(net)))

# %%
# L-BFGS
# ------
# PyTorch's line search calls the closure many times. It fits the
# parameters to the last decimal, here with weight decay and without
# dropout.

optimizer = torch.optim.LBFGS(
    again.parameters(), max_iter=60, line_search_fn="strong_wolfe"
)
losses = []


def closure():
    optimizer.zero_grad()
    loss = bce(again(train_x)[:, 0], train_y)
    for parameter in again.parameters():
        loss = loss + 1e-2 * (parameter**2).sum()
    loss.backward()
    losses.append(loss.item())
    return loss


again.eval()
optimizer.step(closure)
print(f"loss {losses[0]:.4f} -> {losses[-1]:.4f}, {len(losses)} calls")

# %%
# Back to Equinox
# ---------------
# The trained module, without PyTorch and without Keras:

trained = again[0].module_with_weights()
print(type(trained).__name__, trained.hidden.weight.shape)

# %%
# The two networks, side by side
# ------------------------------

figure, (left, right) = plt.subplots(
    1, 2, figsize=(9, 4), layout="constrained"
)
for label, model, style in (
    ("JAX in PyTorch", net, "-"),
    ("PyTorch", own, "--"),
    ("JAX in PyTorch, L-BFGS", again, ":"),
):
    scores = predict(model)
    area = roc_auc_score(test_y, scores)
    false, true, _ = roc_curve(test_y, scores)
    left.plot(false, true, style, lw=2, label=f"{label} ({area:.3f})")
left.set(xlabel="false alarms", ylabel="tumours found")
left.set(title="ROC curve", xlim=(-0.01, 0.4), ylim=(0.6, 1.01))
left.legend(loc="lower right")

right.plot(losses, color="#08519c", lw=2)
right.set(title="L-BFGS from where AdamW stopped")
right.set(xlabel="call of the closure", ylabel="loss", yscale="log")
for axes in (left, right):
    axes.grid(alpha=0.3)
    axes.spines[["top", "right"]].set_visible(False)
plt.show()
