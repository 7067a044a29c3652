"""Images per second of the ImageNet input pipeline, against the plainest correct one.

    python benchmarks/input_pipeline.py

Made-up JPEGs of ImageNet's usual size (300 to 550 pixels a side), read from tfds' record files. The
plain pipeline decodes the whole image, then crops, resizes and flips it; ours decodes the crop.
The two run in turns. Only the ratio is robust on a noisy machine.
"""

import argparse
import os
import pathlib
import tempfile
import time

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds
from common import report
from imagenet_data import MEAN, STD, ImageNet
from made_up_imagenet import write_imagenet

BATCH = 64


def plain(directory):
    """Decode all, crop at random, resize, flip."""

    def augment(image, label):
        begin, size, _ = tf.image.sample_distorted_bounding_box(
            tf.shape(image), tf.constant([[[0.0, 0.0, 1.0, 1.0]]]), min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3), area_range=(0.08, 1.0), max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )  # fmt: skip
        image = tf.image.resize(tf.slice(image, begin, size), (224, 224))
        image = tf.image.random_flip_left_right(image)
        image.set_shape((224, 224, 3))
        return (image - MEAN) / STD, tf.one_hot(label, 1000)

    data = tfds.load(
        "imagenet2012", split="train", data_dir=directory, as_supervised=True, shuffle_files=True
    )
    data = data.repeat().shuffle(256).map(augment, num_parallel_calls=tf.data.AUTOTUNE)
    return data.batch(BATCH, drop_remainder=True).prefetch(tf.data.AUTOTUNE)


def ours(directory, examples):
    data = ImageNet(directory, shuffle_buffer=256)
    return data.training(BATCH, examples // BATCH, first_epoch=0, epochs=10**6)


def images_per_second(batches, count):
    start = time.perf_counter()
    for _ in range(count):
        next(batches)
    return count * BATCH / (time.perf_counter() - start)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--examples", type=int, default=512)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--batches", type=int, default=12, help="per round")
    args = parser.parse_args()
    rates: dict[str, list[float]] = {"plain": [], "ours": []}
    with tempfile.TemporaryDirectory() as directory:
        write_imagenet(directory, args.examples, validation=8, shards=8)
        records = pathlib.Path(directory).rglob("*train.tfrecord*")
        size = sum(path.stat().st_size for path in records)
        iterators = {
            "plain": iter(plain(directory)),
            "ours": iter(ours(directory, args.examples)),
        }
        for iterator in iterators.values():
            images_per_second(iterator, args.batches)  # warm up
        for _ in range(args.rounds):
            for name, iterator in iterators.items():
                rates[name].append(images_per_second(iterator, args.batches))
    cores = os.cpu_count() or 1
    base = np.median(rates["plain"])
    rows = [
        {
            "pipeline": name,
            "images/s": float(np.median(rate)),
            "images/s per core": float(np.median(rate)) / cores,
            "over plain": float(np.median(rate) / base),
            "slowest round": float(min(rate)),
            "fastest round": float(max(rate)),
        }
        for name, rate in rates.items()
    ]
    notes = [f"{size / args.examples / 1000:.0f} kB per image, median of {args.rounds} rounds"]
    report("input_pipeline", rows, ["aim: not slower than plain"], notes)


if __name__ == "__main__":
    main()
