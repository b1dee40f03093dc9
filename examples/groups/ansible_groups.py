# SPDX-License-Identifier: Apache-2.0
"""Turns what `ansible-inventory --list` prints into lines `group: nodes`, for `mapall` of a group source."""

import json
import sys

for group, holds in json.load(sys.stdin).items():
    if group != "_meta":
        nodes = [*holds.get("hosts", []), *(f"@{child}" for child in holds.get("children", []))]
        print(f"{group}: {' '.join(nodes)}")
