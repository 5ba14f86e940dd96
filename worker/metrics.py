"""What a worker process counts; labels are stages, outcomes and destinations' names, never anything of a patient."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_STAGE_BUCKETS = (0.05, 0.1, 0.25, 0.5, 1, 2.5, 5, 10, 30, 60, 120, 300)
_BATCH_BUCKETS = (1, 2, 4, 8, 16, 32)


class Metrics:
    """The metrics of one process in a registry of its own."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.studies = Counter(
            "mu2_stage_outcomes_total", "Tries of a stage by outcome.", ["stage", "outcome"], registry=self.registry
        )
        self.stage_seconds = Histogram(
            "mu2_stage_seconds",
            "Duration of one try of a stage.",
            ["stage"],
            buckets=_STAGE_BUCKETS,
            registry=self.registry,
        )
        self.due = Gauge("mu2_due", "Studies that wait for a stage now.", ["stage"], registry=self.registry)
        self.claim_age_seconds = Gauge(
            "mu2_claim_age_seconds",
            "Seconds since the last claim while work is due and a slot is free; high means deaf.",
            ["stage"],
            registry=self.registry,
        )
        self.messages = Counter(
            "mu2_messages_total", "Tries of a message by outcome.", ["destination", "outcome"], registry=self.registry
        )
        self.unwritable = Counter(
            "mu2_messages_unwritable_total",
            "Drafts for which no message could be written, by destination.",
            ["destination"],
            registry=self.registry,
        )
        self.conflicts = Counter(
            "mu2_instance_conflicts_total",
            "Instances whose pixels differ from the kept one of their SOP Instance UID.",
            registry=self.registry,
        )
        self.rings = Counter("mu2_rings_total", "Doorbells rung by the sweep.", ["queue"], registry=self.registry)
        self.leases_lost = Counter(
            "mu2_leases_lost_total", "Claims that another worker took over.", ["stage"], registry=self.registry
        )
        self.batch_size = Histogram(
            "mu2_model_batch_size",
            "Questions that the model answered together.",
            buckets=_BATCH_BUCKETS,
            registry=self.registry,
        )
        self.out_of_memory = Counter(
            "mu2_model_out_of_memory_total", "Batches that did not fit the memory.", registry=self.registry
        )
