# SPDX-License-Identifier: Apache-2.0
"""What nodes print: kept once for all nodes that print the same, and read while it still grows.

One thread writes (the dispatcher); anybody reads, without a lock. Memory is bounded by the task's `MemoryBudget`; what
is above its ceiling lies in a private temporary file.
"""

from __future__ import annotations

from ctask.buffers.budget import MemoryBudget
from ctask.buffers.loose import Loose
from ctask.buffers.readers import Look, Reader
from ctask.buffers.store import BLOCK, STDERR, STDOUT, BufferStore, Capture
from ctask.buffers.text import Output, view

__all__ = [
    "BLOCK",
    "STDERR",
    "STDOUT",
    "BufferStore",
    "Capture",
    "Look",
    "Loose",
    "MemoryBudget",
    "Output",
    "Reader",
    "view",
]
