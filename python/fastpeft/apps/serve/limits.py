"""Limits of a server and their defaults, in one place. It imports nothing, so that the command line can show them."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Limits:
    """max_length: tokens of prompt and answer together. max_batch: requests in a batch; max_queue: that wait beside
    them. batch_tokens: in one forward. page: tokens of a page of the cache; cache_tokens: of the whole cache
    (None: as transformers finds room). timeout: seconds for a request."""

    max_length: int = 2048
    max_batch: int = 64
    max_queue: int = 256
    batch_tokens: int = 512
    page: int = 32
    cache_tokens: int | None = 32768
    timeout: float = 300.0


@dataclass(frozen=True)
class BodyLimits:
    """Of the bodies of requests, in MiB and seconds. max_body: one body. body_timeout: until it is whole. body_memory:
    all bodies that are being received or wait to be decoded; client_memory: of those, one client's."""

    max_body: float = 4.0
    body_timeout: float = 30.0
    body_memory: float = 128.0
    client_memory: float = 64.0


@dataclass(frozen=True)
class ConnectionLimits:
    """max_connections: None for as many as the limit of open files has room for, at most 1024. max_client_connections:
    from one address, or one /64 network of IPv6; None for all of them. header_bytes: of a request before its body.
    header_timeout: seconds until a header is whole. idle_timeout: seconds that a connection stays after an answer,
    without another request or without the answer being read."""

    max_connections: int | None = None
    max_client_connections: int | None = None
    header_bytes: int = 32 << 10
    header_timeout: float = 10.0
    idle_timeout: float = 30.0
