"""A conversation in the terminal.

All turns run on one LLM. Its prefix cache holds the conversation so far, so each turn computes only
the new tokens.

Replies are written to `out`. Notices and the output of commands are written to `err`, so that a
pipe gets the replies alone. Without a terminal, each line of standard input is one message.
"""

from __future__ import annotations

import json
import os
import signal
import sys
import threading
from collections.abc import Callable
from pathlib import Path
from typing import TextIO

from lamoe import atomic
from lamoe.cli.text_input import check
from lamoe.engine.llm import LLM
from lamoe.engine.prefix_file import is_cache
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.model.accounting import human_bytes
from lamoe.model.config import did_you_mean
from lamoe.os_errors import check_output, explain

HELP = """/help           this list
/clear          forget the conversation; the system text stays
/system [TEXT]  show the system text, or set it; /system "" removes it
/save FILE      write the conversation, and its cached part to FILE.cache.safetensors
/load FILE      continue a saved conversation
/quit           leave (Ctrl-D too)
A line that begins with \"\"\" opens a message of several lines; the next \"\"\" at the end of a
line closes it. Write // for a message that begins with /. Ctrl-C stops the reply."""
COMMANDS = ("/help", "/clear", "/system", "/save", "/load", "/quit")
KIND, MAX_FILE_BYTES = "lamoe conversation", 64 << 20
# Visible replacements of control characters. A terminal takes those as commands (move the cursor,
# change the title, ...), and a model must not be able to send commands.
_VISIBLE = (
    {c: 0x2400 + c for c in range(32) if chr(c) not in "\n\t"}
    | {0x7F: 0x2421}
    | dict.fromkeys(range(0x80, 0xA0), 0xFFFD)
)


class Chat:
    """A conversation and the commands that act on it.

    `messages` holds {"role", "content"} dictionaries. A system text, if any, comes first. A turn or
    command that fails prints the reason on `err`, adds one to `failures` and leaves the
    conversation unchanged.
    """

    def __init__(
        self,
        llm: LLM,
        params: SamplingParams,
        system: str | None = None,
        out: TextIO | None = None,
        err: TextIO | None = None,
        dim: bool = False,
    ):
        if llm.tokenizer is None:
            raise ValueError("a chat needs a tokenizer; use a model folder with tokenizer.json")
        if params.n != 1:
            raise ValueError(f"a chat has one reply per turn, but n is {params.n}; set it to 1")
        self.llm, self.params, self.dim, self.failures = llm, params, dim, 0
        self.out, self.err = out or sys.stdout, err or sys.stderr
        self.messages = [{"role": "system", "content": system}] if system else []

    # ---- turns -----------------------------------------------------------------------------------
    def say(self, text: str, stopped: Callable[[], bool] = lambda: False) -> Output | None:
        """Run one turn: stream the reply to `text` until it ends or `stopped()` is true.

        If the reply is stopped, the part that was shown stays in the conversation. If nothing was
        shown, the message is removed from the conversation.

        Returns:
            The output, or None if the turn failed.
        """
        turn = [*self.messages, {"role": "user", "content": text}]
        try:
            output = self._reply(turn, stopped)
        except ValueError as e:
            self.fail(str(e))
            return None
        if output.finish_reason == "error":
            self.fail(f"the reply failed: {output.error}; the message is discarded")
            return None
        reply = output.text.strip()  # the chat template adds whitespace around messages
        if output.finish_reason == "abort":
            self.note(
                "[stopped]"
                if reply
                else "[stopped before the reply began; the message is discarded]"
            )
            if not reply:
                return output
        elif not reply:
            self.note("[an empty reply]")
        self.messages = [*turn, {"role": "assistant", "content": reply}]
        if output.finish_reason == "length":
            self._explain_length(output)
        return output

    def _reply(self, turn: list[dict], stopped: Callable[[], bool]) -> Output:
        # Not llm.stream: it yields once per token, and a long prompt takes many steps before the
        # first token. `stopped` must be checked in each step.
        ids = self.llm.tokenizer.apply_chat(turn)
        if len(ids) >= self.llm.max_model_len:
            raise ValueError(
                f"with this message the conversation has {len(ids)} tokens, and the context is "
                f"{self.llm.max_model_len}, reply included; the message is discarded: shorten it, "
                "or /save FILE and /clear to start again"
            )
        [id] = self.llm.add(ids, self.params)
        output, began = None, False
        try:
            while output is None and not stopped():
                for delta in self.llm.step():
                    if delta.id == id:
                        text = delta.text if began else delta.text.lstrip()
                        began = began or bool(text)
                        self._show(text)
                        output = delta.output or output
        finally:
            output = output or self.llm.cancel(id)
            self.out.write("\n")
            self.out.flush()
        return output

    def _show(self, text: str) -> None:
        self.out.write(text.translate(_VISIBLE) if self.out.isatty() else text)
        self.out.flush()

    def _explain_length(self, output: Output) -> None:
        used, context = output.prompt_tokens + len(output.token_ids), self.llm.max_model_len
        if used >= context:
            self.note(
                f"[the context is full: {used} of {context} tokens; /save FILE keeps the "
                "conversation, /clear starts a new one]"
            )
        else:
            self.note(f"[cut at --max-tokens {self.params.max_tokens}]")

    # ---- commands --------------------------------------------------------------------------------
    def command(self, line: str) -> bool:
        """Run a line that begins with /. Returns True if the chat should end."""
        name, _, rest = line.strip().partition(" ")
        rest = rest.strip()
        if name not in COMMANDS:
            self.fail(
                f"unknown command {name!r}{did_you_mean(name, COMMANDS) or ';'} /help lists the "
                "commands; write // for a message that begins with /"
            )
        elif name in ("/save", "/load") and not rest:
            self.fail(f"{name} needs a file, for example {name} talk.json")
        elif name in ("/help", "/clear", "/quit") and rest:
            self.fail(f"{name} takes nothing after it, found {rest[:40]!r}")
        else:
            try:
                getattr(self, name[1:])(*[rest] if name in ("/system", "/save", "/load") else ())
            except (ValueError, OSError) as e:
                self.fail(explain(e) if isinstance(e, OSError) else str(e))
            return name == "/quit"
        return False

    def help(self) -> None:
        self.note(HELP)

    def quit(self) -> None:
        """Do nothing, because `command` itself reports that the chat should end."""

    def clear(self) -> None:
        self.messages = [m for m in self.messages[:1] if m["role"] == "system"]
        self.note("[the conversation is cleared]")

    def system(self, text: str) -> None:
        """Show the system text if `text` is empty, else set it. The text '""' removes it."""
        has_system = bool(self.messages) and self.messages[0]["role"] == "system"
        now = self.messages[0]["content"] if has_system else None
        if not text:
            self.note(now or "[no system text]")
            return
        text = "" if text in ('""', "''") else text
        rest = self.messages[1:] if now is not None else self.messages
        self.messages = ([{"role": "system", "content": text}] if text else []) + rest
        self.note("[system text set]" if text else "[system text removed]")

    def save(self, file: str) -> None:
        """Write the conversation to `file` (JSON) and its cached rows to a file next to it."""
        path = check_output("/save", file, "file")
        if path.exists():
            _read(path)  # refuse to overwrite anything but a conversation
        rows = _cache_file(path)
        if rows.exists() and not is_cache(rows):
            raise ValueError(
                f"{rows} exists and is not a saved cache, so it is not overwritten; save to "
                "another name"
            )
        # The text comes first, because the rows can be computed again from it.
        content = {"kind": KIND, "version": 1, "messages": self.messages}
        atomic.write_text(path, json.dumps(content, ensure_ascii=False, indent=1) + "\n")
        try:
            tokens = []
            if self.messages:
                tokens = self.llm.tokenizer.apply_chat(self.messages, add_generation_prompt=False)
            num_saved = self.llm.save_cache(rows, tokens)
            cached = f"{num_saved} of {len(tokens)} tokens cached in {rows.name}"
        except (ValueError, OSError) as e:
            rows.unlink(missing_ok=True)  # it belongs to an earlier conversation of this name
            cached = "none of it is in the cache"
            if isinstance(e, OSError):
                cached = f"its cached rows are not saved: {explain(e)}"
        self.note(f"[saved {len(self.messages)} messages to {path}; {cached}]")

    def load(self, file: str) -> None:
        """Replace the conversation with a saved one.

        Cached rows of another model are ignored with a notice, and the text is computed again.
        """
        path = Path(file).expanduser()
        self.messages, rows = _read(path), _cache_file(path)
        cached = "without cached rows, so its text is computed again"
        if rows.exists():
            try:
                cached = f"{self.llm.load_cache(rows)} tokens of it are in the cache"
            except (ValueError, OSError) as e:
                cached = f"its cached rows are not used, so its text is computed again: {e}"
        self.note(f"[loaded {len(self.messages)} messages from {path}; {cached}]")

    # ---- notices ---------------------------------------------------------------------------------
    def note(self, text: str) -> None:
        """Print a notice on `err`."""
        text = text.translate(_VISIBLE) if self.err.isatty() else text
        print(f"\x1b[2m{text}\x1b[0m" if self.dim else text, file=self.err, flush=True)

    def fail(self, text: str) -> None:
        """Print the reason why a turn or command failed, and count it."""
        self.failures += 1
        self.note(text)


def run(
    llm: LLM,
    params: SamplingParams,
    system: str | None = None,
    name: str = "",
    stdin: TextIO | None = None,
    stdout: TextIO | None = None,
    stderr: TextIO | None = None,
) -> int:
    """Chat until the input ends or /quit.

    Returns:
        The exit code: 1 if the input is not a terminal and one of its lines failed, else 0.
    """
    stdin = stdin or sys.stdin
    terminal = stdin.isatty() and (stdout or sys.stdout).isatty()
    colour = terminal and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"
    chat = Chat(llm, params, system, stdout, stderr, dim=colour and (stderr or sys.stderr).isatty())
    if terminal:
        chat.note(
            f"{name or 'model'} · context {llm.max_model_len} tokens · cache {llm.cache.format}, "
            f"{human_bytes(llm.cache.nbytes)} · /help\n{llm.plan().describe()}"
        )
    if llm.tokenizer.chat_template is None:
        chat.note(
            "[this model has no chat template and may not be trained to chat; DeepSeek-V2's format "
            "is used]"
        )
    read = _reader(stdin, chat.out, terminal, colour)
    leaving = False  # whether the last input was a Ctrl-C at the prompt
    while True:
        try:
            line = _message(read)
        except KeyboardInterrupt:
            if not terminal:
                raise
            chat.out.write("\n")
            if leaving:
                return 0
            chat.note("[Ctrl-C again or /quit leaves]")
            leaving = True
            continue
        leaving = False
        if line is None and terminal:
            print(file=chat.out, flush=True)
        if line is None or _handle(chat, line, terminal):
            return 1 if chat.failures and not terminal else 0


def _handle(chat: Chat, line: str, terminal: bool) -> bool:
    """Run one message or command. Returns True if the chat should end."""
    try:
        line = check(line, "the message")
    except ValueError as e:
        chat.fail(str(e))
        return False
    with _Interrupt(terminal) as interrupt:
        if line.startswith("/") and not line.startswith("//"):
            return chat.command(line)
        if line.strip():
            chat.say(line.removeprefix("/"), lambda: interrupt.asked)
    return False


class _Interrupt:
    """A context in which the first Ctrl-C only sets `asked`, and the second one raises.

    An exception at an arbitrary point could leave the engine in an undefined state.
    """

    def __init__(self, active: bool):
        self.active = active and threading.current_thread() is threading.main_thread()
        self.asked = False

    def __enter__(self) -> _Interrupt:
        if self.active:
            self.before = signal.signal(signal.SIGINT, self._ask)
        return self

    def __exit__(self, *_) -> None:
        if self.active:
            signal.signal(signal.SIGINT, self.before)

    def _ask(self, *_) -> None:
        if self.asked:
            raise KeyboardInterrupt
        self.asked = True


# ---- input ---------------------------------------------------------------------------------------
def _reader(
    stdin: TextIO, out: TextIO, terminal: bool, colour: bool
) -> Callable[[str], str | None]:
    """Return a function that shows a prompt (on a terminal) and reads one line; None at the end."""
    if not terminal:
        return lambda prompt: stdin.readline() or None
    try:
        import readline  # noqa: F401 (enables line editing and a history in `input`)

        # \x01 and \x02 tell readline that the escape codes between them take no columns.
        start, end = "\x01\x1b[1m\x02", "\x01\x1b[0m\x02"
    except ImportError:  # not available on every system
        start, end = "\x1b[1m", "\x1b[0m"

    def read(prompt: str) -> str | None:
        prompt = f"{start}{prompt}{end}" if colour else prompt
        if stdin is sys.stdin and out is sys.stdout:
            try:
                return input(prompt)
            except EOFError:
                return None
        out.write(prompt)
        out.flush()
        return stdin.readline() or None

    return read


def _message(read: Callable[[str], str | None]) -> str | None:
    '''Read a line, or several lines between two """ marks. Returns None at the end of the input.'''
    line = read("> ")
    if line is None:
        return None
    line = line.rstrip("\r\n")
    if not line.startswith('"""'):
        return line
    lines = [line[3:]]
    while not lines[-1].rstrip().endswith('"""'):
        more = read(". ")
        if more is None:
            break
        lines.append(more.rstrip("\r\n"))
    text = "\n".join(lines).rstrip().removesuffix('"""').strip("\n")
    return f"/{text}" if text.startswith("/") else text  # "//": a message, not a command


# ---- files ---------------------------------------------------------------------------------------
def _cache_file(path: Path) -> Path:
    return path.with_name(f"{path.name}.cache.safetensors")


def _read(path: Path) -> list[dict[str, str]]:
    """Read the messages of a saved conversation.

    Raises:
        ValueError: if the file is not a saved conversation.
    """
    if path.stat().st_size > MAX_FILE_BYTES:
        raise ValueError(
            f"{path} has {path.stat().st_size:,} bytes; a conversation may have at most "
            f"{MAX_FILE_BYTES:,}"
        )
    try:
        raw = json.loads(path.read_text(encoding="utf-8"))
    except (ValueError, RecursionError):
        raw = None
    if not isinstance(raw, dict) or raw.get("kind") != KIND:
        raise ValueError(
            f"{path} is not a saved conversation; /load needs a file that /save "
            "wrote, and /save a new name"
        )
    if raw.get("version") != 1:
        raise ValueError(
            f"{path} is a conversation of version {str(raw.get('version'))[:20]}; this lamoe reads "
            "version 1"
        )
    messages = raw.get("messages")
    for n, m in enumerate(messages if isinstance(messages, list) else [None]):
        if (
            not isinstance(m, dict)
            or set(m) != {"role", "content"}
            or not all(isinstance(v, str) for v in m.values())
            or m["role"] not in ("user", "assistant", *(["system"] if n == 0 else []))
        ):
            raise ValueError(
                f"{path}: message {n} must have a role (user, assistant, or system for the first "
                f"one) and a content, found {str(m)[:60]!r}"
            )
    return messages
