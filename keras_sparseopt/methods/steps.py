"""What happens at certain optimizer steps: a callback that counts them, in `fit` and elsewhere."""

import contextlib
import inspect
import math
import warnings
from collections.abc import Sequence
from typing import Any

import keras

from keras_sparseopt import backend, keras_internals
from keras_sparseopt.backend import host
from keras_sparseopt.checks import check_patterns
from keras_sparseopt.devices import all_names, build_optimizer, optimizers_by_name, use_step
from keras_sparseopt.methods.schedule import Schedule
from keras_sparseopt.models.conversion import masked_share, told_dense
from keras_sparseopt.models.topology import is_named, sparse_weights
from keras_sparseopt.optimizers.moving import is_written
from keras_sparseopt.optimizers.sparse_opt import sparse_opt_of
from keras_sparseopt.typing import SeededSchedule

# Compiling a step without kept gradients pays off, if so many steps are left to gain by it.
_STEPS_WORTH_COMPILING = 20_000


class Run:
    """What a callback knows of the loop that it is in; nothing that a resume would need."""

    def __init__(self, schedule):
        self.schedule = schedule
        self.lease: Any = None
        # Whether dense gradients are kept only in the steps before something is due, as they cost
        # more than all else does where weights are condensed.
        self.has_windows = False
        self.epoch: int | None = None  # inside of `fit` only
        self.initial_epoch: Any = 0
        self.is_again = False  # whether such a callback has begun with this optimizer before
        self.is_settled = False
        self.logs: dict[str, float] = {}
        self.compiled_with: Any = None  # the optimizer that `fit` trains with
        # The optimizer step, and what is added to the optimizer's own count to have it.
        self.step = self.offset = self.first_step = 0
        self.next: float = 0
        # Calls of `apply` at the last look, and how many there are per batch, at most.
        self.calls, self.calls_per_batch = 0, 1.0
        # Batches of the epoch that were seen; since the last look; when to look in any case; and
        # since the count of steps has changed.
        self.seen = self.pending = self.standing = 0
        self.has_seen_last = False
        self.probe = 1

    @contextlib.contextmanager
    def at(self, step):
        """For so long it is another step: a tensor, while something is compiled for all steps."""
        before, self.step = self.step, step
        try:
            yield
        finally:
            self.step = before


class StepCallback(keras.callbacks.Callback):
    """Base of the callbacks that do something every so many optimizer steps.

    It reads the step count when something may be due, and leaves Keras' asynchronous dispatch on in
    between: batches are counted, with as many steps per batch as there were so far. A subclass
    says what is done (`act`), when (`is_due`), and what it logs.

    A subclass sets the attribute that `interval` names, and `begin_step` and `end_step` where they
    are others (see `Schedule`), before it calls this constructor. They are read at the start of
    every training.

    Args:
        layers: List of names or patterns such as `"conv*"` of sparse weights, or `None` for all.
        optimizer: String, the attribute of the model that holds the `SparseOpt`, or `None`.
    """

    # Whether the last time is at the end of the schedule, whatever the interval.
    ends_with_update = False
    # Whether it is meant to act at all.
    acts = True
    # The argument that says how often.
    interval = "update_every"
    begin_step: int = 0
    end_step: Any = math.inf

    def __init__(self, layers: Sequence[str] | None = None, optimizer: str | None = None) -> None:
        super().__init__()
        if optimizer is not None and not isinstance(optimizer, str):
            raise ValueError(
                "`optimizer` must be the name of an attribute of the model, or None. "
                f"Received: optimizer={optimizer!r}"
            )
        self.layers = check_patterns("layers", layers)
        self.optimizer_name = optimizer
        self.optimizer: Any = None
        self._run = self._new_run()

    def _new_run(self):
        every = getattr(self, self.interval)
        return Run(Schedule(every, self.begin_step, self.end_step, self.ends_with_update))

    def __repr__(self) -> str:
        own, defaults = inspect.signature(type(self)).parameters, dict[str, Any]()
        makers = [vars(kind).get("__init__") for kind in type(self).__mro__]
        for parameters in (inspect.signature(make).parameters for make in makers if make):
            defaults = {name: p.default for name, p in parameters.items()} | defaults
        hands_on = any(p.kind is p.VAR_KEYWORD for p in own.values())
        names = {*own, *(SeededSchedule.__annotations__ if hands_on else ())}
        values = vars(self) | {"optimizer": self.optimizer_name}
        told = [
            f"{name}={values[name]!r}"
            for name, default in defaults.items()
            if name in names & {*values}
            and (name == self.interval or repr(values[name]) != repr(default))
        ]
        return f"{type(self).__name__}({', '.join(told)})"

    # ------------------------------------------------------------------ what a subclass is

    def act(self) -> None:
        """What is done at a step at which something is due."""
        raise NotImplementedError

    def is_due(self) -> Any:
        """Whether something is due at the present step, `self.current_step`."""
        return True

    def is_over(self) -> bool:
        """Whether nothing will be due any more."""
        return False

    def lease(self, optimizer: Any) -> Any:
        """The `Lease` on dense gradients that is needed, or `None`."""
        return None

    def read_logs(self) -> dict[str, float]:
        """What appears in the logs: dict of floats."""
        return {}

    def check_weights(self) -> None:
        """Raise ValueError where a weight cannot take part."""

    def warn_if_idle(self) -> None:
        """Warn of what will not happen, as far as it is known when training begins."""
        run, schedule = self._run, self._run.schedule
        if not self.acts or schedule.is_open or run.initial_epoch > 0:
            return
        first = schedule.first_due_after(run.step)
        # One of several fits may be too short; the first one may be all.
        if first == math.inf or (first > schedule.last and self.is_first_fit):
            is_known = schedule.last != math.inf
            end = f" and training ends at step {schedule.last:g}" if is_known else ""
            when = "never" if first == math.inf else f"at step {first:g}"
            warnings.warn(
                f"{type(self).__name__} will not act in this training: the first time would be "
                f"{when}, now is step {run.step}{end}. Received: {self.told_schedule()}",
                stacklevel=2,
            )

    def told_schedule(self) -> str:
        """The arguments that say when, for messages."""
        schedule = self._run.schedule
        told = f"{self.interval}={schedule.every}"
        if schedule.end == math.inf and not schedule.has_own_horizon:
            return told
        end = "75 % of the training" if schedule.has_own_horizon else schedule.end
        return f"{told}, begin_step={schedule.begin}, end_step={end}"

    # ------------------------------------------------------------------ for subclasses

    @property
    def current_step(self) -> Any:
        """The optimizer step: int, or a tensor in what is compiled (`stateless_step`, `scores`)."""
        return self._run.step

    @property
    def schedule(self) -> Schedule:
        """When something is due in this training."""
        return self._run.schedule

    @property
    def is_first_fit(self) -> bool:
        """Whether this is neither resumed nor one of several trainings of the same optimizer."""
        return not (self._run.is_again or self._run.initial_epoch)

    def weights(self) -> list[Any]:
        """The optimizer's `Weight`s that this callback is for."""
        return [
            weight
            for weight in self.optimizer.weights
            if weight.variable.trainable
            and not weight.topology.is_led
            and (self.layers is None or is_named(weight.topology, self.layers))
        ]

    def gradient_of(self, weight: Any) -> Any:
        """The dense gradient kept for a `Weight`; read one by one, each read may be a copy."""
        lease = self._run.lease
        return None if lease is None else lease.gradient(weight.variable)

    def no_gradient(self, weights: Sequence[Any]) -> None:
        """No `Weight` has a dense gradient that is not 0: an error, if no step has written one."""
        if not any(host(is_written(self.gradient_of(weight))) for weight in weights):
            raise ValueError(
                "No dense gradient has arrived: the train step was compiled before `begin`, which "
                "then returned True. Make the train step again after it."
            )
        warnings.warn(
            f"{type(self).__name__} does nothing: the dense gradients of all its weights are 0. No "
            "loss depends on them, or a layer gives 0 for all inputs and lets no gradient through.",
            stacklevel=2,
        )

    # ------------------------------------------------------------------ any training loop

    def begin(self, optimizer: Any, total_steps: float | None = None) -> bool:
        """Start. Call once before the loop, with a built optimizer.

        Args:
            optimizer: `SparseOpt`, also inside a `LossScaleOptimizer`.
            total_steps: Int, optimizer steps of the whole training; needed with
                `end_step=None`.

        Returns:
            Bool, whether the train step must be compiled again: the optimizer keeps other
            gradients than before.
        """
        optimizer = _required(optimizer)
        self.end()
        self._run = self._new_run()
        schedule = self._run.schedule
        if schedule.is_open and total_steps is None:
            raise ValueError(
                "`total_steps` must be given when the callback has no `end_step`. "
                "Received: total_steps=None, end_step=None"
            )
        changed = self._take(optimizer)
        schedule.set_length(0, total_steps)
        self._run.is_again = optimizer.begins_again(type(self).__name__)
        optimizer.settle()
        self._look()
        self._run.first_step = self._run.step
        self.warn_if_idle()
        self._run.logs = self.read_logs()
        return changed

    def _take(self, optimizer, may_have_windows=False):
        """Begin with an optimizer; whether it keeps other gradients than before."""
        if not optimizer.built:
            raise ValueError(
                "`optimizer` must be built: call optimizer.build(model.trainable_variables)."
            )
        if not optimizer.sparse_weights:
            raise ValueError(
                "The optimizer trains no sparse weight, or all of them are frozen. Convert the "
                "model with keras_sparseopt.sparsify(model, sparsity), or use SparseDense, …"
            )
        topologies = [variable.topology for variable in optimizer.sparse_weights]
        for pattern in self.layers or ():
            if not any(is_named(topology, [pattern]) for topology in topologies):
                raise ValueError(
                    "`layers` must name sparse weights that are trained: "
                    f"{[topology.name for topology in topologies]}. Received: {pattern!r}"
                )
        if all(variable.topology.is_led for variable in optimizer.sparse_weights):
            raise ValueError(
                "All sparse weights of the optimizer follow those of another model "
                "(keras_sparseopt.follow), which moves their masks. To train the copy by itself "
                "call keras_sparseopt.strip(copy), then keras_sparseopt.masks_from_zeros(copy)."
            )
        self.optimizer = optimizer
        self.check_weights()
        before = optimizer.kept_gradients
        self._run.lease = lease = self.lease(optimizer)
        if may_have_windows and lease is not None and not lease.averaging.outlasts_a_step:
            self._run.has_windows = any(w.topology.is_condensed for w in self.weights())
            if self._run.has_windows:
                self.end()
        return optimizer.kept_gradients != before or optimizer.has_new_weights

    def step(self, batches: int = 1) -> dict[str, float]:
        """Tell that the optimizer was applied; acts when it is time.

        Args:
            batches: Int, how many train steps were taken since the last call, defaults to 1.

        Returns:
            Dict of what is logged, as of the last time that it has acted.

        Raises:
            ValueError: If the optimizer's step count stands still: it is not applied, or the state
                of the loop lives outside of the variables.
        """
        if self.optimizer is None:
            raise ValueError("`begin` must be called before `step`.")
        if self._may_be_due(batches):
            if self._act_if_due():
                self._run.logs = self.read_logs()
            self._check_it_moves()
        return dict(self._run.logs)

    def _check_it_moves(self):
        run = self._run
        allowed = 2 * run.schedule.every * self._accumulation()
        if self.optimizer.loss_scale_factor is not None:
            allowed += 100  # loss scaling skips steps
        if run.standing >= allowed:
            raise ValueError(
                f"`step` has nothing to do: optimizer.iterations stands at {run.step} after "
                f"{run.standing} more steps, so it is not this optimizer that is applied, or the "
                "state of the loop lives outside of the variables. There, call `stateless_step` "
                "inside of your jitted step, or assign the state to the variables before `step`."
            )

    def end(self) -> None:
        """Stop; frees the dense gradients."""
        if self._run.lease is not None:
            self._run.lease.release()
            self._run.lease = None

    # ------------------------------------------------------------------ counting steps

    def _accumulation(self):
        return self.optimizer.base_optimizer().gradient_accumulation_steps or 1

    def _may_be_due(self, batches):
        """Whether the step count can have come to the next time, without reading it.

        Reading a variable waits for the device (and on JAX moves the whole state). Skipped steps
        only make the count an upper bound. How many steps a batch has is seen after 1, 2, 4, …
        batches.
        """
        run = self._run
        run.pending += batches
        is_near = self._steps_at_most(run.pending) >= run.next
        return self.acts and (is_near or run.pending >= run.probe)

    def _look(self):
        """Read the step count."""
        run = self._run
        step = int(host(self.optimizer.iterations)) + run.offset
        calls = int(host(keras_internals.step_count(self.optimizer.base_optimizer())))
        run.standing = 0 if calls != run.calls else run.standing + run.pending
        if run.pending:
            run.probe = max(run.probe, 2 * run.pending)
            per_batch = (calls - run.calls) / run.pending
            if per_batch > run.calls_per_batch:
                run.calls_per_batch = per_batch
                self._set_length()
        run.step, run.calls, run.pending = step, calls, 0
        run.next = run.schedule.next_after(step)

    def _act_if_due(self):
        """Act, if the step count says so; whether it did."""
        due = self._run.next
        self._look()
        if self._run.step < due or not self.is_due():
            return False
        self.optimizer.catch_up()
        self.act()
        return True

    # ------------------------------------------------------------------ inside of `fit`

    def set_params(self, params):
        super().set_params(params)
        self._run.epoch = None  # another loop begins: the one before may have been interrupted

    def on_train_begin(self, logs=None):
        model = self.model
        self.end()  # of a fit that was interrupted
        self.optimizer, self._run = None, self._new_run()
        optimizer = self._find_optimizer(model)
        # A `CallbackList` of one's own may have none.
        self.params: Any = {"epochs": 1, "steps": None} | (self.params or {})
        backend.check_fit(model, own_loop=self.params.get("own_loop", False))
        accumulation = optimizer.base_optimizer().gradient_accumulation_steps or 1
        self._check_interval(model.steps_per_execution, accumulation)
        self._check_place()
        # TensorFlow builds a model without known input shape at its first batch.
        if not keras_internals.unbuilt_layers(model):
            self._begin_fit(model)

    def _check_place(self):
        """Warn of callbacks that write logs before this one has added its own."""
        before, _ = keras_internals.callbacks_around(self)
        if self.acts and any(isinstance(x, keras.callbacks.CSVLogger) for x in before):
            warnings.warn(
                f"CSVLogger comes before {type(self).__name__} in the list of callbacks and will "
                "not see its logs: put it behind.",
                stacklevel=2,
            )

    def _find_optimizer(self, model):
        """The `SparseOpt` of the model that this callback is for."""
        if self.optimizer_name is not None:
            return _required(all_names(model).get(self.optimizer_name))
        found = {
            name: optimizer
            for name, optimizer in optimizers_by_name(model).items()
            if sparse_opt_of(optimizer) is not None
        }
        if len({id(optimizer) for optimizer in found.values()}) > 1:
            raise ValueError(
                "The model has several SparseOpts: give each its own callback, with "
                f"`optimizer=`. Received: {', '.join(found)}"
            )
        return _required(next(iter(found.values()), getattr(model, "optimizer", None)))

    def _check_interval(self, steps_per_execution, accumulation):
        every = self._run.schedule.every
        if not self.acts:
            return
        if every * accumulation % steps_per_execution:
            raise ValueError(
                f"`{self.interval}` must be a multiple of `steps_per_execution`, or updates would "
                f"come late. Received: {self.interval}={every}, "
                f"steps_per_execution={steps_per_execution}"
            )
        steps, epochs = self.params.get("steps"), self.params.get("epochs", 1)
        if steps is not None and steps % steps_per_execution and epochs > 1:
            raise ValueError(
                "The steps of an epoch must be a multiple of `steps_per_execution`, or updates "
                f"would come late. Received: {steps} steps, "
                f"steps_per_execution={steps_per_execution}"
            )

    def _begin_fit(self, model):
        if not sparse_weights(model):
            raise ValueError(
                "The model holds no sparse weight. Convert it with "
                "keras_sparseopt.sparsify(model, sparsity), or use SparseDense, SparseConv2D, …"
                f" Received: model '{model.name}'"
            )
        optimizer = self._find_optimizer(model)
        if optimizer is sparse_opt_of(model.optimizer):
            build_optimizer(model)
        elif not optimizer.built:  # the model's own step builds it
            return
        self._take(optimizer, may_have_windows=True)
        self._run.compiled_with = getattr(model, "optimizer", None)
        use_step(model)
        self._tell_what_is_sparse(model)

    def _tell_what_is_sparse(self, model):
        if not self.params.get("verbose") or keras_internals.told_once(self):
            return
        masked, total, dense = masked_share(model)
        text = f"{masked / total:.1%} of the {total:,} kernel weights have a mask"
        if dense:
            text += f"; dense: {told_dense(dense)}"
        print(f"{type(self).__name__}: {text}.")

    def _settle(self):
        """Read phase and horizon off the step count, which may just have been restored."""
        run = self._run
        run.is_settled, run.initial_epoch = True, run.epoch
        self.optimizer.settle()
        self._look()
        run.first_step = run.step
        self._set_length()
        epochs = self.params["epochs"]
        if run.schedule.is_open and self.acts and epochs - run.initial_epoch == 1:
            raise ValueError(
                "`end_step` must be given when the number of steps per epoch is unknown. "
                "Received: end_step=None"
            )
        name = type(self).__name__
        run.is_again = self.optimizer.begins_again(name)
        if run.schedule.has_own_horizon and run.epoch == 0 and epochs == 1 and self.acts:
            if self.optimizer.begins_again(f"{name}, one epoch") and run.step:
                warnings.warn(
                    f"The schedule of {name} begins anew at step {run.step}, "
                    "because `end_step` is 75 % of each `fit` unless it is given. For one training "
                    "in several fits give it, as a step of all of them together.",
                    stacklevel=2,
                )
        self.warn_if_idle()

    def _set_length(self):
        """Where this fit ends, in optimizer steps, as far as it is known."""
        run = self._run
        if run.epoch is None or not run.is_settled:
            return
        steps, epochs = self.params.get("steps"), self.params["epochs"]
        per_epoch = None
        if steps is not None:
            per_epoch = steps * run.calls_per_batch / self._accumulation()
        elif run.epoch > run.initial_epoch:
            per_epoch = (run.step - run.first_step) / (run.epoch - run.initial_epoch)
        elif run.initial_epoch and run.first_step:  # as many as so far
            per_epoch = run.first_step / run.initial_epoch
        if per_epoch is None:
            run.schedule.set_length(run.first_step, None)
        else:
            before_this_fit = math.floor(run.first_step - run.initial_epoch * per_epoch)
            run.schedule.set_length(max(0, before_this_fit), epochs * per_epoch)
        run.next = run.schedule.next_after(run.step)

    def on_epoch_begin(self, epoch, logs=None):
        run = self._run
        run.seen, run.epoch, run.has_seen_last = 0, epoch, False
        # Not in `on_train_begin`: BackupAndRestore may have restored the state after ours.
        if self.optimizer is not None and not run.is_settled:
            self._attach_state()
            self._settle()
        elif self.optimizer is not None and run.schedule.is_open:
            self._attach_state()
            self._look()
            self._set_length()

    # Not `on_train_batch_end`: Keras would wait for the loss of every batch, and call it in a
    # thread beside the training. The next batch's beginning is the same point.
    def on_train_batch_begin(self, batch, logs=None):
        run = self._run
        batches, run.seen = batch - run.seen, batch
        if self.optimizer is not None and self._has_another_optimizer():
            self._go_on_with_another(batches)
        elif batches and self.optimizer is None:  # the first batch has built the model
            self._begin_late()
        elif batches and self._may_be_due(batches):
            self._attach_state()
            self._act_if_due()
            self._stop_keeping_gradients()
        if self._run.has_windows:
            self._keep_gradients_of_next()

    def _keep_gradients_of_next(self):
        """Keep dense gradients in the next batch if something is due after it, and else not."""
        run = self._run
        is_wanted = not self.is_over() and self._steps_at_most(run.pending, more=True) >= run.next
        if is_wanted and run.pending:
            self._attach_state()
            self._look()
            is_wanted = self._steps_at_most(0, more=True) >= run.next
        if is_wanted == (run.lease is not None):
            return
        self._attach_state()
        if is_wanted:
            run.lease = self.lease(self.optimizer)
        else:
            self.end()
        use_step(keras_internals.model_of(self))

    def _steps_at_most(self, batches, more=False):
        """The step count after so many batches since the last look; `more` for the next ones."""
        run = self._run
        if more:
            batches += keras_internals.model_of(self).steps_per_execution
        return run.step + math.ceil(batches * run.calls_per_batch / self._accumulation())

    def _begin_late(self):
        self._begin_fit(self.model)
        if self.optimizer is not None:
            self._settle()

    def _has_another_optimizer(self):
        model = keras_internals.model_of(self)
        return getattr(model, "optimizer", None) is not self._run.compiled_with

    def _go_on_with_another(self, batches):
        """A callback has compiled the model again: the schedule goes on where it was."""
        self._attach_state()
        run, model = self._run, self.model
        run.pending += batches
        step = self._steps_at_most(run.pending)
        self.end()
        optimizer = self._find_optimizer(model)
        build_optimizer(model)
        self._take(optimizer, may_have_windows=True)
        run.compiled_with = model.optimizer
        optimizer.settle()
        run.pending, run.calls, run.offset = 0, 0, 0
        self._look()
        run.offset = step - run.step
        self._look()
        use_step(model)

    def _stop_keeping_gradients(self):
        schedule = self._run.schedule
        left = schedule.last - schedule.end if schedule.last != math.inf else 0
        worth_it = left >= _STEPS_WORTH_COMPILING
        if self._run.lease is not None and self.is_over() and worth_it:
            self.end()
            use_step(keras_internals.model_of(self))

    def _after_last_batch(self):
        """What is due after an epoch's last step comes before anything looks at it."""
        if self.optimizer is None:
            self._begin_late()
        elif self._run.epoch is not None and self.acts:
            if not self._run.has_seen_last:
                self._run.pending += keras_internals.model_of(self).steps_per_execution
                self._run.has_seen_last = True
            self._act_if_due()
            self._stop_keeping_gradients()

    def on_test_begin(self, logs=None):
        if self._run.epoch is not None:
            self._attach_state()
            self._after_last_batch()

    def _attach_state(self):
        # In the middle of an epoch JAX holds the state outside of the variables; reading
        # `model` puts it back. It costs, so only where variables are read.
        _ = self.model

    def on_epoch_end(self, epoch, logs=None):
        self._attach_state()
        self._after_last_batch()
        if self.optimizer is not None:
            self._run.logs = self.read_logs()
            if logs is not None:
                logs.update(self._run.logs)

    def on_train_end(self, logs=None):
        self._run.epoch = None
        if self.optimizer is not None:
            self.end()
            use_step(self.model)


def _required(optimizer):
    found = sparse_opt_of(optimizer)
    if found is None:
        raise ValueError(
            "The optimizer must be a SparseOpt: it moves masks, weights and slots together. "
            "Compile with optimizer=keras_sparseopt.SparseOpt(optimizer); for masking without "
            "the correction SparseOpt(optimizer, skew_correction=False). "
            f"Received: optimizer={type(optimizer).__name__}"
        )
    return found
