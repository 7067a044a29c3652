"""The small laboratories among the examples: their arithmetic by hand, and that they run."""

import pydoc_data.topics

import keras
import numpy as np
import pytest
from helpers import array

import keras_sparseopt as kso

pytestmark = [
    pytest.mark.backend("tensorflow"),
    pytest.mark.filterwarnings("ignore::ResourceWarning"),
]


# -------------------------------------------------------------------------- student and teacher


def test_balance_is_conserved_the_better_the_smaller_the_steps(monkeypatch):
    """Half the steps' size, twice as many: half the drift. With and without normalization, HAM."""
    import student_teacher as st

    monkeypatch.setattr(st, "EXAMPLES", 256)
    for normalized, ham in ((False, False), (False, True), (True, True)):
        setting = {
            "fan_ins": [8, 2], "normalized": normalized, "corrected": True, "ham": ham,
            "sparse_initialization": False, "seed": 0,
        }  # fmt: skip
        coarse = st.drift(st.train(setting, learning_rate=0.02, steps=100))
        fine = st.drift(st.train(setting, learning_rate=0.01, steps=200))
        assert fine < 0.05 and fine == pytest.approx(coarse / 2, rel=0.3)


def test_without_the_correction_in_it_the_balance_is_not_conserved(monkeypatch):
    import student_teacher as st

    monkeypatch.setattr(st, "EXAMPLES", 256)
    setting = {
        "fan_ins": [32, 2], "normalized": False, "corrected": True, "ham": False,
        "sparse_initialization": False, "seed": 0,
    }  # fmt: skip
    times = st.train(setting, steps=100)
    assert st.drift(times) < 0.02
    terms = np.array(times["terms"]).copy()
    density = np.array([1.0, 2 / 32])
    terms[:, 0] *= np.sqrt(density / density.mean())  # Σ Ψ(w), not divided by c
    wrong = {"terms": terms, "conserved": terms[:, 0] - terms[:, 1]}
    assert st.drift(wrong) > 0.2


def test_potential_of_the_hyperbolic_flow():
    import student_teacher as st

    v, alpha, h = np.array([-0.7, 0.3, 2.0]), 5.0, 1e-6
    slope = (st.psi(v + h, alpha) - st.psi(v - h, alpha)) / (2 * h)
    np.testing.assert_allclose(slope, v / (1 + alpha * np.abs(v)), rtol=1e-6)
    np.testing.assert_allclose(st.psi(v, 0), v**2 / 2)


def test_student_teacher_runs(tmp_path, monkeypatch, capsys):
    import student_teacher as st

    monkeypatch.setattr(st, "FAN_INS", (8, 4))
    monkeypatch.setattr(st, "ONE", {"one": {}, "HAM": {"ham": True}})
    monkeypatch.setattr(st, "RECORD_EVERY", 10)
    content = st.main(["--quick", "--output", str(tmp_path)])
    assert set(content["turning_exponent"]) == {"one", "HAM"} and len(content["drift"]) == 8
    assert (tmp_path / "student_teacher.png").read_bytes().startswith(b"\x89PNG")
    assert "exponent of the turning rate" in capsys.readouterr().out


# ---------------------------------------------------------------------------- equal capacities


@pytest.mark.parametrize("family", ["mlp", "resnet"])
def test_same_capacity(family):
    """In every layer as many active weights, and the very same initial values."""
    import capacity_comparison as cc

    build = cc.family_of({**cc.DEFAULTS, "family": family}, (16, 16, 3))
    dense, sparse = cc.same_capacity(build, *cc.WIDTHS[family], seed=3)
    pairs = list(zip(kso.sparse_weights(dense), kso.sparse_weights(sparse), strict=True))
    assert len(pairs) == {"mlp": 4, "resnet": 10}[family]
    for one, other in pairs:
        assert one.topology.sparsity == 0
        assert other.topology.sparsity > 0.7 or other.topology.name == "stem"
        mask, values = array(other.topology.mask), array(other)
        np.testing.assert_array_equal(np.sort(values[mask]), np.sort(array(one).ravel()))
        assert not values[~mask].any()


def test_pruning_ends_at_the_narrow_networks_size():
    import capacity_comparison as cc

    (images, labels), _ = data = __import__("proxy").made_up()
    result = cc.train(data, {"family": "resnet", "network": "gmp", "epochs": 4})
    build = cc.family_of({**cc.DEFAULTS, "family": "resnet"}, images.shape[1:])
    narrow, _ = cc.same_capacity(build, *cc.WIDTHS["resnet"], seed=0)
    assert result["active_weights"] == [
        int(np.prod(weight.shape)) for weight in kso.sparse_weights(narrow)
    ]


def test_wilcoxon_by_hand():
    import capacity_comparison as cc

    assert cc.wilcoxon([1, 2, 3, 4, 5, 6]) == pytest.approx(2 / 2**6)  # all of one sign
    assert cc.wilcoxon([0, 0, 0]) == 1.0


def test_capacity_comparison_runs(tmp_path):
    import capacity_comparison as cc

    only = ["--only", "adagrad, batch"]
    content = cc.main(["--quick", "--output", str(tmp_path), *only])
    assert [row["label"] for row in content["comparisons"]] == ["adagrad, batch"]
    for row in content["comparisons"]:
        assert row["seeds"] == 2 and row["difference"] == pytest.approx(
            row["sparse"] - row["dense"]
        )
        assert min(row["effective_gradient_flow"]) > 0
    assert (tmp_path / "quick" / "capacity_comparison.png").read_bytes().startswith(b"\x89PNG")


# ---------------------------------------------------------------------------------- structures


def test_structure_comparison_runs(tmp_path, capsys):
    import structure_comparison as sc

    arguments = ["--quick", "--only", r"mlp rigl .* NM\(2", "--output", str(tmp_path)]
    content = sc.main(arguments)
    rows = content["comparisons"]
    assert [row["skew_correction"] for row in rows] == [True, False]
    by_setting = {
        tuple(run["setting"].get(k, sc.DEFAULTS[k]) for k in ("structure", "seed")): run["result"]
        for run in content["runs"]
        if "skew_correction" not in run["setting"]
    }
    differences = [
        by_setting["NM(2, 4)", s]["test_accuracy"][-1]
        - by_setting["unstructured", s]["test_accuracy"][-1]
        for s in (0, 1)
    ]
    assert rows[0]["difference"] == pytest.approx(100 * np.mean(differences))
    assert all(run["result"]["sparsity"] == 0.5 for run in content["runs"])
    assert "mlp     rigl              NM(2, 4)" in capsys.readouterr().out
    picture = tmp_path / "quick" / "structure_comparison.png"
    assert picture.read_bytes().startswith(b"\x89PNG")
    trained = len(content["runs"])
    assert len(sc.main(arguments)["runs"]) == trained == 8  # none is repeated


def test_characters_of_other_pages():
    import manual
    import structure_comparison as sc

    (x, y), (test_x, _) = manual.load(3000, 1000, 16)
    assert x.shape == (3000, sc.CONTEXT) and y.shape == (3000,) and len(test_x) == 1000
    pages = "\n".join(pydoc_data.topics.topics.values())
    characters = sorted(set("".join(pydoc_data.topics.topics.values())))
    for window, following in zip(x[:20], y[:20]):
        assert "".join(characters[i] for i in [*window, following]) in pages
    assert sc.text_model()(x[:2]).shape == (2, manual.classes())
    (x, y), _ = manual.load(300, 100, 16, every=True)
    np.testing.assert_array_equal(x[:, 1:], y[:, :-1])


def test_training_time_finds_opponents_and_compares(tmp_path, monkeypatch):
    import training_time as tt

    assert tt.width_for(3.0, (100, 200), [2.0, 4.0], 16) == 144
    assert tt.width_for(9.0, (100, 200), [2.0, 4.0], 16) == 192
    monkeypatch.setattr(tt, "WIDTHS", {"text": 128})
    monkeypatch.setattr(tt, "SPARSITIES", {"text": (0.9,)})
    monkeypatch.setattr(tt, "CANDIDATES", {"text": ((32, 96), (128, 320))})
    monkeypatch.setattr(tt, "STEPS", {"text": 8})
    monkeypatch.setattr(tt, "BATCH", {"text": 4})
    data = tt.load(["text"], None, True)
    (ms,) = tt.step_times([{"task": "text", "tile": (1, 64)}], data, 3, 1)
    assert 0 < ms < 1000

    def invented(settings, data, steps, rounds):
        """Dense: a millisecond for 16 units; tiles: for 32; unstructured: for 8."""
        per = {None: 16, "unstructured": 8}
        return [s.get("width", 128) / per.get(s.get("tile"), 32) for s in settings]

    monkeypatch.setattr(tt, "step_times", invented)
    options = ["--quick", "--output", str(tmp_path)]
    times = tt.main([*options, "--time"])["times"]
    assert [(tt.kind(row), row["ms"]) for row in times] == [
        ("dense", 8), ("unstructured rigl", 16), ("1×64 rigl", 4), ("8×64 rigl", 4),
        ("64×64 rigl", 4), ("narrow", 4), ("wide 1×64 rigl", 8),
    ]  # fmt: skip
    assert times[-2]["width"] == 64 and times[-1]["width"] == 256
    row, longer, _ = next(x for x in tt.rows_to_train(times) if tt.kind(x[0]) == "1×64 rigl")
    assert longer == {**row, "steps": 16}
    record = tt.Record(tmp_path / "by_hand.json", "", tt.DEFAULTS)
    record.content["times"] = times
    for seed, (dense, sparse) in enumerate(((0.5, 0.6), (0.5, 0.62))):
        for setting, accuracy in (({"task": "text"}, dense), (longer, sparse), (row, 0.4)):
            run = {"test_accuracy": [accuracy], "steps": [8], "weights": 1, "bytes": 1}
            record.add({**setting, "seed": seed}, run)
    found = {x["row"]: x for x in tt.compare(record, {"text": 2})}["1×64 rigl"]
    assert found["− dense, equal time"]["points"] == pytest.approx(11)
    half = 12.706 * np.std([10, 12], ddof=1) / np.sqrt(2)
    assert found["− dense, equal time"]["± 95 %"] == pytest.approx(half, rel=1e-3)
    assert found["− dense, equal time"]["verdict"] == "no difference shown"
    assert found["− dense, equal steps"] == {
        "points": pytest.approx(-10), "± 95 %": pytest.approx(0, abs=1e-9), "verdict": "loses",
    }  # fmt: skip
    assert found["steps in equal time"] == 16 and found["seconds to reach"] == 0.032
    assert "1×64 rigl" in "\n".join(tt.table(tt.compare(record, {"text": 2})))
    tt.picture(record, tmp_path / "times.png")
    assert (tmp_path / "times.png").read_bytes().startswith(b"\x89PNG")
    result = tt.train(data, {**row, "seed": 0})
    assert result["steps"] == list(range(1, 9)) and len(result["test_accuracy"]) == 8
    model, _ = tt.prepare(tt.completed({"task": "text"}), 8)
    dense = tt.sizes(model)
    assert result["weights"] < dense["weights"] and result["bytes"] < dense["bytes"]


# ----------------------------------------------------------------------------------- the skew


def test_angles_by_hand():
    import skew

    one, two = [np.array([[1.0, 0.0]])], [np.array([[0.0, 1.0]])]
    assert skew.angle(one, two) == pytest.approx(90)
    mask = [np.array([[True, True], [False, True]])]
    g = [np.array([[1.0, 1.0], [5.0, 0.0]])]
    assert skew.angle_of_surviving(g, mask, g, mask, 0.5) == pytest.approx(0, abs=1e-5)
    # The second neuron loses a connection: its factor falls from √(4/3) to √1, the first rises.
    mask, g = ([np.array(side)[None, None] for side in sides] for sides in (mask, g))
    now = [np.array([[[[True, True], [False, False]]]])]
    turned = skew.angle_of_surviving(g, mask, g, now, 0.5)
    before = np.degrees(np.arctan(np.sqrt(2)))
    assert turned == pytest.approx(before - 45)
    assert skew.angle_of_surviving(g, mask, g, now, 0.0) == pytest.approx(0, abs=1e-5)


def test_probe_equals_a_training_step_and_changes_nothing():
    import proxy
    import skew

    setting = proxy.full({"widths": (8,), "weight_decay": 0.0})
    model = proxy.make_model((16, 16, 3), setting)
    model.compile(kso.SparseOpt("sgd"), loss=keras.losses.SparseCategoricalCrossentropy(True))
    (images, labels), _ = proxy.made_up()
    images, labels = images[:128], labels[:128]
    probe = skew.Probe(model, images, labels)
    before = [array(v) for v in model.variables]
    loss, gradients = probe()
    for old, new in zip(before, model.variables):
        np.testing.assert_array_equal(old, array(new))
    model.optimizer.build(model.trainable_variables)
    lease = model.optimizer.lease_gradients()
    assert model.train_on_batch(images, labels) == pytest.approx(loss, rel=1e-5)
    for weight, gradient in zip(model.optimizer.sparse_weights, gradients):
        np.testing.assert_allclose(array(lease.gradient(weight)), gradient, atol=1e-5)


def test_turning_exponent_of_known_turns():
    """Neurons that turn by an angle of 0.001 · fan-in^(−½)."""
    import skew

    layer = kso.SparseConv2D(4, 1, use_bias=False)
    model = keras.Sequential([keras.Input((1, 1, 16)), layer])
    mask = np.zeros((1, 1, 16, 4), bool)
    for neuron, fan_in in enumerate([2, 4, 8, 16]):
        mask[0, 0, :fan_in, neuron] = True
    kso.set_mask(layer, mask)
    turning = skew.Turning(every=100)
    turning.set_model(model)
    weights = mask.astype("float32")
    weights[0, 0, 1] = 0  # room for a second direction
    for step in range(1, 36):
        if step == 35:
            weights[0, 0, 1] = (
                0.001 * np.array([2, 4, 8, 16]) ** -0.5 * np.linalg.norm(weights[0, 0], axis=0)
            )
        layer.kernel.assign(weights)
        turning.after_step()
    (window,) = turning.windows
    assert window["step"] == 35 and window["exponent"] == pytest.approx(-0.5, abs=0.05)


def test_skew_runs(tmp_path, monkeypatch):
    import skew

    monkeypatch.setattr(skew, "STILL", [(0.5, True, 0.1)])
    content = skew.main(["--quick", "--output", str(tmp_path)])
    assert set(content["jumps"]) == set(content["correlation"]) and len(content["turning"]) == 1
    for cells in content["jumps"].values():
        assert 0 < cells["angle_raw"]["mean"] < 90
    assert (tmp_path / "quick" / "skew.png").read_bytes().startswith(b"\x89PNG")
