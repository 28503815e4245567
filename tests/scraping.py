"""Reads a page of /metrics as Prometheus does."""

import msgspec
from prometheus_client.parser import text_string_to_metric_families


class Page(msgspec.Struct, frozen=True):
    """Samples: name, labels, value."""

    samples: tuple[tuple[str, dict[str, str], float], ...]

    @classmethod
    def of(cls, text: str) -> "Page":
        families = text_string_to_metric_families(text)
        return cls(tuple((s.name, dict(s.labels), s.value) for family in families for s in family.samples))

    def value(self, name: str, **labels: str) -> float:
        """Return the sum of the samples that have these labels, among others; 0 if there is none."""
        return sum(value for _, value in self._matching(name, labels))

    def series(self, name: str, **labels: str) -> list[dict[str, str]]:
        """Return the labels of each sample that has these."""
        return [found for found, _ in self._matching(name, labels)]

    def _matching(self, name: str, labels: dict[str, str]) -> list[tuple[dict[str, str], float]]:
        return [(own, v) for n, own, v in self.samples if n == name and labels.items() <= own.items()]
