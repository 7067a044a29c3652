"""Random histories of a sparse model for a while. Usage: histories.py --minutes 60 --output FILE

Prints each one that breaks an invariant, and writes how many were tried.
"""

import argparse
import datetime
import json
import os
import pathlib
import platform
import sys
import time
import traceback

sys.path[:0] = [str(pathlib.Path(__file__).parents[1]), str(pathlib.Path(__file__).parents[2])]

import keras  # noqa: E402
import test_histories  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--minutes", type=float, default=60)
    parser.add_argument("--first_seed", type=int, default=0)
    parser.add_argument("--output", type=pathlib.Path)
    args = parser.parse_args()
    start, seed, actions, broken = time.perf_counter(), args.first_seed, 0, []
    while time.perf_counter() < start + 60 * args.minutes:
        # Every other one with balanced tiles, which may be condensed.
        kind = test_histories.InBothForms if seed % 2 else test_histories.History
        history = test_histories.random_actions(seed, kind)
        try:
            test_histories.run(history, kind)
        except Exception:
            broken.append({"seed": seed, "history": history, "error": traceback.format_exc(-3)})
            print(json.dumps(broken[-1], indent=1), flush=True)
        actions += len(history)
        seed += 1
        keras.backend.clear_session()
        if args.output is not None and seed % 10 == 0:
            write(args.output, args, start, seed, actions, broken)
    if args.output is not None:
        write(args.output, args, start, seed, actions, broken)
    print(f"{seed - args.first_seed} histories, {actions} actions, {len(broken)} broken")
    return bool(broken)


def write(path, args, start, seed, actions, broken):
    record = {
        "command": f"python tests/programs/histories.py --minutes {args.minutes:g}",
        "backend": keras.backend.backend(),
        "versions": {"keras": keras.__version__, "python": platform.python_version()},
        "machine": f"{os.cpu_count()} CPU cores, shared with other work",
        "date": datetime.date.today().isoformat(),
        "minutes": round((time.perf_counter() - start) / 60, 1),
        "first_seed": args.first_seed,
        "histories": seed - args.first_seed,
        "actions": actions,
        "broken": broken,
    }
    path.write_text(json.dumps(record, indent=1) + "\n")


if __name__ == "__main__":
    sys.exit(main())
