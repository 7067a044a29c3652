"""What `SparseOpt` and `HAM` share: being a Keras optimizer around another one."""

import warnings

import keras

from keras_sparseopt import backend, keras_internals


class WrapperOptimizer(keras.optimizers.Optimizer):
    """Delegates everything to `inner_optimizer`; subclasses change gradients or weights.

    Learning rate, schedules, weight decay, clipping, EMA, gradient accumulation and loss
    scaling stay the inner optimizer's business.

    Args:
        inner_optimizer: Keras optimizer, its name or its config.
        name: String or `None`.
    """

    @classmethod
    def reasons_to_refuse(cls):
        """Dict: optimizer class → why it, or what derives from it, cannot be inside."""
        return {
            keras.optimizers.LossScaleOptimizer: "it must be outermost: "
            f"LossScaleOptimizer({cls.__name__}(optimizer))",
            keras.optimizers.MultiOptimizer: "it has no single learning rate and step count; use "
            "one optimizer per training run",
        }

    def __init__(self, inner_optimizer, name=None):
        if not isinstance(inner_optimizer, (keras.optimizers.Optimizer, str, dict)):
            raise ValueError(
                "`inner_optimizer` must be a Keras optimizer, its name or its config. "
                f"Received: inner_optimizer={inner_optimizer!r}"
            )
        inner_optimizer = keras.optimizers.get(inner_optimizer)
        self._refuse(inner_optimizer)
        if inner_optimizer.built:
            raise ValueError(
                "`inner_optimizer` must be new: this one was built for other variables already. "
                f"Received: inner_optimizer={type(inner_optimizer).__name__}"
            )
        super().__init__(learning_rate=0.0, name=name)
        self.inner_optimizer = inner_optimizer

    @classmethod
    def _refuse(cls, inner_optimizer):
        while inner_optimizer is not None:
            for refused, reason in cls.reasons_to_refuse().items():
                if isinstance(inner_optimizer, refused):
                    raise ValueError(
                        f"{cls.__name__} does not accept {refused.__name__} as inner optimizer: "
                        f"{reason}. Received: inner_optimizer={type(inner_optimizer).__name__}"
                    )
            inner_optimizer = getattr(inner_optimizer, "inner_optimizer", None)

    def __repr__(self):
        inner = self.inner_optimizer
        if not isinstance(inner, WrapperOptimizer):
            inner = f"<{type(inner).__name__}>"
        return f"<{type(self).__name__} around {inner}{self._told()}>"

    def _told(self):
        """What `repr` says beside the inner optimizer."""
        return ""

    # Not a property: Keras would save the optimizer once more under its name.
    def base_optimizer(self):
        """The innermost optimizer: the one that holds the slots and the step count."""
        optimizer = self.inner_optimizer
        while isinstance(optimizer, WrapperOptimizer):
            optimizer = optimizer.inner_optimizer
        return optimizer

    def build(self, variables):
        self.inner_optimizer.build(variables)
        super().build(variables)

    @backend.not_compiled
    def apply(self, grads, trainable_variables=None):
        if trainable_variables is not None:
            trainable_variables = list(trainable_variables)
            if not self.built:
                self.build(trainable_variables)
        elif not self.built:
            raise ValueError(
                "`apply` without `trainable_variables` needs a built optimizer. "
                "Call `optimizer.build(trainable_variables)` first."
            )
        trained = trainable_variables or keras_internals.trained_variables(self)
        self._apply(list(grads), trained)

    def _apply(self, grads, variables):
        self.inner_optimizer.apply(grads, variables)

    def apply_gradients(self, grads_and_vars):
        super().apply_gradients(grads_and_vars)
        return self.iterations

    @property
    def variables(self):
        return keras_internals.own_variables(self) + self.inner_optimizer.variables

    @property
    def iterations(self):
        return self.inner_optimizer.iterations

    @property
    def learning_rate(self):
        return self.inner_optimizer.learning_rate

    @learning_rate.setter
    def learning_rate(self, learning_rate):
        self.inner_optimizer.learning_rate = learning_rate

    @property
    def loss_scale_factor(self):
        return self.inner_optimizer.loss_scale_factor

    @loss_scale_factor.setter
    def loss_scale_factor(self, value):
        # The base constructor assigns it before there is an inner optimizer.
        if "inner_optimizer" in self.__dict__:
            self.inner_optimizer.loss_scale_factor = value

    def scale_loss(self, loss):
        return self.inner_optimizer.scale_loss(loss)

    def finalize_variable_values(self, var_list):
        self.inner_optimizer.finalize_variable_values(var_list)
        if self.base_optimizer().use_ema:
            backend.unshare(var_list)

    def exclude_from_weight_decay(self, var_list=None, var_names=None):
        self.inner_optimizer.exclude_from_weight_decay(var_list, var_names)

    # Keras saves the inner optimizer by itself, as a child; here only what is the wrapper's own.
    def save_own_variables(self, store):
        keras_internals.save_own(self, store)

    def load_own_variables(self, store):
        own = keras_internals.own_variables(self)
        if len(store.keys()) != len(own):
            warnings.warn(
                f"Skipping variable loading for optimizer '{self.name}': it has "
                f"{len(own)} variables of its own, the file {len(store.keys())}. Where masks were "
                "in it, take them from the weights: keras_sparseopt.masks_from_zeros(model).",
                stacklevel=2,
            )
            return
        for i, variable in enumerate(own):
            variable.assign(store[str(i)])

    # Where Keras' `SwapEMAWeights` looks for the averages of a nested optimizer.
    @property
    def _model_variables_moving_average(self):
        return keras_internals.averages(self.base_optimizer())

    def get_config(self):
        inner = keras_internals.serialized(self.inner_optimizer)
        return {"name": self.name, "inner_optimizer": inner}

    @classmethod
    def from_config(cls, config, custom_objects=None):
        config = dict(config)
        inner = keras.saving.deserialize_keras_object(
            config.pop("inner_optimizer"), custom_objects=custom_objects
        )
        return cls(inner, **config)
