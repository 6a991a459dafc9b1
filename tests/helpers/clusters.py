"""A scheduler and workers in processes of their own, and workers that can be made slow, or to die."""

import os
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
# what a worker runs first; files in a folder say how it is to behave, so that a test can change its mind
HOOK = """
import os, pathlib, time
import requant.conversion.write_on_cluster as workers
folder = pathlib.Path({folder!r})
if not hasattr(workers, "quick"):  # Dask may run this twice
    workers.quick = workers.write_chunk
def write_chunk(source, output, chunk):
    if (folder / "slow").exists():
        time.sleep(0.05)
    if (folder / "die").exists() and chunk.job.tensor.name == (folder / "die").read_text():
        os._exit(9)
    return workers.quick(source, output, chunk)
workers.write_chunk = write_chunk
"""


class Machines:
    """A scheduler on this machine, and its workers of one thread each. Use as a context manager."""

    def __init__(self, folder, n_workers, allowed_failures=3):
        self.folder, self.processes = Path(folder), []
        hook = self.folder / "hook.py"
        hook.write_text(HOOK.format(folder=str(self.folder)))
        self.hook = hook
        settings = {
            "DASK_DISTRIBUTED__SCHEDULER__ALLOWED_FAILURES": str(allowed_failures),
            "PYTHONPATH": str(ROOT),
        }
        self.environment = os.environ | settings
        file = self.folder / "scheduler.json"
        self.scheduler = self._start("scheduler", "--host", "127.0.0.1", "--port", "0", "--scheduler-file", file)
        until(lambda: file.exists() and file.read_text().rstrip().endswith("}"))
        self.address = next(
            word.strip('",') for word in file.read_text().split() if word.startswith('"tcp://127.0.0.1')
        )
        self.workers = [self.worker() for _ in range(n_workers)]

    def worker(self):
        """One more worker."""
        words = ("--no-nanny", "--nthreads", "1", "--preload", self.hook, "--local-directory", self.folder)
        return self._start("worker", self.address, *words, "--memory-limit", "0")

    def _start(self, what, *words):
        command = [sys.executable, "-m", "distributed.cli.dask_" + what, *map(str, words), "--no-dashboard"]
        with (self.folder / f"{what}.log").open("ab") as log:
            process = subprocess.Popen(command, env=self.environment, cwd=self.folder, stdout=log, stderr=log)
        self.processes.append(process)
        return process

    def slow(self, yes=True):
        """Have every chunk take a while, or not."""
        (self.folder / "slow").touch() if yes else (self.folder / "slow").unlink(missing_ok=True)

    def __enter__(self):
        return self

    def __exit__(self, *_):
        for process in self.processes:
            process.kill()
            process.wait()


def until(condition, seconds=60):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.02)
