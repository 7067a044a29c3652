"""Private attributes of Keras that this package needs, each behind one function.

`tests/test_keras_internals.py` checks that every one still exists and does what is expected here.
"""

import contextlib
import functools
import gc
import sys
from typing import Any

import keras
from keras.src import backend
from keras.src.backend.common.stateless_scope import in_stateless_scope
from keras.src.saving import object_registration

__all__ = ["in_stateless_scope"]


def all_layers(model):
    """The layer or model itself and all layers inside of it, at any depth, each once."""
    return model._flatten_layers()


def unbuilt_layers(model):
    """Layers inside of a model, or itself, that may have weights but have not made them yet.

    A model without a `build` of its own only holds others, which are asked one by one.
    """
    return [layer for layer in all_layers(model) if not layer.built and _makes_weights(layer)]


def _makes_weights(layer):
    kind = type(layer)
    overrides = kind.build not in (keras.layers.Layer.build, keras.Model.build)
    return overrides and ".preprocessing" not in kind.__module__


def sublayers(layer):
    """The layers that a layer holds."""
    return list(layer._layers)


def own_weights(layer):
    """The weights that a layer made itself, frozen or not, without those of its sublayers."""
    return list(layer._trainable_variables)


def forget_weight(layer, variable):
    """Take a non-trainable weight away from a layer."""
    layer._tracker.unlock()
    layer._non_trainable_variables[:] = [
        v for v in layer._non_trainable_variables if v is not variable
    ]


def build_shapes(layer):
    """The shapes by argument name that a layer was built with, or `None`."""
    return layer._build_shapes_dict


# What stands for sizes that are not known, one after the other: a layer may not take all.
_EXAMPLE_BATCH, _EXAMPLE_SIZES = 3, (8, 32, 128)


def with_example_inputs(layer, look):
    """What can be seen in one call of a layer or model with made-up inputs.

    Args:
        layer: Keras layer.
        look: Function of a function and its argument, a structure of `keras.KerasTensor`s without
            unknown sizes: the call.

    Returns:
        What `look` returns; `None` if the layer's inputs are not known, or its own code fails.
    """
    inputs = example_inputs(layer)
    if inputs is None:
        return None
    is_known = all(None not in tensor.shape[1:] for tensor in keras.tree.flatten(inputs))
    for size in _EXAMPLE_SIZES[: 1 if is_known else None]:
        examples = keras.tree.map_structure(functools.partial(_example, size=size), inputs)
        try:
            return look(functools.partial(call_by_name, layer), examples)
        except Exception:  # the layer's own code may fail on made-up inputs in any way
            continue
    return None


def _example(tensor, size):
    shape = [size if known is None else known for known in tensor.shape]
    if shape and tensor.shape[0] is None:
        shape[0] = _EXAMPLE_BATCH
    return keras.KerasTensor(tuple(shape), tensor.dtype)


def example_inputs(layer):
    """What a layer or model can be called with, as `keras.KerasTensor`s by argument name.

    Returns:
        Dict from argument names (`None` for the first) to structures; `None` if it is not known.
    """
    functional = functional_of(layer)
    if functional is not None:
        return {None: functional.input}
    shapes = build_shapes(layer)
    if not shapes:
        return None
    named = {name.removesuffix("_shape"): shape for name, shape in shapes.items()}
    try:
        tensors = {
            name: keras.tree.map_shape_structure(keras.KerasTensor, shape)
            for name, shape in named.items()
        }
    except (TypeError, ValueError):
        return None
    return {None: tensors["input"]} if list(tensors) == ["input"] else tensors


def call_by_name(layer, arrays):
    """Call a layer, or the graph of a functional model, with what `example_inputs` stands for."""
    function = functional_of(layer) or layer
    if list(arrays) == [None]:
        return function(arrays[None])
    return function(**arrays)


def layout(variable):
    """How JAX shards a variable, or `None`."""
    return variable._layout


def follow_layout(variable, of):
    """Shard a variable as another one is."""
    if of._layout is not None:
        variable._layout = of._layout
        variable.assign(variable.value)


def is_absent(variable):
    """Whether JAX holds the value outside of the variable, and is about to bring it back.

    `fit` empties its variables; `train_on_batch` leaves donated buffers in them.
    """
    value = variable._value
    return value is None or getattr(value, "is_deleted", lambda: False)()


def is_training_state_taken():
    """Whether JAX's `fit` asks, perhaps through wrappers, which will empty the variables."""
    frame: Any = sys._getframe(2)
    for _ in range(3):
        if frame is None or frame.f_code.co_name == "_get_jax_state":
            break
        frame = frame.f_back
    return frame is not None and frame.f_code.co_name == "_get_jax_state"


def functional_of(model):
    """The functional graph inside a Functional or Sequential model, or `None`."""
    if isinstance(model, keras.Sequential):
        return model._functional if model.built else None
    return model if hasattr(model, "_nodes_by_depth") and hasattr(model, "operations") else None


def nodes_of(functional):
    """The calls in a functional graph: objects with `operation`, `arguments` and `outputs`."""
    return [node for nodes in functional._nodes_by_depth.values() for node in nodes]


def strategy_of(optimizer):
    """The `tf.distribute` strategy that an optimizer was made in (TensorFlow)."""
    return optimizer._distribution_strategy


def step_count(optimizer):
    """The variable that counts calls of `apply`; under accumulation more than `iterations`."""
    return optimizer._iterations


def variable_index(optimizer, variable):
    """Position of a variable among those that an optimizer trains, or `None`."""
    return optimizer._trainable_variables_indices.get(optimizer._var_key(variable))


def variable_key(optimizer, variable):
    """What an optimizer knows a variable by."""
    return optimizer._var_key(variable)


def trained_variables(optimizer):
    """The variables that an optimizer was built with."""
    return optimizer._trainable_variables


def own_variables(optimizer):
    """The variables that a wrapper holds itself, without those of the inner optimizer."""
    return optimizer._variables


def save_own(optimizer, store):
    """Write an optimizer's own variables alone into what a file holds of it."""
    for i, variable in enumerate(own_variables(optimizer)):
        store[str(i)] = keras.ops.convert_to_numpy(variable)


def _callers():
    """The frames of all functions that are running, the innermost first."""
    frame: Any = sys._getframe(1)
    while frame is not None:
        yield frame
        frame = frame.f_back


def track(optimizer, variable):
    """Make a variable one of an optimizer's own."""
    if not any(own is variable for own in optimizer._variables):
        optimizer._track_variable(variable)


def store_as(optimizer, written, read):
    """Let files hold an optimizer's variables in another form.

    Args:
        optimizer: Keras optimizer.
        written: Function of a variable: what files hold of it; `None` for its value.
        read: Function of a variable and what a file holds: its value; `None` for that itself.
    """
    kind = type(optimizer)

    def save_own_variables(store):
        own: dict = {}
        kind.save_own_variables(optimizer, own)
        for i, variable in enumerate(optimizer.variables):
            value = written(variable) if str(i) in own else None
            if value is not None:
                own[str(i)] = value
        for name, value in own.items():
            store[name] = value

    def load_own_variables(store):
        own = {name: store[name] for name in store.keys()}
        for i, variable in enumerate(optimizer.variables):
            value = read(variable, own[str(i)]) if str(i) in own else None
            if value is not None:
                own[str(i)] = value
        kind.load_own_variables(optimizer, own)

    # Through `__dict__`: Keras tracks attributes that are set the usual way.
    optimizer.__dict__["save_own_variables"] = save_own_variables
    optimizer.__dict__["load_own_variables"] = load_own_variables


def store_own_only(optimizer):
    """Let files hold an optimizer's own variables alone, where Keras would add the inner one's.

    These are saved with the inner optimizer, and are others in another form of its weights.
    """
    if type(optimizer).save_own_variables is not keras.optimizers.Optimizer.save_own_variables:
        return

    def load_own_variables(store):
        for i, variable in enumerate(own_variables(optimizer)):
            if str(i) in store.keys():
                variable.assign(store[str(i)])

    optimizer.__dict__["save_own_variables"] = functools.partial(save_own, optimizer)
    optimizer.__dict__["load_own_variables"] = load_own_variables


def outer_of(optimizer):
    """The optimizer around one, where its method calls the inner one's just now, or `None`."""
    for frame in _callers():
        caller = frame.f_locals.get("self")
        is_optimizer = isinstance(caller, keras.optimizers.Optimizer)
        if is_optimizer and getattr(caller, "inner_optimizer", None) is optimizer:
            return caller
    return None


def plain_class(optimizer):
    """The class by which Keras' API knows an optimizer; on PyTorch it makes subclasses."""
    inner = "keras.src.backend."
    return next(kind for kind in type(optimizer).__mro__ if not kind.__module__.startswith(inner))


def serialized(optimizer):
    """An optimizer's config under the class that every backend knows."""
    config, kind = keras.saving.serialize_keras_object(optimizer), plain_class(optimizer)
    if kind is not type(optimizer):
        config |= {"module": "keras.optimizers", "class_name": kind.__name__}
        config["registered_name"] = None
    return config


# What makes the final gradients the step of an optimizer: of one variable; on PyTorch of all.
_STEPS = "update_step", "_parallel_update_step"


def extend_step(optimizer, then):
    """Let an optimizer call a function after the step of each variable, with the same arguments.

    Args:
        optimizer: Keras optimizer.
        then: Function of gradient, variable (as the optimizer names it) and learning rate.
    """
    one_step = optimizer.update_step

    def update_step(gradient, variable, learning_rate):
        one_step(gradient, variable, learning_rate)
        then(gradient, variable, learning_rate)

    optimizer.__dict__["update_step"] = update_step
    if hasattr(optimizer, "_parallel_update_step"):
        all_steps = optimizer._parallel_update_step

        def parallel_update_step(gradients, variables, learning_rate):
            all_steps(gradients, variables, learning_rate)
            for gradient, variable in zip(gradients, variables):
                then(gradient, variable, learning_rate)

        optimizer.__dict__["_parallel_update_step"] = parallel_update_step


def changed_steps(optimizer):
    """Which of the methods that make a step an optimizer has got anew: set of names."""
    return {"apply", *_STEPS} & vars(optimizer).keys()


def quantized_layers(model):
    """The layers whose kernel Keras' `quantize` has replaced."""
    return [layer for layer in all_layers(model) if getattr(layer, "quantization_mode", None)]


def averages(optimizer):
    """The moving averages of an optimizer with `use_ema`; AttributeError without."""
    return optimizer._model_variables_moving_average


@contextlib.contextmanager
def slots_recorded(optimizer):
    """Yields a dict: key of a variable → the slots that `optimizer` makes for it meanwhile."""
    slots: dict = {}
    original = optimizer.add_variable_from_reference

    def record(reference_variable, *args, **kwargs):
        slot = original(reference_variable, *args, **kwargs)
        slots.setdefault(optimizer._var_key(reference_variable), []).append(slot)
        return slot

    # Through `__dict__`: Keras tracks attributes that are set the usual way.
    optimizer.__dict__["add_variable_from_reference"] = record
    try:
        yield slots
    finally:
        del optimizer.__dict__["add_variable_from_reference"]


def slots_of(slots, optimizer, variable):
    return slots.get(optimizer._var_key(variable), [])


def set_initial_epoch(model, epoch):
    """Where `fit` begins, whatever its `initial_epoch` says; `None` to leave it to that."""
    model._initial_epoch = epoch


def initial_epoch(model):
    return model._initial_epoch


def model_of(callback):
    """A callback's model, without bringing JAX's state into the variables; or `None`."""
    return callback._model


def build_metrics(model, data_batch):
    model._symbolic_build(data_batch=data_batch)


def uncompile(model):
    """Take optimizer, loss and metrics away from a model, so that its file holds none."""
    model.compiled = False
    model.optimizer = None
    for name in ("train_function", "test_function", "predict_function"):
        setattr(model, name, None)


@contextlib.contextmanager
def without_attributes(model, names):
    """While files are read or written that hold nothing for some of a model's attributes."""
    # Through `__dict__`: Keras tracks attributes that are set the usual way.
    held = {name: vars(model)[name] for name in names if name in vars(model)}
    vars(model).update(dict.fromkeys(held))
    try:
        yield
    finally:
        vars(model).update(held)


def _is_optimizer_calling():
    """Whether the caller's caller is a method of an optimizer."""
    caller = sys._getframe(2).f_locals.get("self")
    return isinstance(caller, keras.optimizers.Optimizer)


@functools.cache
def told_class(variable_class: Any) -> Any:
    """A variable class whose instances tell their `topology` before and after an assignment."""

    class Told(variable_class):
        def assign(self, value):
            after = self.topology.before_assign(self, value)
            value = super().assign(value)
            self.topology.has_seen(self)
            if after is not None:
                after()
            return value

        # Optimizers may leave the mask: a constraint follows, or SparseOpt sees to it.
        def assign_add(self, value):
            if not _is_optimizer_calling():
                return self.assign(self + value)
            with self.topology.moving():
                return super().assign_add(value)

        def assign_sub(self, value):
            if not _is_optimizer_calling():
                return self.assign(self - value)
            with self.topology.moving():
                return super().assign_sub(value)

        # Not `super()`: torch.compile would take masks for weights that are trained.
        @property
        def trainable(self):
            return variable_class.trainable.fget(self)

        @trainable.setter
        def trainable(self, value):
            variable_class.trainable.fset(self, value)
            # Keras' `enable_lora` freezes the kernel; there is no hook for it.
            if sys._getframe(1).f_code.co_name == "enable_lora":
                self.topology.warn_of_lora()

    Told.__name__, Told.__qualname__ = variable_class.__name__, variable_class.__qualname__
    Told.__module__ = variable_class.__module__
    return Told


def tell(variable):
    """Let a variable tell its `topology` of assignments: there is no public hook for that."""
    if not hasattr(type(variable), "is_told"):
        variable.__class__ = told_class(type(variable))  # type: ignore[arg-type]
        type(variable).is_told = True


def tell_no_more(variable):
    if hasattr(type(variable), "is_told"):
        variable.__class__ = type(variable).__mro__[1]


@contextlib.contextmanager
def calls_recorded():
    """Yields a list that takes every layer that is called meanwhile, and its first argument."""
    called: list = []
    original = keras.layers.Layer.__call__

    @functools.wraps(original)
    def record(self, *args, **kwargs):
        outputs = original(self, *args, **kwargs)
        called.append((self, next(iter((*args, *kwargs.values())), None)))
        return outputs

    keras.layers.Layer.__call__ = record
    try:
        yield called
    finally:
        keras.layers.Layer.__call__ = original


def file_as(kind, other):
    """Let files name a class as another one that was registered."""
    name = object_registration.GLOBAL_CUSTOM_NAMES.get(other)
    if name is not None:
        object_registration.GLOBAL_CUSTOM_NAMES[kind] = name


def add_weight(layer, **arguments):
    """Give a built layer one more weight."""
    locked = layer._tracker.locked
    layer._tracker.unlock()
    variable = layer.add_weight(**arguments)
    if locked:
        layer._tracker.lock()
    return variable


def is_training(layer):
    """Whether a layer is called in training, as far as the caller has said so."""
    return bool(layer._get_call_context().get_value("training"))


def all_optimizers():
    """All optimizers that there are: nothing leads to them from variables, nor to outer ones."""
    return [x for x in gc.get_objects() if issubclass(type(x), keras.optimizers.Optimizer)]


def is_built_with(optimizer, variable):
    """Whether a variable is one of those that an optimizer trains."""
    return any(v is variable for v in getattr(optimizer, "_trainable_variables", ()))


def exchange(variable, value, optimizers=()):
    """Give a variable a value of another shape; whoever holds the variable goes on with it.

    Args:
        variable: Keras variable.
        value: NumPy array.
        optimizers: List of those that may have been built with it.
    """
    holders = [(o, o._var_key(variable)) for o in optimizers if is_built_with(o, variable)]
    variable._shape, variable._ndim = tuple(value.shape), value.ndim
    variable._layout = None  # of another rank; JAX asks the distribution again
    old, is_trainable = variable._value, variable._trainable
    # A frozen one may be thawed: TensorFlow's own flag, which that leaves alone, stays as it was.
    variable._trainable = getattr(old, "trainable", is_trainable)
    variable._initialize(variable._convert_to_tensor(value, dtype=variable._dtype))
    variable._trainable = is_trainable
    if hasattr(old, "grad"):  # PyTorch: layers list their parameters, by which `zero_grad` goes
        for parameters in [x for x in gc.get_referrers(old) if isinstance(x, dict)]:
            for name in [name for name, held in parameters.items() if held is old]:
                parameters[name] = variable._value
    for optimizer, before in holders:
        now = optimizer._var_key(variable)
        indices = optimizer._trainable_variables_indices
        indices[now] = indices.pop(before)
        excluded: set = getattr(optimizer, "_exclude_from_weight_decay", set())
        if before in excluded:
            excluded.remove(before)
            excluded.add(now)
        optimizer._exclude_from_weight_decay_cache = {}


def pair_with(optimizer, variables):
    """Let an optimizer pair the gradients that it gets with these variables."""
    optimizer.__dict__["_trainable_variables"] = variables  # untracked: they are not its own


def check_before_training(model, check):
    """Let `fit` call `check(model)` before it has taken the state out of the variables."""

    def make_train_function(force=False):
        if not force:  # as `fit` calls it
            check(model)
        return type(model).make_train_function(model, force=force)

    vars(model)["make_train_function"] = make_train_function


def replace_wrapped(layer, name, function):
    """What Keras has bound to a layer when it was made, such as `quantize`; what was there."""
    before = vars(layer).pop(name, None)
    if function is not None:
        vars(layer)[name] = function
    return before


def symbolic_call(function, *args, **kwargs):
    """Call a function of `keras.KerasTensor`s for the shapes of its results only."""
    return backend.compute_output_spec(function, *args, **kwargs)


def models_of(variables):
    """The built models that hold one of some variables, at any depth.

    Nothing leads from a variable to models around it; Python's garbage collector knows them all.
    """
    wanted = {id(variable) for variable in variables}
    models = [x for x in gc.get_objects() if issubclass(type(x), keras.Model)]
    return [
        model
        for model in models
        if getattr(model, "built", False) and any(id(weight) in wanted for weight in model.weights)
    ]


def forget_functions(model, also_of_inference):
    """Let a model compile its train step anew, or all that it has compiled."""
    if also_of_inference:
        model.test_function = model.predict_function = None
    if getattr(model, "train_function", None) is not None:
        model.make_train_function(force=True)  # perhaps in the middle of `fit`


def list_of(callback):
    """The `CallbackList` that calls a callback just now; `None` if none does."""
    for frame in _callers():
        caller = frame.f_locals.get("self")
        if isinstance(caller, keras.callbacks.CallbackList) and callback in caller.callbacks:
            return caller
    return None


def callbacks_around(callback):
    """The callbacks before one in the list that calls it just now, and those behind it."""
    calling = list_of(callback)
    if calling is None:
        return [], []
    at = calling.callbacks.index(callback)
    return calling.callbacks[:at], calling.callbacks[at + 1 :]


def is_loading():
    """Whether a file is being read that holds an optimizer and the weights that it trains."""
    return is_called_by("_load_state")


def is_called_by(function):
    """Whether a function of this name is running."""
    return any(frame.f_code.co_name == function for frame in _callers())


def told_once(callback):
    """Whether this was asked before by a callback of the same list."""
    calling = list_of(callback)
    told = getattr(calling, "has_told", False)
    if calling is not None:
        calling.has_told = True
    return told


def steps_of(model):
    """A dict on the model for its compiled train steps; Keras does not track it."""
    return vars(model).setdefault("_steps_by_gradients", {})
