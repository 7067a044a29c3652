"""Files that are always whole: written aside, flushed, renamed, with a checksum at the end."""

import hashlib
import os
import pathlib

_CHECKSUM_SIZE = hashlib.sha256().digest_size


def check_place(path):
    """Raise FileNotFoundError before the work, if there is no directory for a file."""
    if not pathlib.Path(path).parent.is_dir():
        raise FileNotFoundError(f"`path` must be in a directory that exists. Received: '{path}'")


def write_aside(path, write):
    """Write a file that is either there as a whole or not at all.

    Args:
        path: Where to.
        write: Function of an open binary file.
    """
    path = pathlib.Path(path)
    unfinished = path.with_name(f".{path.name}.unfinished")
    try:
        with open(unfinished, "w+b") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)


def write_whole(path, write):
    """`write_aside`, with a checksum at the end."""

    def write_and_sign(file):
        write(file)
        file.flush()
        file.seek(0)
        checksum = hashlib.file_digest(file, "sha256").digest()
        file.seek(0, os.SEEK_END)
        file.write(checksum)

    write_aside(path, write_and_sign)


def read_whole(path):
    """What was written: memoryview.

    Raises:
        ValueError: If the checksum at its end is wrong.
    """
    content = memoryview(pathlib.Path(path).read_bytes())
    content, checksum = content[:-_CHECKSUM_SIZE], content[-_CHECKSUM_SIZE:]
    if hashlib.sha256(content).digest() != checksum:
        raise ValueError("it is damaged, cut off, or of another kind (wrong checksum)")
    return content
