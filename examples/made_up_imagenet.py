"""Made-up images in the form of tfds' `imagenet2012`, to try the ImageNet example without ImageNet.

    python examples/made_up_imagenet.py /tmp/tfds
    python examples/imagenet_resnet50.py --data_dir /tmp/tfds --epochs 1 --batch_size 16

Images of a class have a coarse pattern in common, so that with few classes there is something to
learn.
"""

import argparse
import io

import numpy as np
import tensorflow as tf
import tensorflow_datasets as tfds


def jpeg(index, label, smallest, largest):
    """Real JPEG bytes; as in ImageNet sizes vary and some images are grey."""
    rng = np.random.default_rng(index)
    height, width = rng.integers(smallest, largest + 1, 2)
    channels = 1 if index % 50 == 0 else 3
    of_image = rng.uniform(0, 255, (max(2, height // 16), max(2, width // 16), channels))
    of_class = np.random.default_rng(label).uniform(0, 255, (3, 3, channels))
    image = sum(
        tf.image.resize(coarse, (height, width), "bicubic").numpy() / 2
        for coarse in (of_image, of_class)
    )
    image = np.clip(image + rng.normal(0, 14, image.shape), 0, 255).astype("uint8")
    return tf.io.encode_jpeg(image, quality=90).numpy()


def write_imagenet(
    directory, training=256, validation=64, smallest=300, largest=550, shards=4, classes=1000
):
    """Write `directory/imagenet2012`, as `tfds.builder("imagenet2012")` expects it."""
    with tfds.core.registered.skip_registration():

        class Imagenet2012(tfds.core.GeneratorBasedBuilder):
            VERSION = tfds.core.Version("5.1.0")

            def _info(self):
                features = {
                    "image": tfds.features.Image(encoding_format="jpeg"),
                    "label": tfds.features.ClassLabel(num_classes=1000),
                    "file_name": tfds.features.Text(),
                }
                return tfds.core.DatasetInfo(
                    builder=self, features=tfds.features.FeaturesDict(features)
                )

            def _split_generators(self, dl_manager):
                return {
                    "train": self._generate_examples(0, training),
                    "validation": self._generate_examples(training, validation),
                }

            def _generate_examples(self, first, count):
                for index in range(first, first + count):
                    yield (
                        index,
                        {
                            "image": io.BytesIO(jpeg(index, index % classes, smallest, largest)),
                            "label": index % classes,
                            "file_name": f"{index}.JPEG",
                        },
                    )

    config = tfds.download.DownloadConfig(num_shards=shards)
    Imagenet2012(data_dir=directory).download_and_prepare(download_config=config)


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("directory")
    parser.add_argument("--training", type=int, default=256)
    parser.add_argument("--validation", type=int, default=64)
    parser.add_argument("--smallest", type=int, default=300, help="pixels of a side")
    parser.add_argument("--largest", type=int, default=550, help="pixels of a side")
    parser.add_argument("--classes", type=int, default=1000, help="how many of them occur")
    args = parser.parse_args()
    # tfds looks at the package of a builder, which a script has not.
    import made_up_imagenet

    made_up_imagenet.write_imagenet(**vars(args))


if __name__ == "__main__":
    main()
