"""Tests of the terminal chat: turns, prefix reuse, every command, Ctrl-C, and a real terminal."""

import io
import json
import math
import os
import pty
import select
import signal
import sys
import threading
import time
from unittest import mock

import pytest
import torch
from safetensors.torch import load_file

from lamoe import cli
from lamoe.cli import chat as chat_module
from lamoe.cli.chat import Chat, run
from lamoe.engine.llm import LLM
from lamoe.engine.request import Output
from lamoe.engine.sampler import SamplingParams
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)

GREEDY = SamplingParams(temperature=0.0, max_tokens=12)


class Terminal(io.StringIO):
    def isatty(self):
        return True


@pytest.fixture(scope="module")
def parts(trained):
    """Return (model, tokenizer): random weights, a context of 400 tokens, a trained vocabulary."""
    config = ModelConfig(
        **{**BODY, "max_position_embeddings": 400, "initializer_range": 0.2}, **MLA, **MOE
    )
    return Transformer(config).init_weights(1).eval(), Tokenizer.load(
        checkpoint.latest(trained) / "model"
    )


@pytest.fixture
def llm(parts):
    return LLM(*parts, cache="fp32", page_size=4)


def chat(llm, params=GREEDY, system=None) -> Chat:
    return Chat(llm, params, system, io.StringIO(), io.StringIO())


def talk(llm, text, params=GREEDY, system=None):
    """Return (exit code, standard output, standard error) of a piped conversation."""
    out, err = io.StringIO(), io.StringIO()
    return (
        run(llm, params, system, "m", io.StringIO(text), out, err),
        out.getvalue(),
        err.getvalue(),
    )


# ---- turns ----
def test_a_turn_generates_from_the_chat_template(llm, parts):
    c = chat(llm, system="be brief")
    for n, said in enumerate(("the cat", "and then? ✓", "<｜end▁of▁sentence｜>")):
        turn = [*c.messages, {"role": "user", "content": said}]
        [want] = LLM(*parts, cache="fp32").generate([parts[1].apply_chat(turn)], GREEDY)
        c.out.truncate(0), c.out.seek(0)
        got = c.say(said)
        assert got.token_ids == want.token_ids and c.out.getvalue() == want.text.lstrip() + "\n"
        assert c.messages == [*turn, {"role": "assistant", "content": want.text.strip()}]
        assert len(c.messages) == 3 + 2 * n
    assert len(set(got.token_ids)) > 2 and c.failures == 0 and not llm.busy and llm.pool.owned == 0


def test_turns_reuse_the_cached_conversation(llm, parts):
    c, cached = chat(llm, system="a text that comes before the whole conversation"), []
    before = ""
    for _ in range(4):
        shared = (
            len(
                os.path.commonprefix(
                    [
                        parts[1].apply_chat([*c.messages, {"role": "user", "content": "go on"}]),
                        before,
                    ]
                )
            )
            if cached
            else 0
        )
        out = c.say("go on")
        assert out.cached_tokens >= shared // 4 * 4
        cached.append(out.cached_tokens)
        before = parts[1].apply_chat(c.messages[:-1])
    assert cached[0] == 0 and cached[1] > 20 and cached == sorted(set(cached))


def test_replies_stream(llm):
    """A reply is streamed: each piece of text is flushed at once."""
    pieces = []

    class Out(io.StringIO):
        def flush(self):
            pieces.append(self.getvalue())

    c = Chat(llm, GREEDY, None, Out(), io.StringIO())
    c.say("the dog")
    assert len(set(pieces)) > 5 and pieces == sorted(pieces, key=len)


def test_stopped_replies(llm):
    c, whole = chat(llm), chat(llm).say("the bird")
    ticks = iter(range(100))
    out = c.say("the bird", lambda: next(ticks) == 5)
    assert out.finish_reason == "abort"
    assert out.token_ids == whole.token_ids[:5]
    assert not llm.busy
    assert llm.pool.owned == 0
    assert c.messages[-1]["content"] == out.text.strip()
    assert "[stopped]" in c.err.getvalue()
    assert c.out.getvalue() == out.text.lstrip() + "\n"
    kept = list(c.messages)
    c.say("more", lambda: True)
    assert c.messages == kept
    assert "the message is discarded" in c.err.getvalue()
    assert llm.pool.owned == 0
    assert c.say("more").finish_reason == "length" and c.failures == 0


def test_a_long_prompt_can_be_stopped(parts):
    """A long prompt can be stopped in any of the many steps before its first token."""
    llm = LLM(*parts, cache="fp32", max_num_batched_tokens=64)
    c, asked = chat(llm), []
    c.say("x " * 120, lambda: asked.append(1) or len(asked) == 3)
    assert len(asked) == 3
    assert c.messages == []
    assert c.out.getvalue() == "\n"
    assert not llm.busy
    assert llm.pool.owned == 0


def test_a_full_context(llm):
    c = chat(llm, SamplingParams(temperature=0.0, max_tokens=10**6, ignore_eos=True))
    out = c.say("the hill")
    assert out.prompt_tokens + len(out.token_ids) == 400
    assert "[the context is full: 400 of 400 tokens; /save FILE keeps" in c.err.getvalue()
    kept = list(c.messages)
    assert c.say("and?") is None and c.messages == kept and c.failures == 1
    assert (
        "tokens, and the context is 400, reply included; the message is discarded"
        in c.err.getvalue()
    )
    assert "/clear" in c.err.getvalue()
    c.command("/clear")
    assert c.say("hi") is not None


def test_notes_say_why_a_reply_was_cut(llm):
    c = chat(llm, SamplingParams(temperature=0.0, max_tokens=3, ignore_eos=True))
    c.say("the mat")
    assert c.err.getvalue() == "[cut at --max-tokens 3]\n"


def test_failures_discard_the_message(llm):
    c = chat(llm)
    assert c.say("\ud800") is None and "surrogate" in c.err.getvalue()
    with mock.patch(
        "lamoe.engine.runner.run",
        lambda model, cache, work, *rest: [
            (seq, torch.full((1, 300), torch.nan), [(math.nan, 0)]) for seq, _ in work
        ],
    ):
        assert c.say("hello") is None
    assert "the reply failed: the model's logits are not finite" in c.err.getvalue()
    assert c.messages == []
    assert c.failures == 2
    llm.tokenizer = mock.Mock(
        wraps=llm.tokenizer,
        apply_chat=mock.Mock(side_effect=ValueError("the chat template failed: no system")),
    )
    assert c.say("hello") is None and "no system" in c.err.getvalue()


def test_whitespace_around_a_reply_is_stripped(llm, monkeypatch):
    c = chat(llm)
    for text, kept in ((" hello \n there\n\n", "hello \n there"), (" \n", "")):
        monkeypatch.setattr(c, "_reply", lambda turn, stopped: Output([1], text, "stop", 5))
        c.say("hi")
        assert c.messages[-1] == {"role": "assistant", "content": kept}
    assert c.err.getvalue() == "[an empty reply]\n"


def test_a_chat_needs_a_tokenizer_and_one_reply(llm, parts):
    with pytest.raises(ValueError, match="needs a tokenizer"):
        chat(LLM(parts[0]))
    with pytest.raises(ValueError, match="n is 2"):
        chat(llm, SamplingParams(n=2))


@pytest.mark.parametrize("terminal", [True, False])
def test_control_characters_are_made_visible_on_a_terminal(llm, terminal):
    stream = Terminal() if terminal else io.StringIO()
    c = Chat(llm, GREEDY, None, stream, stream)
    c._show("a\x1b[2J\x07\r\x9bm\x7f\tb\n")
    c.note("\x1b]0;x\x07")
    assert stream.getvalue() == (
        "a␛[2J␇␍\ufffdm␡\tb\n␛]0;x␇\n" if terminal else "a\x1b[2J\x07\r\x9bm\x7f\tb\n\x1b]0;x\x07\n"
    )


# ---- piped input ----
def test_lines_are_turns(llm, parts):
    code, out, err = talk(llm, "the cat\n\n   \nand then?")
    c = chat(llm)
    c.say("the cat"), c.say("and then?")
    assert (code, out, err) == (0, c.out.getvalue(), c.err.getvalue()) and "\x1b" not in err
    assert talk(llm, "") == (0, "", "") and talk(llm, "/quit\nthe cat\n") == (0, "", "")


def test_messages_and_commands_are_told_apart(llm, monkeypatch):
    said = []
    monkeypatch.setattr(Chat, "say", lambda self, text, stopped: said.append(text))
    code, _, err = talk(
        llm,
        'one\r\n"""two\n  lines """\n"""\n\n/three\n"""\n//four\n"""five"""\n/fiv\n"""open\nend',
    )
    assert said == ["one", "two\n  lines ", "/three", "/four", "five", "open\nend"]
    assert code == 1 and "unknown command '/fiv'" in err


def test_a_failed_line_sets_the_exit_code(llm):
    assert talk(llm, "/sav x\nhello\n")[0] == talk(llm, "hello\n/sav x\n/quit\n")[0] == 1


def test_a_missing_chat_template_is_announced(parts):
    bare = Tokenizer(parts[1].inner, bos=parts[1]._bos, eos=parts[1]._eos)
    assert "has no chat template" in talk(LLM(parts[0], bare), "")[2]


# ---- commands ----
@pytest.mark.parametrize(
    "line, words",
    [
        ("/sav talk.json", "unknown command '/sav', did you mean '/save'?"),
        ("/halp", "did you mean '/help'?"),
        ("/", "unknown command '/'"),
        ("/HELP", "unknown command '/HELP'"),
        ("/exec rm", "unknown command '/exec'"),
        ("/__init__", "unknown command"),
        ("/say x", "unknown command '/say'"),
        ("/save", "/save needs a file, for example /save talk.json"),
        ("/load  ", "/load needs a file"),
        ("/quit now", "/quit takes nothing after it, found 'now'"),
        ("/clear all", "/clear takes nothing"),
        ("/load none.json", "none.json does not exist"),
        ("/load .", ". is a folder; name a file"),
        ("/save no/where/x.json", "the folder no/where does not exist; make it first"),
    ],
)
def test_wrong_commands(llm, line, words, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    c = chat(llm)
    c.say("hi")
    c.err.truncate(0), c.err.seek(0)
    kept = list(c.messages)
    assert c.command(line) is False
    assert words in c.err.getvalue()
    assert c.err.getvalue().count("\n") == 1
    assert c.failures == 1 and c.messages == kept and list(tmp_path.iterdir()) == []


def test_help_names_every_command(llm):
    c = chat(llm)
    assert c.command("/help") is False
    assert all(f"{name} " in c.err.getvalue() for name in chat_module.COMMANDS)
    assert c.command("/quit") is True and c.command(" /quit ") is True and c.failures == 0


def test_system_and_clear(llm):
    c = chat(llm)
    c.command("/system")
    assert "[no system text]" in c.err.getvalue()
    c.say("hi")
    c.command("/system  you are a cat ")
    assert [m["role"] for m in c.messages] == ["system", "user", "assistant"]
    assert c.messages[0]["content"] == "you are a cat"
    c.command("/system you are a dog")
    assert [m["content"] for m in c.messages if m["role"] == "system"] == ["you are a dog"]
    c.command("/system")
    assert "\nyou are a dog\n" in c.err.getvalue()
    c.command("/clear")
    assert c.messages == [{"role": "system", "content": "you are a dog"}]
    c.command('/system ""')
    assert c.messages == [] and c.failures == 0
    c.command("/clear")
    assert c.messages == []


def test_save_and_load(llm, parts, tmp_path):
    c, file = chat(llm, system="be brief"), tmp_path / "a talk.json"
    c.say("the cat sat on the mat"), c.say("where? ✓")
    c.command(f"/save {file}")
    tokens = parts[1].apply_chat(c.messages, add_generation_prompt=False)
    assert f"saved 5 messages to {file}; " in c.err.getvalue()
    assert f" of {len(tokens)} tokens cached in a talk.json.cache.safetensors]" in c.err.getvalue()
    assert json.loads(file.read_text()) == {
        "kind": "lamoe conversation",
        "version": 1,
        "messages": c.messages,
    }
    assert sorted(p.name for p in tmp_path.iterdir()) == [
        "a talk.json",
        "a talk.json.cache.safetensors",
    ]

    other = chat(LLM(*parts, cache="fp32", page_size=8))
    other.command(f"/load {file}")
    assert other.messages == c.messages and "tokens of it are in the cache]" in other.err.getvalue()
    a, b, cold = (
        c.say("and then?"),
        other.say("and then?"),
        Chat(LLM(*parts, cache="fp32"), GREEDY, None, io.StringIO(), io.StringIO()),
    )
    cold.messages = c.messages[:-2]
    assert a.token_ids == b.token_ids == cold.say("and then?").token_ids
    assert b.cached_tokens >= 24 and a.cached_tokens - b.cached_tokens < 8
    assert c.failures == other.failures == 0

    c.command("/clear")
    c.command(f"/save {file}")  # replaces both files of a saved chat
    system = parts[1].apply_chat(c.messages, add_generation_prompt=False)
    assert (
        load_file(tmp_path / "a talk.json.cache.safetensors")["tokens"].tolist()
        == system[: len(system) // 4 * 4]
    )
    c.command('/system ""'), c.command(f"/save {file}")
    assert "none of it is in the cache" in c.err.getvalue()
    assert [p.name for p in tmp_path.iterdir()] == ["a talk.json"]
    other.command(f"/load {file}")
    assert other.messages == [] and "without cached rows" in other.err.getvalue()


def test_loading_for_another_model_keeps_the_text(llm, parts, tmp_path):
    c = chat(llm)
    c.say("the cat sat on the mat")
    c.command(f"/save {tmp_path / 't'}")
    for options in (dict(cache="bf16"), dict(cache="fp32", max_model_len=12)):
        other = chat(LLM(*parts, **options))
        other.command(f"/load {tmp_path / 't'}")
        assert other.messages == c.messages
        assert (
            "its cached rows are not used, so its text is computed again: " in other.err.getvalue()
        )
    (tmp_path / "t.cache.safetensors").write_bytes(b"nonsense")
    other = chat(llm)
    other.command(f"/load {tmp_path / 't'}")
    assert other.messages == c.messages
    assert "computed again" in other.err.getvalue()
    assert other.failures == 0
    other.command(f"/save {tmp_path / 't'}")
    assert "exists and is not a saved cache, so it is not overwritten" in other.err.getvalue()
    assert (tmp_path / "t.cache.safetensors").read_bytes() == b"nonsense"


@pytest.mark.parametrize(
    "content, words",
    [
        ("notes", "is not a saved conversation"),
        ("[" * 10**5, "is not a saved conversation"),
        ("{}", "is not a saved conversation"),
        ("[]", "is not"),
        ('{"kind": "lamoe conversation"}', "version None"),
        ('{"kind": "lamoe conversation", "version": 2, "messages": []}', "version 2"),
        *(
            (json.dumps({"kind": "lamoe conversation", "version": 1, "messages": m}), "message")
            for m in (
                None,
                {},
                "x",
                [1],
                [{"role": "user"}],
                [{"role": "tool", "content": "x"}],
                [{"role": "user", "content": 1}],
                [{"role": "user", "content": "x", "tool_calls": []}],
                [{"role": "user", "content": "x"}, {"role": "system", "content": "x"}],
            )
        ),
    ],
)
def test_files_other_than_conversations(llm, tmp_path, content, words):
    """/load and /save refuse files that are not conversations, and do not change them."""
    (tmp_path / "f").write_text(content)
    c = chat(llm)
    c.say("hi")
    kept = list(c.messages)
    for command in ("/load", "/save"):
        c.command(f"{command} {tmp_path / 'f'}")
        assert words in c.err.getvalue().splitlines()[-1]
    assert c.messages == kept
    assert c.failures == 2
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("f", content)]


# ---- chat at a terminal ----
def interactive(llm, lines, monkeypatch, **env):
    """Return (standard output, standard error) of a conversation at a terminal.

    A line that is an exception is raised when it is read.
    """
    for name in ("NO_COLOR", "TERM"):
        monkeypatch.delenv(name, raising=False)
    for name, value in env.items():
        monkeypatch.setenv(name, value)
    lines = iter(lines)

    class In(Terminal):
        def readline(self):
            line = next(lines, "")
            if isinstance(line, BaseException):
                raise line
            return line

    out, err = Terminal(), Terminal()
    code = run(llm, GREEDY, None, "my model", In(), out, err)
    assert code == 0 and next(lines, None) is None
    return out.getvalue(), err.getvalue()


def test_prompt_banner_and_colour(llm, monkeypatch):
    out, err = interactive(llm, ["/sav\n", ""], monkeypatch)
    assert "> " in out
    assert out.endswith("\n")
    assert "my model · context 400 tokens · cache fp32, " in err
    assert "/help" in err
    assert "\x1b[2m" in err
    for env in (dict(NO_COLOR="1"), dict(TERM="dumb")):
        out, err = interactive(llm, ["hi\n", "/help\n", ""], monkeypatch, **env)
        assert "\x1b" not in out + err and out.startswith("> ")


def test_ctrl_c_at_the_prompt(llm, monkeypatch):
    stop = KeyboardInterrupt()
    out, err = interactive(llm, [stop, "hi\n", stop, "/clear\n", stop, stop], monkeypatch)
    assert err.count("[Ctrl-C again or /quit leaves]") == 3 and "cleared" in err
    with pytest.raises(KeyboardInterrupt):  # without a terminal, Ctrl-C ends the program
        run(
            llm,
            GREEDY,
            None,
            "m",
            mock.Mock(isatty=lambda: False, readline=mock.Mock(side_effect=stop)),
            io.StringIO(),
            io.StringIO(),
        )


def test_ctrl_c_stops_the_reply_only(llm, monkeypatch):
    handler, step, count = signal.getsignal(signal.SIGINT), llm.step, iter(range(10**6))

    def step_with_signal():
        if next(count) == 4:
            signal.raise_signal(signal.SIGINT)
        return step()

    monkeypatch.setattr(llm, "step", step_with_signal)
    out, err = interactive(llm, ["the cat\n", "the dog\n", ""], monkeypatch, NO_COLOR="1")
    assert err.count("[stopped]") == 1 and "[cut at" in err and out.count("\n") >= 2
    assert signal.getsignal(signal.SIGINT) is handler and llm.pool.owned == 0


def test_a_second_ctrl_c_ends_a_reply_that_hangs(llm, monkeypatch):
    handler = signal.getsignal(signal.SIGINT)
    monkeypatch.setattr(
        llm,
        "step",
        lambda: [signal.raise_signal(signal.SIGINT), signal.raise_signal(signal.SIGINT)],
    )
    with pytest.raises(KeyboardInterrupt):
        interactive(llm, ["the cat\n"], monkeypatch)
    assert signal.getsignal(signal.SIGINT) is handler and not llm.busy and llm.pool.owned == 0


def test_in_a_thread(llm, monkeypatch):
    """A chat runs in a thread that is not the main thread, where signal handlers cannot be set."""
    got = []
    t = threading.Thread(
        target=lambda: got.append(interactive(llm, ["the cat\n", ""], monkeypatch))
    )
    t.start(), t.join()
    assert "[cut at" in got[0][1]


class Child:
    """`lamoe chat` in a pseudo-terminal. `seen` holds its output so far."""

    def __init__(self, *argv):
        self.pid, self.fd = pty.fork()
        if self.pid == 0:
            # A shell that runs the tests in the background makes them ignore SIGINT.
            signal.signal(signal.SIGINT, signal.SIG_DFL)
            env = {
                **os.environ,
                "NO_COLOR": "1",
                "TERM": "dumb",
                "OMP_NUM_THREADS": "1",
                "PYTHONPATH": os.pathsep.join(sys.path),
            }
            os.execve(sys.executable, [sys.executable, "-m", "lamoe", "chat", *map(str, argv)], env)
        self.seen, self.at = "", 0

    def until(self, *words):
        """Wait until these words appear in this order.

        Output that an earlier wait consumed is skipped.
        """
        for word in words:
            self._read(lambda: self.seen.find(word, self.at) >= 0, word)
            self.at = self.seen.find(word, self.at) + len(word)

    def more(self, characters):
        self._read(lambda: len(self.seen) >= self.at + characters, f"{characters} characters")

    def _read(self, done, what, seconds=30):
        deadline = time.monotonic() + seconds
        while not done():
            ready, _, _ = select.select([self.fd], [], [], max(0, deadline - time.monotonic()))
            assert ready, f"{what!r} did not come in {seconds} s:\n{self.seen[self.at :]}"
            try:
                self.seen += os.read(self.fd, 1 << 16).decode("utf-8", "replace")
            except OSError:  # Linux reports the end of a terminal as an error
                raise AssertionError(f"it ended before {what!r}:\n{self.seen[self.at :]}") from None

    def type(self, text):
        os.write(self.fd, text.encode())

    def end(self, seconds=30) -> int:
        deadline = time.monotonic() + seconds
        while time.monotonic() < deadline:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                os.close(self.fd)
                return os.waitstatus_to_exitcode(status)
            time.sleep(0.02)
        os.kill(self.pid, signal.SIGKILL)
        os.waitpid(self.pid, 0)
        raise AssertionError("it did not end")


@pytest.fixture
def endless(parts, tmp_path):
    """Save a model whose replies are long enough to be stopped. Return its folder."""
    from lamoe.checkpoints import save

    model, tok = parts
    roomy = Transformer(model.config.replace(max_position_embeddings=20_000))
    roomy.load_state_dict(model.state_dict())
    with torch.no_grad():
        roomy.head.weight[tok.eos_id] = 0.0  # EOS is never the most likely token
    save(roomy, tmp_path / "model")
    tok.save(tmp_path / "model")
    return tmp_path / "model"


def test_in_a_real_terminal(endless, tmp_path):
    c = Child(endless, "--temperature", 0, "--max-tokens", 15_000, "--threads", 1)
    c.until("context 20000 tokens", "> ")
    c.type("/hlp\n")
    c.until("did you mean '/help'?", "> ")
    for _ in range(2):
        c.type("the cat\n")
        c.until("the cat\r\n")
        c.more(40)
        c.type("\x03")
        c.until("[stopped]", "> ")
    c.type(f"/save {tmp_path / 'talk'}\n")
    c.until("[saved ", "> ")
    # If the signal comes before readline waits for input, readline notices it at the next key.
    time.sleep(0.3)
    c.type("\x03")
    time.sleep(0.3)
    c.type("\x7f")  # a key press, in case the signal came before readline waited for input
    c.until("[Ctrl-C again or /quit leaves]", "> ")
    c.type("\x04")
    assert c.end() == 0
    assert json.loads((tmp_path / "talk").read_text())["messages"][0] == {
        "role": "user",
        "content": "the cat",
    }


# ---- command-line options ----
def test_options_of_the_verb(trained, capsys, monkeypatch):
    def out(*argv, text="hi\n"):
        monkeypatch.setattr(sys, "stdin", io.StringIO(text))
        code = cli.main(["chat", str(trained), *map(str, argv)])
        return code, *capsys.readouterr()

    code, greedy, _ = out("--temperature", 0, "--max-tokens", 10)
    assert code == 0 and len(greedy) > 5
    assert (
        out("--max-tokens", 10, "--top-k", 1)[1]
        == out("--max-tokens", 10, "--top-p", 1e-6)[1]
        == out("--max-tokens", 10, "--min-p", 1)[1]
        == greedy
    )
    assert (
        out("--seed", 1, "--temperature", 3)[1]
        == out("--seed", 1, "--temperature", 3)[1]
        != out("--seed", 2, "--temperature", 3)[1]
    )
    assert (
        out("--temperature", 0, "--max-tokens", 10, "--stop", greedy[3:5])[1]
        == greedy[: greedy.index(greedy[3:5])].rstrip(" ") + "\n"
        or greedy[3] == " "
    )
    assert out("--system", "be a cat", text="/system\n")[2] == "be a cat\n"
    assert out("--dtype", "bfloat16", "--cache", "fp32", text="/quit\n") == (0, "", "")
    code, _, err = out("--cache", "bf61")
    assert code == 2 and "lamoe chat: unknown cache format 'bf61', did you mean 'bf16'?" in err
    assert out("--temperature", "nan")[0] == 2 and out(text="zq " * 100)[0] == 1
