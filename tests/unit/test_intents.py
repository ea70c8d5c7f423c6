"""The manager's word: only what its key has signed counts, and only as long as it says."""

import base64
import datetime
import json
from collections.abc import Callable

import pytest
from cryptography import x509
from cryptography.hazmat.primitives import hashes, serialization
from cryptography.hazmat.primitives.asymmetric import ec, rsa
from hypothesis import given
from hypothesis import strategies as st

from controller.guard import Intent
from controller.intents import IntentError, Verifier

MAC = "00:50:56:00:00:01"
SAID = {"mac": MAC, "from": "esx1", "to": "esx2", "until": 1060.0}
KEY, OTHER_KEY = ec.generate_private_key(ec.SECP256R1()), ec.generate_private_key(ec.SECP256R1())


def certificate(key: ec.EllipticCurvePrivateKey | rsa.RSAPrivateKey) -> bytes:
    name = x509.Name([x509.NameAttribute(x509.NameOID.COMMON_NAME, "vcenter")])
    day = datetime.datetime(2026, 1, 1)
    made = x509.CertificateBuilder().subject_name(name).issuer_name(name).public_key(key.public_key())
    made = made.serial_number(1).not_valid_before(day).not_valid_after(day + datetime.timedelta(days=9999))
    return made.sign(key, hashes.SHA256()).public_bytes(serialization.Encoding.PEM)


VERIFIER = Verifier(certificate(KEY))


def signed(body: bytes, key: ec.EllipticCurvePrivateKey = KEY) -> str:
    return base64.b64encode(key.sign(body, ec.ECDSA(hashes.SHA256()))).decode()


def read(said: object, sign: Callable[[bytes], str] = signed) -> Intent:
    body = json.dumps(said).encode()
    return VERIFIER.read(body, sign(body), unix_s=1000.0, now_s=5.0)


def test_what_the_manager_has_signed_is_its_word() -> None:
    assert read(SAID) == Intent(MAC, "esx1", "esx2", 65.0)
    assert read(SAID | {"from": ""}).from_host == ""


@pytest.mark.parametrize(
    "sign",
    [
        lambda body: signed(body, OTHER_KEY),
        lambda body: signed(body + b" "),
        lambda body: "",
        lambda body: "not base64",
        lambda body: base64.b64encode(b"\0" * 64).decode(),
    ],
    ids=["another key", "other words", "no signature", "no base64", "zeros"],
)
def test_what_somebody_else_has_signed_is_not(sign: Callable[[bytes], str]) -> None:
    with pytest.raises(IntentError, match="the signature is not the manager's"):
        read(SAID, sign)


@pytest.mark.parametrize(
    "change",
    [
        {"until": 1000.0},
        {"until": float("nan")},
        {"until": "soon"},
        {"mac": "00:50:56:00:00:0g"},
        {"mac": "01:00:5e:00:00:01"},
        {"to": "../esx2"},
        {"to": "esx2\n"},
        {"more": 1},
    ],
    ids=str,
)
def test_words_that_say_no_move_are_refused_whoever_signed_them(change: dict[str, object]) -> None:
    with pytest.raises(IntentError):
        read(SAID | change)


@given(st.binary(max_size=200))
def test_any_bytes_are_refused_without_another_error(body: bytes) -> None:
    with pytest.raises(IntentError):
        VERIFIER.read(body, signed(body), unix_s=0.0, now_s=0.0)


def test_a_certificate_of_another_kind_is_refused() -> None:
    with pytest.raises(IntentError, match="no ECDSA key"):
        Verifier(certificate(rsa.generate_private_key(65537, 2048)))
