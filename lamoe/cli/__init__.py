"""The command line. parser.py defines every option. Each verb is a function in train.py,
generate.py, measure.py or convert.py that calls the Python API."""

from __future__ import annotations

import os
import sys

from lamoe.cli.parser import build_parser, split_overrides


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code.

    A user error prints one line on stderr and returns 2. If LAMOE_TRACEBACK is set, the exception
    is raised instead.
    """
    words, overrides = split_overrides(sys.argv[1:] if argv is None else argv)
    args = build_parser().parse_args(words)
    args.overrides = overrides
    try:
        code = args.run(args) or 0
        sys.stdout.flush()  # raise the error of a closed pipe here, not at exit
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 1
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError, RuntimeError) as e:
        if os.environ.get("LAMOE_TRACEBACK"):
            raise
        print(f"lamoe {args.verb}: {' '.join(str(e).splitlines())}", file=sys.stderr)
        return 2
