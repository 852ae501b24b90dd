"""The settings of a retrieval server, checked together."""

from __future__ import annotations

import ipaddress
from dataclasses import dataclass, field

from rex_rag.support.errors import UserError

DEFAULT_HOST = "127.0.0.1"
DEFAULT_PORT = 8000
# Search-R1's server answers with three passages unless asked for another number.
DEFAULT_TOP_K = 3


@dataclass(frozen=True)
class ServerOptions:
    """Where a server listens, what it refuses, and how it batches.

    Raises:
        ValueError: for values out of range or that contradict each other.
    """

    host: str = field(
        default=DEFAULT_HOST,
        metadata={"help": "The address to bind; anything but loopback opens the index to whoever reaches the port."},
    )
    port: int = field(
        default=DEFAULT_PORT,
        metadata={"help": "The port to bind; 0 takes a free one."},
    )
    default_top_k: int = field(
        default=DEFAULT_TOP_K,
        metadata={"help": "Passages a query where a request names no `topk`."},
    )
    max_queries: int = field(
        default=4096,
        metadata={"help": "Queries allowed in a request."},
    )
    max_query_characters: int = field(
        default=16_384,
        metadata={"help": "Characters allowed in a query."},
    )
    max_top_k: int = field(
        default=100,
        metadata={"help": "Passages a query that a request may ask for."},
    )
    max_body_bytes: int = field(
        default=16 * 1024**2,
        metadata={"help": "Bytes allowed in a request's body."},
    )
    micro_batching: bool = field(
        default=True,
        metadata={"help": "Merge concurrent requests into batches; engines without an own index never do."},
    )
    max_batch: int = field(
        default=256,
        metadata={"help": "Queries searched together at most."},
    )
    batch_wait_ms: float = field(
        default=2.0,
        metadata={
            "help": "A batch smaller than the last waits for the clients just answered to ask again, until none came "
            "for so many milliseconds; 0 never waits."
        },
    )
    max_waiting: int = field(
        default=16_384,
        metadata={"help": "Unanswered queries beyond which requests are refused with 503 and Retry-After."},
    )
    cache_size: int = field(
        default=65_536,
        metadata={"help": "Rankings kept in memory, about half a kilobyte each at topk 3; 0 for none."},
    )

    def __post_init__(self) -> None:
        if not isinstance(self.host, str) or not self.host.strip():
            raise UserError(f"host={self.host!r} names no address; use {DEFAULT_HOST} for this machine alone")
        _check_integer("port", self.port, 0, 65_535, "8000 is the usual one, 0 takes a free one")
        for name in ("default_top_k", "max_queries", "max_query_characters", "max_top_k", "max_body_bytes"):
            _check_integer(name, getattr(self, name), 1, None, "a lower limit would refuse every request")
        _check_integer("max_batch", self.max_batch, 1, None, "1 searches query by query")
        _check_integer("max_waiting", self.max_waiting, 1, None, "a lower limit would refuse every request")
        _check_integer("cache_size", self.cache_size, 0, None, "0 keeps nothing")
        if not isinstance(self.micro_batching, bool):
            raise UserError(f"micro_batching={self.micro_batching!r}; it must be true or false")
        wait = self.batch_wait_ms
        if isinstance(wait, bool) or not isinstance(wait, int | float) or not 0 <= wait <= 1000:
            raise UserError(f"batch_wait_ms={wait!r}; it must be between 0 and 1000, and 0 to 5 make sense")
        if self.default_top_k > self.max_top_k:
            raise UserError(
                f"default_top_k={self.default_top_k} is above max_top_k={self.max_top_k}, so that a request without "
                "topk would be refused; raise max_top_k or lower default_top_k"
            )
        if self.max_waiting < self.max_queries:
            raise UserError(
                f"max_waiting={self.max_waiting} is below max_queries={self.max_queries}, so that a request of "
                "allowed size would be refused even by an idle server; raise max_waiting or lower max_queries"
            )

    @property
    def is_loopback(self) -> bool:
        """Whether only this machine can reach the server."""
        if self.host == "localhost":
            return True
        try:
            return ipaddress.ip_address(self.host).is_loopback
        except ValueError:
            return False


def _check_integer(name: str, value: object, low: int, high: int | None, way_out: str) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low or (high is not None and value > high):
        range_text = f"at least {low}" if high is None else f"between {low} and {high}"
        raise UserError(f"{name}={value!r}; it must be an integer of {range_text}; {way_out}")
