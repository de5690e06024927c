"""What holds for every tool: the tests loop over the registry, so a new tool is tested by being there."""

from __future__ import annotations

import dataclasses
import json
import random
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from matplotlib.image import imread

from bbfast import analysis, models
from bbfast.analysis import Numbers
from bbfast.analysis.base import find
from bbfast.analysis.style import short_name
from bbfast.attacks import AttackResult
from bbfast.defenses import DefenseResult
from bbfast.errors import ConfigError, DataRequirementError, MissingExtraError, UnknownNameError, UnsupportedModelError

NAMES = analysis.available()
QUICK: dict[str, dict[str, Any]] = {
    "activated_images": {"num_image": 4, "num_neuron": 4},
    "feature_map": {"channels": 16},
    "feature_visualization": {"steps": 5, "channels": 8},
    "frequency_saliency": {"n_stat": 50},
    "grad_cam": {"n_stat": 50},
    "hessian": {"n": 24, "probes": 2, "m": 6, "trace_probes": 3},
    "lipschitz": {"n": 50, "steps": 5},
    "loss_landscape": {"points": 5, "n": 60},
    "shapley": {"nsamples": 8, "background": 20},
}
"""Settings that make a tool quick on the tests' 200 images; those of a tool that is quick anyhow are its defaults."""


MISSING = {
    "grad_cam": ("energy_clean", "energy_bd", "iou_clean", "iou_bd"),  # of a blank map
    "hessian": ("ritz_clean", "ritz_bd"),  # where a probe ended before
    "lipschitz": ("L_bn",),  # of channels that are in no pair
    "neuron_activation": ("t",),  # of dead neurons
    "shapley": ("share",),  # where nothing speaks for the target
}
"""Arrays whose values may be missing by their documentation; everything else is finite."""


def go(name: str, out: Path, attacked: AttackResult, defended: DefenseResult | None = None) -> analysis.AnalysisResult:
    try:
        return analysis.run(name, attacked, defended, out, device="cpu", **QUICK.get(name, {}))
    except MissingExtraError as error:
        pytest.skip(str(error))


@pytest.mark.parametrize("name", NAMES)
def test_card_and_config(name: str) -> None:
    facts = analysis.info(name)
    assert json.loads(json.dumps(facts)) == facts and facts["name"] == name
    assert facts["question"].endswith("?") and all(text.endswith(".") for text in facts["deviations"])
    assert find(name).__doc__ and analysis.create(name, **QUICK.get(name, {})).config.seed == 0
    with pytest.raises(ConfigError, match=f"{name}: unknown setting 'sead'; did you mean seed"):
        analysis.create(name, sead=1)


@pytest.mark.parametrize("name", NAMES)
def test_numbers_and_figure(name: str, badnets: AttackResult, tmp_path: Path) -> None:
    """Files are there, numbers finite or named missing, and the figure comes from the numbers on disk alone."""
    before = {key: value.clone() for key, value in badnets.model.state_dict().items()}
    flags = [parameter.requires_grad for parameter in badnets.model.parameters()]
    torch.manual_seed(5)
    states = torch.get_rng_state(), random.getstate(), np.random.get_state()[1].copy()  # type: ignore[index,union-attr]
    found = go(name, tmp_path / "a", badnets)
    assert torch.equal(torch.get_rng_state(), states[0]) and random.getstate() == states[1]
    assert (np.random.get_state()[1] == states[2]).all()  # type: ignore[index]
    assert all(torch.equal(value, before[key]) for key, value in badnets.model.state_dict().items())
    assert [parameter.requires_grad for parameter in badnets.model.parameters()] == flags
    assert not any(module._forward_hooks or module._backward_hooks for module in badnets.model.modules())

    assert found.summary and found.data == tmp_path / "a" / "numbers.npz"
    back = Numbers.load(tmp_path / "a")
    assert back.arrays.keys() == found.numbers.arrays.keys() and back.meta["tool"] == name
    assert "digits, small_cnn, badnets" in back.meta["caption"] and back.meta["result"] is None
    chosen = back.meta["ids_sha256"]
    assert chosen is None if name == "network_structure" else len(chosen) == 64
    assert isinstance(back.meta["peak_bytes"], int) and back.meta["peak_bytes"] >= 0
    for key, array in back.arrays.items():
        assert array.size and array.dtype != object, key
        if array.dtype.kind == "f":
            known = np.isfinite(array)
            assert known.any() if key in MISSING.get(name, ()) else known.all(), key
    assert not MISSING.get(name) or "NaN" in (find(name).__doc__ or "")
    assert found.figure is not None and (tmp_path / "a" / "figure.pdf").stat().st_size > 1000
    picture = imread(found.figure)
    assert picture.std() > 0.01 and min(picture.shape[:2]) > 300
    again = find(name).draw(back)
    again.savefig(tmp_path / "again.png", metadata={"Software": None})
    assert (tmp_path / "again.png").read_bytes() == found.figure.read_bytes()


LONG = ("frequency_saliency", "hessian", "lipschitz", "loss_landscape", "shapley", "umap")
"""Tools of which three runs take seconds even so."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in LONG else []) for name in NAMES]
)
def test_the_same_twice_and_on_a_defended_model(
    name: str, badnets: AttackResult, tuned: DefenseResult, tmp_path: Path
) -> None:
    first, second = (go(name, tmp_path / str(i), badnets).numbers.arrays for i in range(2))
    assert first.keys() == second.keys()
    for key, array in first.items():
        np.testing.assert_array_equal(array, second[key], err_msg=key)
    defended = go(name, tmp_path / "defended", badnets, tuned)
    assert defended.numbers.arrays.keys() >= first.keys() and "ft" in defended.numbers.meta["caption"]


HOSTILE = ["$\\foo$", "a$b$c", "_x", "<b>", "very long " * 20, "", "%s {0}", "_nolegend_", "\\frac{", "n\nl"]
NAMING = (
    "activation_distribution",
    "confusion_matrix",
    "feature_map",
    "frequency_saliency",
    "grad_cam",
    "metrics",
    "shapley",
    "tsne",
)
SAME_PICTURE = ("feature_map", "grad_cam", "shapley")
"""They draw names as frequency_saliency does."""


@pytest.mark.parametrize(
    "name", [pytest.param(name, marks=[pytest.mark.slow] if name in SAME_PICTURE else []) for name in NAMING]
)
def test_any_class_names(name: str, badnets: AttackResult, tmp_path: Path) -> None:
    """Names are drawn as they stand: no formulas, none left out, and room for the rest of the figure."""
    from matplotlib.text import Text

    data = {**badnets.config["data"], "class_names": HOSTILE}
    named = dataclasses.replace(badnets, config={**badnets.config, "data": data})
    options = {"n_sub": 60, "perplexity": 5} if name == "tsne" else FEW.get(name, {})
    numbers = analysis.run(name, named, None, tmp_path, device="cpu", figures=False, **options).numbers
    figure = find(name).draw(numbers)
    figure.savefig(tmp_path / "figure.png")
    words = [text for text in figure.findobj(Text) if isinstance(text, Text) and text.get_text()]
    assert not any(text.get_parse_math() for text in words)
    said = "\n".join(text.get_text() for text in words)
    if name in ("activation_distribution", "confusion_matrix", "metrics", "tsne"):
        assert all(short_name(wanted, 18)[:16] in said for wanted in HOSTILE)


def test_names_and_aliases() -> None:
    assert "confusion_matrix" in NAMES
    with pytest.raises(UnknownNameError, match="unknown analysis tool 'confusion_matrx'; did you mean"):
        analysis.create("confusion_matrx")


def test_a_defense_without_a_model(badnets: AttackResult, tmp_path: Path) -> None:
    flagged = DefenseResult(kind="detection", scores=torch.zeros(3), flags=torch.zeros(3, dtype=torch.bool))
    with pytest.raises(DataRequirementError, match="analysis needs a model, and this defense gave none"):
        analysis.run("confusion_matrix", badnets, flagged, tmp_path)


LARGE = ("preactresnet18", "vgg19_bn", "convnext_tiny", "vit_b_16")
FEW: dict[str, dict[str, Any]] = {
    "feature_visualization": {"steps": 2, "channels": 2},
    "frequency_saliency": {"n_stat": 4},
    "grad_cam": {"n_stat": 4},
    "hessian": {"n": 4, "probes": 1, "m": 2, "trace_probes": 1},
    "lipschitz": {"n": 4, "steps": 2},
    "loss_landscape": {"points": 3, "n": 4},
    "shapley": {"nsamples": 2, "background": 4},
}
"""For networks of which one forward pass over the tests' images takes minutes."""


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("name", [name for name in NAMES if name != "umap"])  # tsne's features, but of 35 images
@pytest.mark.parametrize("model", LARGE)
def test_the_papers_models(model: str, name: str, badnets: AttackResult, tmp_path: Path) -> None:
    """Of any weights: a tool works on it, or refuses it by name before any work."""
    network = models.build(model, 10, (3, 32, 32))
    test, bad = badnets.test, badnets.backdoor_test
    chosen = bad.ids[:6]
    small = dataclasses.replace(
        badnets,
        model=network.eval(),
        test=test.subset(torch.isin(test.ids, chosen).nonzero().flatten()),
        backdoor_test=bad.subset(torch.arange(6)),
    )
    try:
        found = analysis.run(name, small, None, tmp_path, device="cpu", **{**QUICK, **FEW}.get(name, {}))
    except UnsupportedModelError as error:
        assert name in str(error)
        assert not any(tmp_path.iterdir())
        return
    assert found.summary and found.figure is not None and imread(found.figure).std() > 0.01
