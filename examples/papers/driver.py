"""What the drivers of the papers' experiments share: their arguments, command, and result file."""

import argparse
import json
import pathlib
import re
import sys

sys.path.insert(0, str(pathlib.Path(__file__).resolve().parent.parent))  # models, record

from record import facts  # noqa: E402

DATA_DIR = "where tfds keeps (or puts) the dataset"


def arguments(doc, seeds, quick, data=True, jobs=False):
    """An `argparse` parser with the arguments that every driver has.

    Args:
        doc: The driver's docstring; its first paragraph becomes the description.
        seeds: Int, default of `--seeds`.
        quick: String, what `--quick` makes smaller.
        data: Bool, whether a dataset is read.
        jobs: Bool, whether several trainings can run at a time.
    """
    parser = argparse.ArgumentParser(description=doc.split("\n\n")[0])
    if data:
        parser.add_argument("--data_dir", help=DATA_DIR)
    parser.add_argument("--seeds", type=int, default=seeds)
    if jobs:
        parser.add_argument("--jobs", type=int, default=1, help="trainings at a time")
    parser.add_argument("--quick", action="store_true", help=quick)
    parser.add_argument("--output", type=pathlib.Path, default=pathlib.Path("runs"))
    return parser


def command(name, argv=None):
    """The command of a run, without what differs between machines.

    Args:
        name: The driver's `__file__`.
        argv: List of strings, or `None` for those of the process.
    """
    driver = f"python examples/papers/{pathlib.Path(name).name}"
    text = " ".join([driver, *(sys.argv[1:] if argv is None else argv)])
    return re.sub(r" --(data_dir|output|jobs) \S+| --merge( (?!-)\S+)+", "", text)


def write(content, path, command):
    """A result as JSON, with command, date and machine."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps({"command": command, **facts(), **content}, indent=1) + "\n")
