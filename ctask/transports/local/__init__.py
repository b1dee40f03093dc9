# SPDX-License-Identifier: Apache-2.0
"""Commands on this machine: `way` is the transport, `session` one command, `stdin` and `processes` its parts."""

from ctask.transports.local.session import LocalSession
from ctask.transports.local.way import LocalConnection, LocalTransport, transport

__all__ = ["LocalConnection", "LocalSession", "LocalTransport", "transport"]
