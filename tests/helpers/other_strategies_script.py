"""Trains a model of Keras alone under a strategy that Keras 3 does not support; `test_replicas.py` runs it.

Arguments: "parameters"; or "workers", the number of the worker, and the port of each. The error of `fit` is printed.
"""

import json
import os
import sys

import numpy as np
import tensorflow as tf

kind, *rest = sys.argv[1:]
if kind == "workers":
    index, *ports = rest
    cluster = {"worker": [f"127.0.0.1:{port}" for port in ports]}
    task = {"type": "worker", "index": int(index)}
    os.environ["TF_CONFIG"] = json.dumps({"cluster": cluster, "task": task})
    strategy = tf.distribute.MultiWorkerMirroredStrategy()
else:
    names = ("worker", "ps")
    cluster = tf.train.ClusterSpec(
        {name: [f"127.0.0.1:{port}"] for name, port in zip(names, rest, strict=True)}
    )
    servers = [tf.distribute.Server(cluster, name, 0, protocol="grpc") for name in names]
    resolver = tf.distribute.cluster_resolver.SimpleClusterResolver(cluster, rpc_layer="grpc")
    strategy = tf.distribute.ParameterServerStrategy(resolver)

import keras  # noqa: E402

with strategy.scope():
    model = keras.Sequential([keras.Input((4,)), keras.layers.Dense(1)])
    model.compile("sgd", "mse")
try:
    model.fit(np.ones((8, 4)), np.ones((8, 1)), verbose=0)
    message = "no error"
except Exception as error:
    message = f"{type(error).__name__}: {error}"
sys.stdout.write(message)
sys.stdout.flush()
os._exit(0)  # servers would wait for the others
