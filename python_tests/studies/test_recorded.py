"""Quick learning and forgetting: numbers against loops over hand-made records, and one small recorded attack."""

from __future__ import annotations

import dataclasses
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.metrics import roc_auc_score
from torch import nn
from typer.testing import CliRunner

from bbfast import Recipe, attack, attacks, datasets, studies
from bbfast.analysis import Numbers
from bbfast.cli.app import app
from bbfast.data import ImageSet
from bbfast.errors import ConfigError, DataRequirementError
from bbfast.store import Store
from bbfast.studies import Results
from bbfast.studies.perspectives import forgetting, quick_learning
from bbfast.studies.perspectives._probe import COLUMNS, GradientProbe, mean_gradient
from bbfast.studies.perspectives._recorded import Recorded, Truth, record
from bbfast.studies.perspectives._relabelled import Relabelled, shares
from bbfast.training import SampleRecorder
from bbfast.training.recorder import NEVER


def draws(seed: int = 0) -> np.random.Generator:
    return np.random.default_rng(seed)


# Numbers ----------------------------------------------------------------------------------------------------------


def test_group_curves_against_a_loop() -> None:
    rng = draws()
    loss, correct = rng.random((4, 30)), rng.random((4, 30)) < 0.5
    loss[0, 3] = np.nan
    steps = rng.integers(0, 7, (2, 30))
    steps[0, 3] = -1
    poisoned = rng.random(30) < 0.3
    found = quick_learning.group_curves(loss, correct, steps, (~poisoned, poisoned), per_epoch=7, every=3)
    assert found[:, 0].tolist() == pytest.approx(
        [1.5 / 7, 4.5 / 7, 6.5 / 7, 1 + 1.5 / 7, 1 + 4.5 / 7, 1 + 6.5 / 7, 2.5, 3.5]
    )
    at = 0
    for epoch in range(4):
        for start in (0, 3, 6) if epoch < 2 else (None,):
            for j, group in enumerate((~poisoned, poisoned)):
                own = [
                    i for i in range(30)
                    if group[i] and np.isfinite(loss[epoch, i])
                    and (start is None or start <= steps[epoch, i] < start + 3)
                ]  # fmt: skip
                expected = [np.mean(loss[epoch, own]), np.mean(correct[epoch, own])] if own else [np.nan, np.nan]
                np.testing.assert_allclose(found[at, [1 + j, 3 + j]], expected)
            at += 1


def test_first_above() -> None:
    at, values = np.array([0.5, 1.0, 2.0]), np.array([0.1, np.nan, 0.95])
    assert quick_learning.first_above(at, values, 0.9) == 2.0
    assert np.isnan(quick_learning.first_above(at, values, 0.95))


def test_events_and_their_auroc_against_a_loop() -> None:
    correct = draws(1).random((9, 40)) < 0.6
    events = np.zeros((9, 40), dtype=int)
    for i in range(40):
        for epoch in range(1, 9):
            events[epoch, i] = events[epoch - 1, i] + (correct[epoch - 1, i] and not correct[epoch, i])
    assert (forgetting.event_curves(correct) == events).all()
    poisoned = draws(2).random(40) < 0.4
    learned = np.ones(40, dtype=bool)
    assert forgetting._auroc(events[-1], learned, poisoned) == pytest.approx(roc_auc_score(poisoned, -events[-1]))
    learned[:5] = False  # forgotten more than anything
    expected = roc_auc_score(poisoned, -np.where(learned, events[-1], 100))
    assert forgetting._auroc(events[-1], learned, poisoned) == pytest.approx(expected)


def test_shares_of_lost_labels() -> None:
    # Three poisoned whose label was changed, one of the target class itself, two clean.
    predicted, given = torch.tensor([0, 1, 2, 0, 2, 1]), torch.tensor([0, 0, 0, 0, 2, 2])
    original, poisoned = torch.tensor([3, 1, 1, 0, 2, 2]), torch.tensor([True, True, True, True, False, False])
    assert shares(predicted, given, original, poisoned) == pytest.approx([2 / 3, 1 / 3, 1 / 2])
    assert np.isnan(shares(predicted[:3], given[:3], original[:3], poisoned[:3])[2])
    # Clean labels: the poisoned keep their class.
    kept = shares(predicted, original, original, poisoned)
    assert kept[0] == pytest.approx(2 / 4 + 0.0) and np.isnan(kept[1])


def test_mean_gradient_is_that_of_all_samples_at_once() -> None:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Flatten(), nn.Linear(12, 5), nn.ReLU(), nn.Linear(5, 3))
    x, y = torch.randn(300, 3, 2, 2), torch.randint(0, 3, (300,))
    loss = nn.functional.cross_entropy(net(x), y)
    loss.backward()
    kept = [p.grad.clone() for p in net.parameters() if p.grad is not None]
    gradient, value = mean_gradient(net, x, y)
    torch.testing.assert_close(gradient, torch.cat([g.flatten() for g in kept]))
    assert value == pytest.approx(float(loss.detach()), rel=1e-5)
    assert all(torch.equal(p.grad, g) for p, g in zip(net.parameters(), kept, strict=True) if p.grad is not None)


# A recorded attack ------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def tiny() -> dict[str, Any]:
    """BadNets on a few digits, recorded, and without anything that watches."""
    data = datasets.load("digits")
    small = dataclasses.replace(data, train=data.train[:300], test=data.test[:60], fingerprint="")
    recipe = Recipe.preset("quick", dataset="digits", model="small_cnn").replace(
        epochs=2, batch_size=50, precision="fp32", deterministic=True
    )
    recorder, probe, truth = SampleRecorder(fine_epochs=1), GradientProbe(n=20, fine_epochs=1, every=2), Truth()

    def run(*callbacks: Any) -> Any:
        method = attacks.create("badnets", ratio=0.2)
        return attack(method, small, "small_cnn", recipe, device="cpu", progress=False, callbacks=callbacks)

    return {"result": run(truth, recorder, probe), "plain": run(), "recorder": recorder, "probe": probe, "truth": truth}


def test_recording_an_attack_leaves_it_as_it_is(tiny: Mapping[str, Any]) -> None:
    a, b = (tiny[name].model.state_dict() for name in ("result", "plain"))
    assert all(torch.equal(a[name], b[name]) for name in a)
    assert torch.equal(tiny["truth"].poisoned, tiny["result"].poisoned)


def test_the_probe_measures_what_it_says(tiny: Mapping[str, Any]) -> None:
    probe, result = tiny["probe"], tiny["result"]
    rows = np.array(probe.rows)
    assert rows[:, 0].tolist() == pytest.approx([2 / 6, 4 / 6, 1.0, 2.0])
    # The last row, of the model as it is now: the same samples, one by one.
    model = result.model.eval()
    norms, sums = [], []
    for x, y in probe._groups:
        each = []
        for i in range(len(x)):
            loss = nn.functional.cross_entropy(model(x[i : i + 1]), y[i : i + 1])
            each.append(torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))]))
        sums.append(torch.stack(each).mean(0))
        norms.append(float(sums[-1].norm()))
    cosine = float(torch.nn.functional.cosine_similarity(*sums, dim=0))
    np.testing.assert_allclose(rows[-1, 1:4], [*norms, cosine], rtol=2e-3)
    assert [len(x) for x, _ in probe._groups] == [20, 20]
    # Of the twins: the same images without the trigger, under the label that the attacker wants.
    (clean, _), (bad, wanted), (without, same) = probe._tests
    assert torch.equal(wanted, same) and 0 < float((bad != without).flatten(1).any(1).float().mean()) <= 1
    changed = (bad - without).abs().amax(1).gt(0)
    assert int(changed.flatten(1).sum(1).max()) <= 9 * 4 and len(clean) == 20
    for value, (x, y) in zip(rows[-1, 6:], probe._tests, strict=True):
        assert value == pytest.approx(float((model(x).argmax(1) == y).float().mean()))
    assert len(COLUMNS) == rows.shape[1]


def test_probe_and_relabelled_take_back_their_state(tiny: Mapping[str, Any]) -> None:
    other = GradientProbe()
    other.load_state(tiny["probe"].state())
    assert other.rows == tiny["probe"].rows
    result = tiny["result"]
    watch = Relabelled(result.train, result.original_labels, result.poisoned)
    watch.rows = [[0.1, 0.2, 0.3]]
    again = Relabelled(result.train, result.original_labels, result.poisoned)
    again.load_state(watch.state())
    assert again.rows == watch.rows and watch.describe() == {
        "class": "Relabelled",
        "counts": "changed labels",
        "n": 300,
    }


# Studies ----------------------------------------------------------------------------------------------------------


def made(cell: Any, seed: int, epochs: int = 6) -> Recorded:
    """A record without a training: 60 samples, 12 of them poisoned and learned at once."""
    rng = draws(seed)
    poisoned = np.zeros(60, dtype=bool)
    poisoned[:12] = True
    correct = rng.random((epochs, 60)) < 0.6
    correct[1:, :12] = True
    correct[:, 59] = False
    events = forgetting.event_curves(correct)[-1]
    learned = np.where(correct.any(0), correct.argmax(0), NEVER)
    loss = rng.random((epochs, 60)).astype(np.float32) + 0.1
    samples = {
        "loss": torch.from_numpy(loss),
        "correct": torch.from_numpy(np.packbits(correct, axis=1)),
        "steps": torch.from_numpy(rng.integers(0, 8, (2, 60)).astype(np.int32)),
        "last": torch.from_numpy(correct[-1]),
        "events": torch.from_numpy(events.astype(np.int32)),
        "learned_at": torch.from_numpy(learned.astype(np.int32)),
    }
    at = np.concatenate([np.arange(1, 16) / 8, np.arange(2, epochs + 1)])
    probe = np.concatenate([at[:, None], rng.random((len(at), len(COLUMNS) - 1))], axis=1)
    asr = [0.99, 0.2, 0.95, 0.97, 0.99, 1.0]
    probe[probe[:, 0] == 1, COLUMNS.index("base")] = 0.9  # the ASR of the first epoch is that of a trivial model
    probe[probe[:, 0] >= 2, COLUMNS.index("base")] = 0.1
    history = [{"epoch": e, "c_acc": 0.3 + 0.1 * e, "asr": asr[e]} for e in range(epochs)]
    metrics = {"c_acc": 0.8, "asr": 1.0, "r_acc": 0.0}
    return Recorded(
        cell, "done", "", torch.from_numpy(poisoned),
        {"samples": samples, "probe": {"rows": torch.from_numpy(probe)}}, history, metrics,
    )  # fmt: skip


@pytest.fixture
def without_training(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Callable[[studies.Study], Numbers]:
    """Measures a study of recordings on made ones; the second cell has failed."""
    from bbfast.bench import make_plan

    def fake(grid: Any, *_: Any) -> tuple[Recorded, ...]:
        cells = make_plan(grid).cells
        return tuple(made(c, i) if i != 1 else Recorded(c, "failed", "no luck") for i, c in enumerate(cells))

    def measure(study: studies.Study) -> Numbers:
        results = Results([], Store(tmp_path / "none"), torch.device("cpu"), study.name)
        return study.measure(results)

    for module in (quick_learning, forgetting):
        monkeypatch.setattr(module, "record", fake)
    return measure


SETTINGS = {"attacks": ["badnets", "blended"], "ratios": [0.1, 0.2]}


def reloaded(numbers: Numbers, folder: Path) -> Numbers:
    numbers.save(folder)
    return Numbers.load(folder)


def test_quick_learning(without_training: Callable[[studies.Study], Numbers], tmp_path: Path) -> None:
    study = studies.create("quick_learning", **SETTINGS)
    numbers = without_training(study)
    row = numbers.table[0]
    # 90 % of the last C-Acc, 0.8, is 0.72; the first epoch's ASR does not count.
    assert (row["asr_epoch"], row["c_acc_epoch"]) == (3.0, 6.0) and row["ratio_of_epochs"] == 0.5
    cell = made(None, 0)
    loss, bad = cell.tensors["samples"]["loss"].double().numpy(), cell.poisoned.numpy()
    assert row["area"] == pytest.approx(sum(r[~bad].mean() - r[bad].mean() for r in loss))
    probe = cell.tensors["probe"]["rows"].numpy()
    assert row["cosine"] == pytest.approx(probe[probe[:, 0] % 1 == 0][:, 3].mean())
    assert numbers.table[1]["status"] == "failed" and "no luck" in numbers.meta["findings"][1]
    assert numbers.summary["cells"] == 4 and numbers.summary["backdoor_first"] == 3
    figure = study.draw(reloaded(numbers, tmp_path))
    assert len(figure.axes) == 8


def test_forgetting(without_training: Callable[[studies.Study], Numbers], tmp_path: Path) -> None:
    study = studies.create("forgetting", finetune=False, **SETTINGS)
    numbers = without_training(study)
    row, samples = numbers.table[0], made(None, 0).tensors["samples"]
    events, bad = samples["events"].numpy(), made(None, 0).poisoned.numpy()
    never = samples["learned_at"].numpy() == NEVER
    assert row["mean_events_clean"] == pytest.approx(events[~bad].mean())
    assert row["unforgettable_clean"] == pytest.approx((events[~bad & ~never] == 0).mean())
    assert row["never_clean"] == pytest.approx(never[~bad].mean()) and row["never_poisoned"] == 0
    assert row["auroc"] == pytest.approx(roc_auc_score(bad, -np.where(never, 100, events))) and row["auroc"] > 0.8
    assert numbers.arrays["auroc_0"][-1] == pytest.approx(row["auroc"])
    assert numbers.arrays["events_0"].dtype == numbers.arrays["learned_at_0"].dtype == np.uint16
    np.testing.assert_allclose(numbers.arrays["mean_0"][-1], [events[~bad].mean(), events[bad].mean()])
    assert np.isnan(row["finetuned_relabelled"])
    figure = study.draw(reloaded(numbers, tmp_path))
    assert len(figure.axes) == 9


@pytest.mark.parametrize("module", [quick_learning, forgetting], ids=["quick_learning", "forgetting"])
def test_cells_without_figures_are_counted_listed_and_end_the_command(
    module: Any, without_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    fake, out = module.record, tmp_path / "out"

    def record(grid: Any, *_: Any) -> tuple[Recorded, ...]:
        first, second, third, fourth = fake(grid)
        return first, second, Recorded(third.cell, "not_applicable", "no poison"), fourth

    monkeypatch.setattr(module, "record", record)
    out.mkdir()
    (out / "figure.png").write_bytes(b"of another day")
    name = module.__name__.rpartition(".")[2]
    sets = ["attacks=[badnets,blended]", "ratios=[0.1,0.2]", *(["finetune=false"] if name == "forgetting" else [])]
    flags = [part for text in sets for part in ("--set", text)]
    more = ["--store", tmp_path, "--out", out, "--device", "cpu", "--workers", 4, "--retry-failed", "--no-figures"]
    result = CliRunner().invoke(app, [str(part) for part in ("study", name, *flags, *more, "--json")])
    assert result.exit_code == 1 and "1 failed of 4 cells" in result.stderr, result.stderr
    assert "--retry-failed tries" not in result.stderr
    assert "without effect: workers, retry_failed (" in result.stderr and "executor" not in result.stderr
    assert json.loads(result.stdout)["cells"] == {"done": 2, "failed": 1, "not_applicable": 1}
    meta, reading = Numbers.load(out).meta, (out / "reading.md").read_text()
    assert meta["caption"].endswith("; of 4 cells 1 failed, 1 not applicable")
    assert "## Cells without figures\n\n- 1 failed: no luck\n- 1 not_applicable: no poison\n" in reading
    assert not (out / "figure.png").exists(), "numbers and figure are replaced as a set"


def test_a_fine_tuning_that_fails_costs_its_cell(
    without_training: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    curve = np.tile([0.25, 0.125, 0.0], (3, 1))

    def finetuned(cell: Recorded, *_: Any) -> Any:
        if cell.cell.ratio == 0.1:
            raise OSError("no room")
        return curve

    monkeypatch.setattr(forgetting, "finetuned", finetuned)
    numbers = without_training(studies.create("forgetting", attacks=["blended", "badnets"], ratios=[0.2, 0.1, 0.05]))
    failed = {(row["attack"], row["ratio"]): row["reason"] for row in numbers.table if row["status"] == "failed"}
    assert failed["blended", 0.1] in ("OSError: no room", "no luck") and failed["badnets", 0.1] == "OSError: no room"
    at = [row["reason"] for row in numbers.table].index("OSError: no room")
    assert f"events_{at}" not in numbers.arrays and numbers.meta["status"][at] == "failed"
    assert {row["finetuned_relabelled"] for row in numbers.table if row["status"] == "done"} == {0.25}
    with pytest.raises(DataRequirementError, match=r"nothing to measure: of 1 cells 1 failed; .*no room"):
        without_training(studies.create("forgetting", attacks=["badnets"], ratios=[0.1]))


@pytest.mark.parametrize("name", ["quick_learning", "forgetting"])
def test_bad_settings(name: str) -> None:
    with pytest.raises(ConfigError, match="seconds: this study trains in its own process"):
        studies.create(name, seconds=60).grids()
    with pytest.raises(ConfigError, match="ratios"):
        studies.create(name, ratios=[0.0]).grids()
    with pytest.raises(ConfigError, match="attacks"):
        studies.create(name, attacks=[])


def test_an_attack_that_poisons_batches_is_refused(tmp_path: Path) -> None:
    config = studies.create("forgetting", attacks=["wanet"], ratios=[0.1], recipe={"epochs": 1})
    with pytest.raises(DataRequirementError, match=r"none of 1 attacks could be recorded; .*poisons every batch anew"):
        record(config._grid(), Store(tmp_path), torch.device("cpu"), lambda: {"samples": SampleRecorder()})


@pytest.mark.slow
def test_from_training_to_figure(tmp_path: Path) -> None:
    shared: dict[str, Any] = {"store": tmp_path / "runs", "device": "cpu", "workers": 1}
    own = {"attacks": ["badnets", "wanet"], "ratios": [0.2], "recipe": {"epochs": 3}}
    for name, more in (("quick_learning", {"probe": 32}), ("forgetting", {"finetune_settings": {"epochs": 3}})):
        found = studies.run(name, tmp_path / name, **shared, **own, **more)
        assert found.figure is not None and found.figure.stat().st_size > 10_000
        assert [row["status"] for row in found.numbers.table] == ["done", "not_applicable"]
        again = studies.run(name, tmp_path / "again", figures=False, **shared, **own, **more)
        for key, value in found.numbers.arrays.items():
            np.testing.assert_array_equal(value, again.numbers.arrays[key])
    curve = found.numbers.arrays["finetuned_0"]
    assert curve.shape == (4, 3) and ((curve >= 0) & (curve <= 1)).all()


def test_images_of_the_tiny_attack_are_those_of_the_set(tiny: Mapping[str, Any]) -> None:
    """The recorder's rows are in the order of the training set, whatever the order of the batches."""
    result, recorder = tiny["result"], tiny["recorder"]
    assert isinstance(result.train, ImageSet) and recorder.loss.shape == (2, 300)
    assert sorted(recorder.steps[0].tolist()) == sorted(i for i in range(6) for _ in range(50))
