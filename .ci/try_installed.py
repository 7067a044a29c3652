"""What a user does first, where only the package and a backend are installed."""

import importlib.metadata
import json
import sys
import warnings

warnings.simplefilter("error", UserWarning)
import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_sparseopt as kso  # noqa: E402

backend = keras.backend.backend()
others = {"tensorflow", "jax", "torch"} - {backend}
assert backend == "tensorflow" or not others & set(sys.modules), "another backend came along"
model = keras.Sequential(
    [
        keras.Input((8, 8, 1)),
        keras.layers.Conv2D(16, 3, use_bias=False),
        keras.layers.BatchNormalization(),
        keras.layers.ReLU(),
        keras.layers.Flatten(),
        keras.layers.Dense(10),
    ]
)
kso.sparsify(model, 0.9)
counts = [int(np.sum(w.topology.mask)) for w in kso.sparse_weights(model)]
model.compile(
    kso.SparseOpt(keras.optimizers.SGD(0.1, momentum=0.9)),
    keras.losses.SparseCategoricalCrossentropy(from_logits=True),
)
rng = np.random.default_rng(0)
x, y = rng.normal(size=(256, 8, 8, 1)).astype("float32"), rng.integers(0, 10, 256).astype("int32")
history = model.fit(x, y, epochs=2, verbose=0, callbacks=[kso.RigL(update_every=4)]).history
assert history["itop_rate"][-1] > 1 - history["sparsity"][-1], "no mask moved"
model.save("model.keras")
loaded = keras.models.load_model("model.keras")
for before, model_ in (("fit", model), ("load_model", loaded)):
    now = [int(np.sum(w.topology.mask)) for w in kso.sparse_weights(model_)]
    assert now == counts, (before, now, counts)
loaded.fit(x, y, verbose=0, callbacks=[kso.SET(update_every=4)])
plain = kso.strip(loaded)
np.testing.assert_allclose(plain.predict(x, verbose=0), loaded.predict(x, verbose=0))
package = {"tensorflow": "tensorflow-cpu"}.get(backend, backend)
versions = {"keras": keras.version(), backend: importlib.metadata.version(package)}
print(json.dumps(versions))
