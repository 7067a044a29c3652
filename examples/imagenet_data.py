"""ImageNet from tfds' record files: decoded in part, augmented, in an order that can be resumed.

No step runs in Python. Order and augmentation depend on (seed, epoch, position) only: a resumed
training, or one with another number of workers, sees the same global batches. Every worker reads
all records but decodes only its own share of each batch.
"""

import tensorflow as tf
import tensorflow_datasets as tfds

MEAN = (0.485 * 255, 0.456 * 255, 0.406 * 255)
STD = (0.229 * 255, 0.224 * 255, 0.225 * 255)
FILES_AT_ONCE = 16


class ImageNet:
    """The two splits of a prepared `imagenet2012`.

    Args:
        data_dir: Directory that holds `imagenet2012/`, or `None` for tfds' own.
        image_size: Int, height and width of the images.
        shuffle_buffer: Int, examples (as JPEG bytes, about 110 kB each) to shuffle among.
    """

    def __init__(self, data_dir=None, image_size=224, shuffle_buffer=16_384):
        builder = tfds.builder("imagenet2012", data_dir=data_dir)
        if not builder.info.splits:
            raise SystemExit(
                f"imagenet2012 is not prepared in {builder.data_dir}. Its images cannot be "
                "downloaded automatically: see "
                "https://www.tensorflow.org/datasets/catalog/imagenet2012"
            )
        self.features = builder.info.features
        self.splits = builder.info.splits
        self.classes = self.features["label"].num_classes
        self.image_size = image_size
        self.shuffle_buffer = shuffle_buffer

    def num_examples(self, split):
        return self.splits[split].num_examples

    def training(self, batch, steps, first_epoch, epochs, seed=0, worker=0, workers=1, replicas=1):
        """Batches of (images, one-hot labels) of all epochs from `first_epoch` on.

        Args:
            batch: Int, examples per batch.
            steps: Int, training steps per epoch.
            first_epoch, epochs: Ints, as in `fit`.
            seed: Int.
            worker, workers: Ints, the global batch is shared out by example.
            replicas: Int, batches that this worker yields per training step.
        """
        files = [str(path) for path in self.splits["train"].filepaths]

        def one_epoch(epoch):
            seeds = tf.stack([tf.cast(seed, tf.int64), epoch])
            order = tf.random.experimental.stateless_shuffle(tf.constant(files), seeds)
            data = tf.data.Dataset.from_tensor_slices(order)
            data = data.interleave(
                tf.data.TFRecordDataset,
                cycle_length=min(FILES_AT_ONCE, len(files)),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            )
            # A seed that changes with the epoch is not possible here: the same permutation acts in
            # every epoch, on the records of files that come in another order.
            data = data.shuffle(self.shuffle_buffer, seed=seed, reshuffle_each_iteration=False)
            data = data.take(steps * replicas * batch * workers).enumerate().shard(workers, worker)
            return data.map(
                lambda position, record: self._augmented(
                    record, tf.stack([seed * 100_003 + epoch, position])
                ),
                num_parallel_calls=tf.data.AUTOTUNE,
                deterministic=True,
            ).batch(batch, drop_remainder=True)

        every = tf.data.Dataset.range(first_epoch, max(epochs, first_epoch + 1))
        return every.flat_map(one_epoch).prefetch(tf.data.AUTOTUNE)

    def validation(self, batch, worker=0, workers=1, replicas=1):
        """Batches of (images, one-hot labels, weights), all of one shape.

        The last batch is filled up with examples of weight 0, so every example counts once.
        """
        files = [str(path) for path in self.splits["validation"].filepaths]
        examples = self.num_examples("validation")
        at_once = batch * workers * replicas
        filled = -(-examples // at_once) * at_once
        data = tf.data.TFRecordDataset(files).repeat().take(filled)
        data = data.enumerate().shard(workers, worker)

        def example(position, record):
            image, label = self._centre(record)
            return image, label, tf.cast(position < examples, tf.float32)

        data = data.map(example, num_parallel_calls=tf.data.AUTOTUNE)
        data = data.batch(batch, drop_remainder=True).prefetch(tf.data.AUTOTUNE)
        # `repeat` made the length unknown.
        return data.apply(tf.data.experimental.assert_cardinality(filled // (batch * workers)))

    def _parsed(self, record):
        features = self.features.deserialize_example(
            record, decoders={"image": tfds.decode.SkipDecoding()}
        )
        return features["image"], tf.one_hot(features["label"], self.classes)

    def _augmented(self, record, seed):
        """A random part of 8–100 % of the area, resized and flipped at random."""
        jpeg, label = self._parsed(record)
        shape = tf.image.extract_jpeg_shape(jpeg)
        begin, size, _ = tf.image.stateless_sample_distorted_bounding_box(
            shape,
            tf.constant([[[0.0, 0.0, 1.0, 1.0]]]),
            seed=seed,
            min_object_covered=0.0,
            aspect_ratio_range=(3 / 4, 4 / 3),
            area_range=(0.08, 1.0),
            max_attempts=10,
            use_image_if_no_bounding_boxes=True,
        )
        image = self._decoded(jpeg, begin[0], begin[1], size[0], size[1])
        image = tf.image.stateless_random_flip_left_right(image, seed=seed + 1)
        return self._normalized(image), label

    def _centre(self, record):
        """As if the shorter side were resized to 256/224 of the image size, then its centre."""
        jpeg, label = self._parsed(record)
        shape = tf.image.extract_jpeg_shape(jpeg)
        height, width = shape[0], shape[1]
        side = tf.cast(tf.round(tf.cast(tf.minimum(height, width), tf.float32) * 0.875), tf.int32)
        image = self._decoded(jpeg, (height - side) // 2, (width - side) // 2, side, side)
        return self._normalized(image), label

    def _decoded(self, jpeg, top, left, height, width):
        # Decoding only the crop skips most of the work.
        window = tf.stack([top, left, height, width])
        image = tf.image.decode_and_crop_jpeg(jpeg, window, channels=3)
        return tf.image.resize(image, (self.image_size, self.image_size))

    def _normalized(self, image):
        image.set_shape((self.image_size, self.image_size, 3))
        return (image - MEAN) / STD
