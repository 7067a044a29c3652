"""What the benchmarks share: a table, a JSON file, and the facts about the machine."""

import json
import pathlib
import sys

import keras

# The benchmarks measure the networks of the examples.
sys.path.insert(0, str(pathlib.Path(__file__).parent.parent / "examples"))
from record import facts  # noqa: E402

RESULTS = pathlib.Path(__file__).parent.parent / "results"


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
        "command": " ".join([f"python benchmarks/{name}.py", *sys.argv[1:]]),
        **facts(),
        "aims": list(aims),
        "notes": list(notes),
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"→ {path.relative_to(RESULTS.parent)}")


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
