"""The manager's word that a VM is about to be elsewhere: signed by its key, so that nobody else can give it. Pure.

The body is JSON, {"mac": "00:50:56:00:00:01", "from": "esx1", "to": "esx2", "until": 1790000000.5}: Unix time in s, and
"from" empty for a VM that is powered on. The signature is ECDSA with SHA-256 over these bytes, in base64.
"""

import base64
import binascii
from typing import Annotated

import msgspec

from controller.guard import Intent
from topologies.plan import NAME_PATTERN

MAX_BODY_BYTES = 1024
_Name = Annotated[str, msgspec.Meta(pattern=rf"\A({NAME_PATTERN})?\Z")]


class IntentError(ValueError):
    """No intent of the manager's; the message says why."""


class _Body(msgspec.Struct, frozen=True, forbid_unknown_fields=True):
    mac: Annotated[str, msgspec.Meta(pattern=r"\A[0-9a-f][02468ace](:[0-9a-f]{2}){5}\Z")]
    origin: _Name = msgspec.field(name="from")
    to: _Name
    until: float


class Verifier:
    """Has the manager's certificate (PEM)."""

    def __init__(self, certificate: bytes) -> None:
        from cryptography import x509
        from cryptography.hazmat.primitives.asymmetric.ec import EllipticCurvePublicKey

        key = x509.load_pem_x509_certificate(certificate).public_key()
        if not isinstance(key, EllipticCurvePublicKey):
            raise IntentError("the manager's certificate has no ECDSA key")
        self._key = key

    def read(self, body: bytes, signature: str, unix_s: float, now_s: float) -> Intent:
        """The intent of a signed body. Both clocks now: its end is told in Unix time, and returned in the other."""
        from cryptography.exceptions import InvalidSignature
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA
        from cryptography.hazmat.primitives.hashes import SHA256

        try:
            self._key.verify(base64.b64decode(signature, validate=True), body, ECDSA(SHA256()))
        except (InvalidSignature, binascii.Error, ValueError) as error:
            raise IntentError("the signature is not the manager's") from error
        try:
            said = msgspec.json.decode(body, type=_Body)
        except msgspec.MsgspecError as error:
            raise IntentError(f"no intent: {error}") from error
        if not said.until > unix_s:  # nor if it is no number
            raise IntentError("it has expired")
        return Intent(said.mac, said.origin, said.to, now_s + said.until - unix_s)
