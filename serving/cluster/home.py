"""The folder of one local cluster: Ray's session, HAProxy's files, the certificate of its routers, for this user alone.

Clusters beside each other share no file and no port. The folder goes with a cluster that ends well; of those that did
not, the logs of the last few stay.
"""

import datetime
import ipaddress
import os
import secrets
import shutil
import tempfile
from pathlib import Path

from mpt.errors import MachineRefused
from serving.cluster import guard, haproxy
from serving.ports import free_port

_PREFIX = "mpt-"
# HAProxy's admin socket is FOLDER/NODE/admin.sock with Ray's 56 digits for the node, and takes at most 97 characters.
_LONGEST_FOLDER = 97 - len(f"/{'0' * 56}/admin.sock")
_FOLDERS_KEPT = 3
_CERTIFICATE, _KEY = "cluster.pem", "cluster.key"


def make() -> Path:
    """A new folder, which nobody else can look into. Raises MachineRefused."""
    _remove_old()
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX))
    if len(str(folder)) > _LONGEST_FOLDER:
        folder.rmdir()
        raise MachineRefused(
            f"`{folder}` is too long for the path of a socket, which may have {_LONGEST_FOLDER} characters before its "
            "own part; set TMPDIR to a shorter folder, such as /tmp"
        )
    return folder


def ports() -> dict[str, str]:
    """Free ones for what is on fixed ports of Ray's otherwise, so that a machine could hold one cluster only."""
    names = ("HAPROXY_STATS", "HAPROXY_METRICS", "FALLBACK_PROXY_HTTP")  # the last: Ray's own proxy, behind HAProxy
    variables = [f"RAY_SERVE_{name}_PORT" for name in names] + ["AUTOSCALER_METRIC_PORT", "DASHBOARD_METRIC_PORT"]
    return {variable: str(free_port()) for variable in variables}


def environment(folder: Path) -> dict[str, str]:
    """What the processes of the cluster in this folder are told. `write_certificate` has been called."""
    certificate, key = str(folder / _CERTIFICATE), str(folder / _KEY)
    return {
        guard.VARIABLE: str(folder),
        haproxy.CERTIFICATE_VARIABLE: certificate,
        "RAY_SERVE_HAPROXY_BINARY_PATH": haproxy.command(),
        "RAY_SERVE_HAPROXY_CONFIG_FILE_LOC": f"{folder}/haproxy.cfg",
        "RAY_SERVE_HAPROXY_SOCKET_PATH": f"{folder}/admin.sock",
        "RAY_SERVE_HAPROXY_METRICS_SOCKET_PATH": f"{folder}/metrics.sock",
        "RAY_SERVE_HAPROXY_SERVER_STATE_BASE": str(folder),
        "RAY_SERVE_HAPROXY_SERVER_STATE_FILE": f"{folder}/server-state",
        # Ray's own calls ask for this certificate on both sides. Its token is not asked for by the port over which
        # replicas are called, where a caller may have any code run.
        "RAY_USE_TLS": "1",
        "RAY_TLS_SERVER_CERT": certificate,
        "RAY_TLS_CA_CERT": certificate,
        "RAY_TLS_SERVER_KEY": key,
    }


def write_certificate(folder: Path) -> tuple[Path, Path]:
    """A new certificate and its key, as PEM files: who holds the key belongs to this cluster.

    HAProxy finds its routers by their ports. When one has died, any program may listen there; without the key it gets
    no request, and so none of the clients' keys.
    """
    from cryptography import x509
    from cryptography.hazmat.primitives import hashes, serialization
    from cryptography.hazmat.primitives.asymmetric import ec

    key = ec.generate_private_key(ec.SECP256R1())
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "mpt cluster")])
    here = ipaddress.ip_address("127.0.0.1")
    now = datetime.datetime.now(datetime.UTC)
    certificate = (
        x509.CertificateBuilder()
        .subject_name(name)
        .issuer_name(name)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - datetime.timedelta(days=1))
        .not_valid_after(now + datetime.timedelta(days=3650))
        .add_extension(x509.BasicConstraints(ca=True, path_length=0), critical=True)
        .add_extension(x509.SubjectAlternativeName([x509.IPAddress(here), x509.DNSName("localhost")]), critical=False)
        .sign(key, hashes.SHA256())
    )
    as_pem = serialization.Encoding.PEM
    certificate_file, key_file = folder / _CERTIFICATE, folder / _KEY
    certificate_file.write_bytes(certificate.public_bytes(as_pem))
    pem = key.private_bytes(as_pem, serialization.PrivateFormat.PKCS8, serialization.NoEncryption())
    with os.fdopen(os.open(key_file, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(pem)
    return certificate_file, key_file


def remove(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)


def keep_token_private() -> None:
    """Ray's token, in the user's home, is for the user alone; left to Ray, everybody on the machine could read it."""
    token = Path.home() / ".ray" / "auth_token"
    if not token.exists():
        token.parent.mkdir(mode=0o700, exist_ok=True)
        with os.fdopen(os.open(token, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "w") as file:
            file.write(secrets.token_hex(32))
    elif token.stat().st_uid == os.getuid():
        token.chmod(0o600)


def _remove_old() -> None:
    """The folders of clusters that are over, but for the latest few: their logs say why."""
    own = [
        path
        for path in Path(tempfile.gettempdir()).glob(f"{_PREFIX}*")
        if (path / _CERTIFICATE).is_file() and path.stat().st_uid == os.getuid() and not guard.members(str(path))
    ]
    for path in sorted(own, key=lambda path: path.stat().st_mtime)[:-_FOLDERS_KEPT]:
        remove(path)
