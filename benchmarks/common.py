"""What the benchmarks share: a table, a JSON file, and the facts about the machine."""

import datetime
import json
import os
import pathlib
import platform
import sys

import keras

RESULTS = pathlib.Path(__file__).parent.parent / "results"


def report(name, rows, aims, notes=()):
    """Print the rows as a table and write them to `results/<name>-<backend>.json`."""
    columns = list(rows[0])
    cells = [columns] + [[_text(row[column]) for column in columns] for row in rows]
    widths = [max(len(row[i]) for row in cells) for i in range(len(columns))]
    for row in cells:
        print("  ".join(cell.rjust(width) for cell, width in zip(row, widths)))
    for note in (*aims, *notes):
        print(note)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"{name}-{keras.backend.backend()}.json"
    content = {
        "command": f"python benchmarks/{name}.py " + " ".join(sys.argv[1:]),
        "date": datetime.date.today().isoformat(),
        "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
        "versions": {"keras": keras.__version__, "backend": keras.backend.backend()},
        "aims": list(aims),
        "notes": list(notes),
        "rows": rows,
    }
    path.write_text(json.dumps(content, indent=1) + "\n")
    print(f"→ {path.relative_to(RESULTS.parent)}")


def _text(value):
    return f"{value:.4g}" if isinstance(value, float) else str(value)
