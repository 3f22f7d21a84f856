"""`Step`: one state of the model that was tried in a panel, and what is known of it."""

from __future__ import annotations

import dataclasses
from typing import Any

from qnb.measure.accuracy import Accuracy
from qnb.measure.profile import Profile
from qnb.notebook.panel import speed
from qnb.notebook.panel.evaluation import Progress
from qnb.notebook.panel.recipe import Layers


@dataclasses.dataclass
class Step:
    """One state of the model that was tried: its layers, and what is known of it so far."""

    number: int
    layers: Layers
    words: str
    weight_bytes: int | None = None
    original_bytes: int | None = None
    progress: Progress | None = None
    speed: speed.Speed | None = None
    metric: float | None = None
    why_no_metric: str | None = None
    written: list[int] | None = None
    settled: bool = False

    def profile(self, accuracy: Accuracy | None = None) -> Profile:
        """What is known as a `Profile`; what is not known yet says so."""
        found = self.speed or speed.Speed({}, {}, {}, {})
        values: dict[str, Any] = {
            **found.values,
            "weight_bytes": self.weight_bytes,
            "original_bytes": self.original_bytes,
        }
        accuracy = accuracy or (self.progress and self.progress.accuracy)
        if accuracy is not None and (self.metric is not None or self.why_no_metric):
            unavailable = {k: v for k, v in accuracy.unavailable.items() if k != "metric"}
            if self.metric is None:
                unavailable["metric"] = self.why_no_metric
            accuracy = dataclasses.replace(accuracy, metric=self.metric, unavailable=unavailable)
        values["accuracy"] = accuracy
        fields = [f.name for f in dataclasses.fields(Profile) if not f.name.startswith("_")]
        unavailable = {f: found.unavailable.get(f, "not measured yet") for f in fields if values.get(f) is None}
        unavailable.update({f: "see %qprofile" for f in ("peak_host_bytes", "peak_cuda_bytes")})
        environment = found.environment or {"rows": None}
        return Profile(**values, unavailable=unavailable, environment=environment, _samples=dict(found.samples))
