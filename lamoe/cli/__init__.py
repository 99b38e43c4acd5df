"""The command line. parser.py defines every option. Each verb is a function in train.py,
generate.py, measure.py or convert.py that calls the Python API."""

from __future__ import annotations

import errno
import io
import os
import sys
import warnings

from lamoe.cli.arguments import in_words_of_options
from lamoe.cli.parser import parse
from lamoe.os_errors import explain


def main(argv: list[str] | None = None) -> int:
    """Run one verb and return its exit code.

    A user error prints one line on stderr and returns 2. If LAMOE_TRACEBACK is set, the exception
    is raised instead.
    """
    _prepare_streams()
    args = parse(sys.argv[1:] if argv is None else argv)
    with warnings.catch_warnings():
        warnings.showwarning = _show_warning
        try:
            _check_current_folder()
            code = args.run(args) or 0
            sys.stdout.flush()  # raise the error of a closed pipe or a full disk here, not at exit
            return code
        except BrokenPipeError:
            _discard_output()
            return 1
        except KeyboardInterrupt:
            return 130
        except (ValueError, OSError, RuntimeError) as e:
            if os.environ.get("LAMOE_TRACEBACK"):
                raise
            text = in_words_of_options(explain(e) if isinstance(e, OSError) else str(e))
            # A failed write may have emptied the buffer. Errors of files have a name.
            is_full = isinstance(e, OSError) and e.errno == errno.ENOSPC and e.filename is None
            if _discard_output() or is_full:
                text = f"standard output cannot be written: {text}"
            print(f"lamoe {args.verb}: {' '.join(text.splitlines())}", file=sys.stderr)
            return 2


def _check_current_folder() -> None:
    """Raise ValueError if the current folder was deleted. Libraries of torch would abort."""
    try:
        os.getcwd()
    except FileNotFoundError:
        raise ValueError("the current folder was deleted; cd to one that exists") from None


def _prepare_streams() -> None:
    """Make the standard streams usable for any text and any state that they were inherited in."""
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:  # closed; the number must not go to the next opened file
            setattr(sys, name, open(os.devnull, mode))
    for stream, errors in ((sys.stdin, "surrogateescape"), (sys.stdout, "replace")):
        if isinstance(stream, io.TextIOWrapper):  # tests use other streams
            stream.reconfigure(errors=errors)  # input is checked where it is used


def _discard_output() -> bool:
    """Discard buffered output that cannot be written, so that Python does not fail at exit.

    Returns:
        Whether there was such output.
    """
    try:
        sys.stdout.flush()
        return False
    except OSError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return True


def _show_warning(message, category, filename, lineno, file=None, line=None) -> None:
    print(f"lamoe: warning: {' '.join(str(message).splitlines())}", file=sys.stderr)
