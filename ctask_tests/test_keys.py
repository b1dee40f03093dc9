# SPDX-License-Identifier: Apache-2.0
"""Identities: which key files can be offered, which are refused early, and how a failed login reads."""

from __future__ import annotations

import base64
import concurrent.futures
import logging
import os
import re
import shutil
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any

import paramiko
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from ctask.errors import AuthRejected, NoCredentials, OptionError
from ctask.options import Target
from ctask.transports.ssh import keys

SSH_KEYGEN = shutil.which("ssh-keygen") or ""
pytestmark = [
    pytest.mark.timeout(60),
    pytest.mark.skipif(not SSH_KEYGEN and "CI" not in os.environ, reason="no ssh-keygen"),
]

MakeKey = Callable[..., Path]


def ssh_keygen(*arguments: object) -> str:
    done = subprocess.run(
        [SSH_KEYGEN, *map(str, arguments)],
        check=True,
        capture_output=True,
        text=True,
        stdin=subprocess.DEVNULL,
    )
    return done.stdout


@pytest.fixture(scope="session")
def made_keys(tmp_path_factory: pytest.TempPathFactory) -> dict[tuple[str, ...], Path]:
    return {}


@pytest.fixture
def make_key(
    tmp_path: Path, tmp_path_factory: pytest.TempPathFactory, made_keys: dict[tuple[str, ...], Path]
) -> MakeKey:
    """Make a private key in the test's folder; each kind is generated once."""

    def make(name: str = "id", *options: str, comment: str = "ops@head", passphrase: str = "") -> Path:
        wanted = (*(options or ("-t", "ed25519")), "-C", comment, "-N", passphrase)
        if wanted not in made_keys:
            made_keys[wanted] = tmp_path_factory.mktemp("keys") / "key"
            ssh_keygen("-q", *wanted, "-f", made_keys[wanted])
        shutil.copy(made_keys[wanted], tmp_path / name)
        (tmp_path / name).chmod(0o600)
        return tmp_path / name

    return make


def named(*paths: object) -> Target:
    return Target(address="n1", user="root", identities=tuple(map(str, paths)), named_identities=True)


def default(*paths: object) -> Target:
    return Target(address="n1", user="root", identities=tuple(map(str, paths)))


DAMAGED = [
    ("-t", "ed25519"),
    ("-t", "rsa", "-b", "2048"),
    ("-t", "rsa", "-b", "2048", "-m", "PEM"),
]
KINDS = [
    pytest.param(DAMAGED[0], "ed25519", id="ed25519"),
    pytest.param(DAMAGED[1], "rsa", id="rsa"),
    pytest.param(DAMAGED[2], "rsa", id="rsa-pem"),
    pytest.param(("-t", "ecdsa", "-b", "256"), "ecdsa", id="ecdsa-256"),
    pytest.param(("-t", "ecdsa", "-b", "384"), "ecdsa", id="ecdsa-384"),
    pytest.param(("-t", "ecdsa", "-b", "521", "-m", "PEM"), "ecdsa", id="ecdsa-521-pem"),
]


@pytest.mark.parametrize(("options", "short"), KINDS)
def test_a_key_can_sign_and_is_told_as_ssh_keygen_tells_it(
    make_key: MakeKey, options: tuple[str, ...], short: str
) -> None:
    path = make_key("id", *options)
    keys.check(named(path))
    (identity,) = keys.identities(named(path))
    assert identity.fingerprint == ssh_keygen("-lf", path).split()[1]
    assert identity.key_type == short
    label = "ops@head" if "PEM" not in options else ""
    assert identity.comment == label
    assert str(identity) == f"{short} {identity.fingerprint} " + (f'"{label}"' if label else str(path))
    algorithm = "rsa-sha2-512" if short == "rsa" else None
    signature = identity.pkey.sign_ssh_data(b"data", algorithm)
    public = paramiko.PKey.from_type_string(identity.pkey.get_name(), identity.pkey.asbytes())
    assert public.verify_ssh_sig(b"data", paramiko.Message(signature.asbytes()))


def test_keys_are_offered_in_their_order_and_each_once(make_key: MakeKey, tmp_path: Path) -> None:
    one, two = make_key("one"), make_key("two", "-t", "ecdsa")
    shutil.copy(one, tmp_path / "copy")
    offered = keys.identities(named(two, one, tmp_path / "copy"))
    assert [identity.path for identity in offered] == [str(two), str(one)]


def test_a_key_is_parsed_once_for_all_threads_and_again_when_it_changes(
    make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_key()
    parsed = []
    real = keys._parse

    def counting(path: str, data: bytes) -> Any:
        parsed.append(path)
        return real(path, data)

    monkeypatch.setattr(keys, "_parse", counting)
    with concurrent.futures.ThreadPoolExecutor(16) as pool:
        found = list(pool.map(lambda _: keys.identities(named(path)), range(64)))
    assert len(parsed) == 1
    assert len({id(each[0].pkey) for each in found}) == 1
    other = make_key("id", "-t", "ecdsa")
    (identity,) = keys.identities(named(other))
    assert identity.key_type == "ecdsa"


def test_nothing_secret_is_in_the_texts(make_key: MakeKey) -> None:
    path = make_key()
    (identity,) = keys.identities(named(path))
    secret = path.read_text().splitlines()[3]
    for text in (repr(identity), str(identity), str(keys.rejected(named(path), [identity]))):
        assert secret not in text
        assert "PRIVATE" not in text


# --- what is no key that can be offered


def bad_files(make_key: MakeKey, folder: Path) -> dict[Path, str]:
    """Key files that can never do, each with what is said of it."""
    make_key("open").chmod(0o644)
    make_key("group").chmod(0o640)
    (folder / "folder").mkdir()
    os.mkfifo(folder / "fifo", 0o600)
    broken = make_key("broken").read_text().splitlines()
    texts = {
        "empty": "",
        "junk": "\0\xff nothing\n",
        "public": "ssh-ed25519 AAAAC3NzaC1lZDI1NTE5AAAA ops@head\n",
        "broken": "\n".join([*broken[:2], broken[2][:-4], *broken[3:]]),
        "pkcs8": "-----BEGIN PRIVATE KEY-----\nMC4CAQ==\n-----END PRIVATE KEY-----\n",
        "hardware": hardware_key(),
    }
    for name, text in texts.items():
        (folder / name).touch(0o600)
        (folder / name).write_text(text)
    said = {
        "none": "does not exist",
        "open": r"is open to other users \(mode 0644\), as no private key may be: chmod 600 it",
        "group": r"is open to other users \(mode 0640\), as no private key may be: chmod 600 it",
        "folder": "is a directory, not a file",
        "fifo": "is not a regular file",
        "empty": "is not a private key",
        "junk": "is not a private key",
        "public": "is a public key: name the private one",
        "broken": r"is a broken private key( \(\w+\))?",
        "pkcs8": r'is in a form that is not supported \("PRIVATE KEY"\): ssh-keygen -p -f FILE rewrites it',
        "hardware": "is a key of type sk-ssh-ed25519@openssh.com, which is not supported",
    }
    return {folder / name: text for name, text in said.items()}


def hardware_key() -> str:
    def string(data: bytes) -> bytes:
        return len(data).to_bytes(4, "big") + data

    body = b"openssh-key-v1\0" + string(b"none") + string(b"none") + string(b"") + b"\0\0\0\1"
    body += string(string(b"sk-ssh-ed25519@openssh.com") + string(b"x" * 32)) + string(b"private")
    armoured = base64.b64encode(body).decode()
    return f"-----BEGIN OPENSSH PRIVATE KEY-----\n{armoured}\n-----END OPENSSH PRIVATE KEY-----\n"


def test_c11_a_named_file_that_can_never_do_is_refused_in_the_caller(
    make_key: MakeKey, tmp_path: Path
) -> None:
    good = make_key("good", "-t", "ecdsa")
    for path, text in bad_files(make_key, tmp_path).items():
        with pytest.raises(OptionError, match=f"^identity {re.escape(str(path))} {text}$"):
            keys.check(named(good, path))


def test_default_files_that_cannot_do_are_left_out_and_told_once_but_for_missing_ones(
    make_key: MakeKey, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    good = make_key("good", "-t", "ecdsa")
    files = bad_files(make_key, tmp_path)
    encrypted = make_key("encrypted", passphrase="secret word")
    target = default(*files, encrypted, good)
    with caplog.at_level(logging.WARNING, "ctask.ssh"):
        for _ in range(3):
            keys.check(target)
            assert [identity.path for identity in keys.identities(target)] == [str(good)]
    texts = [record.getMessage() for record in caplog.records]
    assert len(texts) == len(files) - 1
    assert texts[0].startswith(f"identity {tmp_path}/open: is open to other users")
    assert all(text.endswith("; it is not used") for text in texts)


def test_a_file_that_may_not_be_read_is_refused(make_key: MakeKey, monkeypatch: pytest.MonkeyPatch) -> None:
    path = make_key()

    def forbidden(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr(keys, "read_regular", forbidden)
    with pytest.raises(OptionError, match=r"cannot be read: Permission denied$"):
        keys.check(named(path))


def test_a_key_of_another_owner_may_be_open_as_ssh_has_it(
    make_key: MakeKey, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = make_key()
    path.chmod(0o640)
    monkeypatch.setattr(os, "getuid", lambda: path.stat().st_uid + 1)
    keys.check(named(path))


def test_a_file_that_is_put_right_is_good_at_once(make_key: MakeKey) -> None:
    path = make_key()
    path.chmod(0o644)
    with pytest.raises(OptionError, match="chmod 600 it"):
        keys.check(named(path))
    path.chmod(0o600)
    keys.check(named(path))
    assert len(keys.identities(named(path))) == 1


ENCRYPTED = [
    pytest.param(("-t", "ed25519", "-a", "1"), id="openssh"),
    pytest.param(("-t", "rsa", "-b", "2048", "-m", "PEM"), id="pem"),
    pytest.param(("-t", "ecdsa", "-b", "256", "-m", "PKCS8"), id="pkcs8"),
]


@pytest.mark.parametrize("options", ENCRYPTED)
def test_c11_an_encrypted_key_is_no_mistake_and_is_not_asked_for(
    make_key: MakeKey, options: tuple[str, ...]
) -> None:
    path = make_key("id", *options, passphrase="secret word")
    good = make_key("good")
    keys.check(named(path))
    assert [identity.path for identity in keys.identities(named(path, good))] == [str(good)]
    assert keys.identities(named(path)) == ()
    error = keys.no_credentials(named(path), ["publickey"])
    assert error.reason == (
        f"nothing to offer for root. {path}: encrypted; not asked for. server allows: publickey."
    )


@settings(max_examples=80, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_no_damage_to_a_key_file_raises_anything_else(make_key: MakeKey, data: st.DataObject) -> None:
    path = make_key("id", *data.draw(st.sampled_from(DAMAGED)))
    content = bytearray(path.read_bytes())
    for _ in range(data.draw(st.integers(1, 4))):
        content[data.draw(st.integers(0, len(content) - 1))] = data.draw(st.integers(0, 255))
    del content[data.draw(st.integers(0, len(content))) :]
    path.write_bytes(content)
    loaded = keys._parse(str(path), bytes(content))
    assert isinstance(loaded, keys.Identity) or loaded.reason.isprintable()


def test_a_comment_cannot_play_with_the_terminal(make_key: MakeKey) -> None:
    path = make_key("id", "-t", "ed25519", comment='a\x1b[2J"b\n')
    (identity,) = keys.identities(named(path))
    assert str(identity).isprintable()
    assert str(identity).endswith('"a?[2J?b?"')


# --- how a failed login reads


def test_a_rejected_login_tells_what_was_offered_and_what_the_server_takes(make_key: MakeKey) -> None:
    target = named(make_key("one"), make_key("two", "-t", "ecdsa"))
    one, two = keys.identities(target)
    error = keys.rejected(target, [one], ["publickey", "hostbased"])
    assert isinstance(error, AuthRejected)
    assert str(error) == (
        f'auth: refused for root. offered: ed25519 {one.fingerprint} "ops@head". '
        "server allows: publickey, hostbased."
    )
    assert error.kind == "refused for root"
    both = keys.rejected(target, [one, two])
    assert both.reason == (
        f'refused for root. offered: ed25519 {one.fingerprint} "ops@head", '
        f'ecdsa {two.fingerprint} "ops@head".'
    )


def test_what_a_server_calls_its_methods_reaches_no_terminal(make_key: MakeKey) -> None:
    target = named(make_key())
    evil = ["\x1b[2Jpassword", "a b", "publickey", "x" * 100, *map(str, range(100))]
    text = str(keys.rejected(target, [], evil))
    assert text.isprintable()
    assert "server allows: publickey, 0, 1" in text
    assert len(text) < 200


def test_c11_where_there_is_nothing_to_offer_the_text_says_why(make_key: MakeKey, tmp_path: Path) -> None:
    missing = tmp_path / "a", tmp_path / "b"
    error = keys.no_credentials(default(*missing))
    assert isinstance(error, NoCredentials)
    assert error.phase == "auth"
    assert error.kind == "nothing to offer for root"
    assert error.reason == f"nothing to offer for root. no such file: {missing[0]}, {missing[1]}."
    encrypted = make_key("c", passphrase="secret word")
    error = keys.no_credentials(default(*missing, encrypted))
    assert error.reason == f"nothing to offer for root. {encrypted}: encrypted; not asked for."
    error = keys.no_credentials(named(make_key("d")), ["password"])
    assert error.reason == "nothing to offer for root. server allows: password."


def test_the_home_directory_is_told_as_a_tilde(
    make_key: MakeKey, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    with pytest.raises(OptionError, match=r"^identity ~/none does not exist$"):
        keys.check(named(tmp_path / "none"))
