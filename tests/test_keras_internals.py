"""Every private attribute of Keras that the package uses is there, and does what is said."""

import contextlib

import keras
import numpy as np
from helpers import array

from keras_sparseopt import keras_internals as internals


def functional():
    inputs = keras.Input((4,))
    return keras.Model(inputs, keras.layers.Dense(3, name="d")(inputs))


def test_layers_and_weights():
    model = functional()
    layer = model.get_layer("d")
    assert [x.name for x in internals.all_layers(model)][1:] == ["input_layer", "d"]
    assert internals.own_weights(layer) == [layer.kernel, layer.bias]
    layer.trainable = False
    assert internals.own_weights(layer) == [layer.kernel, layer.bias]
    assert internals.own_weights(model) == []
    norm = keras.layers.BatchNormalization()
    norm.build((None, 3))
    internals.forget_weight(norm, norm.moving_mean)
    assert [w.name for w in norm.non_trainable_variables] == ["moving_variance"]


def test_shapes_graphs_and_calls():
    class Net(keras.Model):
        def __init__(self):
            super().__init__()
            self.b, self.a = keras.layers.Dense(2, name="b"), keras.layers.Dense(2, name="a")

        def call(self, x):
            return self.b(self.a(x))

    net = Net()
    net(np.ones((2, 4), "float32"))
    assert internals.build_shapes(net) == {"input_shape": (2, 4)}
    assert internals.functional_of(net) is None
    model = functional()
    assert internals.functional_of(model) is model
    sequential = keras.Sequential([keras.Input((4,)), keras.layers.Dense(2)])
    assert internals.functional_of(sequential) is not None
    operations = [node.operation.name for node in internals.nodes_of(model)]
    assert set(operations) == {"input_layer", "d"}
    with internals.calls_recorded() as called:
        internals.symbolic_call(net, keras.KerasTensor((2, 4)))
    assert [x.name for x, _ in called][:2] == ["a", "b"]


def test_variables():
    variable = keras.Variable(np.zeros((2, 3), "float32"))
    assert internals.layout(variable) is None and not internals.is_absent(variable)
    internals.follow_layout(variable, of=variable)
    seen = []

    class Topology:
        def before_assign(self, variable, value):
            seen.append("before")
            return lambda: seen.append("after")

        def has_seen(self, variable):
            pass

    variable.topology = Topology()
    kind = type(variable)
    internals.tell(variable)
    internals.tell(variable)  # twice does no harm
    variable.assign(np.ones((2, 3)))
    assert seen == ["before", "after"] and array(variable).all()
    assert isinstance(variable, keras.Variable)
    internals.tell_no_more(variable)
    variable.assign(np.zeros((2, 3)))
    assert type(variable) is kind and seen == ["before", "after"]
    assert not internals.in_stateless_scope()
    with keras.StatelessScope():
        assert internals.in_stateless_scope()


def test_optimizers():
    variable, other = (keras.Variable(np.ones((2, 3), "float32")) for _ in range(2))
    optimizer = keras.optimizers.SGD(0.1, momentum=0.9, use_ema=True)
    with internals.slots_recorded(optimizer) as slots:
        optimizer.build([variable, other])
    names = [slot.name for slot in internals.slots_of(slots, optimizer, other)]
    assert len(names) == 2 and any("momentum" in name for name in names)
    assert internals.variable_index(optimizer, other) == 1
    assert internals.variable_index(optimizer, keras.Variable(1.0)) is None
    assert internals.trained_variables(optimizer) == [variable, other]
    assert len(internals.averages(optimizer)) == 2
    own = len(internals.own_variables(optimizer))
    internals.track(optimizer, keras.Variable(1.0))
    assert len(internals.own_variables(optimizer)) == own + 1 == len(optimizer.variables)
    optimizer.apply([keras.ops.ones((2, 3))] * 2, [variable, other])
    assert int(array(internals.step_count(optimizer))) == 1
    if keras.backend.backend() == "tensorflow":
        assert internals.strategy_of(optimizer).num_replicas_in_sync == 1


def test_training():
    model = functional()
    model.compile("sgd", "mse")
    internals.set_initial_epoch(model, 2)
    assert internals.initial_epoch(model) == 2
    x, y = np.ones((4, 4), "float32"), np.ones((4, 3), "float32")
    assert model.fit(x, y, epochs=3, verbose=0).epoch == [2]
    internals.steps_of(model)["a"] = 1
    assert internals.steps_of(model) == {"a": 1}
    callback = keras.callbacks.Callback()
    callback.set_model(model)
    assert internals.model_of(callback) is model
    optimizer = model.optimizer
    with internals.without_attributes(model, {"optimizer", "none_of_it"}):
        assert model.optimizer is None and not hasattr(model, "none_of_it")
    assert model.optimizer is optimizer
    outer = keras.Sequential([keras.Input((4,)), model])
    assert model in internals.sublayers(outer) and not internals.sublayers(model.layers[-1])
    internals.uncompile(model)
    assert not model.compiled and model.optimizer is None
    with contextlib.suppress(ValueError):
        model.fit(x, y, verbose=0)
        raise AssertionError("an uncompiled model trained")


def test_calls_with_made_up_inputs():
    class Pair(keras.layers.Layer):
        def __init__(self):
            super().__init__()
            self.dense = keras.layers.Dense(2)

        def build(self, first_shape, second_shape):
            self.dense.build(first_shape)
            self.built = True

        def call(self, first, second):
            return self.dense(first) + second

    pair = Pair()
    pair(np.ones((3, 4), "float32"), np.ones((3, 2), "float32"))
    inputs = internals.example_inputs(pair)
    assert {name: x.shape for name, x in inputs.items()} == {"first": (3, 4), "second": (3, 2)}
    arrays = {name: np.ones(x.shape, "float32") for name, x in inputs.items()}
    assert array(internals.call_by_name(pair, arrays)).shape == (3, 2)
    model = functional()
    (single,) = internals.example_inputs(model).values()
    assert single.shape == (None, 4)
    assert internals.example_inputs(keras.layers.Dense(2)) is None


def test_steps_of_models_around():
    inner = functional()
    inputs = keras.Input((4,))
    outer = keras.Model(inputs, inner(inputs))
    weight = inner.get_layer("d").kernel
    assert set(map(id, internals.models_of([weight]))) == {id(inner), id(outer)}
    assert internals.models_of([keras.Variable(1.0)]) == []
    internals.forget_functions(outer, also_of_inference=True)
    assert getattr(outer, "train_function", None) is None
    outer.compile("sgd", "mse")
    outer.make_train_function()
    before = outer.train_function
    internals.forget_functions(outer, also_of_inference=False)
    assert outer.train_function is not None and outer.train_function is not before


def test_who_calls():
    seen = []

    class Look(keras.callbacks.Callback):
        def on_train_begin(self, logs=None):
            around = internals.callbacks_around(self)
            around = [[x for x in part if isinstance(x, Look)] for part in around]
            seen.append((internals.told_once(self), *around))

    first, second = Look(), Look()
    model = functional()
    model.compile("sgd", "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0, callbacks=[first, second])
    assert seen == [(False, [], [second]), (True, [first], [])]
    assert internals.callbacks_around(first) == ([], []) and internals.list_of(first) is None
    assert not internals.told_once(first) and not internals.told_once(first)


def test_state_of_training_and_lora():
    class Asked(keras.optimizers.SGD):
        asked = set()

        @property
        def variables(self):
            return self._all()

        def _all(self):
            self.asked.add(internals.is_training_state_taken())
            return super().variables

    model = functional()
    model.compile(Asked(0.1), "mse")
    model.fit(np.ones((4, 4)), np.ones((4, 3)), verbose=0)
    assert (True in Asked.asked) == (keras.backend.backend() == "jax")

    class Topology:
        told = 0

        def warn_of_lora(self):
            self.told += 1

    kernel = model.get_layer("d").kernel
    kernel.topology = Topology()
    internals.tell(kernel)
    model.get_layer("d").trainable = False
    model.get_layer("d").trainable = True
    assert kernel.topology.told == 0
    model.get_layer("d").enable_lora(2)
    assert kernel.topology.told == 1 and not kernel.trainable


def test_optimizers_are_saved_under_the_class_of_every_backend():
    class Own(keras.optimizers.SGD):
        pass

    for optimizer in (keras.optimizers.SGD(0.5), keras.optimizers.Adam()):
        config = internals.serialized(optimizer)
        assert config["module"] == "keras.optimizers"
        assert config["class_name"] == type(optimizer).__name__
        loaded = keras.optimizers.deserialize(config)
        assert type(loaded) is type(optimizer) and loaded.get_config() == optimizer.get_config()
    assert internals.serialized(Own())["class_name"] == "Own"
