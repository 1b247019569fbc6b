"""What an operator can set of the gateway."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path

from services.common.settings import ServiceSettings, SettingsError, setting
from services.gateway.addresses import split


@dataclass(frozen=True, kw_only=True)
class GatewaySettings(ServiceSettings):
    """OpenAI's HTTP API in front of a verifier."""

    host: str = setting("Address to listen on.", default="127.0.0.1")
    port: int = setting("Port to listen on; 0 chooses a free one.", default=8000, minimum=0, maximum=65535)
    model: str = setting("Folder or hub id of the model, for its tokenizer.")
    verifier: tuple[str, ...] = setting(
        "HOST:PORT of a verifier; repeatable. A name with several addresses stands for a verifier at each.",
        default=("127.0.0.1:50051",),
    )
    tls_server_name: str = setting(
        "Name that the verifiers' certificates must carry; empty: the host of their address.", default=""
    )
    api_keys_file: Path | None = setting(
        "File of hashed API keys, one a line, # for comments: requests must carry one of the keys. `specserve "
        "hash-key` makes the lines.",
        default=None,
    )
    api_keys: tuple[str, ...] = setting("Hashed API keys besides those of the file; repeatable.", default=())
    https_cert: Path | None = setting(
        "Certificate of the HTTP API, PEM, with its intermediates; without it the API is plain HTTP.", default=None
    )
    https_key: Path | None = setting("The key of that certificate, PEM, not encrypted.", default=None)
    redis_url: str = setting("Redis for the request records.", default="redis://127.0.0.1:6379/0")
    redis_timeout_s: float = setting("Seconds that Redis may take to answer.", default=1.0, minimum=0.01)
    record_ttl_s: int = setting("Seconds that a request record is kept after its last write.", default=3600, minimum=1)
    max_body_bytes: int = setting("Largest request body.", default=4 * 1024 * 1024, minimum=1)
    max_choices: int = setting("Most choices of a request: prompts times n.", default=128, minimum=1)
    max_stop_length: int = setting("Longest stop string, in characters.", default=1024, minimum=1)
    request_timeout_s: float = setting("Seconds after which a request ends with an error.", default=600.0, minimum=0.1)
    connect_timeout_s: float = setting("Seconds for a health check or the model facts.", default=2.0, minimum=0.1)
    resume_timeout_s: float = setting(
        "Seconds to wait for a lost verifier to come back, for each accepted request.", default=30.0, minimum=0
    )
    resume_attempts: int = setting(
        "Most attempts to resume a generation after a loss; the default is more than fit into the default of "
        "resume_timeout_s.",
        default=40,
        minimum=0,
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        if not self.verifier:
            raise SettingsError("no verifier is given; give --verifier HOST:PORT")
        for address in self.verifier:
            try:
                split(address)
            except ValueError as error:
                raise SettingsError(f"--verifier: {error}") from None
        if (self.https_cert is None) != (self.https_key is None):
            raise SettingsError("--https-cert and --https-key are given together or not at all; give both")
        if self.record_ttl_s < self.request_timeout_s:
            raise SettingsError(
                f"record_ttl_s is {self.record_ttl_s} and request_timeout_s {self.request_timeout_s:g}: a record must "
                "outlive its request; raise record_ttl_s"
            )
