# SPDX-License-Identifier: Apache-2.0
"""What helps to test programs that use ctask. Only re-exports; loading it starts nothing."""

from __future__ import annotations

from ctask.closing import close_everything
from ctask.testing.cluster import EmbeddedCluster
from ctask.testing.fake import End, FakeTransport, Step

__all__ = ["EmbeddedCluster", "End", "FakeTransport", "Step", "close_everything"]
