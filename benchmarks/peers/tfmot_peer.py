"""tfmot, TensorFlow's own toolkit: gradual magnitude pruning, for Keras 2 (tf-keras)."""

import os
import sys

os.environ["TF_USE_LEGACY_KERAS"] = "1"
import measuring  # noqa: E402
import numpy as np  # noqa: E402
import tensorflow as tf  # noqa: E402
import tensorflow_model_optimization as tfmot  # noqa: E402
import tf_keras  # noqa: E402
from measuring import (  # noqa: E402
    HEADS,
    HIDDEN,
    SEQUENCE,
    SPARSITY,
    UNITS,
    UPDATES,
    VOCABULARY,
    WIDTH,
)  # fmt: skip

layers = tf_keras.layers
pruning = tfmot.sparsity.keras
EVERY = 2


def resnet20():
    def convolution(x, width, size, stride=1):
        return layers.Conv2D(width, size, stride, padding="same", use_bias=False)(x)

    inputs = tf_keras.Input((32, 32, 3))
    x = layers.ReLU()(layers.BatchNormalization()(convolution(inputs, 16, 3)))
    for width in (16, 32, 64):
        for block in range(3):
            stride = 2 if block == 0 and width > 16 else 1
            shortcut = x
            if stride > 1:
                shortcut = layers.BatchNormalization()(convolution(x, width, 1, stride))
            y = layers.ReLU()(layers.BatchNormalization()(convolution(x, width, 3, stride)))
            y = layers.BatchNormalization()(convolution(y, width, 3))
            x = layers.ReLU()(layers.Add()([y, shortcut]))
    return tf_keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling2D()(x)))


def bert_tiny():
    inputs = tf_keras.Input((SEQUENCE,), dtype="int32")
    x = layers.Embedding(VOCABULARY, WIDTH)(inputs)
    for _ in range(2):
        y = layers.MultiHeadAttention(HEADS, WIDTH // HEADS)(x, x)
        x = layers.LayerNormalization()(layers.Add()([x, y]))
        y = layers.Dense(WIDTH)(layers.Dense(4 * WIDTH, activation="relu")(x))
        x = layers.LayerNormalization()(layers.Add()([x, y]))
    # The others take the first token: tfmot prunes no model in which a tensor is sliced.
    return tf_keras.Model(inputs, layers.Dense(10)(layers.GlobalAveragePooling1D()(x)))


def wide_mlp():
    x = inputs = tf_keras.Input((UNITS,))
    for _ in range(HIDDEN):
        x = layers.Dense(UNITS, activation="relu")(x)
    return tf_keras.Model(inputs, layers.Dense(10)(x))


NETWORKS = {"resnet20": resnet20, "bert_tiny": bert_tiny, "wide_mlp": wide_mlp}


def batch(network):
    return tuple(map(tf.constant, measuring.batch(network)))


def compiled(model):
    loss = tf_keras.losses.SparseCategoricalCrossentropy(from_logits=True)
    model.compile(tf_keras.optimizers.SGD(0.01, momentum=0.9), loss)
    return model


def prune(model, begin=0, frequency=EVERY):
    schedule = pruning.ConstantSparsity(SPARSITY, begin, frequency=frequency)
    return pruning.prune_low_magnitude(model, schedule)


def wrappers(model):
    return [m for m in model.layers if hasattr(m, "pruning_obj")]


def masked(model):
    return [mask for wrapper in wrappers(model) for _, mask, _ in wrapper.pruning_vars]


class TFMOT(measuring.Peer):
    name = "tfmot"
    reasons = {"semantics": "no method of dynamic sparse training: nothing grows"}

    def versions(self):
        return {
            "tensorflow-model-optimization": tfmot.__version__,
            "tf-keras": tf_keras.__version__,
            "tensorflow": tf.__version__,
        }

    def steps(self, network):
        x, y = batch(network)
        ways = {"dense": compiled(NETWORKS[network]())}
        try:
            ways["sparse"] = compiled(prune(NETWORKS[network](), begin=10**6))
        except ValueError as error:
            raise measuring.CannotRun(f"ValueError: {error}"[:200]) from error
        functions = {}
        for name, model in ways.items():
            callback = pruning.UpdatePruningStep()
            callback.set_model(model)
            if name == "sparse":
                callback.on_train_begin()

            def step(model=model, name=name, callback=callback):
                if name == "sparse":
                    callback.on_train_batch_begin(0)
                model.train_on_batch(x, y)

            functions[name] = step
        return functions

    def update(self, shapes):
        found = []
        for shape in shapes:
            if len(shape) == 2:
                model = tf_keras.Sequential([layers.Dense(shape[1], input_shape=shape[:1])])
            else:
                size = (max(shape[0], 8),) * 2
                layer = layers.Conv2D(
                    shape[3], shape[:2], use_bias=False, input_shape=(*size, shape[2])
                )
                model = tf_keras.Sequential([layer])
            (wrapper,) = wrappers(prune(model))
            wrapper.pruning_step.assign(0)
            found.append(wrapper.pruning_obj)

        @tf.function
        def update():
            for pruner in found:
                for weight, mask, threshold in pruner._pruning_vars:
                    new_threshold, new_mask = pruner._maybe_update_block_mask(weight)
                    threshold.assign(new_threshold)
                    mask.assign(new_mask)

        return update, "the 10 % largest of each kernel; nothing grows"

    def counts(self):
        model = compiled(prune(resnet20()))
        x, y = batch("resnet20")
        data = tf.data.Dataset.from_tensors((x, y)).repeat(2 * UPDATES)
        callback = pruning.UpdatePruningStep()
        model.fit(data.take(4), epochs=1, verbose=0, callbacks=[callback])
        before = [int(tf.reduce_sum(mask)) for mask in masked(model)]
        model.fit(data, epochs=1, verbose=0, callbacks=[callback])
        return before, [int(tf.reduce_sum(mask)) for mask in masked(model)]

    def memory(self):
        model = prune(resnet20())
        masks = masked(model)
        size = sum(int(np.prod(mask.shape)) for mask in masks)
        return sum(4 * int(np.prod(mask.shape)) for mask in masks) / size

    def files(self, folder):
        height, width, inputs, outputs = measuring.ONE_KERNEL[0]
        layer = layers.Conv2D(outputs, (height, width), use_bias=False)
        model = tf_keras.Sequential([tf_keras.Input((8, 8, inputs)), layer])
        dense, sparse = folder / "dense.h5", folder / "sparse.h5"
        model.save(dense, include_optimizer=False)
        pruned = compiled(prune(model))
        x = np.zeros((2, 8, 8, inputs), "float32")
        y = np.zeros((2, 6, 6), "int32")
        pruned.fit(x, y, verbose=0, epochs=4, callbacks=[pruning.UpdatePruningStep()])
        pruning.strip_pruning(pruned).save(sparse, include_optimizer=False)
        zeros = float(np.mean(model.layers[0].get_weights()[0] == 0))
        assert zeros > 0.85, zeros
        return dense, sparse, "after `strip_pruning`: a dense file with zeros, to be zipped"

    def crash(self, folder):
        steps, stop = measuring.CRASH["steps"], measuring.CRASH["killed_at"]

        def make():
            tf_keras.utils.set_random_seed(0)
            parts = [
                layers.Dense(128, input_shape=(64,)), layers.BatchNormalization(), layers.ReLU(),
                layers.Dense(10),
            ]  # fmt: skip
            schedule = pruning.PolynomialDecay(
                0.0, SPARSITY, 0, steps - 2, frequency=measuring.CRASH["update_every"]
            )
            return compiled(pruning.prune_low_magnitude(tf_keras.Sequential(parts), schedule))

        def data(begin, end):
            for step in range(begin, end):
                rng = np.random.default_rng(step)
                yield rng.normal(size=(32, 64)).astype("float32"), rng.integers(0, 10, 32)

        def train(model, begin, end):
            batches = list(data(begin, end))
            x, y = (np.concatenate(part) for part in zip(*batches))
            callback = pruning.UpdatePruningStep()
            model.fit(x, y, batch_size=32, shuffle=False, verbose=0, callbacks=[callback])

        def weights(model):
            stripped = pruning.strip_pruning(model)
            return [w for w in stripped.get_weights() if w.ndim == 2]

        whole, first = make(), make()
        train(whole, 0, steps)
        train(first, 0, stop)
        path = folder / "model.h5"
        first.save(path)
        with pruning.prune_scope():
            second = tf_keras.models.load_model(path)
        train(second, stop, steps)
        return weights(whole), weights(second), "`model.save` to .h5, loaded in `prune_scope`"

    def kinds(self):
        class Custom(layers.Layer):
            def build(self, shape):
                self.kernel = self.add_weight("kernel", (shape[-1], 8))

            def call(self, x):
                return x @ self.kernel

        class Deep(layers.Layer):
            def __init__(self, **options):
                super().__init__(**options)
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
        }
        found = {}
        for name, (shape, layer) in of.items():
            inputs = tf_keras.Input(shape)
            if layer is None:
                outputs = layers.MultiHeadAttention(2, 4)(inputs, inputs)
            else:
                outputs = layer(inputs)
            model = tf_keras.Model(inputs, outputs)
            total = sum(
                int(np.prod(w.shape)) for w in model.trainable_weights
                if "kernel" in w.name and "depthwise" not in w.name
            )  # fmt: skip
            try:
                pruned = prune(model)
                found[name] = sum(int(np.prod(m.shape)) for m in masked(pruned)) / total
            except Exception as error:
                found[name] = f"{type(error).__name__}: {error}"[:160]
        try:
            subclassed = type("Own", (tf_keras.Model,), {"call": lambda self, x: x})()
            subclassed(np.zeros((1, 2), "float32"))
            prune(subclassed)
            found["subclassed model"] = 1.0
        except Exception as error:
            found["subclassed model"] = f"{type(error).__name__}: {error}"[:160]
        return found


if __name__ == "__main__":
    sys.exit(measuring.main(TFMOT()))
