"""What an operator sets of the gRPC listener, with Triton's names and defaults."""

from __future__ import annotations

from dataclasses import dataclass

from venturi.core.errors import ModelError

_LEVELS = ("none", "low", "medium", "high")
_MAX_MESSAGE = (1 << 31) - 1


@dataclass(frozen=True)
class GrpcSettings:
    """Times in milliseconds; an age of 0 has no bound. `compression`: of answers, for clients that accept it."""

    keepalive_time_ms: int = 7_200_000
    keepalive_timeout_ms: int = 20_000
    keepalive_without_calls: bool = False
    max_connection_age_ms: int = 0
    max_connection_age_grace_ms: int = 0
    compression: str = "none"

    def __post_init__(self) -> None:
        if self.compression not in _LEVELS:
            raise ModelError(
                f"compression of gRPC answers must be one of {', '.join(_LEVELS)}, got {self.compression!r}"
            )

    def options(self) -> list[tuple[str, int]]:
        """Channel arguments of the server."""
        found = [
            ("grpc.max_send_message_length", _MAX_MESSAGE), ("grpc.max_receive_message_length", _MAX_MESSAGE),
            ("grpc.so_reuseport", 0), ("grpc.keepalive_time_ms", self.keepalive_time_ms),
            ("grpc.keepalive_timeout_ms", self.keepalive_timeout_ms),
            ("grpc.keepalive_permit_without_calls", int(self.keepalive_without_calls)),
        ]  # fmt: skip
        if self.max_connection_age_ms:
            found.append(("grpc.max_connection_age_ms", self.max_connection_age_ms))
        if self.max_connection_age_grace_ms:
            found.append(("grpc.max_connection_age_grace_ms", self.max_connection_age_grace_ms))
        level = _LEVELS.index(self.compression)
        return [*found, ("grpc.default_compression_level", level)] if level else found
