"""Certificates of the listeners: HTTP, metrics and gRPC speak TLS with the same ones."""

from __future__ import annotations

import ssl
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from venturi.core.errors import ModelError


@dataclass(frozen=True)
class Tls:
    """PEM files. `client_ca`: clients must show a certificate that it has signed."""

    certificate: Path
    key: Path
    client_ca: Path | None = None

    def __post_init__(self) -> None:
        """Raises ModelError for files that cannot be read or do not belong together."""
        try:
            context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
            context.load_cert_chain(self.certificate, self.key)
            if self.client_ca is not None:
                context.load_verify_locations(self.client_ca)
        except (OSError, ssl.SSLError) as exc:
            raise ModelError(f"TLS certificate {self.certificate} and key {self.key} cannot be used: {exc}") from exc

    def uvicorn(self) -> dict[str, Any]:
        out: dict[str, Any] = {"ssl_certfile": str(self.certificate), "ssl_keyfile": str(self.key)}
        if self.client_ca is not None:
            out |= {"ssl_ca_certs": str(self.client_ca), "ssl_cert_reqs": int(ssl.CERT_REQUIRED)}
        return out

    def grpc(self) -> Any:
        import grpc

        pair = self.key.read_bytes(), self.certificate.read_bytes()
        ca = None if self.client_ca is None else self.client_ca.read_bytes()
        return grpc.ssl_server_credentials([pair], root_certificates=ca, require_client_auth=ca is not None)
