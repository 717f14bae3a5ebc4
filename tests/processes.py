"""Scripts as processes of their own, forked from one that has imported torch.

To import torch, timm and matplotlib takes several seconds of CPU, a tiny run takes less than one.
So one process a session imports them, and every script is a fork of it. What a fork cannot show is
left to tests that start Python itself: that --help answers without torch, what torchrun does.
"""

import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from multiprocessing.forkserver import ensure_running
from pathlib import Path
from unittest import mock

ROOT = Path(__file__).parents[1]
FORKS = multiprocessing.get_context("forkserver")


def environment() -> dict[str, str]:
    return {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": str(ROOT)}


class Script:
    """A script that runs, with the methods of `subprocess.Popen` that the tests use.

    line: a file and its arguments, or -m, a module and its arguments. It has a process group of
    its own, so that a signal to the group reaches its workers.
    """

    def __init__(
        self,
        line: Sequence[str | Path],
        *,
        variables: Mapping[str, str] | None = None,
        cwd: Path | None = None,
    ) -> None:
        # Once a session.
        FORKS.set_forkserver_preload(["train_pretrain", "train_seg", "eval", "dae.weights.foreign"])
        with mock.patch.dict(os.environ, environment()):
            ensure_running()

        self.line = [str(word) for word in line]
        self.output = tempfile.TemporaryDirectory()  # it goes with this object
        own = {**environment(), **(variables or {})}
        arguments = (self.line, own, str(cwd or Path.cwd()), self.output.name)
        self.process = FORKS.Process(target=run_here, args=arguments)
        self.process.start()
        assert self.process.pid is not None
        self.pid: int = self.process.pid

    def poll(self) -> int | None:
        """The exit code, the negative number of the signal that ended it, or None: it runs."""
        return self.process.exitcode

    def wait(self, timeout: float | None = None) -> int:
        self.process.join(timeout)
        code = self.poll()
        if code is None:
            os.killpg(self.pid, signal.SIGKILL)
            raise subprocess.TimeoutExpired(self.line, timeout or 0)
        return code

    def done(self, timeout: float | None = None) -> subprocess.CompletedProcess[str]:
        """Waits for its end: the exit code, and what it has said."""
        code = self.wait(timeout)
        said = [Path(self.output.name, name).read_text() for name in ("stdout", "stderr")]
        return subprocess.CompletedProcess(self.line, code, *said)


def run_here(line: Sequence[str], variables: Mapping[str, str], cwd: str, output: str) -> None:
    """In the fork: what `python LINE` does."""
    os.setsid()

    # A process of a fork server would take a fork server for its own workers too.
    multiprocessing.set_start_method(None, force=True)

    os.chdir(cwd)
    os.environ.clear()
    os.environ.update(variables)
    for number, name in ((1, "stdout"), (2, "stderr")):
        os.dup2(os.open(f"{output}/{name}", os.O_WRONLY | os.O_CREAT | os.O_APPEND), number)

    if line[0] == "-m":
        sys.argv = list(line[1:])
        runpy.run_module(line[1], run_name="__main__", alter_sys=True)
    else:
        sys.argv = list(line)
        sys.path.insert(0, str(Path(line[0]).parent))
        runpy.run_path(line[0], run_name="__main__")


def run_script(*line: str | Path, cwd: Path | None = None) -> subprocess.CompletedProcess[str]:
    return Script(line, cwd=cwd).done()


def start_ranks(*lines: Sequence[str | Path], cwd: Path | None = None) -> list[Script]:
    """A script on a rank for each line, with the variables that torchrun sets."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]

    scripts = []
    for rank, line in enumerate(lines):
        variables = {
            "RANK": str(rank),
            "LOCAL_RANK": str(rank),
            "WORLD_SIZE": str(len(lines)),
            "LOCAL_WORLD_SIZE": str(len(lines)),
            "MASTER_ADDR": "127.0.0.1",
            "MASTER_PORT": str(port),
        }
        scripts.append(Script(line, variables=variables, cwd=cwd))
    return scripts


def run_ranks(
    *lines: Sequence[str | Path], cwd: Path | None = None
) -> subprocess.CompletedProcess[str]:
    """The same, until all have ended.

    The exit code is 1 where that of any rank is not 0, as torchrun's is.
    """
    scripts = start_ranks(*lines, cwd=cwd)

    # Where one has failed the others have some seconds to end by themselves.
    codes: list[int | None] = [None]
    while None in codes and not any(codes):
        time.sleep(0.02)
        codes = [script.poll() for script in scripts]
    for script in scripts:
        script.process.join(10)
        script.process.kill()

    each = [script.done() for script in scripts]
    failed = any(done.returncode for done in each)
    stdout = "".join(done.stdout for done in each)
    stderr = "".join(done.stderr for done in each)
    return subprocess.CompletedProcess(lines, int(failed), stdout, stderr)
