# SPDX-License-Identifier: Apache-2.0
"""`python -m ctask`: the command line, in the main thread."""

from __future__ import annotations

import sys

from ctask.cli import main

if __name__ == "__main__":
    sys.exit(main())
