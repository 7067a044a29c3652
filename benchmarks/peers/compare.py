"""The same work by this package and by its peers, on this machine, in one run.

    python benchmarks/peers/compare.py                              # an hour, and 6 GB of downloads
    python benchmarks/peers/compare.py --jaxpruner ~/src/jaxpruner  # a checkout: it is on no index
    python benchmarks/peers/compare.py --only tfmot --rows counts files

Makes an environment for each peer in `.peers/` from `requirements/`, then measures row after row,
in each the peers one after the other, as often as `--rounds` says: what disturbs the machine
disturbs all of them. Every row runs in a process of its own. Step times are ratios to the peer's
own dense step in the same process; times of mask updates are ratios to a plain copy of weights and
gradients in the same process, beside milliseconds. Medians.

Writes `results/peers.json`. A row that a peer cannot run says why; rows that a peer wins stay.
"""

import argparse
import json
import os
import pathlib
import statistics
import subprocess
import sys
import tempfile

import numpy as np

HERE = pathlib.Path(__file__).resolve().parent
ROOT = HERE.parents[1]
sys.path[:0] = [str(ROOT / "benchmarks"), str(HERE)]
import measuring  # noqa: E402

# name → (program, requirements, environment variables)
PEERS = {
    "keras_sparseopt, tensorflow": (
        "keras_sparseopt_peer.py",
        None,
        {"KERAS_BACKEND": "tensorflow"},
    ),
    "keras_sparseopt, jax": ("keras_sparseopt_peer.py", None, {"KERAS_BACKEND": "jax"}),
    "keras_sparseopt, torch": ("keras_sparseopt_peer.py", None, {"KERAS_BACKEND": "torch"}),
    "tfmot": ("tfmot_peer.py", "tfmot.txt", {}),
    "rigl-torch": ("rigl_torch_peer.py", "rigl-torch.txt", {}),
    "sparsimony": ("sparsimony_peer.py", "sparsimony.txt", {}),
    "torch.nn.utils.prune": ("torch_prune_peer.py", "torch-prune.txt", {}),
    "JaxPruner": ("jaxpruner_peer.py", "jaxpruner.txt", {}),
}
MEASURED_AGAIN = ("step", "update")


def python_of(requirements, folder):
    """The interpreter of a peer's environment, which is made if it is not there."""
    if requirements is None:
        return sys.executable
    environment = folder / pathlib.Path(requirements).stem
    python, done = environment / "bin" / "python", environment / ".installed"
    wanted = (HERE / "requirements" / requirements).read_text()
    if not done.exists() or done.read_text() != wanted:
        print(f"making {environment}", flush=True)
        subprocess.run([sys.executable, "-m", "venv", "--clear", environment], check=True)
        install = [python, "-m", "pip", "install", "--quiet", "--requirement"]
        subprocess.run([*install, HERE / "requirements" / requirements], check=True)
        done.write_text(wanted)
    return str(python)


def measured(python, program, row, variables, seconds=900):
    """One row in a process of its own."""
    with tempfile.TemporaryDirectory() as folder:
        output = pathlib.Path(folder) / "row.json"
        environment = {**os.environ, "TF_CPP_MIN_LOG_LEVEL": "3", **variables}
        environment.pop("PYTHONPATH", None)
        try:
            ended = subprocess.run(
                [python, str(HERE / program), row, str(output)],
                env=environment, cwd=folder, capture_output=True, text=True, timeout=seconds,
            )  # fmt: skip
        except subprocess.TimeoutExpired:
            return {"cannot_run": f"took more than {seconds} s"}
        if ended.returncode:
            last = [line for line in ended.stderr.splitlines() if line.strip()][-1:]
            return {"cannot_run": f"fails: {' '.join(last)[:300]}"}
        return json.loads(output.read_text())


def median_of(results):
    """Medians of what was measured several times."""
    if any("cannot_run" in result for result in results):
        return next(result for result in results if "cannot_run" in result)
    return {
        key: statistics.median(result[key] for result in results)
        if isinstance(results[0][key], float) else results[0][key]
        for key in results[0]
    }  # fmt: skip


def checked(results):
    """The masks of every peer against the rule in plain NumPy: what differs, and by how much."""
    found = {}
    for peer, result in results.items():
        if "cannot_run" in result:
            found[peer] = result
            continue
        found[peer] = {}
        for method, cases in result.items():
            if isinstance(cases, str):
                found[peer][method] = cases
                continue
            found[peer][method] = [
                compared(method, seed, size, case)
                for seed, (size, case) in enumerate(zip(((64, 32), (256, 128), (512, 512)), cases))
            ]
    return found


def compared(method, seed, size, packed):
    weights, mask, gradient, number = measuring.numbers(seed, size)
    new = np.unpackbits(np.frombuffer(bytes.fromhex(packed), "uint8"), count=mask.size)
    new = new.reshape(size).astype(bool)
    order = np.argsort(-np.abs(weights), axis=None, kind="stable")
    kept = np.zeros(mask.size, bool)
    kept[order[: mask.sum() - number]] = True
    kept = kept.reshape(size)
    found = {
        "active_before": int(mask.sum()), "active_after": int(new.sum()),
        "kept_that_should_be": int((new & kept).sum()) - int(kept.sum()),
    }  # fmt: skip
    if method == "RigL":
        scores = np.where(kept, -1.0, np.abs(gradient)).ravel()
        expected = kept.ravel().copy()
        expected[np.argsort(-scores, kind="stable")[:number]] = True
        found["positions_that_differ"] = int((expected.reshape(size) != new).sum())
    else:  # what grows is random: it may grow what was just dropped, or not
        found["regrown_of_dropped"] = int((new & mask & ~kept).sum())
    return found


def shown(row, result):
    if "cannot_run" in result:
        return f"cannot: {result['cannot_run'][:60]}"
    if row.startswith("step"):
        return f"{result['ratio']:.2f} × ({result['dense_ms']:.0f} → {result['sparse_ms']:.0f} ms)"
    if row.startswith("update"):
        return f"{result['ms']:.0f} ms, {result['ratio_to_copy']:.1f} × copy"
    if row == "counts":
        return f"{result['changed']} of {result['kernels']} changed"
    if row == "memory":
        return f"{result['bytes_per_weight']:.1f} bytes per weight"
    if row == "files":
        return f"{result['ratio']:.1f} × smaller, gzipped {result['ratio_gzipped']:.1f} ×"
    if row == "crash":
        return (
            "same bits"
            if result["same_bits"]
            else (f"{result['share_of_connections_that_differ']:.0%} of the connections differ")
        )
    return json.dumps(result)[:100]


def main(argv=None):
    parser = argparse.ArgumentParser(description=__doc__.split("\n\n")[0])
    parser.add_argument("--only", nargs="+", choices=PEERS, default=list(PEERS))
    parser.add_argument("--rows", nargs="+", help="beginnings of rows, as `step` or `files`")
    parser.add_argument("--rounds", type=int, default=3, help="of what is timed")
    parser.add_argument("--jaxpruner", help="a checkout of google-research/jaxpruner")
    parser.add_argument("--environments", type=pathlib.Path, default=ROOT / ".peers")
    parser.add_argument("--output", type=pathlib.Path, default=ROOT / "results" / "peers.json")
    args = parser.parse_args(argv)
    from common import facts

    rows = [r for r in measuring.ROWS if not args.rows or r.startswith(tuple(args.rows))]
    known = json.loads(args.output.read_text())["rows"] if args.output.exists() else {}
    peers = {}
    for name in args.only:
        program, requirements, variables = PEERS[name]
        if name == "JaxPruner":
            if args.jaxpruner is None:
                print("JaxPruner is left out: it needs --jaxpruner and a checkout")
                continue
            variables = {"JAXPRUNER": str(pathlib.Path(args.jaxpruner).resolve())}
        peers[name] = python_of(requirements, args.environments), program, variables
    for row in rows:
        rounds = args.rounds if row.startswith(MEASURED_AGAIN) else 1
        results = {name: [] for name in peers}
        for _ in range(rounds):
            for name, (python, program, variables) in peers.items():
                results[name].append(measured(python, program, row, variables))
        found = {name: median_of(several) for name, several in results.items()}
        if rounds > 1:
            found = {name: {**result, "rounds": rounds} for name, result in found.items()}
        if row == "semantics":
            found = checked(found)
        print(f"\n{row}", flush=True)
        for name, result in found.items():
            print(f"  {name:<28} {shown(row, result)}", flush=True)
        found = {**known.get(row, {}), **found}
        known[row] = {name: found[name] for name in PEERS if name in found}
        command = "python benchmarks/peers/compare.py" + (
            " --jaxpruner CHECKOUT" if any("JaxPruner" in found for found in known.values()) else ""
        )
        content = {"command": command, **facts(), "rows": known}
        args.output.write_text(json.dumps(content, indent=1) + "\n")
    print(f"\n→ {args.output}")


if __name__ == "__main__":
    main()
