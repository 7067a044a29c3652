"""Builds the wheel, and tries it in empty environments: which versions work?

    python .ci/versions.py                     # all of it; half an hour, some GB of downloads
    python .ci/versions.py --only newest       # or lowest, or nightly
    python .ci/versions.py --python python3.12 --backends jax

For every Python that is on the machine, and for each backend alone and TensorFlow with JAX: an
empty environment with the wheel and the newest versions that the package index has, the lowest
ones that setup.cfg allows, or Keras as it was developed last night. In each, `try_installed.py`
trains, saves and loads a model.
Writes results/versions.json.
"""

import argparse
import configparser
import datetime
import itertools
import json
import os
import pathlib
import platform
import re
import shutil
import subprocess
import sys
import tempfile

ROOT = pathlib.Path(__file__).resolve().parents[1]
PYTHONS = ("python3.11", "python3.12", "python3.13")
BACKENDS = {
    "tensorflow": ["tensorflow"],
    "jax": ["jax"],
    "torch": ["torch"],
    "both": ["tensorflow", "jax"],
}
# Without GPU support it is the same code, and a tenth of the size; of PyTorch this one is at hand.
DISTRIBUTIONS = {"tensorflow": "tensorflow-cpu", "jax": "jax", "torch": "torch"}
NEWEST = {"torch": "torch==2.13.0"}
VERSIONS = ["newest", "lowest", "nightly"]


def lowest():
    """Package → lowest version that setup.cfg allows."""
    config = configparser.ConfigParser()
    config.read(ROOT / "setup.cfg")
    text = config["options"]["install_requires"] + "".join(
        config["options.extras_require"][backend] for backend in DISTRIBUTIONS
    )
    return dict(re.findall(r"^([a-z-]+) >= ([\d.]+)$", text, flags=re.M))


def requirements(backends, versions):
    if versions != "lowest":
        return [NEWEST.get(backend, DISTRIBUTIONS[backend]) for backend in backends]
    minimum = lowest()
    pinned = [f"{DISTRIBUTIONS[b]}=={minimum[b]}.*" for b in backends]
    return [*pinned, f"keras=={minimum['keras']}.*"]


def run(command, **options):
    environment = {k: v for k, v in os.environ.items() if k not in ("PYTHONPATH", "VIRTUAL_ENV")}
    environment |= {"TF_CPP_MIN_LOG_LEVEL": "3", **options.pop("env", {})}
    return subprocess.run(
        [str(part) for part in command], env=environment, capture_output=True, text=True, **options
    )


def build(folder):
    source = folder / "source"
    tracked = run(["git", "ls-files", "-z"], cwd=ROOT).stdout.split("\0")
    for name in filter(None, tracked):
        (source / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copy(ROOT / name, source / name)
    environment = folder / "build"
    run([sys.executable, "-m", "venv", environment], check=True)
    run([environment / "bin/pip", "install", "-q", "build", "twine"], check=True)
    run([environment / "bin/python", "-m", "build", source, "-o", folder], check=True)
    checked = run([environment / "bin/twine", "check", "--strict", *folder.glob("keras_*")])
    print(checked.stdout.strip())
    checked.check_returncode()
    (wheel,) = folder.glob("*.whl")
    return wheel


def tried(python, name, versions, wheel, folder):
    """One environment: what it has, and whether the program ran on each backend."""
    environment = folder / "environment"
    run([python, "-m", "venv", "--clear", environment], check=True)
    interpreter = environment / "bin" / "python"
    backends = BACKENDS[name]
    wanted = [*requirements(backends, versions), wheel]
    row = {"python": python, "backends": name, "versions": versions}
    steps = [["install", *wanted]]
    if versions == "nightly":  # a package of another name that fills the same folder
        steps += [["uninstall", "-y", "keras"], ["install", "--no-deps", "--pre", "keras-nightly"]]
    for step in steps:
        installed = run([interpreter, "-m", "pip", "-q", *step])
        if installed.returncode:
            errors = [line for line in installed.stderr.splitlines() if line.startswith("ERROR")]
            return {**row, "result": "not installable: " + " ".join(errors)[:300]}
    row["result"] = {}
    for backend in backends:
        ended = run(
            [interpreter, ROOT / ".ci" / "try_installed.py"],
            cwd=folder, env={"KERAS_BACKEND": backend},
        )  # fmt: skip
        if ended.returncode:
            row["result"][backend] = "fails: " + ended.stderr.strip().splitlines()[-1][:300]
        else:
            row.update(json.loads(ended.stdout.splitlines()[-1]))
            row["result"][backend] = "works"
    return row


def main():
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--python", nargs="+", default=PYTHONS)
    parser.add_argument("--backends", nargs="+", choices=BACKENDS, default=list(BACKENDS))
    parser.add_argument("--only", choices=VERSIONS)
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "results" / "versions.json")
    args = parser.parse_args()
    # What was tried before stays, unless it is tried again.
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else []
    tried_now, failed = {}, False

    def write():
        key = ("python", "backends", "versions")
        old = {tuple(row.get(k) for k in key): row for row in known}
        content = {
            "command": "python .ci/versions.py",
            "date": datetime.date.today().isoformat(),
            "machine": f"{platform.machine()}, {os.cpu_count()} CPU cores",
            "rows": list({**old, **tried_now}.values()),
        }
        args.output.write_text(json.dumps(content, indent=1) + "\n")

    with tempfile.TemporaryDirectory() as folder:
        folder = pathlib.Path(folder)
        wheel = build(folder)
        choices = [args.only] if args.only else VERSIONS
        for versions, python, name in itertools.product(choices, args.python, args.backends):
            where = python, name, versions
            if shutil.which(python) is None or run([python, "-c", ""]).returncode:
                row = dict(zip(("python", "backends", "versions"), where))
                row["result"] = "this Python is not on the machine"
            else:
                row = tried(*where, wheel, folder)
            tried_now[where] = row
            print(json.dumps(row), flush=True)
            result = row["result"]
            failed |= isinstance(result, dict) and set(result.values()) != {"works"}
            write()
    return int(failed)


if __name__ == "__main__":
    raise SystemExit(main())
