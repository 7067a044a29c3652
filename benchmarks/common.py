"""What the benchmarks share: a table, a JSON file, and the facts about the machine."""

import ctypes
import gc
import json
import pathlib
import re
import sys

import keras

# The benchmarks measure the networks of the examples.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from record import bytes_of, facts  # noqa: E402, F401

# For a process whose peak is measured: one malloc arena, freed memory goes back at once.
LITTLE_SLACK = {"MALLOC_ARENA_MAX": "1", "MALLOC_TRIM_THRESHOLD_": "65536"}
RESULTS = pathlib.Path(__file__).parent.parent / "results"


def command(name):
    """The command that was given: `python benchmarks/<name>.py …`."""
    return " ".join([f"python benchmarks/{name}.py", *sys.argv[1:]])


def report(name, rows, aims, notes=(), both_backends=False):
    """Print the rows as a table and write them to `results/<name>[-<backend>].json`."""
    columns = list(rows[0])
    cells = [columns] + [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    for note in (*aims, *notes):
        print(note)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / (name + ("" if both_backends else f"-{keras.backend.backend()}") + ".json")
    content = {
        "command": command(name),
        **facts(),
        "aims": list(aims),
        "notes": list(notes),
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"→ {path.relative_to(RESULTS.parent)}")


def resident(what):
    """Bytes of `VmRSS` (now) or `VmHWM` (the peak) of this process."""
    status = pathlib.Path("/proc/self/status").read_text()
    return 1024 * int(re.search(rf"{what}:\s+(\d+) kB", status)[1])


def reset_peak():
    """From here on `resident("VmHWM")` counts anew."""
    gc.collect()
    ctypes.CDLL(None).malloc_trim(0)
    pathlib.Path("/proc/self/clear_refs").write_text("5")


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
