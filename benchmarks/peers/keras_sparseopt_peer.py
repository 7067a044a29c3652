"""This package, on the backend of `KERAS_BACKEND`."""

import pathlib
import sys

import measuring
import numpy as np
from measuring import (
    BATCH,
    DROP_FRACTION,
    HEADS,
    HIDDEN,
    SEQUENCE,
    SPARSITY,
    UNITS,
    UPDATES,
    VOCABULARY,
    WIDTH,
)  # fmt: skip

ROOT = pathlib.Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "examples")]
import keras  # noqa: E402
from models import resnet  # noqa: E402

import keras_sparseopt as kso  # noqa: E402

layers = keras.layers
NEVER = 10**6


def resnet20():
    return resnet((32, 32, 3), 10, (16, 32, 64), 3)


def bert_tiny():
    inputs = keras.Input((SEQUENCE,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(2):
        y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        y = layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="relu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    return keras.Model(inputs, layers.Dense(10)(x[:, 0]))


def wide_mlp():
    x = inputs = keras.Input((UNITS,))
    for _ in range(HIDDEN):
        x = layers.Dense(UNITS, activation="relu")(x)
    return keras.Model(inputs, layers.Dense(10)(x))


NETWORKS = {"resnet20": resnet20, "bert_tiny": bert_tiny, "wide_mlp": wide_mlp}


def compiled(model, optimizer):
    model.compile(optimizer, keras.losses.SparseCategoricalCrossentropy(from_logits=True))
    return model


def sgd():
    return keras.optimizers.SGD(0.01, momentum=0.9)


def sparse(model):
    return compiled(kso.sparsify(model, SPARSITY, "uniform"), kso.SparseOpt(sgd()))


def condensed(model):
    tiles = kso.Block(1, 64, balanced=True)
    kso.sparsify(model, SPARSITY, "uniform", exclude=model.layers[-1], structure=tiles)
    return compiled(kso.condense(model), kso.SparseOpt(sgd()))


def masks_of(model):
    weights = kso.sparse_weights(model)
    return [keras.ops.convert_to_numpy(weight.topology.mask) for weight in weights]


def counts_of(model):
    return [int(mask.sum()) for mask in masks_of(model)]


class Kernels(keras.layers.Layer):
    """Weights of given shapes, and nothing else."""

    def __init__(self, shapes):
        super().__init__()
        self.kernels = [
            self.add_weight(shape=shape, name=f"kernel_{i}") for i, shape in enumerate(shapes)
        ]

    def call(self, x):
        return x + keras.ops.sum(self.kernels[0])


class Ours(measuring.Peer):
    name = f"keras_sparseopt, {keras.backend.backend()}"

    def versions(self):
        import importlib

        backend = importlib.import_module(keras.backend.backend())
        return {
            "keras_sparseopt": kso.__version__, "keras": keras.__version__,
            keras.backend.backend(): backend.__version__,
        }  # fmt: skip

    def steps(self, network):
        x, y = measuring.batch(network)
        make_sparse = condensed if network == "wide_mlp" else sparse
        dense, masked = compiled(NETWORKS[network](), sgd()), make_sparse(NETWORKS[network]())
        masked.optimizer.build(masked.trainable_variables)
        if network != "wide_mlp":  # in `fit` only the step before an update needs gradients
            self.rigl = kso.RigL(NEVER, end_step=2 * NEVER)
            self.rigl.begin(masked.optimizer)  # keeps the gradient, as long as it lives
        return {
            "dense": lambda: dense.train_on_batch(x, y),
            "sparse": lambda: masked.train_on_batch(x, y),
        }

    def update(self, shapes):
        inputs = keras.Input((1,))
        model = sparse(keras.Model(inputs, Kernels(shapes)(inputs)))
        optimizer = model.optimizer
        optimizer.build(model.trainable_variables)
        rigl = kso.RigL(drop_fraction=DROP_FRACTION, end_step=NEVER)
        rigl.begin(optimizer)
        rng = np.random.default_rng(0)
        gradients = {
            id(weight.variable): rng.normal(size=weight.variable.shape).astype("float32")
            for weight in optimizer.weights
        }
        rigl.gradient_of = lambda weight: gradients[id(weight.variable)]  # no step was taken
        return rigl.update_masks, "RigL: drop and grow, weights and slots too"

    def counts(self):
        x, y = measuring.batch("resnet20")
        model = sparse(resnet20())
        before = counts_of(model)
        x, y = (np.concatenate([part] * (2 * UPDATES + 1)) for part in (x, y))
        rigl = kso.RigL(2, DROP_FRACTION, end_step=2 * UPDATES + 2)
        model.fit(x, y, batch_size=BATCH["resnet20"], verbose=0, callbacks=[rigl])
        return before, counts_of(model)

    def memory(self):
        dense, masked = compiled(resnet20(), sgd()), sparse(resnet20())
        for model in (dense, masked):
            model.optimizer.build(model.trainable_variables)
        rigl = kso.RigL(end_step=NEVER)
        rigl.begin(masked.optimizer)
        optimizer = masked.optimizer
        seen = {id(v): v for v in (*optimizer.variables, *optimizer.transient_variables)}
        kept = sum(map(_size, seen.values()))
        kept -= sum(_size(v) for v in dense.optimizer.variables)
        return kept / sum(mask.size for mask in masks_of(masked))

    def files(self, folder):
        height, width, inputs, outputs = measuring.ONE_KERNEL[0]
        layer = layers.Conv2D(outputs, (height, width), use_bias=False)
        model = keras.Sequential([keras.Input((8, 8, inputs)), layer])
        dense, packed = folder / "dense.keras", folder / "sparse.ksp"
        model.save(dense)
        kso.sparsify(model, SPARSITY)
        kso.save_packed(model, packed)
        return dense, packed, "`save_packed`, without loss, masks included"

    def crash(self, folder):
        steps, stop = measuring.CRASH["steps"], measuring.CRASH["killed_at"]

        def make():
            keras.utils.set_random_seed(0)
            parts = [
                keras.Input((64,)), layers.Dense(128), layers.BatchNormalization(), layers.ReLU(),
                layers.Dense(10),
            ]  # fmt: skip
            return sparse(keras.Sequential(parts))

        def train(model, begin, end):
            rngs = [np.random.default_rng(step) for step in range(begin, end)]
            parts = [
                (rng.normal(size=(32, 64)).astype("float32"), rng.integers(0, 10, 32))
                for rng in rngs
            ]
            x, y = (np.concatenate(part) for part in zip(*parts))
            rigl = kso.RigL(measuring.CRASH["update_every"], DROP_FRACTION, end_step=steps + 1)
            model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=[rigl])

        whole, first = make(), make()
        train(whole, 0, steps)
        train(first, 0, stop)
        path = folder / "model.keras"
        first.save(path)
        second = keras.models.load_model(path)
        train(second, stop, steps)
        return *(
            [keras.ops.convert_to_numpy(weight) for weight in kso.sparse_weights(model)]
            for model in (whole, second)
        ), "`model.save`, `keras.models.load_model`, the same `fit`"

    def kinds(self):
        class Custom(layers.Layer):
            def build(self, shape):
                self.kernel = self.add_weight(shape=(shape[-1], 8), name="kernel")

            def call(self, x):
                return x @ self.kernel

        class Deep(layers.Layer):
            def __init__(self):
                super().__init__()
                self.inner = layers.Dense(8)

            def call(self, x):
                return self.inner(x)

        class Own(keras.Model):
            def __init__(self):
                super().__init__()
                self.inner = layers.Dense(8)

            def call(self, x):
                return self.inner(x)

        image, text, volume = (8, 8, 4), (6, 8), (4, 4, 4, 2)
        of = {
            "dense": (text, layers.Dense(8)),
            "convolution 1D": (text, layers.Conv1D(8, 3)),
            "convolution 2D": (image, layers.Conv2D(8, 3)),
            "convolution 3D": (volume, layers.Conv3D(4, 3)),
            "transposed convolution": (image, layers.Conv2DTranspose(8, 3)),
            "separable convolution": (image, layers.SeparableConv2D(8, 3)),
            "einsum dense": (text, layers.EinsumDense("abc,cd->abd", (None, 8))),
            "LSTM": (text, layers.LSTM(8)),
            "GRU": (text, layers.GRU(8)),
            "bidirectional LSTM": (text, layers.Bidirectional(layers.LSTM(8))),
            "convolutional LSTM": ((3, 8, 8, 2), layers.ConvLSTM2D(4, 3)),
            "attention": (text, None),
            "kernel of an own layer": (text, Custom()),
            "layers inside of layers": (text, Deep()),
            "subclassed model": (text, Own()),
        }
        found = {}
        for name, (shape, layer) in of.items():
            inputs = keras.Input(shape)
            if isinstance(layer, keras.Model):
                model = layer
                model(np.zeros((1, *shape), "float32"))
            elif layer is None:
                model = keras.Model(inputs, layers.MultiHeadAttention(2, 4)(inputs, inputs))
            else:
                model = keras.Model(inputs, layer(inputs))
            total = sum(
                int(np.prod(w.shape)) for w in model.trainable_weights
                if "kernel" in w.name and "depthwise" not in w.name
            )  # fmt: skip
            kso.sparsify(model, SPARSITY)
            found[name] = sum(mask.size for mask in masks_of(model)) / total
        return found

    def next_mask(self, method, weights, mask, gradient, num_update):
        if method == "SET":
            scores = kso.masks.random_scores(mask, 0, 0, 0)
        else:
            scores = np.abs(gradient)
        return kso.drop_and_grow(weights, mask, scores, num_update)


def _size(variable):
    return keras.ops.convert_to_numpy(variable).nbytes  # TensorFlow's may have a shape only now


if __name__ == "__main__":
    measuring.main(Ours())
