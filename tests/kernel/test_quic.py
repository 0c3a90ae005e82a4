"""Real QUIC (aioquic) over a scheduled NIC: its packets sink by the bytes of their UDP flow, whatever is in them."""

import asyncio
import datetime
import threading
from pathlib import Path

import pytest
from datapath_kit import in_netns
from datapath_wire import ADDRESSES, DESTINATION_PORT_AT, captured, on_one_cpu, sunk_datagrams

aioquic_server = pytest.importorskip("aioquic.asyncio", reason="needs aioquic (pip install 'fabricpilot[quic]')")

SERVER = ADDRESSES[4][0]
QUIC_PORT = 4433
RESPONSES = (3_000, 2_500_000)


def certificate(directory: Path) -> tuple[Path, Path]:
    """A self-signed certificate and its key, as files."""
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "fptest")])
    now = datetime.datetime.now(datetime.UTC)
    made = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(1)
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=1))
        .sign(key, hashes.SHA256())
    )
    pem = serialization.Encoding.PEM
    paths = directory / "certificate.pem", directory / "key.pem"
    paths[0].write_bytes(made.public_bytes(pem))
    private = key.private_bytes(pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    paths[1].write_bytes(private)
    return paths


async def serve(files: tuple[Path, Path], ready: threading.Event, stop: threading.Event) -> None:
    """Answer each stream with as many bytes as it asks for."""
    from aioquic.quic.configuration import QuicConfiguration

    async def answer(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        writer.write(bytes(int(await reader.read())))
        writer.write_eof()

    streams: set[asyncio.Task[None]] = set()

    def opened(reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        streams.add(asyncio.ensure_future(answer(reader, writer)))

    configuration = QuicConfiguration(is_client=False, alpn_protocols=["test"])
    configuration.load_cert_chain(*files)
    server = await aioquic_server.serve(SERVER, QUIC_PORT, configuration=configuration, stream_handler=opened)
    ready.set()
    while not stop.is_set():
        await asyncio.sleep(0.01)
    server.close()


async def fetch() -> list[int]:
    """How many bytes each response had."""
    import ssl

    from aioquic.quic.configuration import QuicConfiguration

    configuration = QuicConfiguration(is_client=True, alpn_protocols=["test"], verify_mode=ssl.CERT_NONE)
    received = []
    async with aioquic_server.connect(SERVER, QUIC_PORT, configuration=configuration) as connection:
        for size in RESPONSES:
            reader, writer = await connection.create_stream()
            writer.write(str(size).encode())
            writer.write_eof()
            received.append(len(await asyncio.wait_for(reader.read(), 30)))
    return received


def test_a_quic_connection_sinks_by_its_bytes(host, tmp_path):
    ready, stop = threading.Event(), threading.Event()
    files = certificate(tmp_path)

    def run_server() -> None:
        with in_netns(host.sender), on_one_cpu():
            asyncio.run(serve(files, ready, stop))

    thread = threading.Thread(target=run_server)
    thread.start()
    try:
        assert ready.wait(10)
        with captured(host.receiver) as capture, in_netns(host.receiver):
            assert asyncio.run(fetch()) == list(RESPONSES)
    finally:
        stop.set()
        thread.join(10)
    assert sum(sunk_datagrams(capture.frames, DESTINATION_PORT_AT).values()) > sum(RESPONSES)
