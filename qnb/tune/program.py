"""The integer program behind `search`: which group of layers takes which scheme, at what cost."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

import numpy as np
import torch
from torch import Tensor, nn

from qnb import schemes as registry
from qnb.measure.sensitivity import Sensitivity
from qnb.measure.statistics import median
from qnb.measure.token import alone
from qnb.measure.workload import NEW_TOKENS, PROMPT_TOKENS
from qnb.model.fused import fused_groups
from qnb.model.linear import held_storages
from qnb.model.recipe import LayerRecipe, Recipe
from qnb.model.select import sites_in_place
from qnb.model.subject import measuring_state, synchronize
from qnb.model.trial import in_variant
from qnb.model.variants import Order, calibration_of, make

RUNS = 7  # whose median is a latency


class Program:
    """Which group of layers takes which scheme: costs, and the integer program over them.

    kl, bytes  (groups, schemes), nats and bytes; infinite where a layer of the group refuses the scheme
    """

    def __init__(self, model: nn.Module, sensitivities: Sensitivity, formats: Sequence[str]) -> None:
        self.how = sensitivities.how
        self.schemes = ["none", *formats]
        self.groups = fused_groups(sensitivities.layers)
        rows = {(row.name, row.scheme): row for row in sensitivities.rows}
        originals = {s.name: s.weight.numel() * s.weight.element_size() for s in sites_in_place(model)}
        self.kl = np.array([[self._sum(rows, g, s, "kl") for s in self.schemes] for g in self.groups])
        self.bytes = np.array(
            [
                [sum(originals[n] for n in g) if s == "none" else self._sum(rows, g, s, "bytes") for s in self.schemes]
                for g in self.groups
            ],
            dtype=float,
        )
        # What the layers do not hold: embeddings, norms, the output embedding.
        self.other_bytes = held_storages(model)[0] - self.bytes[:, 0].sum()

    @staticmethod
    def _sum(rows, group: Sequence[str], scheme: str, field: str) -> float:
        if scheme == "none":
            return 0.0
        if any((name, scheme) not in rows for name in group):
            return math.inf  # a layer of the group refuses the scheme
        return max(0.0, sum(getattr(rows[name, scheme], field) for name in group))

    def least(self, cost: np.ndarray, limited: np.ndarray, limit: float) -> np.ndarray | None:
        """The scheme's index of each group with the least sum of `cost` whose sum of `limited` stays within `limit`."""
        from scipy.optimize import Bounds, LinearConstraint, milp
        from scipy.sparse import csr_array

        groups, formats = cost.shape
        possible = np.isfinite(self.bytes) & np.isfinite(self.kl)
        flat = np.arange(groups * formats)
        one_each = csr_array((np.ones(flat.size), (flat // formats, flat)), shape=(groups, flat.size))
        # HiGHS works to absolute tolerances: rows and costs are brought to about 1.
        size = max(abs(limit), 1e-30)
        weights = np.where(possible, limited, 0.0).ravel() / size
        objective = np.where(possible, cost, 0.0).ravel()
        objective = objective / max(objective.max(initial=0.0), 1e-30)
        solved = milp(
            objective,
            constraints=[LinearConstraint(one_each, 1, 1), LinearConstraint(weights[None, :], -np.inf, limit / size)],
            integrality=np.ones(flat.size),
            bounds=Bounds(0, possible.ravel().astype(float)),
            options={"mip_rel_gap": 1e-4, "time_limit": 30},
        )
        return None if solved.x is None else solved.x.reshape(groups, formats).argmax(1)

    def recipe(self, choice: Sequence[int]) -> Recipe:
        """The recipe in which each group takes its scheme."""
        layers = {}
        for group, index in zip(self.groups, choice, strict=True):
            if index:
                layers.update({name: LayerRecipe(self.schemes[index], self.how) for name in group})
        return Recipe(layers)

    def predicted(self, costs: np.ndarray, choice: Sequence[int]) -> float:
        """The sum of a cost over the groups."""
        return float(costs[np.arange(len(choice)), choice].sum())


def run_times(program: Program, model: nn.Module, calibration: object, tokenizer: object) -> np.ndarray:
    """ms (groups, schemes): what each group's layers take of a run of `profile`, each shape timed once by itself."""
    sites = {site.name: site for site in sites_in_place(model)}
    own = calibration_of(model, calibration, tokenizer)
    known: dict[tuple, float] = {}

    def time_of(name: str, scheme: str) -> float:
        site = sites[name]
        key = *site.shape, site.weight.dtype, site.weight.device, scheme
        if key not in known:
            if scheme == "none":
                run = site.module
            else:
                order = Order(site, registry.find(scheme), program.how)
                ((_, variant),) = make(model, [order], list(sites.values()), own, lambda n: None)
                run = in_variant(site.module, variant)
            known[key] = _run_ms(run, site.weight, site.shape[1])
        return known[key]

    table = np.full(program.kl.shape, np.inf)
    with alone(model), measuring_state(model):
        for g, group in enumerate(program.groups):
            for s, scheme in enumerate(program.schemes):
                if np.isfinite(program.kl[g, s]):
                    table[g, s] = sum(time_of(name, scheme) for name in group)
    return table


def _run_ms(run: Callable, weight: Tensor, k: int) -> float:
    """What the layer takes of one run: the prompt's rows at once, then a row for each further new token."""
    total = 0.0
    with torch.no_grad():
        for rows, times in ((PROMPT_TOKENS, 1), (1, NEW_TOKENS - 1)):
            x = torch.randn(rows, k).to(weight.device, weight.dtype)
            samples = []
            for _ in range(RUNS):
                synchronize([weight.device])
                began = time.perf_counter()
                run(x)
                synchronize([weight.device])
                samples.append(time.perf_counter() - began)
            total += 1000 * times * median(samples[2:])
    return total
