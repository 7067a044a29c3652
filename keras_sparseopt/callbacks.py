"""Dynamic sparse training: when and how masks change."""

import collections
import concurrent.futures
import math
import numbers
import os
import zlib
from typing import Any

import keras
import numpy as np
from keras import ops

from keras_sparseopt import masks
from keras_sparseopt.conversion import sparse_layers
from keras_sparseopt.devices import assert_replicas_agree, check_fit, strategy_scope
from keras_sparseopt.optimizers import SparseOpt
from keras_sparseopt.optimizers.sparse_opt import UNWRITTEN


def _find_sparse_opt(optimizer):
    """The `SparseOpt` in a compiled optimizer, under loss scaling too."""
    found = optimizer
    if isinstance(found, keras.optimizers.LossScaleOptimizer):
        found = found.inner_optimizer
    if isinstance(found, SparseOpt):
        return found
    raise ValueError(
        "The optimizer must be a SparseOpt: it moves masks, weights and slots together. "
        "Compile with optimizer=keras_sparseopt.SparseOpt(optimizer); for masking without "
        "the correction SparseOpt(optimizer, skew_correction=False). "
        f"Received: optimizer={type(optimizer).__name__}"
    )


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
            devices after every update (`assert_replicas_agree`): slow, for debugging.

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

    def __init__(
        self,
        update_every=100,
        drop_fraction=0.3,
        begin_step=0,
        end_step=None,
        seed=0,
        check_replicas=False,
    ):
        super().__init__()
        if not isinstance(check_replicas, bool):
            raise ValueError(
                f"`check_replicas` must be a bool. Received: check_replicas={check_replicas!r}"
            )
        _check_int("update_every", update_every, 1)
        _check_int("begin_step", begin_step, 0)
        if end_step is not None:
            _check_int("end_step", end_step, begin_step + 1)
        _check_int("seed", seed, 0)
        if not isinstance(drop_fraction, keras.optimizers.schedules.LearningRateSchedule):
            _check_fraction(drop_fraction)
        self.update_every = int(update_every)
        self.drop_fraction = drop_fraction
        self.begin_step = int(begin_step)
        self.end_step = None if end_step is None else int(end_step)
        self.seed = int(seed)
        self.check_replicas = check_replicas
        self.optimizer: Any = None
        self._logs: dict[str, float] = {}

    def grow_scores(self, index, kernel):
        """Scores by which connections grow, larger first.

        Args:
            index: Int, position of the kernel among `optimizer.sparse_kernels`.
            kernel: Keras variable; `self.optimizer.dense_gradient(kernel)` is its gradient if
                the method asked for gradients.

        Returns:
            Float tensor of the kernel's shape.
        """
        raise NotImplementedError(f"{type(self).__name__} must implement `grow_scores`.")

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
        optimizer = _find_sparse_opt(optimizer)
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
        self.optimizer, self._settled = optimizer, False
        self._set_horizon(0, total_steps)
        changed = False
        if self._gradient_steps:
            changed = optimizer.open_taps(self._gradient_steps, self.update_every)
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
        if self._gradient_steps:
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
        if self.begin_step <= self._step < self._end_step:
            self._update_masks()
        self._look_again()

    def _current_drop_fraction(self, step):
        if isinstance(self.drop_fraction, keras.optimizers.schedules.LearningRateSchedule):
            value = float(ops.convert_to_numpy(self.drop_fraction(step)))
            _check_fraction(value)
            return value
        progress = min((step - self._first_step) / (self._end_step - self._first_step), 1.0)
        return self.drop_fraction / 2 * (1 + math.cos(math.pi * progress))

    def _update_masks(self):
        fraction = self._current_drop_fraction(self._step)
        kernels = list(enumerate(self.optimizer.sparse_kernels))
        if self._gradient_steps:
            gradients = [_Values(self.optimizer.dense_gradient(kernel)) for _, kernel in kernels]
            # A layer that no loss depends on has none; its topology stays.
            kernels = [pair for pair, g in zip(kernels, gradients) if g.are_written]
            if not kernels:
                raise ValueError(
                    "No dense gradient has arrived: the train step was compiled before "
                    "`begin`, which then returned True. Make the train step again after it."
                )
            if not all(g.are_finite for g in gradients if g.are_written):
                return self._keep_masks("the dense gradient is")
        if not all(_Values(kernel).are_finite for _, kernel in kernels):
            return self._keep_masks("the weights are")
        workers, counts = os.cpu_count() or 1, []
        changed = 0
        # Layers are ranked in parallel. Only a few wait at a time: their scores take memory.
        waiting: collections.deque = collections.deque()
        with concurrent.futures.ThreadPoolExecutor(workers) as pool:
            for index, kernel in kernels:
                mask = masks.host(kernel.topology.mask)
                num_active = int(np.count_nonzero(mask))
                num_update = math.floor(fraction * num_active)
                counts.append(num_active)
                if num_update > 0:
                    arrays = masks.host(kernel), mask, masks.host(self.grow_scores(index, kernel))
                    ranking = pool.submit(masks.drop_and_grow, *arrays, num_update)
                    waiting.append((kernel, mask, ranking))
                if len(waiting) >= workers:
                    changed += self._rewire(*waiting.popleft())
            while waiting:
                changed += self._rewire(*waiting.popleft())
        self.optimizer.mask_change.assign(changed / sum(counts))
        if self.check_replicas:
            assert_replicas_agree(self.optimizer)

    def _rewire(self, kernel, old, ranking):
        """Returns how many connections are new."""
        new = ranking.result()
        num_new = int(np.count_nonzero(new & ~old))
        self.optimizer.rewire(kernel, new)
        return num_new

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
        _find_sparse_opt(model.optimizer)
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
        if not model.optimizer.built:
            with strategy_scope(model.optimizer):
                model.optimizer.build(model.trainable_variables)
        if self.begin(model.optimizer, total_steps=self._fit_steps(model) or 1):
            model.make_train_function(force=True)

    def _fit_steps(self, model):
        """Optimizer steps from epoch 0 to the end of this fit, `None` if unknown."""
        if self.params.get("steps") is None:
            return None
        base = _find_sparse_opt(model.optimizer).base_optimizer()
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


class RigL(DynamicSparseTraining):
    """RigL: grow the connections whose dense gradient is largest.

    ```
    score = |g|          g: dense gradient of the loss at optimizer step t, all-reduced
    ```

    The gradient is the training step's own: no extra batch. Just-dropped connections may
    grow again (and then keep weight and slots). If the gradient of an update step is not
    finite, that update is left out.

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1) with cosine annealing, or a Keras schedule of the
            optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        growth_gradient: `"original"` (default) ranks by the gradient as it is, which raises
            the ITOP rate; `"corrected"` by SparseOpt's `g · √(1−s_i)/√(1−s_avg)`. Layers with
            `skew_correction=False` are ranked by the original one in both cases.
        gradient_steps: Int, grow on the gradient averaged over the last so many optimizer
            steps, defaults to 1. At most `update_every`.
        seed: Int; RigL draws nothing at random, kept for a uniform signature.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices after every update (`assert_replicas_agree`): slow, for debugging.

    Raises:
        ValueError: As `DynamicSparseTraining`; or for a wrong `growth_gradient` or
            `gradient_steps`.

    Example:

    ```python
    import keras
    import numpy as np
    import keras_sparseopt as kso

    model = keras.Sequential([
        keras.Input((20,)),
        kso.SparseDense(32, sparsity=0.9),
        keras.layers.BatchNormalization(),
        keras.layers.Dense(1),
    ])
    model.compile(optimizer=kso.SparseOpt("sgd"), loss="mse")
    history = model.fit(
        np.random.rand(64, 20), np.random.rand(64, 1), batch_size=8, epochs=2, verbose=0,
        callbacks=[kso.RigL(update_every=4)],
    )
    assert history.history["itop_rate"][-1] >= 1 - history.history["sparsity"][-1]
    ```

    References:
        Evci et al., "Rigging the Lottery: Making All Tickets Winners", ICML 2020;
        the two growth gradients: Adnan et al., "SparseOpt", ICML 2026.
    """

    def __init__(
        self,
        update_every=100,
        drop_fraction=0.3,
        begin_step=0,
        end_step=None,
        growth_gradient="original",
        seed=0,
        gradient_steps=1,
        check_replicas=False,
    ):
        super().__init__(update_every, drop_fraction, begin_step, end_step, seed, check_replicas)
        if growth_gradient not in ("original", "corrected"):
            raise ValueError(
                '`growth_gradient` must be "original" or "corrected". '
                f"Received: growth_gradient={growth_gradient!r}"
            )
        _check_int("gradient_steps", gradient_steps, 1)
        if gradient_steps > update_every:
            raise ValueError(
                "`gradient_steps` must be at most `update_every`. Received: "
                f"gradient_steps={gradient_steps}, update_every={update_every}"
            )
        self.growth_gradient = growth_gradient
        self.gradient_steps = self._gradient_steps = int(gradient_steps)

    def grow_scores(self, index, kernel):
        scores = ops.abs(self.optimizer.dense_gradient(kernel))
        topology = kernel.topology
        if self.growth_gradient == "corrected" and topology.skew_correction:
            mask = ops.convert_to_tensor(topology.mask)
            scale = masks.correction(mask, topology.neuron_axes)
            scores = scores * ops.cast(scale, scores.dtype)
        return scores


class SET(DynamicSparseTraining):
    """SET, sparse evolutionary training: grow connections uniformly at random.

    ```
    score ~ Uniform(0, 1), drawn from (seed, kernel index, optimizer step)
    ```

    The draw has no state, so it is the same on every replica and after a resume. The count of
    active weights is exact (some codes draw each connection on its own and let it drift).

    Args:
        update_every: Int, optimizer steps between mask updates, defaults to 100.
        drop_fraction: Float in [0, 1) with cosine annealing, or a Keras schedule of the
            optimizer step. Defaults to 0.3.
        begin_step: Int, no update before this optimizer step, defaults to 0.
        end_step: Int, no update at or after this optimizer step. `None` (default): 75 % of
            the steps of this fit.
        seed: Int, defaults to 0.
        check_replicas: Bool, defaults to `False`. `True` compares masks, weights and slots of all
            devices after every update (`assert_replicas_agree`): slow, for debugging.

    Raises:
        ValueError: As `DynamicSparseTraining`.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.SET(update_every=100, drop_fraction=0.5, seed=1)
    ```

    References:
        Mocanu et al., "Scalable Training of Artificial Neural Networks with Adaptive Sparse
        Connectivity Inspired by Network Science", Nature Communications 2018.
    """

    def grow_scores(self, index, kernel):
        draw = zlib.crc32(np.array([self.seed, index, self._step], dtype="<i8").tobytes())
        return keras.random.uniform(kernel.shape, seed=draw & 0x7FFFFFFF, dtype="float32")


class Static(DynamicSparseTraining):
    """Static sparse training: the masks never change; logs as the dynamic methods do.

    Not needed for training with fixed masks (a `SparseOpt` alone does that), but a baseline
    that differs from `RigL` or `SET` in this one name.

    Example:

    ```python
    import keras_sparseopt as kso

    callback = kso.Static()
    ```
    """

    def __init__(self):
        super().__init__(update_every=1, drop_fraction=0.0, end_step=1)

    def _check_interval(self, steps_per_execution):
        pass

    def _may_be_due(self, batches):
        return False


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


def _check_int(argument, value, minimum):
    if isinstance(value, bool) or not isinstance(value, numbers.Integral) or value < minimum:
        raise ValueError(f"`{argument}` must be an int ≥ {minimum}. Received: {argument}={value!r}")


def _check_fraction(value):
    number = isinstance(value, numbers.Real) and not isinstance(value, bool)
    if not number or not 0 <= value < 1:
        raise ValueError(
            "`drop_fraction` must be in [0, 1), or a Keras schedule with such values. "
            f"Received: drop_fraction={value!r}"
        )
