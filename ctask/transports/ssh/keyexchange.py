# SPDX-License-Identifier: Apache-2.0
"""Key exchange: the methods that are offered, their arithmetic, and the signature of the host key.

Runs in the thread that connects, and for later keys of a connection in the thread of `rekey`: all of it costs, and a
node decides when. Holds no state but the parameters of the fixed groups, which are made once.
"""

from __future__ import annotations

import hashlib
import secrets
import warnings
from functools import cache
from typing import Any, ClassVar

import paramiko
from paramiko.kex_curve25519 import KexCurve25519
from paramiko.kex_ecdh_nist import KexNistp256, KexNistp384, KexNistp521
from paramiko.kex_group14 import KexGroup14SHA256
from paramiko.kex_group16 import KexGroup16SHA512
from paramiko.kex_mlkem import KexMLKEM768X25519
from paramiko.message import Message
from paramiko.ssh_exception import SSHException

from ctask.options import GROUP_EXCHANGE, KEX_ALGORITHMS
from ctask.transports.ssh.fields import Fields
from ctask.transports.ssh.messages import mpint, string, u32
from ctask.transports.ssh.packets import Packet

__all__ = ["METHODS", "OFFERED", "verified_key"]

#: RFC 4253 8, and RFC 4419 3 for a group exchange
_INIT, _REPLY, _GROUP, _GROUP_INIT, _GROUP_REPLY, _GROUP_REQUEST = 30, 31, 31, 32, 33, 34
#: Bits of a group that is asked for: as few as are allowed, as many as suit AES-128, as many as we compute with.
_FEWEST, _PREFERRED, _MOST = 2_048, 3_072, 4_096
#: Bits of our secret number in a group exchange: twice what SHA-256 gives to a key, as OpenSSH's `dh_gen_key` has it.
_SECRET = 512
#: RSA host keys, in bits: the fewest that OpenSSH takes (RequiredRSASize), the most that OpenSSL verifies with.
_RSA = (1_024, 16_384)
#: Bytes of the numbers in an ECDSA signature, at most: P-521, and a sign.
_ECDSA_NUMBER = 67


class _DiffieHellman:
    """The client's side of Diffie-Hellman over numbers; `Exchange` is its transport, as paramiko's methods have it."""

    hash_algo: ClassVar[Any]

    def __init__(self, transport: Any) -> None:
        self.transport = transport

    def finish(self, m: Fields, more: bytes, public: int, share: Any) -> None:
        """Take the server's answer, check its signature, and use the new keys.

        Args:
            more: what the method hashes between the host key and the two public numbers.
            public: our public number.
            share: a function from the server's public number to the secret that both have.
        """
        transport = self.transport
        host_key = m.string()
        theirs = m.number()
        signature = m.string()
        secret: int = share(theirs)
        ours = (transport.local_version, transport.remote_version)
        hashed = b"".join(string(text.encode()) for text in ours)
        hashed += string(transport.local_kex_init) + string(transport.remote_kex_init) + string(host_key)
        hashed += more + mpint(public) + mpint(theirs) + mpint(secret)
        transport._set_K_H(secret, self.hash_algo(hashed).digest())
        transport._verify_key(host_key, signature)
        transport._activate_outbound()


class _FixedGroup(_DiffieHellman):
    """Groups 14 and 16 of RFC 3526, by OpenSSL: paramiko's arithmetic holds the interpreter for 60 ms and more."""

    prime: ClassVar[int]

    def start_kex(self) -> None:
        """Send our public number."""
        self._key = _parameters(self.prime).generate_private_key()
        self._public: int = self._key.public_key().public_numbers().y
        self.transport._send_message(Packet(bytes((_INIT,)) + mpint(self._public)))
        self.transport._expect_packet(_REPLY)

    def parse_next(self, kind: int, m: Fields) -> None:
        """Take the server's answer."""
        self.finish(m, b"", self._public, self._share)

    def _share(self, theirs: int) -> int:
        from cryptography.hazmat.primitives.asymmetric import dh

        _check_public(theirs, self.prime)
        _hush()
        peer = dh.DHPublicNumbers(theirs, dh.DHParameterNumbers(self.prime, 2)).public_key()
        return int.from_bytes(self._key.exchange(peer), "big")


class _Group14(_FixedGroup):
    hash_algo = hashlib.sha256
    prime = KexGroup14SHA256.P


class _Group16(_FixedGroup):
    hash_algo = hashlib.sha512
    prime = KexGroup16SHA512.P


class _GroupExchange(_DiffieHellman):
    """A group of the server's choice (RFC 4419).

    OpenSSL proves a strange group to be a safe one for seconds before it computes with it; OpenSSH's client does not
    either. So this is Python's arithmetic, with a secret number as short as OpenSSH's.
    """

    hash_algo = hashlib.sha256

    def start_kex(self) -> None:
        """Ask for a group."""
        self._asked = u32(_FEWEST) + u32(_PREFERRED) + u32(_MOST)
        self.transport._send_message(Packet(bytes((_GROUP_REQUEST,)) + self._asked))
        self.transport._expect_packet(_GROUP)

    def parse_next(self, kind: int, m: Fields) -> None:
        """Take the group, then the server's answer."""
        if kind == _GROUP:
            self._take_group(m)
        else:
            more = self._asked + mpint(self._p) + mpint(self._g)
            self.finish(m, more, self._public, self._share)

    def _take_group(self, m: Fields) -> None:
        self._p, self._g = m.number(), m.number()
        bits = self._p.bit_length()
        if not _FEWEST <= bits <= _MOST:
            raise SSHException(f"the server chose a group of {bits} bits; ctask takes {_FEWEST} to {_MOST}")
        if not self._p % 2 or not 1 < self._g < self._p - 1:
            raise SSHException("the server chose a group that keeps no secret (an even modulus, or its generator)")
        self._secret = secrets.randbits(_SECRET) | 1 << _SECRET - 1
        self._public = pow(self._g, self._secret, self._p)
        self.transport._send_message(Packet(bytes((_GROUP_INIT,)) + mpint(self._public)))
        self.transport._expect_packet(_GROUP_REPLY)

    def _share(self, theirs: int) -> int:
        _check_public(theirs, self._p)
        return pow(theirs, self._secret, self._p)


def _check_public(number: int, prime: int) -> None:
    """Refuse public numbers of which the secret could be guessed (RFC 4253 8; 1 and p - 1 as well)."""
    if not 1 < number < prime - 1:
        raise SSHException("the server's public number in the key exchange is out of range")


@cache
def _parameters(prime: int) -> Any:
    from cryptography.hazmat.primitives.asymmetric import dh

    _hush()
    return dh.DHParameterNumbers(prime, 2).parameters()


def _hush() -> None:
    # cryptography warns of these groups on stderr, which is no news to a user whose old node has nothing else. Said at
    # each use, since programs and test runners put their own filters in front.
    warnings.filterwarnings("ignore", message="Diffie-Hellman over finite fields")


#: name -> class. All but the last, where the server chooses the group (RFC 4419), compute in OpenSSL. The two names of
#: curve25519 are one method: RFC 8731's, which a hardened server has alone, and the one that is older than the RFC.
METHODS: dict[str, Any] = {
    "mlkem768x25519-sha256": KexMLKEM768X25519,
    "curve25519-sha256": KexCurve25519,
    "curve25519-sha256@libssh.org": KexCurve25519,
    "ecdh-sha2-nistp256": KexNistp256,
    "ecdh-sha2-nistp384": KexNistp384,
    "ecdh-sha2-nistp521": KexNistp521,
    "diffie-hellman-group16-sha512": _Group16,
    "diffie-hellman-group14-sha256": _Group14,
    GROUP_EXCHANGE: _GroupExchange,
}
if not KexMLKEM768X25519.is_available():
    del METHODS["mlkem768x25519-sha256"]
#: those that are offered where the caller says nothing
OFFERED = tuple(name for name in KEX_ALGORITHMS if name in METHODS)


def _check_rsa(exponent: int, modulus: int) -> None:
    bits, (fewest, most) = modulus.bit_length(), _RSA
    if not fewest <= bits <= most:
        raise SSHException(f"the server's RSA host key has {bits} bits; ctask takes {fewest} to {most}")
    if exponent.bit_length() > 64:
        raise SSHException(f"the exponent of the server's RSA host key has {exponent.bit_length()} bits, above 64")


def verified_key(algorithm: str, blob: bytes, signature: bytes, data: bytes) -> paramiko.PKey:
    """Return the host key in `blob` whose `signature` of `data` holds.

    Everything in both is checked for its form and size before paramiko reads it.

    Args:
        algorithm: the host key algorithm that was agreed on; key and signature have to be of it.

    Raises:
        Malformed: the key or the signature cannot be read.
        SSHException: it is a key of another type, of a size that is not taken, or the signature does not hold.
    """
    key_type = "ssh-rsa" if algorithm.startswith("rsa-sha2-") else algorithm
    fields = Fields(blob, "a host key", 0)
    if fields.string() != key_type.encode():
        raise SSHException(f"the server has another type of host key than the agreed {algorithm}")
    if key_type == "ssh-rsa":
        _check_rsa(fields.number(), fields.number())
    else:
        fields.string()
        if key_type.startswith("ecdsa-"):
            fields.string()
    fields.end()
    proof = Fields(signature, "a host key's signature", 0)
    if proof.string() != algorithm.encode():
        raise SSHException(f"the server signed with another algorithm than the agreed {algorithm}")
    inner = proof.string()
    proof.end()
    if key_type.startswith("ecdsa-"):
        numbers = Fields(inner, "a host key's signature", 0)
        for number in (numbers.string(), numbers.string()):
            if len(number) > _ECDSA_NUMBER:
                raise numbers.malformed(f"it has a number of {len(number)} bytes")
        numbers.end()
    try:
        key = paramiko.Transport._key_info[algorithm](Message(blob))
        holds = key.verify_ssh_sig(data, Message(signature))
    except SSHException:
        raise
    except Exception as error:  # what the libraries below raise for numbers that are no key, each in its own way
        raise SSHException(f"the server's host key, or its signature, is no {algorithm} one") from error
    if not holds:
        raise SSHException(f"Signature verification ({algorithm}) failed.")
    return key
