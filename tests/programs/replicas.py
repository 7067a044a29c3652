"""MirroredStrategy, two replicas: what holds zeros holds them after a `fit`, too."""

import tensorflow as tf

(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * 2)

import keras  # noqa: E402
import numpy as np  # noqa: E402

import keras_sparseopt as kso  # noqa: E402


class Centralized(keras.optimizers.SGD):
    def update_step(self, gradient, variable, learning_rate):
        super().update_step(gradient + 0.1, variable, learning_rate)


def data():
    rng = np.random.default_rng(0)
    x, y = rng.normal(size=(16, 12)).astype("float32"), rng.normal(size=(16, 4)).astype("float32")
    return tf.data.Dataset.from_tensor_slices((x, y)).batch(8, drop_remainder=True)


def make(optimizer):
    model = keras.Sequential([keras.Input((12,)), keras.layers.Dense(16), keras.layers.Dense(4)])
    kso.sparsify(model, 0.7, "uniform")
    model.compile(optimizer, "mse")
    return model


def check(model):
    for weight in kso.sparse_weights(model):
        topology = weight.topology
        assert not topology.is_moving
        for copy, mask in zip(weight.value.values, topology.mask.value.values):
            assert not copy.numpy()[~mask.numpy()].any(), weight.path
        assert topology.mask.numpy().mean() < 0.35
    for weight in getattr(model.optimizer, "weights", []):
        mask = weight.topology.mask.numpy()
        for slot in weight.slots:
            assert not slot.numpy()[~mask].any(), slot.path
    kso.assert_replicas_agree(model)


def main():
    strategy = kso.resolve_strategy("mirrored")
    for kind in (keras.optimizers.SGD, Centralized):
        with strategy.scope():
            model = make(kso.SparseOpt(kind(0.1, momentum=0.9)))
        model.fit(data(), verbose=0, callbacks=[kso.RigL(1, 0.5, end_step=100)])
        check(model)
        weight = kso.sparse_weights(model)[0]
        try:
            weight.assign(np.ones(weight.shape))
        except ValueError as error:
            assert "denser than its mask" in str(error)
        else:
            raise SystemExit("an assignment left the mask behind")
        with strategy.scope():
            model.compile(keras.optimizers.SGD(0.1), "mse")
        model.fit(data(), epochs=2, verbose=0)
        check(model)
    print("zeros held")


if __name__ == "__main__":
    main()
