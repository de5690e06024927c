"""Hessian: the curvature of the loss on clean and on triggered images."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from pydantic import Field

from bbfast.analysis._curvature import hessian_product, lanczos, rademacher
from bbfast.analysis.base import Tool, ToolCard, ToolConfig, register_tool
from bbfast.analysis.numbers import Numbers
from bbfast.analysis.style import CLEAN, POISONED, figure
from bbfast.analysis.subject import Subject, View
from bbfast.errors import BBFastError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = ["Hessian", "density"]

_SIDES = (("clean", "clean_test"), ("bd", "bd_test"))


def density(ritz: np.ndarray, weights: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """The spectral density that Ritz values and weights say, smoothed by Gaussians of variance ``1e-5 max(1, range)``.

    Args:
        ritz: ``[probes, m]``; NaN where a probe stopped before.
        weights: Same shape, a probe's add up to 1.

    Returns:
        Points in rising order, dense where the values are, and the density there; its integral is 1.
    """
    known = np.isfinite(ritz)
    values, shares = ritz[known], weights[known] / len(ritz)
    reach = values.max() - values.min()
    sigma = np.sqrt(1e-5 * max(1.0, reach))
    edge = max(0.01 * reach, 5 * sigma)
    even = np.linspace(values.min() - edge, values.max() + edge, 2000)
    close = (values[:, None] + sigma * np.linspace(-5, 5, 41)).ravel()
    points = np.unique(np.concatenate([even, close]))
    bells = np.exp(-((points[:, None] - values) ** 2) / (2 * sigma**2)) / np.sqrt(2 * np.pi * sigma**2)
    found = bells @ shares
    return points, found / float((np.diff(points) * (found[1:] + found[:-1]) / 2).sum())


@register_tool("hessian")
class Hessian(Tool):
    """Spectrum of the Hessian of the mean cross-entropy in all parameters, for clean test images with their classes and
    for triggered ones with the classes that the attacker wants.

    Stochastic Lanczos quadrature: a probe ``v`` (Rademacher, of length 1), ``m`` steps of Lanczos with full
    reorthogonalisation give ``T = U diag(t) U^T``, and the density is ``sum_i U[0, i]^2 delta(x - t_i)``, the mean over
    probes. The largest Ritz values bound the largest eigenvalues from below, with the error bounds that stand beside
    them; the trace is the mean of ``v^T H v`` (Hutchinson). ``2 m probes`` gradients of ``n`` images a side: minutes on
    a GPU at the defaults, hours on a CPU with a large model; there take ``n=256, probes=1, m=30``.

    Arrays: ``ritz_clean``, ``ritz_bd``, ``w_clean``, ``w_bd`` f64 ``[probes, m]`` (NaN and 0 where a probe ended
    before); ``top_clean``, ``top_bd`` f64 ``[top]`` and their ``error_*``. Table: one row for each side.

    Source: Yao et al., PyHessian, arXiv 1912.07145; Ghorbani et al., ICML 2019, arXiv 1901.10159.
    """

    card = ToolCard(
        title="Hessian spectrum",
        question="How curved is the loss at this model, on clean and on triggered images?",
        paper="Z. Yao et al., PyHessian: Neural Networks Through the Lens of the Hessian, arXiv 1912.07145",
        deviations=(
            "A fixed set of 2,048 images counts; BackdoorBench takes one batch of 128, whose top eigenvalue varies "
            "much from batch to batch.",
            "Clean and triggered images have spectra of their own; BackdoorBench mixes them.",
            "The top eigenvalues are Ritz values with error bounds; BackdoorBench iterates powers.",
            "Five probes give the density and thirty the trace; BackdoorBench takes one.",
        ),
    )

    class Config(ToolConfig):
        """Settings of the Hessian.

        Args:
            n: Images of each side.
            probes: Random vectors of the density.
            m: Lanczos steps of each; as many vectors of the model's size are kept.
            top: Largest eigenvalues that are listed.
            trace_probes: Random vectors of the trace, those of the density among them.
            batch: Images at a time.
        """

        n: int = Field(2048, ge=1)
        probes: int = Field(5, ge=1)
        m: int = Field(100, ge=2)
        top: int = Field(5, ge=1)
        trace_probes: int = Field(30, ge=1)
        batch: int = Field(256, ge=1)

    def check(self, subject: Subject) -> None:
        subject.pairs(1)

    def measure(self, subject: Subject) -> Numbers:
        arrays: dict[str, np.ndarray] = {}
        table: list[dict[str, Any]] = []
        for side, name in _SIDES:
            found, row = self._spectrum(subject, subject.view(name, self.config.n))
            arrays |= {f"{key}_{side}": value for key, value in found.items()}
            table.append({"images": side, **row})
        keys = ("lambda_max", "lambda_min", "trace", "negative_mass")
        return Numbers(
            arrays,
            table,
            {f"{key}_{row['images']}": row[key] for row in table for key in keys},
            {"n": [row["n"] for row in table], "probes": self.config.probes},
        )

    def _spectrum(self, subject: Subject, view: View) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        config = self.config
        product, size = hessian_product(subject.model, lambda: subject.batches(view.images, config.batch), view.given)
        ritz, weights = np.full((config.probes, config.m), np.nan), np.zeros((config.probes, config.m))
        errors, traces = np.full((config.probes, config.m), np.nan), []
        generator = subject.generator("hessian")  # the same probes for both sides
        for probe in range(max(config.probes, config.trace_probes)):
            start = rademacher(size, generator, subject.device)
            if probe < config.probes:
                values, shares, bounds = lanczos(product, start, config.m)
                ritz[probe, : len(values)], weights[probe, : len(values)] = values, shares
                errors[probe, : len(values)] = bounds
                traces.append(float(size * (values * shares).sum()))
            else:
                traces.append(float(start.double() @ product(start).double()))
            if not np.isfinite(traces[-1]):
                raise BBFastError("the Hessian is not finite: the model's loss or its gradients overflow")
        ranked = np.where(np.isnan(ritz), -np.inf, ritz)
        order = np.argsort(-ranked, axis=1, kind="stable")[:, : config.top]
        each = np.take_along_axis(ranked, order, 1)
        # Ritz values never exceed the eigenvalue of their rank: of several probes the largest is the nearest.
        best = each.argmax(0)
        top = each[best, np.arange(each.shape[1])]
        top, best = top[np.isfinite(top)], best[np.isfinite(top)]
        error = np.array([errors[p, order[p, i]] for i, p in enumerate(best)])
        known = np.isfinite(ritz)
        largest, least = float(top[0]), float(ritz[known].min())
        # What is rounding of zero is not negative curvature.
        negative = known & (np.nan_to_num(ritz) < -1e-5 * max(abs(largest), abs(least)))
        trace = float(np.mean(traces))
        row = {
            "n": len(view),
            "lambda_max": largest,
            "error_of_lambda_max": float(error[0]),
            "lambda_min": least,
            "trace": trace,
            "trace_standard_error": float(np.std(traces, ddof=1) / np.sqrt(len(traces))) if len(traces) > 1 else None,
            "trace_over_lambda_max": trace / largest if largest > 0 else None,
            "negative_mass": float(weights[negative].sum() / len(ritz)),
            "above_tenth": int((np.nan_to_num(ritz) > 0.1 * largest).sum(1).max()) if largest > 0 else 0,
        }
        return {"ritz": ritz, "w": weights, "top": top, "error": error}, row

    @classmethod
    def common(cls, parts: Sequence[Numbers]) -> dict[str, Any]:
        return {"widest": max(_widest(part) for part in parts)}

    @staticmethod
    def draw(numbers: Numbers) -> Figure:
        arrays, summary, counts = numbers.arrays, numbers.summary, numbers.meta["n"]
        note = f"{numbers.meta['caption']}; {counts[0]} clean, {counts[1]} triggered images; "
        with figure(7.2, 4.2, f"{note}probes: {numbers.meta['probes']}; marks at the top: largest eigenvalues") as made:
            axis = made.subplots()
            for (side, _), colour, words, line in zip(
                _SIDES, (CLEAN, POISONED), ("without trigger", "with trigger"), ("-", "--"), strict=True
            ):
                points, values = density(arrays[f"ritz_{side}"], arrays[f"w_{side}"])
                most = summary[f"lambda_max_{side}"]
                axis.plot(points, np.maximum(values, 1e-7), line, color=colour, lw=1.2, label=f"{words}: {most:.4g}")
                height = 0.98 if side == "clean" else 0.93
                mark: dict[str, Any] = {"color": colour, "marker": "|", "ms": 10, "ls": "none", "mew": 1.6}
                top = arrays[f"top_{side}"]
                axis.plot(top, np.full(len(top), height), transform=axis.get_xaxis_transform(), **mark)
            axis.set_yscale("log")
            axis.set_ylim(1e-7)
            # A power of ten: ticks below the threshold would run into one another.
            thousandth = max((numbers.meta.get("widest") or _widest(numbers)) * 1e-3, 1e-9)
            axis.set_xscale("symlog", linthresh=10.0 ** np.ceil(np.log10(thousandth)))
            axis.tick_params(axis="x", labelrotation=30)
            axis.set(xlabel="eigenvalue (linear around 0, then logarithmic)", ylabel="density")
            axis.legend(title="largest eigenvalue", loc="upper left")
        return made


def _widest(numbers: Numbers) -> float:
    """The largest Ritz value of both sides, without its sign."""
    return float(max(np.nanmax(np.abs(numbers.arrays[f"ritz_{side}"])) for side, _ in _SIDES))
