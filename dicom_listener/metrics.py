"""What the listener counts, for Prometheus. Labels are ours: never a peer's or a patient's string."""

from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram

_SECONDS = (0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 10.0, 30.0)


class Metrics:
    """All figures of one listener in a registry of its own, so that two listeners in one process do not collide."""

    def __init__(self) -> None:
        self.registry = CollectorRegistry()
        self.instances = Counter(
            "mu2_dicom_instances", "C-STORE answers by status name.", ["status"], registry=self.registry
        )
        self.bytes = Counter("mu2_dicom_received_bytes", "Bytes of data sets that were stored.", registry=self.registry)
        self.associations = Counter(
            "mu2_dicom_associations", "Associations by how they ended.", ["outcome"], registry=self.registry
        )
        self.open_associations = Gauge(
            "mu2_dicom_open_associations", "Associations served now.", registry=self.registry
        )
        self.half_open = Gauge(
            "mu2_dicom_half_open", "Connections without an association request yet.", registry=self.registry
        )
        self.shed = Counter(
            "mu2_dicom_shed_connections", "Half-open connections closed to make room.", registry=self.registry
        )
        self.group_size = Histogram(
            "mu2_dicom_commit_instances",
            "Instances in one commit.",
            buckets=(1, 2, 4, 8, 16, 32, 64, 256),
            registry=self.registry,
        )
        self.commit_seconds = Histogram(
            "mu2_dicom_commit_seconds",
            "Commit of one group of rows.",
            buckets=_SECONDS,
            registry=self.registry,
        )
        self.duplicates = Counter(
            "mu2_dicom_duplicates", "Instances sent again with equal bytes.", registry=self.registry
        )
        self.variants = Counter(
            "mu2_dicom_variants", "Instances sent again in another encoding.", registry=self.registry
        )
        self.corrections = Counter(
            "mu2_dicom_corrections", "Instances whose header was corrected by their sender.", registry=self.registry
        )
        self.conflicts = Counter(
            "mu2_dicom_conflicts",
            "Instances sent again with other content: an alarm, a person must look.",
            registry=self.registry,
        )
        self.completed = Counter("mu2_dicom_studies_completed", "Studies that became complete.", registry=self.registry)
        self.recovered = Counter(
            "mu2_dicom_recovered_instances",
            "Stored instances whose rows were made at start-up.",
            registry=self.registry,
        )
