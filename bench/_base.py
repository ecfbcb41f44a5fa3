"""Another commit's pydl as one more provider: `--base GITREF`.

The commit is checked out into a temporary git worktree, its CPU library (on a GPU, all libraries) is built there, and a
process that imports pydl from there takes its turns in the same rounds as the providers of this process: for each
sample the parent asks, waits for the other process to be idle again, and goes on. Harness, cases and inputs are those
of the present checkout, so that only pydl differs.
"""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from bench._env import ROOT
from bench._gate import Verdict
from bench._harness import Facts, Group
from bench._providers import Unavailable

_SETTLE_S = 0.004  # threads of a pool spin for a moment after their last task; the other process waits that out


class Base:
    """A built worktree of a commit and a worker process in it; a context manager that removes both.

    Args:
        ref: any name git knows, such as HEAD~1 or a tag.
        device: cpu or cuda.
        threads: CPU threads of the worker.

    Raises:
        SystemExit: the ref is unknown or does not build; the message holds the end of the output.
    """

    def __init__(self, ref: str, device: str, threads: int) -> None:
        self.ref, self.device, self.threads = ref, device, threads
        self._folder = tempfile.TemporaryDirectory(prefix="pydl-base-")
        self.tree = Path(self._folder.name) / "tree"
        self._worker: subprocess.Popen[str] | None = None

    def __enter__(self) -> Base:
        try:
            self._command("git", "worktree", "add", "--detach", str(self.tree), self.ref, cwd=ROOT)
            print(f"building {self.ref} ...", flush=True)
            target = ["ninja", "--target", "cpu"] if self.device == "cpu" else ["build_ext", "--inplace"]
            self._command(sys.executable, "setup.py", *target, cwd=self.tree)
        except BaseException:
            self.__exit__()
            raise
        return self

    def __exit__(self, *_: object) -> None:
        if self._worker:
            self._worker.kill()
            self._worker.wait()
            for pipe in (self._worker.stdin, self._worker.stdout):
                if pipe:
                    pipe.close()
        subprocess.run(["git", "worktree", "remove", "--force", str(self.tree)], cwd=ROOT, capture_output=True)
        self._folder.cleanup()
        subprocess.run(["git", "worktree", "prune"], cwd=ROOT, capture_output=True)

    @staticmethod
    def _command(*command: str, cwd: Path) -> None:
        done = subprocess.run(command, cwd=cwd, capture_output=True, text=True)
        if done.returncode:
            raise SystemExit(f"--base: {' '.join(command)} failed:\n{(done.stdout + done.stderr)[-2000:]}")

    def ask(self, **request: Any) -> Any:
        """Sends one request to the worker and returns its answer."""
        if self._worker is None:
            self._worker = start_worker(self.tree, self.threads)
        assert self._worker.stdin and self._worker.stdout
        self._worker.stdin.write(json.dumps(request) + "\n")
        self._worker.stdin.flush()
        line = self._worker.stdout.readline()
        if not line:
            raise RuntimeError(f"the worker of {self.ref} ended with code {self._worker.wait()}")
        answer = json.loads(line)
        if "error" in answer:
            raise Unavailable(answer["error"])
        return answer["value"]

    def subject(self, group: Group) -> RemoteSubject:
        """pydl of that commit on a group."""
        return RemoteSubject(self, group)


class RemoteSubject:
    """pydl in the worker process."""

    def __init__(self, base: Base, group: Group) -> None:
        self.name, self._base, self._group = f"base:{base.ref}", base, group

    def check(self) -> Verdict:
        group = self._group
        key = {"op": group.op, "case": group.case.name, "device": group.device}
        return Verdict(**self._base.ask(do="check", **key, dtype=group.dtype, mode=group.mode))

    def prepare(self) -> Facts:
        return Facts(**self._base.ask(do="prepare"))

    def sample(self) -> list[float]:
        time.sleep(_SETTLE_S)
        samples = self._base.ask(do="sample")
        time.sleep(_SETTLE_S)
        return samples

    def disturbed(self) -> int:
        return self._base.ask(do="disturbed")

    def close(self) -> None:
        self._base.ask(do="close")


def start_worker(tree: Path, threads: int) -> subprocess.Popen[str]:
    """A process with pydl from `tree` that answers one JSON line per JSON line."""
    environment = {**os.environ, "OMP_NUM_THREADS": str(threads)}
    command = [sys.executable, "-c", f"import sys; sys.path[0] = {str(ROOT)!r}; from bench._base import serve; serve()"]
    return subprocess.Popen(
        [*command, str(tree), str(threads)],
        cwd=tree,
        env=environment,
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    )


def serve() -> None:
    """The worker: argv is the folder to import pydl from and the number of threads."""
    import torch

    from bench import _timing

    tree, threads = sys.argv[1], int(sys.argv[2])
    torch.set_num_threads(threads)
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)  # what the measured code prints must not meet the answers
    sys.path.insert(0, tree)
    import pydl

    if not Path(pydl.__file__).is_relative_to(tree):
        raise SystemExit(f"pydl was imported from {pydl.__file__}, not from {tree}")
    clock: _timing.GpuClock | None = None
    subject: Any = None
    for line in sys.stdin:
        request = json.loads(line)
        try:
            if request["do"] == "check":
                if request["device"] == "cuda" and clock is None:
                    clock = _timing.GpuClock()
                subject = _make_subject(request, clock)
                value: Any = dataclasses.asdict(subject.check())
            elif request["do"] == "prepare":
                value = dataclasses.asdict(subject.prepare())
            else:
                with _timing.quiet():
                    value = getattr(subject, request["do"])()
            answer = {"value": value}
        except Exception as failure:
            answer = {"error": f"{type(failure).__name__}: {failure}"}
        answers.write(json.dumps(answer) + "\n")
        answers.flush()


def _make_subject(request: dict[str, Any], clock: Any) -> Any:
    """pydl on the requested group, with a gate of its own."""
    from bench import _case, _harness, _providers

    case = next(c for c in _case.load(request["op"]).CASES if c.name == request["case"])
    group = Group(request["op"], case, request["device"], request["dtype"], request["mode"])
    gate = _harness.make_gate(group)
    return _harness.LocalSubject(group, _providers.resolve("pydl", group.op, case), gate, clock)
