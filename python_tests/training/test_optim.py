from __future__ import annotations

import warnings

import pytest
import torch
from torch import nn

from bbfast.training import Recipe
from bbfast.training.optim import Schedule, load_optimizer_state, make_optimizer, optimizer_state

EPOCHS, STEPS = 12, 5


def torch_rates(kind: str) -> list[float]:
    """Learning rates of every step by torch's own schedulers."""
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    lr = torch.optim.lr_scheduler
    per_step = kind == "onecycle"
    scheduler: torch.optim.lr_scheduler.LRScheduler = {
        "constant": lambda: lr.LambdaLR(optimizer, lambda _: 1.0),
        "cosine": lambda: lr.CosineAnnealingLR(optimizer, EPOCHS),
        "cosine_100": lambda: lr.CosineAnnealingLR(optimizer, 100, eta_min=0.01),
        "multistep": lambda: lr.MultiStepLR(optimizer, [2, 7], gamma=0.2),
        "step": lambda: lr.StepLR(optimizer, 5, gamma=0.5),
        "onecycle": lambda: lr.OneCycleLR(optimizer, 0.3, total_steps=EPOCHS * STEPS, cycle_momentum=False),
    }[kind]()
    rates = []
    for _ in range(EPOCHS):
        for _ in range(STEPS):
            rates.append(optimizer.param_groups[0]["lr"])
            optimizer.step()
            if per_step and len(rates) < EPOCHS * STEPS:
                scheduler.step()
        if not per_step:
            scheduler.step()
    return rates


@pytest.mark.parametrize(
    ("kind", "settings"),
    [
        ("constant", {"schedule": "constant"}),
        ("cosine", {"schedule": "cosine"}),
        ("cosine_100", {"schedule": "cosine", "t_max": 100, "eta_min": 0.01}),
        ("multistep", {"schedule": "multistep", "milestones": (2, 7), "gamma": 0.2}),
        ("step", {"schedule": "step", "step_size": 5, "gamma": 0.5}),
        ("onecycle", {"schedule": "onecycle"}),
    ],
)
def test_rates_are_those_of_torch(kind: str, settings: dict[str, object]) -> None:
    schedule = Schedule(Recipe(epochs=EPOCHS, lr=0.3, **settings), STEPS)  # type: ignore[arg-type]
    ours = []
    for epoch in range(EPOCHS):
        ours += [schedule.lr(epoch, step) for step in range(STEPS)]
        schedule.epoch_done(1.0)
    assert ours == pytest.approx(torch_rates(kind), rel=1e-9, abs=1e-12)


def test_the_reference_recipe_of_gtsrb_ends_at_half_the_rate() -> None:
    schedule = Schedule(Recipe.preset("paper", dataset="gtsrb", compat="reference"), 10)
    assert schedule.lr(50) == pytest.approx(0.005)
    assert Schedule(Recipe.preset("paper", dataset="gtsrb"), 10).lr(50) == pytest.approx(0.0)


def test_plateau_is_that_of_torch_and_resumes() -> None:
    generator = torch.Generator().manual_seed(1)
    losses = (1 / (1 + torch.arange(60.0)).clamp(max=12) + 0.01 * torch.rand(60, generator=generator)).tolist()
    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.3)
    theirs = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=4, factor=0.5)
    recipe = Recipe(epochs=60, lr=0.3, schedule="plateau", patience=4, gamma=0.5)
    ours = Schedule(recipe, STEPS)
    for epoch, loss in enumerate(losses):
        assert ours.lr(epoch) == pytest.approx(optimizer.param_groups[0]["lr"], rel=1e-12)
        theirs.step(loss)
        ours.epoch_done(loss)
        again = Schedule(recipe, STEPS)
        again.load_state(ours.state())
        ours = again
    assert ours.lr(60) < 0.1  # it has decayed at all


@pytest.mark.parametrize("steps", [1, 2, 3])
def test_one_cycle_of_very_few_steps_stays_in_range(steps: int) -> None:
    schedule = Schedule(Recipe(epochs=1, lr=0.3, schedule="onecycle"), steps)
    assert all(0 < schedule.lr(0, step) <= 0.3 for step in range(steps))


@pytest.mark.parametrize("name", ["sgd", "adam", "adamw", "adadelta"])
def test_optimizer_state_survives_a_round_trip(name: str) -> None:
    def build() -> tuple[nn.Module, torch.optim.Optimizer]:
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten(), nn.Linear(16, 2)).to(memory_format=torch.channels_last)
        return model, make_optimizer(model.parameters(), Recipe(optimizer=name, lr=0.05))  # type: ignore[arg-type]

    def step(model: nn.Module, optimizer: torch.optim.Optimizer, seed: int) -> None:
        x = torch.randn(4, 3, 4, 4, generator=torch.Generator().manual_seed(seed))
        optimizer.zero_grad()
        model(x).square().sum().backward()
        optimizer.step()

    model, optimizer = build()
    for seed in range(3):
        step(model, optimizer, seed)
    weights = {key: value.clone() for key, value in model.state_dict().items()}
    state = {key: value.contiguous() for key, value in optimizer_state(optimizer).items()}
    other, resumed = build()
    other.load_state_dict(weights)
    load_optimizer_state(resumed, state)
    for seed in range(3, 6):
        step(model, optimizer, seed)
        step(other, resumed, seed)
    for a, b in zip(model.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)


def test_only_trainable_parameters_are_optimised() -> None:
    model = nn.Linear(3, 2)
    model.bias.requires_grad_(False)
    optimizer = make_optimizer(model.parameters(), Recipe())
    assert optimizer.param_groups[0]["params"] == [model.weight]
    model.weight.requires_grad_(False)
    with pytest.raises(ValueError, match="no trainable parameter"):
        make_optimizer(model.parameters(), Recipe())


def test_settings_reach_the_optimizer() -> None:
    parameters = [nn.Parameter(torch.zeros(2))]
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        sgd = make_optimizer(parameters, Recipe(momentum=0.8, nesterov=True, weight_decay=0.1))
        adam = make_optimizer(parameters, Recipe(optimizer="adam", betas=(0.5, 0.9), amsgrad=True))
    group = sgd.param_groups[0]
    assert (group["momentum"], group["nesterov"], group["weight_decay"]) == (0.8, True, 0.1)
    assert adam.param_groups[0]["betas"] == (0.5, 0.9) and adam.param_groups[0]["amsgrad"]
