"""What the review page counts; labels are route templates, statuses and states, never an id, a name or a patient's word."""

from collections.abc import Callable

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0)
_METHODS = {"GET", "HEAD", "POST"}  # all that a route here takes; any other word is the caller's own


class Metrics:
    """All figures of one page in a registry of its own, so that two pages in one process do not collide."""

    def __init__(self, live_pages: Callable[[], float]) -> None:
        self.registry = CollectorRegistry()
        self._requests = Counter(
            "mu2_review_requests_total",
            "Answers by route and status; the route of an address that there is not is `none`.",
            ["method", "route", "status"],
            registry=self.registry,
        )
        self._seconds = Histogram(
            "mu2_review_request_seconds",
            "Wait for the beginning of an answer.",
            ["route"],
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.versions = Counter(
            "mu2_review_versions_total",
            "Report versions that a person made, by state: final, corrected, addended and retracted are signed.",
            ["state"],
            registry=self.registry,
        )
        self.edit_conflicts = Counter(
            "mu2_review_edit_conflicts_total",
            "Edits of a sentence that somebody else had changed meanwhile.",
            registry=self.registry,
        )
        Gauge("mu2_review_live_pages", "Open pages that listen for changes.", registry=self.registry).set_function(
            live_pages
        )

    def answered(self, method: str, route: str, status: int, seconds: float) -> None:
        """Counts one answer that has begun."""
        self._requests.labels(method if method in _METHODS else "other", route, str(status)).inc()
        self._seconds.labels(route).observe(seconds)
