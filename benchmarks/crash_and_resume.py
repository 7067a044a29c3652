"""Kill trainings and start them again: how many end bit for bit where the undisturbed one does?

    python benchmarks/crash_and_resume.py            # all combinations, about 10 minutes
    python benchmarks/crash_and_resume.py --random 1

For each backend, strategy and method one training runs undisturbed. Another is killed with SIGKILL
in the middle of writing a backup, in the middle of a mask update, and several times at a random
moment, and is started again with the same command after each kill. In the end its weights, masks,
optimizer slots, statistics, random generators and history must have the same digest.
"""

import argparse
import os
import pathlib
import random
import signal
import subprocess
import sys
import tempfile
import time

ROOT = pathlib.Path(__file__).parent.parent
PROGRAM = ROOT / "tests" / "programs" / "training.py"


class Training:
    """One command, run again and again."""

    def __init__(self, backend, strategy, method, folder):
        self.output, self.backup = folder / "digest", folder / "backup"
        self.command = [sys.executable, str(PROGRAM), method, str(self.output), str(self.backup)]
        self.command += ["--strategy", strategy]
        self.environment = {
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "KERAS_BACKEND": backend,
            "TF_CPP_MIN_LOG_LEVEL": "3",
        }

    def run(self, *options, kill_after=None):
        """Start the command; returns the epoch it started at and the seconds it trained.

        Args:
            options: More options for the program, such as `--kill write`.
            kill_after: Seconds from its first step, or `None` to let it run.
        """
        process = subprocess.Popen(
            [*self.command, *options], env=self.environment, text=True,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        )  # fmt: skip
        output, first_epoch, ready = "", None, None
        for line in process.stdout:
            output += line
            if line.startswith("starts at epoch"):
                first_epoch = int(line.split()[-1])
            if line.startswith("ready"):
                ready = time.perf_counter()
                if kill_after is not None:
                    time.sleep(kill_after)
                    process.kill()
        process.wait()
        process.stdout.close()
        seconds = time.perf_counter() - (ready or time.perf_counter())
        expected = -signal.SIGKILL if options or kill_after is not None else 0
        # A kill at a random moment may come after the end.
        if process.returncode not in (expected, 0 if kill_after is not None else expected):
            raise RuntimeError(f"{' '.join(self.command)} failed:\n{output[-5000:]}")
        return first_epoch, seconds, process.returncode

    def digest(self):
        return self.output.read_text()


def disturbed(backend, strategy, method, folder, randomly, seed):
    """One row of the record."""
    folder = pathlib.Path(folder)
    straight = Training(backend, strategy, method, folder / "straight")
    broken = Training(backend, strategy, method, folder / "broken")
    for training in (straight, broken):
        training.output.parent.mkdir(parents=True)
    _, seconds, _ = straight.run()
    draw = random.Random(seed)
    epochs = [broken.run("--kill", "write")[0], broken.run("--kill", "update")[0]]
    kills = 2
    for _ in range(randomly):
        first_epoch, _, code = broken.run(kill_after=draw.uniform(0, seconds / (randomly + 1)))
        epochs.append(first_epoch)
        kills += code == -signal.SIGKILL
    epochs.append(broken.run()[0])
    if epochs != sorted(epochs) or epochs[1] != 1:
        raise RuntimeError(f"a restart began earlier than its backup: {epochs}")
    return {
        "backend": backend,
        "strategy": strategy if backend == "tensorflow" or strategy == "one" else "data_parallel",
        "method": method,
        "kills": kills,
        "while writing": 1,
        "in a mask update": 1,
        "at random": kills - 2,
        "restarted at epochs": " ".join(map(str, epochs[1:])),
        "came back exactly": kills if broken.digest() == straight.digest() else 0,
    }


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--random", type=int, default=3, help="kills at random per combination")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    rows = []
    for backend in ("tensorflow", "jax"):
        for strategy in ("one", "mirrored"):
            for method in ("rigl", "set"):
                with tempfile.TemporaryDirectory() as folder:
                    row = disturbed(
                        backend, strategy, method, folder, args.random, args.seed + len(rows)
                    )
                rows.append(row)
    from common import report  # it imports Keras

    report("crash_and_resume", rows, ["aim: every kill comes back exactly"], both_backends=True)


if __name__ == "__main__":
    main()
