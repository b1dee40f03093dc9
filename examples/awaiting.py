# SPDX-License-Identifier: Apache-2.0
"""Under asyncio: the loop goes on while nodes work, and what leaves the block early ends what still runs."""

import asyncio

from ctask import task_self


async def main() -> None:
    task = task_self()
    async with asyncio.timeout(30), task.submit("uname -r", nodes="green[36-39,133]") as worker:
        async for result in worker:
            print(f"{result.node}: {result.why or result.stdout.text}")
    kernels, processors = await asyncio.gather(
        task.submit("uname -r", nodes="green[36-39]"),
        task.submit("uname -p", nodes="green[36-39]"),
    )
    print(len(kernels), len(processors))


asyncio.run(main())
