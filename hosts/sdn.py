"""The manager's word to the SDN controller: a VM will be on another host. Signed, so that nobody else can give it.

The controller believes a move that was announced so at its first frame; one that was not it asks about first
(controller/guard.py). They meet on the wire, and nothing here depends on an answer: without one, the VM moves all
the same, and its clients find it a tenth of a second later.
"""

import base64
import http.client
import json
import time
from pathlib import Path

from topologies.errors import TestbedError

# As long as the controller takes it: a migration may take minutes, and who fails says so
INTENT_S = 3600.0 - 60.0
_ANSWER_WITHIN_S = 2.0


class SdnError(TestbedError):
    """The controller did not take it."""


class SdnController:
    """Its API on 127.0.0.1; `key`: the manager's private key, PEM."""

    def __init__(self, port: int, key: Path) -> None:
        from cryptography.hazmat.primitives.serialization import load_pem_private_key

        self._port = port
        self._key = load_pem_private_key(key.read_bytes(), None)

    def expect(self, mac: str, origin: str, to: str) -> None:
        """The VM with this MAC will be on host `to`; `origin`: where it was, "" if off. SdnError if it is not taken."""
        from cryptography.hazmat.primitives.asymmetric.ec import ECDSA, EllipticCurvePrivateKey
        from cryptography.hazmat.primitives.hashes import SHA256

        assert isinstance(self._key, EllipticCurvePrivateKey)
        body = json.dumps({"mac": mac, "from": origin, "to": to, "until": time.time() + INTENT_S}).encode()
        signature = base64.b64encode(self._key.sign(body, ECDSA(SHA256()))).decode()
        connection = http.client.HTTPConnection("127.0.0.1", self._port, timeout=_ANSWER_WITHIN_S)
        try:
            connection.request("POST", "/intents", body, {"X-Signature": signature})
            answer = connection.getresponse()
            said = answer.read(4096).decode(errors="replace").strip()
        except (OSError, http.client.HTTPException) as error:
            raise SdnError(f"the SDN controller does not answer on port {self._port}: {error}") from error
        finally:
            connection.close()
        if answer.status != http.HTTPStatus.OK:
            raise SdnError(f"the SDN controller refuses it ({answer.status}): {said}")
