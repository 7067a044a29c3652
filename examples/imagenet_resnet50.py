"""ResNet-50 on ImageNet, sparse from the start.

    python examples/imagenet_resnet50.py --data_dir /data/tfds --sparsity 0.95
    python examples/imagenet_resnet50.py --method set --distribution uniform --epochs 180
    python examples/imagenet_resnet50.py --method dense --optimizer sgd --strategy mirrored --bf16

`--strategy` names the devices: `one`, `mirrored` (all GPUs of a machine), `multiworker` (several
machines, described by TF_CONFIG), `tpu`, or on the JAX backend `data_parallel`. Run the same
command on every worker.

Needs `imagenet2012` as tfds prepares it. Writes `<output>/<run>/`: `results.json`, TensorBoard
events, `history.csv`, and the state after every epoch. The same command, run again, goes on where
it stopped.
"""

import argparse
import json
import pathlib
import sys
import time

import keras
from imagenet_data import ImageNet
from models import resnet50
from record import facts

import keras_sparseopt as kso
from keras_sparseopt.devices import STRATEGIES

# The recipe. Learning rates are the SparseOpt paper's; it does not state momentum, weight decay and
# label smoothing: these follow neighbouring codes (RigL).
PEAK_LEARNING_RATE = 0.1  # per 256 images of the batch
END_LEARNING_RATE = 1e-5  # where the linear warm-up begins and the cosine ends
WARMUP_EPOCHS = 5  # at most a tenth of the training, for trials
MOMENTUM = 0.9
WEIGHT_DECAY = 1e-4  # coupled, through an L2 regularizer on kernels; none on normalizations
LABEL_SMOOTHING = 0.1
DROP_FRACTION = 0.3


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_dir", help="where tfds keeps imagenet2012")
    parser.add_argument("--method", choices=["rigl", "set", "static", "dense"], default="rigl")
    parser.add_argument("--sparsity", type=float, default=0.9, help="the paper: .90, .95, .97")
    parser.add_argument("--distribution", choices=["erk", "uniform"], default="erk")
    parser.add_argument(
        "--optimizer",
        choices=["sparseopt", "sgd", "ham", "sparseopt+ham"],
        default="sparseopt",
        help="sgd and ham mask without the correction; dense training uses sgd or ham",
    )
    parser.add_argument("--epochs", type=int, default=90, help="the paper: 90, 180, 270")
    parser.add_argument("--batch_size", type=int, default=256, help="of all devices together")
    parser.add_argument("--update_every", type=int, default=100, help="steps between mask updates")
    parser.add_argument("--strategy", choices=STRATEGIES, default="one")
    parser.add_argument("--bf16", action="store_true", help="compute in bfloat16")
    parser.add_argument("--image_size", type=int, default=224)
    parser.add_argument("--shuffle_buffer", type=int, default=16_384, help="images, 110 kB each")
    parser.add_argument("--steps_per_epoch", type=int, help="shorter epochs, for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--output", default="runs")
    args = parser.parse_args(argv)
    if args.method == "dense" and "sparseopt" in args.optimizer:
        parser.error("--method dense has nothing to correct: use --optimizer sgd or ham")
    return args


def make_model(args, steps_per_epoch, classes):
    keras.utils.set_random_seed(args.seed)
    model = resnet50(classes, args.image_size, WEIGHT_DECAY)
    if args.method != "dense":
        kso.sparsify(model, args.sparsity, args.distribution, seed=args.seed)
    model.compile(
        optimizer=make_optimizer(args, steps_per_epoch),
        loss=keras.losses.CategoricalCrossentropy(
            from_logits=True, label_smoothing=LABEL_SMOOTHING
        ),
        weighted_metrics=["accuracy", keras.metrics.TopKCategoricalAccuracy(5, name="top5")],
        jit_compile="auto" if args.strategy in ("one", "data_parallel") else False,
    )
    return model


def make_optimizer(args, steps_per_epoch):
    steps = args.epochs * steps_per_epoch
    warmup = min(WARMUP_EPOCHS * steps_per_epoch, steps // 10)
    peak = PEAK_LEARNING_RATE * args.batch_size / 256
    schedule = keras.optimizers.schedules.CosineDecay(
        END_LEARNING_RATE if warmup else peak,
        decay_steps=steps - warmup,
        alpha=END_LEARNING_RATE / peak,
        warmup_target=peak if warmup else None,
        warmup_steps=warmup,
    )
    inner = keras.optimizers.SGD(schedule, momentum=MOMENTUM)
    if "ham" in args.optimizer:
        inner = kso.HAM(inner)
    if args.method == "dense":
        return inner
    return kso.SparseOpt(inner, skew_correction="sparseopt" in args.optimizer)


def make_data(args, data, devices, steps_per_epoch, first_epoch):
    """Training and validation batches, in the form that the devices need."""

    def training(batch, **share):
        return data.training(
            batch, steps_per_epoch, first_epoch, args.epochs, args.seed, **share
        )  # fmt: skip

    if devices.name in ("multiworker", "tpu"):
        # One pipeline per worker; each yields the batches of its replicas one after the other.
        def per_worker(make):
            def pipeline(context):
                workers = context.num_input_pipelines
                return make(
                    context.get_per_replica_batch_size(args.batch_size),
                    worker=context.input_pipeline_id,
                    workers=workers,
                    replicas=context.num_replicas_in_sync // workers,
                )

            return devices.strategy.distribute_datasets_from_function(pipeline)

        return per_worker(training), per_worker(data.validation)
    batch = args.batch_size // devices.num_workers
    share = {"worker": devices.worker, "workers": devices.num_workers}
    return training(batch, **share), data.validation(batch, **share)


def make_callbacks(args, run_dir, devices, backup):
    callbacks = [Throughput(args.batch_size)]
    if args.method == "rigl":
        callbacks.append(kso.RigL(args.update_every, DROP_FRACTION))
    elif args.method == "set":
        callbacks.append(kso.SET(args.update_every, DROP_FRACTION, seed=args.seed))
    elif args.method == "static":
        callbacks.append(kso.Static())
    if devices.worker == 0:
        callbacks.append(keras.callbacks.CSVLogger(run_dir / "history.csv", append=True))
        callbacks.append(keras.callbacks.TensorBoard(run_dir / "tensorboard", write_graph=False))
    return [*callbacks, backup]


class Throughput(keras.callbacks.Callback):
    """Logs the images per second of each epoch's training, without its first step."""

    def __init__(self, batch_size):
        super().__init__()
        self.batch_size = batch_size

    def on_train_batch_end(self, batch, logs=None):
        self.last = time.perf_counter()
        if batch == 0:
            self.first = self.last
        self.steps = batch

    def on_epoch_end(self, epoch, logs=None):
        seconds = self.last - self.first
        logs["images_per_second"] = self.steps * self.batch_size / seconds if seconds else 0.0


def run_name(args):
    name = args.method
    if args.method != "dense":
        name += f"-{args.distribution}{args.sparsity}"
    name += f"-{args.optimizer}-e{args.epochs}-b{args.batch_size}-s{args.seed}"
    return f"imagenet-{name}" + ("-bf16" if args.bf16 else "")


def command(args):
    """The command that repeats this run; where its files lie is the reader's choice."""
    defaults = vars(arguments([]))
    given = {k: v for k, v in vars(args).items() if v != defaults[k]}
    words = ["python examples/imagenet_resnet50.py"]
    for name, value in given.items():
        if name not in ("data_dir", "output"):
            words.append(f"--{name}" if value is True else f"--{name} {value}")
    return " ".join(words)


def main(argv=None):
    args = arguments(argv)
    devices = kso.resolve_strategy(args.strategy)  # before anything else uses the devices
    run_dir = pathlib.Path(args.output) / run_name(args)
    run_dir.mkdir(parents=True, exist_ok=True)
    if args.bf16:
        keras.mixed_precision.set_dtype_policy("mixed_bfloat16")

    data = ImageNet(args.data_dir, args.image_size, args.shuffle_buffer)
    whole = data.num_examples("train") // args.batch_size
    steps = args.steps_per_epoch or whole
    if not 0 < steps <= whole:
        raise SystemExit(
            f"--steps_per_epoch must be in [1, {whole}] with --batch_size {args.batch_size}, "
            f"received {steps}"
        )
    with devices.scope():
        model = make_model(args, steps, data.classes)
    if args.method != "dense" and devices.worker == 0:
        kso.summary(model)
    backup = kso.BackupAndRestore(run_dir / "backup")
    first_epoch = backup.initial_epoch
    training, validation = make_data(args, data, devices, steps, first_epoch)
    history = kso.fit_distributed(
        model,
        training,
        epochs=args.epochs,
        steps_per_epoch=steps,
        initial_epoch=first_epoch,
        validation_data=validation,
        callbacks=make_callbacks(args, run_dir, devices, backup),
        verbose=1 if sys.stdout.isatty() else 2,
    )
    results = {
        "command": command(args),
        **facts(),
        "settings": {k: v for k, v in vars(args).items() if k not in ("data_dir", "output")},
        "replicas": devices.num_replicas,
        "steps_per_epoch": steps,
        "accuracy": history.history["val_accuracy"][-1],
        "top5": history.history["val_top5"][-1],
        "history": history.history,
    }
    if devices.worker == 0:
        (run_dir / "results.json").write_text(json.dumps(results, indent=1) + "\n")
        print(f"top-1 {100 * results['accuracy']:.2f} % → {run_dir}/results.json")
    return results


if __name__ == "__main__":
    main()
