"""Mutual TLS of a gRPC service: who is let in, what stops the start, what a renewal does."""

from __future__ import annotations

import asyncio
import logging
import os
from collections.abc import AsyncIterator, Callable, Iterator
from contextlib import asynccontextmanager
from datetime import UTC, datetime, timedelta
from pathlib import Path
from typing import Any

import grpc
import pytest

from protos import verifier_pb2_grpc
from protos.tree_pb2 import ModelInfoRequest
from services.common.grpc_setup import Endpoint, aio_channel, aio_server, is_serving, serving_grpc
from services.common.lifecycle import Lifecycle, StartupError
from services.common.tls import INSECURE, Security, Tls, TlsFiles
from tests.certificates import Authority
from tests.services.common.example_service import SERVICE, ExampleVerifier

Files = dict[str, Path]


def tls(files: Files, server_name: str = "") -> Tls:
    return Tls(TlsFiles(files["tls_cert"], files["tls_key"], files["tls_ca"]), server_name)


@asynccontextmanager
async def serving(security: Security, health_port: int = 0) -> AsyncIterator[int]:
    lifecycle = Lifecycle()
    server = aio_server(lifecycle)
    verifier_pb2_grpc.add_VerifierServicer_to_server(ExampleVerifier(), server)
    async with serving_grpc(server, lifecycle, Endpoint("127.0.0.1", 0, health_port), security, [SERVICE]) as port:
        yield port


async def admitted(port: int, security: Security) -> bool:
    async with aio_channel(f"127.0.0.1:{port}", security) as connection:
        return await is_serving(connection, timeout_s=5)


@pytest.fixture(scope="module")
def authority() -> Authority:
    return Authority()


@pytest.fixture(scope="module")
def stranger() -> Authority:
    return Authority()


def test_a_client_with_a_certificate_of_the_authority_is_admitted(authority: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tls(authority.files(tmp_path / "server"))) as port:
            assert await admitted(port, tls(authority.files(tmp_path / "client", "client.example")))

    asyncio.run(run())


@pytest.mark.parametrize("case", ["plain", "other authority", "server of another authority", "other host"])
def test_who_is_refused(case: str, authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    server = authority.files(tmp_path / "server", *(["elsewhere.example"] if case == "other host" else []))
    clients: dict[str, Callable[[], Security]] = {
        "plain": lambda: INSECURE,
        "other authority": lambda: tls(stranger.files(tmp_path / "client", trusted=authority)),
        "server of another authority": lambda: tls(authority.files(tmp_path / "client", trusted=stranger)),
        "other host": lambda: tls(authority.files(tmp_path / "client")),
    }

    async def run() -> None:
        async with serving(tls(server)) as port:
            assert not await admitted(port, clients[case]())

    asyncio.run(run())


def test_a_client_with_certificates_refuses_a_plain_server(authority: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(INSECURE) as port:
            assert not await admitted(port, tls(authority.files(tmp_path)))

    asyncio.run(run())


def test_the_servers_name_can_be_given(authority: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        async with serving(tls(authority.files(tmp_path / "server", "verifier.example"))) as port:
            client = authority.files(tmp_path / "client")
            assert await admitted(port, tls(client, "verifier.example"))
            assert not await admitted(port, tls(client, "speculator.example"))

    asyncio.run(run())


def test_the_health_port_is_open_and_answers_nothing_else(
    authority: Authority, tmp_path: Path, free_port: Callable[[], int]
) -> None:
    async def run() -> None:
        health_port = free_port()
        async with serving(tls(authority.files(tmp_path)), health_port):
            assert await admitted(health_port, INSECURE)
            async with aio_channel(f"127.0.0.1:{health_port}", INSECURE) as connection:
                stub: Any = verifier_pb2_grpc.VerifierStub(connection)
                with pytest.raises(grpc.aio.AioRpcError) as refused:
                    await stub.GetModelInfo(ModelInfoRequest(), timeout=5)
                assert refused.value.code() is grpc.StatusCode.UNIMPLEMENTED

    asyncio.run(run())


def mounted(folder: Path, version: str, files: Files) -> Files:
    """The files through links as a Kubernetes volume has them: one rename replaces all three."""
    link = folder / f"..{version}"
    link.symlink_to(files["tls_cert"].parent)
    os.replace(link, folder / "..data")
    return {name: folder / "..data" / path.name for name, path in files.items()}


def test_renewed_files_take_effect_without_a_restart(
    authority: Authority, stranger: Authority, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """The server changes to another authority; a broken set in between changes nothing."""
    caplog.set_level(logging.INFO)

    async def run() -> None:
        server = tls(mounted(tmp_path, "1", authority.files(tmp_path / "first")))
        old, new = (tls(each.files(tmp_path / name)) for each, name in ((authority, "old"), (stranger, "new")))
        async with serving(server) as port:
            assert (await admitted(port, old), await admitted(port, new)) == (True, False)
            broken = stranger.files(tmp_path / "broken")
            broken["tls_key"].write_bytes(old.identity.key)
            mounted(tmp_path, "2", broken)
            assert (await admitted(port, old), await admitted(port, new)) == (True, False)
            mounted(tmp_path, "3", stranger.files(tmp_path / "second"))
            assert (await admitted(port, old), await admitted(port, new)) == (False, True)

    asyncio.run(run())
    events = [record.getMessage() for record in caplog.records if record.name == "services.common.tls"]
    assert events == ["new certificates refused; the old ones stay", "new certificates"]


def test_a_new_channel_has_the_renewed_certificate(authority: Authority, stranger: Authority, tmp_path: Path) -> None:
    async def run() -> None:
        client = tls(mounted(tmp_path, "1", stranger.files(tmp_path / "first", trusted=authority)))
        async with serving(tls(authority.files(tmp_path / "server"))) as port:
            assert not await admitted(port, client)
            mounted(tmp_path, "2", authority.files(tmp_path / "second"))
            assert await admitted(port, client)

    asyncio.run(run())


def _damages(authority: Authority) -> Iterator[tuple[Callable[[Files], object], str]]:
    yield lambda files: files["tls_ca"].unlink(), "--tls-ca .*: cannot read it: No such file"
    yield lambda files: files["tls_cert"].write_text("nothing"), "--tls-cert .*: not a certificate in PEM"
    yield lambda files: files["tls_ca"].write_text(""), "--tls-ca .*: not a certificate in PEM"
    yield lambda files: files["tls_key"].write_text("nothing"), "--tls-key .*: not an unencrypted private key"
    yield (
        lambda files: files["tls_key"].write_bytes(
            authority.files(files["tls_key"].parent / "other")["tls_key"].read_bytes()
        ),
        "--tls-key .*: not the key of the certificate .*tls.crt; give the pair",
    )


@pytest.mark.parametrize("case", range(5))
def test_unusable_files_are_named_in_one_line(case: int, authority: Authority, tmp_path: Path) -> None:
    damage, message = list(_damages(authority))[case]
    files = authority.files(tmp_path)
    damage(files)
    with pytest.raises(StartupError, match=message) as error:
        tls(files)
    assert "\n" not in str(error.value)


def test_an_expired_certificate_is_named(authority: Authority, tmp_path: Path) -> None:
    files = authority.files(tmp_path, expires=datetime.now(UTC) - timedelta(minutes=1))
    with pytest.raises(StartupError, match=r"--tls-cert .*: expired at 20.* UTC; renew it"):
        tls(files)
