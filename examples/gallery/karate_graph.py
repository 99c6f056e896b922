"""
A graph network
===============

A karate club of 34 members split in two after a quarrel. From the
friendships, and the sides of the two rivals alone, a graph network of
jraph and Haiku says who went with whom.

The data are Zachary's karate club, which ships with networkx.
"""

import haiku as hk
import jax
import jax.numpy as jnp
import jraph
import keras
import matplotlib.pyplot as plt
import networkx as nx
import numpy as np

import jaxwrap

keras.utils.set_random_seed(1)

# %%
# The club
# --------

club = nx.karate_club_graph()
sides = np.array(
    [club.nodes[i]["club"] == "Officer" for i in club.nodes], "int32"
)
pairs = np.array(club.edges)
senders, receivers = np.concatenate([pairs, pairs[:, ::-1]]).T
print(f"{len(sides)} members, {len(pairs)} friendships")

# %%
# The network
# -----------
# Two graph convolutions of jraph with the linear layers of Haiku. The
# nodes are the input of the layer, the friendships are constants.


def convolve(nodes):
    graph = jraph.GraphsTuple(
        nodes=nodes,
        edges=None,
        senders=jnp.array(senders),
        receivers=jnp.array(receivers),
        globals=None,
        n_node=jnp.array([len(sides)]),
        n_edge=jnp.array([len(senders)]),
    )
    for width, activation in ((16, jnp.tanh), (2, lambda x: x)):
        linear = hk.Linear(width)
        layer = jraph.GraphConvolution(linear, add_self_edges=True)
        graph = layer(graph)
        graph = graph._replace(nodes=activation(graph.nodes))
    return graph.nodes


network = hk.without_apply_rng(hk.transform(convolve))
layer = jaxwrap.HaikuLayer(network, name="friends")

# %%
# A node knows nothing but who it is.

nodes = np.eye(len(sides), dtype="float32")
inputs = keras.Input((34,), batch_size=34)
model = keras.Model(inputs, layer(inputs))
print(layer.weight_table())

# %%
# Training
# --------
# The whole graph is one batch. Sample weights hide all sides but those
# of the instructor, number 0, and the officer, number 33.

known = np.zeros(34, "float32")
known[[0, 33]] = 1.0
model.compile(
    keras.optimizers.Adam(0.01),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
guesses = []


def remember(epoch, logs):
    logits = model.predict(nodes, batch_size=34, verbose=0)
    guesses.append(np.asarray(jax.nn.softmax(logits))[:, 1])


model.fit(
    nodes,
    sides,
    sample_weight=known,
    batch_size=34,
    shuffle=False,
    epochs=40,
    callbacks=[keras.callbacks.LambdaCallback(on_epoch_end=remember)],
    verbose=0,
)
right = [np.mean((guess > 0.5) == sides) for guess in guesses]
for epoch in (0, 9, 19, 39):
    print(f"epoch {epoch + 1:>2}: {right[epoch]:.0%} right")

# %%
# The club by sides
# -----------------
# The colour of a node is the guess, and its border the truth.

figure, all_axes = plt.subplots(
    1, 2, figsize=(10, 4.5), layout="constrained"
)
places = nx.spring_layout(club, seed=4)
for axes, epoch in zip(all_axes, (0, 39)):
    nx.draw_networkx(
        club,
        places,
        ax=axes,
        node_color=guesses[epoch],
        cmap="coolwarm",
        vmin=0,
        vmax=1,
        edgecolors=np.where(sides, "#b40426", "#3b4cc0"),
        linewidths=2.5,
        edge_color="#bbbbbb",
        font_size=8,
    )
    axes.set_title(f"Epoch {epoch + 1}: {right[epoch]:.0%} right")
    axes.set_axis_off()
plt.show()
