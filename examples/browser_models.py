"""The networks of the browser page: a MobileNet on CIFAR-10, dense, 80 % and 90 % sparse.

    python examples/browser_models.py      # about 80 minutes on two CPU cores

All three are trained by one recipe, the sparse ones with RigL and SparseOpt, each in a process of
its own, beside each other. Writes to
`examples/browser/models` each network as a TFLite file in half precision, zeros left out, and
`models.json`: accuracies as they came out, and what each network computes for each sample image.
The same command, run again, goes on where it stopped.
"""

import argparse
import concurrent.futures
import functools
import json
import multiprocessing
import os
import pathlib

import cifar_resnet
import keras
import numpy as np
import tensorflow as tf
from cifar_resnet import BATCH_SIZE, DROP_FRACTION, MOMENTUM, UPDATE_EVERY
from models import mobilenet
from record import facts

import keras_sparseopt as kso

PAGE = pathlib.Path(__file__).parent / "browser"
IMAGE_SIZE = 64  # twice CIFAR's: images are enlarged
WIDTH = 0.5
SPARSITIES = [0.0, 0.9, 0.8]
LEARNING_RATE = 0.1
WEIGHT_DECAY = 2e-3  # Keras' own: times the learning rate
NOT_DECAYED = ["gamma", "beta", "bias", "depthwise"]
CLASSES = ["airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck"]


def arguments(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--data_dir", help="where tfds keeps (or puts) the dataset")
    parser.add_argument("--epochs", type=int, default=40)
    parser.add_argument("--steps_per_epoch", type=int, help="shorter epochs, for trials")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument(
        "--sparsities",
        type=float,
        nargs="+",
        choices=SPARSITIES,
        default=SPARSITIES,
        help="which networks to train; the others stay as they are",
    )
    parser.add_argument("--backup", default="runs", help="where the states of trainings go")
    parser.add_argument("--output", type=pathlib.Path, default=PAGE / "models")
    return parser.parse_args(argv)


def prepare(image, label):
    """Pixels from -1 to 1, as the page makes them, too."""
    image = tf.image.resize(tf.cast(image, tf.float32), (IMAGE_SIZE, IMAGE_SIZE))
    return image / 127.5 - 1.0, label


def distribution(model, sparsity):
    """Half way between uniform and ERK.

    Uniform leaves the narrow early layers too few weights to learn with, ERK leaves them so many
    that latency, which goes by their large images, suffers.
    """
    kinds = keras.layers.Conv2D, keras.layers.Dense
    layers = [x for x in model.layers if isinstance(x, kinds) and x.name != "stem"]
    shapes = [layer.kernel.shape for layer in layers]
    both = zip(layers, kso.uniform(shapes, sparsity), kso.erk(shapes, sparsity))
    return {layer.name: (uniform + erk) / 2 for layer, uniform, erk in both}


def train(sparsity, args, data):
    (train_x, train_y), (test_x, test_y) = data
    steps = args.steps_per_epoch or len(train_x) // BATCH_SIZE
    keras.utils.set_random_seed(args.seed)
    model = mobilenet((IMAGE_SIZE, IMAGE_SIZE, 3), len(CLASSES), width=WIDTH, bn_momentum=0.9)
    schedule = keras.optimizers.schedules.CosineDecay(
        0.0, args.epochs * steps, warmup_target=LEARNING_RATE, warmup_steps=steps // 2
    )
    optimizer = keras.optimizers.SGD(
        schedule, momentum=MOMENTUM, nesterov=True, weight_decay=WEIGHT_DECAY
    )
    optimizer.exclude_from_weight_decay(var_names=NOT_DECAYED)
    callbacks = []
    if sparsity:
        kso.sparsify(model, None, distribution(model, sparsity), seed=args.seed)
        optimizer = kso.SparseOpt(optimizer)
        callbacks.append(kso.RigL(UPDATE_EVERY, DROP_FRACTION))
    model.compile(
        optimizer,
        keras.losses.SparseCategoricalCrossentropy(from_logits=True),
        metrics=["accuracy"],
        jit_compile=False,  # TensorFlow's depthwise convolutions are ten times slower in XLA on CPU
    )
    name = f"browser-{sparsity}-e{args.epochs}x{steps}-s{args.seed}"
    backup = kso.BackupAndRestore(pathlib.Path(args.backup) / name)
    test = tf.data.Dataset.from_tensor_slices((test_x, test_y)).map(prepare).batch(500)
    first = backup.initial_epoch
    history = model.fit(
        cifar_resnet.training_data(train_x, train_y, first, args.epochs, args.seed, prepare),
        epochs=args.epochs,
        initial_epoch=first,
        steps_per_epoch=steps,
        shuffle=False,
        callbacks=[*callbacks, backup],
        verbose=2,
    ).history
    loss, accuracy = model.evaluate(test, verbose=0)
    return model, {"test_accuracy": accuracy, "test_loss": loss, "history": history}


def sample_images():
    paths = sorted((PAGE / "samples").glob("*.png"))
    pixels = np.stack([keras.utils.img_to_array(keras.utils.load_img(path)) for path in paths])
    return [path.name for path in paths], prepare(pixels, None)[0]


def make(sparsity, args):
    """Trains one network and writes its file. Returns what is said of it in `models.json`."""
    # All threads of all networks together are as many as there are cores.
    threads = max(1, os.cpu_count() // len(args.sparsities))
    tf.config.threading.set_intra_op_parallelism_threads(threads)
    tf.config.threading.set_inter_op_parallelism_threads(threads)
    model, results = train(sparsity, args, cifar_resnet.load("cifar10", args.data_dir))
    _, samples = sample_images()
    name = f"sparse{100 * sparsity:.0f}" if sparsity else "dense"
    file = kso.export_tflite(
        model, args.output / f"{name}.tflite", float16=True, inputs=samples[:1]
    )
    if sparsity and not kso.sparse_inference_report(model).xnnpack:
        raise RuntimeError(f"XNNPACK's sparse engine would not take {name}")
    print(f"{name}: test accuracy {results['test_accuracy']:.2%}\n{file}", flush=True)
    return {
        "name": name,
        "command": command(args),
        **facts(),
        "sparsity": sparsity,
        "file": file.path.name,
        "bytes": file.size,
        "test_accuracy": results["test_accuracy"],
        "outputs": model.predict(samples, verbose=0).tolist(),
        "history": results["history"],
    }


def main(argv=None):
    args = arguments(argv)
    args.output.mkdir(parents=True, exist_ok=True)
    names, _ = sample_images()
    index = args.output / "models.json"
    kept = json.loads(index.read_text())["networks"] if index.exists() else []
    networks = {network["sparsity"]: network for network in kept}
    context = multiprocessing.get_context("spawn")
    with concurrent.futures.ProcessPoolExecutor(len(args.sparsities), context) as pool:
        made = pool.map(functools.partial(make, args=args), args.sparsities)
        networks.update(zip(args.sparsities, made))
    about = {
        "image_size": IMAGE_SIZE,
        "classes": CLASSES,
        "samples": names,
        "networks": [networks[sparsity] for sparsity in SPARSITIES if sparsity in networks],
    }
    index.write_text(json.dumps(about, indent=1) + "\n")


def command(args):
    """The command that repeats this; where its files lie is the reader's choice."""
    options = f"--epochs {args.epochs} --seed {args.seed}"
    if args.steps_per_epoch:
        options += f" --steps_per_epoch {args.steps_per_epoch}"
    if args.sparsities != SPARSITIES:
        options += " --sparsities " + " ".join(map(str, args.sparsities))
    return f"python examples/browser_models.py {options}"


if __name__ == "__main__":
    main()
