"""Command line: ``python -m pydl info | verify | kernels``."""

from __future__ import annotations

import importlib
import sys

# module and function are imported only when their command runs
COMMANDS = {
    "info": ("pydl._info", "versions, devices, what is built, what is missing and how to get it"),
    "verify": ("pydl._verify", "check every op on this machine against the float64 oracles, beside torch's own error"),
    "kernels": ("pydl._aot", "compile every kernel ahead of time; registers, spills, shared memory"),
}


def usage() -> str:
    """The help text."""
    rows = "\n".join(f"  {name:8} {text}" for name, (_, text) in COMMANDS.items())
    return (
        f"usage: python -m pydl COMMAND [options]\n\n{rows}\n\npython -m pydl COMMAND --help lists a command's options."
    )


def main(argv: list[str] | None = None) -> int:
    """Run one command and return its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help", "help"):
        print(usage())
        return 0
    if argv[0] not in COMMANDS:
        print(f"pydl: no command {argv[0]!r}\n\n{usage()}", file=sys.stderr)
        return 2
    return importlib.import_module(COMMANDS[argv[0]][0]).main(argv[1:]) or 0


if __name__ == "__main__":
    sys.exit(main())
