"""What a retrieval server counts, in Prometheus' format, in a registry of its own."""

from __future__ import annotations

from rex_rag.retrieval.server.stages import Timings

PREFIX = "rexrag_retrieval"
_SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5, 5.0, 10.0, 30.0)
_SIZES = (1, 2, 4, 8, 16, 32, 64, 128, 256, 512, 1024)


class ServerMetrics:
    """The counters of one server. Implements `Observer`.

    Raises:
        ImportError: without prometheus-client, naming what to install.
    """

    def __init__(self) -> None:
        try:
            from prometheus_client import CollectorRegistry, Counter, Gauge, Histogram
        except ImportError as error:
            raise ImportError(
                'the server counts with prometheus-client: install it with `pip install "rex-rag[retrieval]"`'
            ) from error
        self._registry = CollectorRegistry()

        def make(kind: type, name: str, text: str, labels: tuple[str, ...] = (), **options: object):
            return kind(f"{PREFIX}_{name}", text, labels, registry=self._registry, **options)

        requests = make(Counter, "requests", "Search requests answered, by HTTP status", ("status",))
        self._requests = _Labelled(requests)
        self._queries = make(Counter, "queries", "Queries answered")
        self._batch = make(Histogram, "batch_queries", "Queries in a batch that was searched", buckets=_SIZES)
        self._hits = make(Counter, "cache_hits", "Queries answered from the cache")
        self._misses = make(Counter, "cache_misses", "Queries that had to be searched")
        self._seconds = _Labelled(
            make(
                Histogram,
                "stage_seconds",
                "Seconds of a request in each stage: queue (waiting), encode, search, fetch, total",
                ("stage",),
                buckets=_SECONDS,
            )
        )
        self.in_flight = make(Gauge, "in_flight", "Search requests being answered")

    def batch(self, queries: int) -> None:
        self._batch.observe(queries)

    def cache(self, hits: int, misses: int) -> None:
        if hits:
            self._hits.inc(hits)
        if misses:
            self._misses.inc(misses)

    def answered(self, queries: int, timings: Timings) -> None:
        """Count the queries of a request and the seconds that its stages took."""
        self._queries.inc(queries)
        for stage in ("queue", "encode", "search", "fetch", "total"):
            self._seconds[stage].observe(getattr(timings, stage))

    def request(self, status: int) -> None:
        self._requests[str(status)].inc()

    def render(self) -> tuple[bytes, str]:
        """The text of /metrics and its content type."""
        from prometheus_client import CONTENT_TYPE_LATEST, generate_latest

        return generate_latest(self._registry), CONTENT_TYPE_LATEST


class _Labelled(dict):
    """The children of a metric by label: finding one through the library takes longer than counting."""

    def __init__(self, metric) -> None:
        super().__init__()
        self._metric = metric

    def __missing__(self, label: str):
        child = self[label] = self._metric.labels(label)
        return child
