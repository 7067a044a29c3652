"""Dynamic sparse training: what all methods share. The methods are in `methods`."""

import collections
import concurrent.futures
import fnmatch
import math
import numbers
import os
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.conversion import sparse_layers
from keras_sparseopt.devices import assert_replicas_agree, build_optimizer, check_fit
from keras_sparseopt.optimizers.sparse_opt import UNWRITTEN, sparse_opt_of

NO_GRADIENT = (
    "No dense gradient has arrived: the train step was compiled before `begin`, which then "
    "returned True. Make the train step again after it."
)


def _required_sparse_opt(optimizer):
    found = sparse_opt_of(optimizer)
    if found is None:
        raise ValueError(
            "The optimizer must be a SparseOpt: it moves masks, weights and slots together. "
            "Compile with optimizer=keras_sparseopt.SparseOpt(optimizer); for masking without "
            "the correction SparseOpt(optimizer, skew_correction=False). "
            f"Received: optimizer={type(optimizer).__name__}"
        )
    return found


class DynamicSparseTraining(keras.callbacks.Callback):
    """Base of the mask-update methods: drop the smallest weights, grow others, keep the count.

    ```
    every `update_every` optimizer steps t, begin_step ≤ t < end_step, for every sparse kernel:
        f(t)     = drop_fraction/2 · (1 + cos(π t / end_step))
        n_update = floor(f(t) · n_active)
        mask     = drop_and_grow(weights, mask, grow_scores, n_update)
    ```

    The update comes right after optimizer step t, from the weights after that step (and, for
    RigL, the gradient of that step). A method is a subclass with its own `grow_scores`.

    Put it in `fit(callbacks=[...])`, before callbacks that read its logs (`CSVLogger`) or
    save the model. It writes `sparsity`, `drop_fraction`, `itop_rate` and `mask_change` (the
    fraction of active weights that the last update made new) into the logs.

    In a custom loop, the same object works without `fit`:

    ```
    if method.begin(optimizer, total_steps):
        ...                        # make the train step again, if it was compiled before
    for batch in data:
        train_step(batch)          # calls optimizer.apply once
        logs = method.step()
    method.end()
    ```

    Nothing is kept here that a resume would need: the phase comes from
    `optimizer.iterations`, random growth from (seed, kernel, step). Steps that loss scaling
    skips do not count.

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1), the fraction of active weights replaced at the start,
            annealed by a cosine to 0 at `end_step`; or a Keras learning-rate schedule, a
            function of the optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        seed: Int, defaults to 0; of random growth.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices before and after every update (`assert_replicas_agree`): slow, for debugging.
        layers: List of layer names or patterns such as `"conv*"` that this method is for, or `None`
            (default) for all sparse layers. Several methods with different layers may train one
            model; `drop_fraction` and `mask_change` are then those of the last one in the list.

    Raises:
        ValueError: For an argument out of range; at the start of training if the optimizer is
            not a `SparseOpt`, the model holds no sparse layer, or `update_every` is not a
            multiple of `steps_per_execution`.

    Example:

    ```python
    import keras
    import keras_sparseopt as kso

    class ByDistance(kso.DynamicSparseTraining):
        # Grows the connections between the nearest units.
        def grow_scores(self, index, kernel):
            rows, columns = kernel.shape
            distance = keras.ops.arange(rows)[:, None] - keras.ops.arange(columns)[None, :]
            return -keras.ops.cast(keras.ops.abs(distance), "float32")

    callback = ByDistance(update_every=10, end_step=100)
    ```
    """

    # How many steps' dense gradients `grow_scores` needs; 0 for none.
    _gradient_steps = 0
    # Momentum of a moving average of all steps' dense gradients, instead of the last ones'.
    _gradient_momentum: float | None = None

    def __init__(
        self,
        update_every=100,
        drop_fraction=0.3,
        begin_step=0,
        end_step=None,
        seed=0,
        check_replicas=False,
        layers=None,
    ):
        super().__init__()
        if not isinstance(check_replicas, bool):
            raise ValueError(
                f"`check_replicas` must be a bool. Received: check_replicas={check_replicas!r}"
            )
        check_int("update_every", update_every, 1)
        check_int("begin_step", begin_step, 0)
        if end_step is not None:
            check_int("end_step", end_step, begin_step + 1)
        check_int("seed", seed, 0)
        if not isinstance(drop_fraction, keras.optimizers.schedules.LearningRateSchedule):
            check_fraction(drop_fraction)
        self.update_every = int(update_every)
        self.drop_fraction = drop_fraction
        self.begin_step = int(begin_step)
        self.end_step = None if end_step is None else int(end_step)
        self.seed = int(seed)
        self.check_replicas = check_replicas
        self.layers = check_layers("layers", layers)
        self.optimizer: Any = None
        self._logs: dict[str, float] = {}

    def grow_scores(self, index, kernel):
        """Scores by which connections grow, larger first.

        Args:
            index: Int, position of the kernel among `optimizer.sparse_kernels`.
            kernel: Keras variable; `self.optimizer.dense_gradient(kernel)` is its gradient if
                the method asked for gradients.

        Returns:
            Float tensor of the kernel's shape; `None` for a method that grows nothing. Unless
            overridden, the magnitude of the dense gradient, for a method that asked for it.
        """
        if not self._gradient_steps:
            raise NotImplementedError(f"{type(self).__name__} must implement `grow_scores`.")
        return ops.abs(self.optimizer.dense_gradient(kernel))

    # ------------------------------------------------------------------ any training loop

    def begin(self, optimizer, total_steps=None):
        """Start. Call once before the loop, with a built optimizer.

        Args:
            optimizer: `SparseOpt`, also inside a `LossScaleOptimizer`.
            total_steps: Int, optimizer steps of the whole training; needed with
                `end_step=None`.

        Returns:
            Bool, whether the train step must be compiled again: the optimizer has begun to
            keep dense gradients.
        """
        optimizer = _required_sparse_opt(optimizer)
        if self.end_step is None and total_steps is None:
            raise ValueError(
                "`total_steps` must be given when the callback has no `end_step`. "
                "Received: total_steps=None, end_step=None"
            )
        if not optimizer.built:
            raise ValueError(
                "`optimizer` must be built: call optimizer.build(model.trainable_variables)."
            )
        if not optimizer.sparse_kernels:
            raise ValueError(
                "The optimizer trains no sparse layer, or all of them are frozen. Convert the "
                "model with keras_sparseopt.sparsify(model, sparsity), or use SparseDense, …"
            )
        self._check_layers_exist(optimizer)
        self.optimizer, self._settled = optimizer, False
        self._set_horizon(0, total_steps)
        changed = False
        if self._gradient_steps:
            changed = optimizer.open_taps(
                self._gradient_steps, self.update_every, self._gradient_momentum
            )
        optimizer.sync()
        self._look_again()
        return changed

    def _set_horizon(self, first_step, total_steps):
        """Where annealing starts and updates end, in optimizer steps."""
        if self.end_step is None:
            self._first_step = first_step
            self._end_step = math.ceil(first_step + 0.75 * total_steps)
        else:
            self._first_step, self._end_step = 0, self.end_step

    def step(self, batches=1):
        """Tell that the optimizer was applied; updates the masks when it is time.

        Args:
            batches: Int, how many times it was applied since the last call, defaults to 1.

        Returns:
            Dict with `sparsity`, `drop_fraction`, `itop_rate`, `mask_change`.
        """
        if self.optimizer is None:
            raise ValueError("`begin` must be called before `step`.")
        if self._may_be_due(batches):
            self._update_if_due()
        return dict(self._logs)

    def end(self):
        """Stop; frees the dense gradients."""
        if self._gradient_steps and self.optimizer is not None:
            self.optimizer.close_taps()

    def _may_be_due(self, batches):
        """Whether the step count can have crossed a multiple, without reading it.

        Reading a variable waits for the device (and on JAX copies the whole state), so the
        applied batches are counted here; skipped steps only make the count an upper bound.
        """
        self._pending += batches
        accumulation = self.optimizer.base_optimizer().gradient_accumulation_steps or 1
        return self._step + math.ceil(self._pending / accumulation) >= self._next

    def _look_again(self):
        self._step = int(ops.convert_to_numpy(self.optimizer.iterations))
        self._pending = 0
        self._next = (self._step // self.update_every + 1) * self.update_every
        self._logs.update(
            sparsity=self._sparsity(),
            drop_fraction=self._current_drop_fraction(self._step),
            itop_rate=self.optimizer.itop_rate(),
            mask_change=float(masks.host(self.optimizer.mask_change)),
        )

    def _update_if_due(self):
        before = self._step // self.update_every
        self._step = int(ops.convert_to_numpy(self.optimizer.iterations))
        self._pending = 0
        if self._step // self.update_every == before:
            return
        if self._is_due():
            self._update_masks()
        self._look_again()

    def _is_due(self):
        return self.begin_step <= self._step < self._end_step

    def _current_drop_fraction(self, step):
        if isinstance(self.drop_fraction, keras.optimizers.schedules.LearningRateSchedule):
            value = float(ops.convert_to_numpy(self.drop_fraction(step)))
            check_fraction(value)
            return value
        progress = min((step - self._first_step) / (self._end_step - self._first_step), 1.0)
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))

    def _kernels(self):
        """The kernels that this method is for, with their positions among all."""
        return [
            (index, kernel)
            for index, kernel in enumerate(self.optimizer.sparse_kernels)
            if self._is_for(kernel)
        ]

    def _is_for(self, kernel):
        return self.layers is None or is_named(kernel, self.layers)

    def _check_layers_exist(self, optimizer):
        names = [kernel.topology.name for kernel in optimizer.sparse_kernels]
        for pattern in self.layers or ():
            if not fnmatch.filter(names, pattern):
                raise ValueError(
                    f"`layers` must name sparse layers that are trained: {names}. "
                    f"Received: {pattern!r}"
                )

    def _update_masks(self):
        if self.check_replicas:  # before: the update gives all replicas the same
            assert_replicas_agree(self.optimizer)
        kernels = self._kernels()
        if self._gradient_steps:
            gradients = [_Values(self.optimizer.dense_gradient(kernel)) for _, kernel in kernels]
            # A layer that no loss depends on has none; its topology stays.
            kernels = [pair for pair, g in zip(kernels, gradients) if g.are_written]
            if not kernels:
                raise ValueError(NO_GRADIENT)
            if not all(g.are_finite for g in gradients if g.are_written):
                return self._keep_masks("the dense gradient is")
        if not all(_Values(kernel).are_finite for _, kernel in kernels):
            return self._keep_masks("the weights are")
        self.plan(kernels)
        fraction = self._current_drop_fraction(self._step)
        workers = os.cpu_count() or 1
        changed = active = 0
        # Layers are ranked in parallel. Only a few wait at a time: their scores take memory.
        waiting: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            while kernels or waiting:
                if kernels and len(waiting) < workers:
                    index, kernel = kernels.pop(0)
                    mask = masks.host(kernel.topology.mask)
                    scores = self.grow_scores(index, kernel)
                    scores = None if scores is None else masks.host(scores)
                    arguments = kernel, masks.host(kernel), mask, scores, fraction
                    waiting.append((kernel, mask, pool.submit(self.new_mask, *arguments)))
                    continue
                kernel, old, ranking = waiting.popleft()
                new = ranking.result()
                changed += int(np.count_nonzero(new & ~old))
                active += int(np.count_nonzero(new))
                if not np.array_equal(new, old):
                    self.optimizer.rewire(kernel, new)
        self.optimizer.mask_change.assign(changed / max(active, 1))
        if self.check_replicas:
            assert_replicas_agree(self.optimizer)

    def plan(self, kernels):
        """What an update must know of all layers together, before any of them changes.

        Args:
            kernels: List of (index, Keras variable) of the kernels that will be updated.
        """

    def new_mask(self, kernel, weights, mask, scores, fraction):
        """One kernel's next mask. Runs in a thread of its own, on NumPy arrays.

        Args:
            kernel: Keras variable; read its `topology` only, not its value.
            weights: Float array, the kernel's value.
            mask: Bool array, the present mask.
            scores: Float array, what `grow_scores` returned, or `None`.
            fraction: Float, the present drop fraction.

        Returns:
            Bool array of the same shape.
        """
        num_update = math.floor(fraction * np.count_nonzero(mask))
        return masks.drop_and_grow(weights, mask, scores, num_update)

    def _keep_masks(self, what):
        print(
            f"\n{type(self).__name__}: {what} not finite at step {self._step}; "
            "the masks stay as they are."
        )

    def _sparsity(self):
        kernels = self.optimizer.sparse_kernels
        active = sum(int(np.count_nonzero(masks.host(k.topology.mask))) for k in kernels)
        return 1.0 - active / sum(math.prod(k.shape) for k in kernels)

    # ------------------------------------------------------------------ inside of `fit`

    def on_train_begin(self, logs=None):
        model = self.model
        self.optimizer = None
        _required_sparse_opt(model.optimizer)
        check_fit(model, own_loop=self.params.get("own_loop", False))
        self._check_interval(model.steps_per_execution)
        if self.end_step is None and self.params.get("steps") is None:
            raise ValueError(
                "`end_step` must be given when the number of steps per epoch is unknown. "
                "Received: end_step=None"
            )
        # TensorFlow builds a model without known input shape at its first batch.
        if all(layer.built for layer in model._flatten_layers()):
            self._begin_fit(model)

    def _check_interval(self, steps_per_execution):
        if self.update_every % steps_per_execution:
            raise ValueError(
                "`update_every` must be a multiple of `steps_per_execution`, or updates would "
                f"come late. Received: update_every={self.update_every}, "
                f"steps_per_execution={steps_per_execution}"
            )

    def _begin_fit(self, model):
        if not sparse_layers(model):
            raise ValueError(
                "The model holds no sparse layer. Convert it with "
                "keras_sparseopt.sparsify(model, sparsity), or use SparseDense, SparseConv2D, …"
                f" Received: model '{model.name}'"
            )
        build_optimizer(model)
        if self.begin(model.optimizer, total_steps=self._fit_steps(model) or 1):
            model.make_train_function(force=True)

    def _fit_steps(self, model):
        """Optimizer steps from epoch 0 to the end of this fit, `None` if unknown."""
        if self.params.get("steps") is None:
            return None
        base = _required_sparse_opt(model.optimizer).base_optimizer()
        accumulation = base.gradient_accumulation_steps or 1
        return self.params["epochs"] * self.params["steps"] / accumulation

    def _settle(self):
        """Read phase and horizon off the step count, which may just have been restored."""
        self._settled = True
        self.optimizer.sync()
        if self.end_step is None:
            steps = self._fit_steps(self._model)
            now = int(ops.convert_to_numpy(self.optimizer.iterations))
            before_this_fit = math.floor(now - self._epoch * steps / self.params["epochs"])
            self._set_horizon(max(0, before_this_fit), steps)
        self._look_again()

    def on_epoch_begin(self, epoch, logs=None):
        self._last_batch, self._epoch = -1, epoch
        # Not in `on_train_begin`: BackupAndRestore may have restored the state after ours.
        if self.optimizer is not None and not self._settled:
            self._attach_state()
            self._settle()

    def on_train_batch_end(self, batch, logs=None):
        batches, self._last_batch = batch - self._last_batch, batch
        if self.optimizer is None:  # the first batch has built the model
            self._begin_fit(self.model)
            self._settle()
        elif self._may_be_due(batches):
            self._attach_state()
            self._update_if_due()
        if logs is not None:
            logs.update(self._logs)

    def _attach_state(self):
        # In the middle of an epoch JAX holds the state outside of the variables; reading
        # `model` puts it back. It costs, so only where variables are read.
        _ = self.model

    def on_epoch_end(self, epoch, logs=None):
        if logs is not None:
            logs.update(self._logs)

    def on_train_end(self, logs=None):
        if self.optimizer is None:
            return
        self.end()
        if self._gradient_steps:
            # The compiled step writes to the freed gradients; `fit` makes a new one.
            self.model.train_function = None


class _Values:
    """What an update must know of a gradient or of weights before it may use them."""

    def __init__(self, tensor):
        values = masks.host(tensor).ravel()
        # One fast pass; it can only overflow where a value has become enormous.
        with np.errstate(over="ignore", invalid="ignore"):
            self.are_finite = bool(np.isfinite(np.dot(values, values)))
        if not self.are_finite:
            self.are_finite = bool(np.isfinite(values).all())
        self.are_written = self.are_finite or not np.all(values == UNWRITTEN)


def is_named(kernel, patterns):
    """Whether the layer of a sparse kernel has one of these names or patterns."""
    return any(fnmatch.fnmatch(kernel.topology.name, pattern) for pattern in patterns)


def check_layers(argument, layers):
    """A list of layer names or patterns as a tuple, or `None`."""
    if layers is None:
        return None
    listed = isinstance(layers, (list, tuple)) and layers
    if not listed or not all(isinstance(name, str) for name in layers):
        raise ValueError(
            f"`{argument}` must be a list of layer names or patterns, or None. "
            f"Received: {argument}={layers!r}"
        )
    return tuple(layers)


def check_float(argument, value, minimum, limit):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not minimum <= value < limit:
        raise ValueError(
            f"`{argument}` must be in [{minimum}, {limit}). Received: {argument}={value!r}"
        )


def check_int(argument, value, minimum):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{argument}` must be an int ≥ {minimum}. Received: {argument}={value!r}")


def check_fraction(value):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(
            "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. "
            f"Received: drop_fraction={value!r}"
        )
