"""MirroredStrategy on logical CPU devices equals one device. Usage: mirrored.py REPLICAS"""

import sys
import tempfile

import tensorflow as tf

replicas = int(sys.argv[1])
(cpu,) = tf.config.list_physical_devices("CPU")
tf.config.set_logical_device_configuration(cpu, [tf.config.LogicalDeviceConfiguration()] * replicas)

import keras  # noqa: E402
import numpy as np  # noqa: E402
import tiny  # noqa: E402

import keras_sparseopt as kso  # noqa: E402

LOSS = keras.losses.SparseCategoricalCrossentropy(from_logits=True)
CASES = [
    ("rigl", "sgd", {}, {}),
    ("rigl", "adam", {"gradient_steps": 2}, {}),
    ("set", "ham", {}, {}),
    ("rigl", "sgd", {"growth_gradient": "corrected"}, {"renormalize": True}),
]


def train(devices, method, inner, method_args, model_args):
    with devices.scope():
        model = tiny.model(inner, **model_args)
    data = tf.data.Dataset.from_tensor_slices(tiny.data()).batch(24, drop_remainder=True)
    callback = tiny.method(method, check_replicas=True, **method_args)
    history = kso.fit_distributed(model, data, epochs=2, callbacks=[callback], verbose=0)
    kso.assert_replicas_agree(model)
    return model, history.history


def check_that_disagreement_is_found(model):
    for variable, change in (
        (kso.sparse_layers(model)[0].kernel_mask, tf.logical_not),
        (model.optimizer.base_optimizer().variables[2], lambda v: v + 1.0),
    ):
        copy = variable.value.values[-1]
        before = tf.identity(copy)
        copy.assign(change(before))
        try:
            kso.assert_replicas_agree(model)
        except AssertionError as error:
            assert variable.path in str(error), error
        else:
            raise SystemExit(f"a changed replica of {variable.path} was not noticed")
        copy.assign(before)
    kso.assert_replicas_agree(model)


def check_that_updates_notice_disagreement(devices):
    """`check_replicas` looks before the update, which would heal the difference."""
    with devices.scope():
        model = tiny.model()

    class Disturb(keras.callbacks.Callback):
        def on_train_batch_begin(self, batch, logs=None):
            if batch == 1:
                copy = kso.sparse_layers(model)[0].kernel.value.values[-1]
                copy.assign(copy + 1.0)

    data = tf.data.Dataset.from_tensor_slices(tiny.data()).batch(24, drop_remainder=True)
    try:
        model.fit(data, verbose=0, callbacks=[Disturb(), tiny.method("rigl", check_replicas=True)])
    except AssertionError as error:
        assert "conv/kernel" in str(error), error
    else:
        raise SystemExit("check_replicas did not notice a changed replica")


def check_resuming_with_statistics_of_each_replica(devices):
    """Plain BatchNormalization, and validation that reads its statistics."""
    data = tf.data.Dataset.from_tensor_slices(tiny.data()).batch(24, drop_remainder=True)

    def train(directory, epochs):
        with devices.scope():
            model = tiny.model(synchronized=False)
        callbacks = [tiny.method("rigl", end_step=100), kso.BackupAndRestore(directory)]
        history = model.fit(
            data, epochs=epochs, validation_data=data, callbacks=callbacks, verbose=0
        )
        kso.assert_replicas_agree(model)
        copies = [c.numpy() for v in model.variables for c in v.value.values]
        return copies, {k: v for k, v in history.history.items() if k != "drop_fraction"}

    with tempfile.TemporaryDirectory() as a, tempfile.TemporaryDirectory() as b:
        straight, straight_history = train(a, 3)
        train(b, 1)
        resumed, resumed_history = train(b, 3)
    assert resumed_history == straight_history, (resumed_history, straight_history)
    for a, b in zip(straight, resumed, strict=True):
        np.testing.assert_array_equal(a, b)


def check_refusals(devices):
    """What Keras 3 cannot do is refused before anything has changed."""

    def refused(words, compile_args=None, **inner):
        with devices.scope():
            model = tiny.model()
            sgd = keras.optimizers.SGD(0.1, **inner)
            model.compile(kso.SparseOpt(sgd), loss=LOSS, **(compile_args or {}))
        before = [keras.ops.convert_to_numpy(v) for v in model.variables]
        data = tf.data.Dataset.from_tensor_slices(tiny.data()).batch(24)
        try:
            model.fit(data, callbacks=[kso.SET(2)], verbose=0)
        except ValueError as error:
            assert words in str(error) and "Received" in str(error), error
        else:
            raise SystemExit(f"not refused: {words}")
        for value, variable in zip(before, model.variables, strict=True):
            np.testing.assert_array_equal(value, keras.ops.convert_to_numpy(variable))

    model = tiny.model()  # outside of the scope
    with devices.scope():
        model.compile(kso.SparseOpt("sgd"), loss=LOSS)
    try:
        model.fit(*tiny.data(), callbacks=[kso.SET(2)], verbose=0)
    except (ValueError, RuntimeError) as error:
        assert "same strategy" in str(error) or "Mixing" in str(error), error
    else:
        raise SystemExit("an optimizer of another strategy was not refused")
    refused("gradient_accumulation_steps", gradient_accumulation_steps=2)
    refused("use_ema", use_ema=True)
    refused("steps_per_execution", {"steps_per_execution": 2})
    refused("jit_compile", {"jit_compile": True})


def main():
    mirrored = kso.resolve_strategy("mirrored")
    assert mirrored.num_replicas == replicas and mirrored.num_workers == 1
    for case in CASES if replicas == 2 else CASES[1:2]:
        one, one_history = train(kso.resolve_strategy("one"), *case)
        many, many_history = train(mirrored, *case)
        tiny.assert_close(tiny.state(one), tiny.state(many))
        for name, values in one_history.items():
            np.testing.assert_allclose(values, many_history[name], rtol=1e-4, err_msg=name)
        assert many_history["itop_rate"][-1] > 1 - many_history["sparsity"][-1] + 0.02
    if replicas == 2:
        check_that_disagreement_is_found(many)
        check_that_updates_notice_disagreement(mirrored)
        check_resuming_with_statistics_of_each_replica(mirrored)
        check_refusals(mirrored)
    print("all equal")


if __name__ == "__main__":
    main()
