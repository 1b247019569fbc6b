"""Child processes in process groups of their own, none of which outlives the launcher."""

from __future__ import annotations

import asyncio
import collections
import contextlib
import os
import signal
import sys
from collections.abc import Callable, Mapping, Sequence
from io import FileIO
from pathlib import Path

from services.launcher import watchdog

TAIL_LINES = 30
CHUNK_BYTES = 2**16
LINE_BYTES = 2**20
# A process that left its group may keep the pipe open for ever.
READ_REST_S = 1.0

# The child waits until the watchdog knows its process group, so a launcher killed in between leaves nothing behind.
GATE = 'read -r go && exec "$@" </dev/null'


class Watchdog:
    """The process that ends the children when this one dies (see watchdog.py); restarted should it die itself."""

    def __init__(self, folder: Path) -> None:
        self._folder = folder
        self._groups: set[int] = set()
        self._process: asyncio.subprocess.Process | None = None
        self._guard: asyncio.Task[None] | None = None

    async def __aenter__(self) -> Watchdog:
        await self._start()
        self._guard = asyncio.create_task(self._keep_alive())
        return self

    async def __aexit__(self, *exc: object) -> None:
        assert self._guard is not None
        assert self._process is not None
        self._guard.cancel()
        await self._tell("done")
        assert self._process.stdin is not None
        self._process.stdin.close()
        await self._process.wait()

    async def add(self, group: int) -> None:
        self._groups.add(group)
        await self._tell(f"+{group}")

    async def remove(self, group: int) -> None:
        self._groups.discard(group)
        await self._tell(f"-{group}")

    async def _start(self) -> None:
        self._process = await asyncio.create_subprocess_exec(
            *(sys.executable, "-I", "-S", watchdog.__file__, str(self._folder)),
            stdin=asyncio.subprocess.PIPE,
            start_new_session=True,
        )
        for group in self._groups:
            await self._tell(f"+{group}")

    async def _keep_alive(self) -> None:
        while self._process is not None:
            await self._process.wait()
            await self._start()

    async def _tell(self, line: str) -> None:
        assert self._process is not None
        assert self._process.stdin is not None
        with contextlib.suppress(BrokenPipeError, ConnectionResetError):  # it died; _keep_alive tells the next one all
            self._process.stdin.write(line.encode() + b"\n")
            await self._process.stdin.drain()


class Child:
    """One running process and what it wrote.

    tail: its last TAIL_LINES lines of stdout and stderr.
    """

    def __init__(
        self,
        name: str,
        process: asyncio.subprocess.Process,
        output: FileIO,
        keeper: Watchdog,
        on_line: Callable[[str], None],
    ) -> None:
        self.name = name
        self.tail: collections.deque[str] = collections.deque(maxlen=TAIL_LINES)
        self._process = process
        self._keeper = keeper
        self._reader = asyncio.create_task(self._read(output, on_line))
        self._exit = asyncio.create_task(self._wait())

    @classmethod
    async def start(
        cls,
        name: str,
        command: Sequence[str],
        environment: Mapping[str, str],
        keeper: Watchdog,
        on_line: Callable[[str], None],
        yields: bool = False,
    ) -> Child:
        """Starts the command in a session of its own, out of reach of the terminal's Ctrl-C.

        yields: it takes no core from a running thread when it wakes.
        """
        # Were the pipe asyncio's, it would report the end only when whatever the child started has closed it too.
        read_end, write_end = os.pipe()
        output = FileIO(read_end)
        try:
            process = await asyncio.create_subprocess_exec(
                *("/bin/sh", "-c", GATE, name, *command),
                env=dict(environment),
                stdin=asyncio.subprocess.PIPE,
                stdout=write_end,
                stderr=asyncio.subprocess.STDOUT,
                start_new_session=True,
            )
        finally:
            os.close(write_end)
        await keeper.add(process.pid)
        if yields and sys.platform == "linux":
            with contextlib.suppress(OSError):  # a sandbox that forbids it; everything works without
                os.sched_setscheduler(process.pid, os.SCHED_BATCH, os.sched_param(0))
        assert process.stdin is not None
        process.stdin.write(b"go\n")
        process.stdin.close()
        return cls(name, process, output, keeper, on_line)

    @property
    def pid(self) -> int:
        return self._process.pid

    @property
    def running(self) -> bool:
        return not self._exit.done()

    async def wait(self) -> int:
        """The exit code, or -n for signal n, once the process and its output have ended."""
        return await asyncio.shield(self._exit)

    async def stop(self, timeout_s: float) -> bool:
        """SIGTERM, and SIGKILL for its whole group after the timeout; False when it came to that."""
        if self.running:
            self._process.terminate()
        try:
            await asyncio.wait_for(self.wait(), timeout_s)
        except TimeoutError:
            await self.kill()
            return False
        return True

    async def kill(self) -> None:
        if self.running:
            self._kill_group()
        await self.wait()

    def _kill_group(self) -> None:
        with contextlib.suppress(ProcessLookupError, PermissionError):
            os.killpg(self._process.pid, signal.SIGKILL)

    async def _read(self, output: FileIO, on_line: Callable[[str], None]) -> None:
        reader = asyncio.StreamReader()
        transport, _ = await asyncio.get_running_loop().connect_read_pipe(
            lambda: asyncio.StreamReaderProtocol(reader), output
        )
        rest = b""
        with contextlib.closing(transport):
            while chunk := await reader.read(CHUNK_BYTES):
                *lines, rest = (rest + chunk).split(b"\n")
                if len(rest) > LINE_BYTES:
                    lines, rest = [*lines, rest], b""
                for line in lines:
                    self._keep(line, on_line)
        if rest:
            self._keep(rest, on_line)

    def _keep(self, raw: bytes, on_line: Callable[[str], None]) -> None:
        line = raw.decode(errors="replace")
        self.tail.append(line)
        on_line(line)

    async def _wait(self) -> int:
        code = await self._process.wait()
        # Whatever the child itself started ends with it; this also closes the pipe that _read waits for.
        self._kill_group()
        await asyncio.wait([self._reader], timeout=READ_REST_S)
        self._reader.cancel()
        await self._keeper.remove(self._process.pid)
        return code
