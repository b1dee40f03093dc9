# SPDX-License-Identifier: Apache-2.0
"""Benchmarks of ctask beside other programs, in one run on one machine: `python -m benchmarks fanout`.

Nothing here runs in ctask, and nothing in ctask knows of it.
"""
