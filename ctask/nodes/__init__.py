# SPDX-License-Identifier: Apache-2.0
"""Node sets: ``green[36-39,133]`` as a set of names.

From the ground up: `names` (which names a node may have), `space` (sets of numbers, kept as ranges),
`grammar` (text to patterns and numbers), `nodeset` (`NodeSet`, what programs use).

Runs in any thread: no threads, no sockets, no files, and no state but that of each `NodeSet`.
"""

from ctask.nodes.nodeset import NodeSet, NodesLike, fold

__all__ = ["NodeSet", "NodesLike", "fold"]
