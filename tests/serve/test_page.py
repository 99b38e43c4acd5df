"""Tests of the behaviour of the web page in headless Chromium.

Most tests use the fake server page_server.py. The last ones use the real server with a tiny random
model. test_page_looks.py tests the appearance and the security of the page.
"""

import json
import re
import subprocess
import sys
from pathlib import Path

import pytest
from playwright.sync_api import expect

import lamoe
from chromium import WIDE, browser, done, page, reply, send, server, stored, tabs  # noqa: F401 (some are fixtures)
from lamoe.model.config import ModelConfig
from lamoe.model.transformer import Transformer
from lamoe.text.tokenizer import Tokenizer
from lamoe.train import checkpoint
from page_server import WINDOW
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)


# ---- messages ------------------------------------------------------------------------------------
def test_reply_streams_in_as_markdown(page, server):
    server.delay = 0.02
    send(page, "tell me about the cache", wait=False)
    expect(reply(page)).to_have_attribute("aria-busy", "true")
    expect(reply(page)).to_contain_text("latent vector")
    assert "the paper" not in reply(page).inner_text()  # the reply is still incomplete
    expect(page.locator("#stop")).to_be_visible()
    server.delay = 0
    done(page)
    prose = reply(page).locator(".prose")
    expect(prose.locator("ol > li")).to_have_count(3)
    expect(prose.locator("strong")).to_have_text("one latent vector")
    expect(prose.locator("pre .hljs-keyword").first).to_have_text("def")
    expect(prose.locator("table tbody tr")).to_have_count(3)
    expect(prose.locator("blockquote a")).to_have_attribute("rel", "noopener noreferrer")
    assert "135 tokens" in reply(page).locator(".meta").inner_text()
    assert server.bodies == [
        {
            "model": server.model,
            "messages": [{"role": "user", "content": "tell me about the cache"}],
            "temperature": 0.7,
            "top_p": 0.95,
            "top_k": 0,
            "min_p": 0,
            "max_tokens": 1024,
            "stream": True,
            "stream_options": {"include_usage": True},
        }
    ]
    send(page, "and then?")
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    expect(page.locator("#list .open")).to_have_text("tell me about the cache")


def test_shift_enter_adds_a_line_and_empty_messages_are_not_sent(page, server):
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Enter")
    page.locator("#input").fill("  ")
    page.keyboard.press("Enter")
    page.locator("#input").fill("one")
    page.keyboard.press("Shift+Enter")
    page.keyboard.type("two")
    assert not server.bodies
    page.keyboard.press("Enter")
    done(page)
    assert server.bodies[0]["messages"][0]["content"] == "one\ntwo"


@pytest.mark.parametrize("how", ["Escape", "button"])
def test_stop_keeps_the_partial_reply_and_closes_the_connection(page, server, how):
    send(page, "slow", wait=False)
    expect(reply(page)).to_contain_text("word word")
    if how == "button":
        page.get_by_role("button", name="Stop").click()
    else:
        page.keyboard.press("Escape")
    done(page)
    expect(reply(page).locator(".note")).to_have_text("You stopped this reply.")
    for _ in range(40):
        if server.dropped:
            break
        page.wait_for_timeout(25)
    assert server.dropped == 1 and server.running == 0
    kept = stored(page)[0]["messages"][1]["versions"][0]
    assert kept["finish"] == "stopped" and kept["content"].startswith("word word")
    send(page, "go on")
    assert server.bodies[1]["messages"][1] == {"role": "assistant", "content": kept["content"]}


def test_regenerate_adds_a_version(page, server):
    send(page, "please cut")
    page.keyboard.press("Alt+r")
    done(page)
    assert [len(b["messages"]) for b in server.bodies] == [1, 1]
    expect(reply(page).locator(".versions")).to_contain_text("2 / 2")
    reply(page).get_by_role("button", name="Previous version").click()
    expect(reply(page).locator(".versions")).to_contain_text("1 / 2")
    page.reload()
    expect(reply(page).locator(".versions")).to_contain_text("1 / 2")
    reply(page).get_by_role("button", name="Regenerate").click()
    done(page)
    expect(reply(page).locator(".versions")).to_contain_text("3 / 3")


def test_edit_the_last_message(page, server):
    send(page, "first")
    send(page, "secnod")
    page.keyboard.press("ArrowUp")
    box = page.get_by_label("Edit message")
    expect(box).to_be_focused()
    page.keyboard.press("Escape")
    expect(page.locator(".msg.user").last).to_have_text("secnod")
    page.locator(".msg.user").last.hover()
    page.locator(".msg.user").last.get_by_role("button", name="Edit message").click()
    box.fill("second")
    page.keyboard.press("Enter")
    done(page)
    expect(page.locator(".msg")).to_have_count(4)
    assert [m["content"] for m in server.bodies[-1]["messages"] if m["role"] == "user"] == [
        "first",
        "second",
    ]


def test_settings_are_sent_and_kept(page, server):
    page.keyboard.press("Alt+s")
    expect(page.locator("#system")).to_be_focused()
    page.keyboard.type("Answer in rhymes.")
    for name, value in (
        ("Temperature", "0"),
        ("Top k", "40"),
        ("Tokens per reply", "33"),
        ("Seed", "7"),
    ):
        page.get_by_label(name, exact=True).fill(value)
    # 5 is above the limit of top p: the field is marked as invalid and its value is not sent.
    page.get_by_label("Top p", exact=True).fill("5")
    page.get_by_label("Min p, slider").fill("0.1")
    expect(page.get_by_label("Min p", exact=True)).to_have_value("0.1")
    send(page, "hello")
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Answer in rhymes."}
    assert {
        k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")
    } == {"temperature": 0, "top_p": 0.95, "top_k": 40, "min_p": 0.1, "max_tokens": 33, "seed": 7}
    page.reload()
    page.get_by_role("tab", name="Settings").click()
    expect(page.locator("#system")).to_have_value("Answer in rhymes.")
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")


# ---- storing conversations -----------------------------------------------------------------------
def test_reload_keeps_conversation_and_draft(page):
    send(page, "remember me")
    page.locator("#input").fill("half a thought")
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator(".msg.user")).to_have_text("remember me")
    expect(reply(page).locator("table tbody tr")).to_have_count(3)
    expect(page.locator("#input")).to_have_value("half a thought")
    expect(page.locator("#title")).to_have_text("remember me")


def test_reload_keeps_a_partial_reply(page, server):
    send(page, "slow", wait=False)
    expect(reply(page)).to_contain_text("word word")
    page.reload()
    expect(reply(page)).to_contain_text("word word")
    expect(reply(page).locator(".note")).to_have_text("The page was closed while this was written.")
    expect(reply(page)).to_have_attribute("aria-busy", "false")
    expect(reply(page).get_by_role("button", name="Regenerate")).to_be_enabled()


def test_list_rename_delete_and_undo(page):
    for text in ("alpha", "beta"):
        page.keyboard.press("Alt+n")
        send(page, text)
    expect(page.locator("#list .open")).to_have_text(["beta", "alpha"])
    page.keyboard.press("Alt+ArrowDown")
    expect(page.locator("#title")).to_have_text("alpha")
    page.get_by_role("button", name="Options for alpha").click()
    page.locator("#menu").get_by_role("button", name="Rename").click()
    page.keyboard.type("Greek <b>letters</b>")
    page.keyboard.press("Enter")
    expect(page.locator("#list .open")).to_have_text(["beta", "Greek <b>letters</b>"])
    page.locator("#list .open").first.focus()
    page.keyboard.press("ArrowDown")
    page.keyboard.press("Delete")
    expect(page.locator("#list .open")).to_have_text(["beta"])
    page.reload()
    expect(page.locator("#list .open")).to_have_text(["beta"])
    page.locator("#list .open").focus()
    page.keyboard.press("Delete")
    expect(page.locator("#empty")).to_be_visible()
    page.get_by_role("button", name="Undo").click()
    expect(page.locator(".msg.user")).to_have_text("beta")
    assert [c["title"] for c in stored(page)] == ["beta"]


def test_search_conversations(tabs, server):
    context = tabs.context()
    context.add_init_script("""
        const day = 864e5;
        for (let i = 0; i < 9; i++) {
          localStorage[`lamoe:c:${i}`] = JSON.stringify({
            id: `${i}`,
            title: `talk ${i}`,
            updated: Date.now() - i * day,
            messages: [{role: 'user', content: i == 4 ? 'the needle' : 'hay'}],
          });
        }
    """)
    page = tabs.open(server.url, context)
    expect(page.locator("#list .open")).to_have_count(9)
    expect(page.locator("#list .day")).to_have_text(
        ["Today", "Yesterday", "The last seven days", "Older"]
    )
    page.get_by_label("Find a conversation").fill("NEEDLE")
    expect(page.locator("#list .open")).to_have_text(["talk 4"])
    page.get_by_label("Find a conversation").fill("nothing like it")
    expect(page.locator("#list-empty")).to_have_text("Nothing found.")


def test_export_conversations(page):
    send(page, "what to keep")

    def saved(name: str) -> tuple[str, str]:
        with page.expect_download() as info:
            page.get_by_role("button", name=name).click()
        return info.value.suggested_filename, Path(info.value.path()).read_text()

    page.get_by_role("button", name="Options for what to keep").click()
    name, text = saved("Export as Markdown")
    assert name == "what-to-keep.md"
    assert text.startswith(
        "# what to keep\n\n## You\n\nwhat to keep\n\n## Model\n\nAttention keeps"
    )
    page.get_by_role("button", name="Options for what to keep").click()
    assert json.loads(saved("Export as JSON")[1])["messages"][0]["content"] == "what to keep"
    assert [c["title"] for c in json.loads(saved("Export all conversations")[1])] == [
        "what to keep"
    ]


def test_other_tabs_see_a_new_conversation(tabs, server):
    context = tabs.context()
    one, two = tabs.open(server.url, context), tabs.open(server.url, context)
    send(one, "from the first tab")
    expect(two.locator("#list .open")).to_have_text("from the first tab")


def test_reply_continues_while_another_conversation_is_open(page, server):
    server.delay = 0.01
    send(page, "first", wait=False)
    expect(reply(page)).to_contain_text("Attention")
    page.keyboard.press("Alt+n")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()  # the new conversation is not busy
    expect(page.locator("#list li.busy")).to_have_count(1)
    expect(page.locator("#list li.busy")).to_have_count(0)
    page.locator("#list .open").click()
    expect(reply(page)).to_contain_text("the paper")


def test_limit_of_concurrent_replies(page, server):
    server.delay = 0.02
    for i in range(4):
        page.keyboard.press("Alt+n")
        send(page, f"{i} slow", wait=False)
    page.keyboard.press("Alt+n")
    send(page, "one too many", wait=False)
    expect(page.locator(".toast")).to_contain_text("4 replies are being written already")
    expect(page.locator("#input")).to_have_value("one too many")
    expect(page.locator("#queue")).to_have_text("4, 0")
    assert len(server.bodies) == 4


def test_damaged_or_full_storage(tabs, server):
    context = tabs.context()
    context.add_init_script("""
        localStorage['lamoe:c:bad'] = '{"id": 3';
        localStorage['lamoe:c:odd'] = '{"id":"odd","title":"t","messages":[{"role":"x"}]}';
        localStorage['lamoe:prefs'] = 'nonsense';
        Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') };
    """)
    page = tabs.open(server.url, context)
    expect(page.locator("#list-empty")).to_be_visible()
    send(page, "hello")
    expect(page.locator(".toast")).to_contain_text("storage for this page is full")
    expect(reply(page)).to_contain_text("latent vector")


# ---- failures ------------------------------------------------------------------------------------
def test_key_is_asked_for_until_it_is_right(tabs, server):
    server.key = "right-key"
    page = tabs.open(server.url, ready=False)
    dialog = page.locator("#key-dialog")
    expect(dialog).to_be_visible()
    expect(page.locator("#key")).to_be_focused()
    for wrong, says in (("wrong", "refused this key"), ("schlüssel", "letters, digits and signs")):
        page.locator("#key").fill(wrong)
        page.keyboard.press("Enter")
        expect(page.locator("#key-why")).to_contain_text(says)
    page.locator("#key").fill("right-key")
    page.get_by_role("button", name="Use this key").click()
    expect(dialog).to_be_hidden()
    expect(page.locator("#dot")).to_have_class("dot ready")
    send(page, "hello")
    expect(reply(page)).to_contain_text("latent vector")
    assert page.evaluate("sessionStorage['lamoe:key']") == "right-key"
    assert "right-key" not in page.evaluate("JSON.stringify(localStorage)")
    # The server restarts with another key. The next message asks for the key, then continues.
    server.key = "another"
    send(page, "and now?", wait=False)
    expect(dialog).to_be_visible()
    page.locator("#key").fill("another")
    page.keyboard.press("Enter")
    done(page)
    expect(reply(page)).to_contain_text("latent vector")
    server.key = "third"
    send(page, "no", wait=False)
    expect(dialog).to_be_visible()
    page.keyboard.press("Escape")
    done(page)
    expect(reply(page).locator(".note")).to_contain_text("wants a key")


def test_page_waits_for_an_unreachable_server(page, server):
    server.down = True
    # When the user returns to the tab, the page polls the server at once.
    page.evaluate("document.dispatchEvent(new Event('visibilitychange'))")
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    send(page, "are you there?", wait=False)
    expect(reply(page)).to_contain_text("cannot be reached. Trying again in")
    server.down = False
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#banner")).to_be_hidden()
    done(page)
    expect(reply(page)).to_contain_text("latent vector")


def test_stop_waiting_for_a_server(page, server):
    server.down = True
    send(page, "anybody?", wait=False)
    expect(reply(page)).to_contain_text("Trying again in")
    page.keyboard.press("Escape")
    done(page)
    expect(reply(page).locator(".note")).to_have_text("You stopped this reply.")
    server.down = False


def test_lost_connection_keeps_the_partial_reply(page):
    send(page, "please die")
    expect(reply(page).locator(".note")).to_have_text(
        "The connection was lost before the reply was complete."
    )
    expect(reply(page)).to_contain_text("Attention keeps one latent vector")
    expect(reply(page).get_by_role("button", name="Regenerate")).to_be_enabled()


def test_page_waits_while_the_model_loads(tabs, server):
    server.loading = True
    page = tabs.open(server.url, ready=False)
    expect(page.locator("#banner")).to_have_text(
        "Not ready: the model is loading. You can write meanwhile."
    )
    send(page, "early", wait=False)
    expect(reply(page)).to_contain_text("not ready yet. Trying again in")
    server.loading = False
    done(page)
    expect(reply(page)).to_contain_text("latent vector")
    expect(page.locator("#banner")).to_be_hidden()


def test_page_waits_while_the_queue_is_full(page, server):
    server.busy_left = 1
    send(page, "busy", wait=False)
    expect(reply(page)).to_contain_text("queue is full. Trying again in 1 s")
    page.evaluate("() => { Date.now = () => 0 }")  # the clock jumps back
    done(page)
    expect(reply(page)).to_contain_text("latent vector")
    assert len(server.bodies) == 2


def test_server_error_is_shown(page):
    send(page, "broken")
    expect(reply(page).locator(".note")).to_have_text(
        "temperature is 9; it must be between 0 and 2"
    )


def test_token_limit_and_full_context_have_different_notes(page):
    send(page, "cut")
    expect(reply(page).locator(".note")).to_contain_text("Cut at the limit of 135 tokens")
    send(page, "full")
    expect(reply(page).locator(".note")).to_contain_text(
        f"The context is full: {WINDOW:,} of {WINDOW:,} tokens"
    )
    expect(page.locator("#context")).to_have_class("context bad")


def test_long_paste_is_counted_limited_and_folded(page, server):
    page.locator("#input").fill("word " * 40_000)
    expect(page.locator("#draft-note")).to_contain_text(
        f"50,000 tokens with the conversation; this model reads {WINDOW:,}"
    )
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Enter")
    assert not server.bodies
    height = page.locator("#composer").bounding_box()["height"]
    assert height < WIDE["height"] / 2
    text = "".join(f"line {i} of what was pasted\n" for i in range(200))
    page.locator("#input").fill(text)
    expect(page.locator("#draft-note")).to_contain_text(
        f"{len(text) // 4:,} tokens with the conversation, of"
    )
    page.keyboard.press("Enter")
    done(page)
    assert server.bodies[0]["messages"][0]["content"] == text
    said = page.locator(".msg.user .said")
    assert said.bounding_box()["height"] < 400
    page.get_by_role("button", name=re.compile("Show all: 201 lines")).click()
    assert said.bounding_box()["height"] > 2000


# ---- the real server -----------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(trained, tmp_path_factory):
    """The URL of `lamoe serve` with a tiny random model, a trained tokenizer, and a key."""
    folder = tmp_path_factory.mktemp("real") / "tiny-random"
    config = ModelConfig(
        **{**BODY, "max_position_embeddings": 256, "initializer_range": 0.2}, **MLA, **MOE
    )
    lamoe.save(Transformer(config).init_weights(1).eval(), folder)
    Tokenizer.load(checkpoint.latest(trained) / "model").save(folder)
    options = "--port 0 --api-key secret --threads 1 --kv-cache-dtype 6bit".split()
    process = subprocess.Popen(
        [sys.executable, "-m", "lamoe", "serve", str(folder), *options],
        stderr=subprocess.PIPE,
        text=True,
        cwd=Path(__file__).resolve().parents[2],
    )
    output = []
    for line in process.stderr:
        output.append(line)
        if line.startswith("{") and "url" in (event := json.loads(line)):
            break
    else:
        raise AssertionError("the server ended: " + "".join(output))
    yield event["url"]
    process.kill()
    process.wait()


def test_page_with_the_real_server(tabs, real):
    page = tabs.open(real, ready=False)
    expect(page.locator("#key-dialog")).to_be_visible()  # even while the model loads
    page.locator("#key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#dot")).to_have_class("dot ready", timeout=60_000)
    expect(page.locator("#model")).to_contain_text("tiny-random")
    page.keyboard.press("Alt+s")
    page.get_by_label("Seed", exact=True).fill("1")
    page.get_by_label("Tokens per reply", exact=True).fill("24")
    page.get_by_role("tab", name="Live").click()
    send(page, "the cat sat on the mat")
    note = reply(page).locator(".note")
    expect(note).to_contain_text("Cut at the limit of 24 tokens")
    expect(page.locator("#heat")).to_be_visible()
    expect(page.locator("#hits-reply")).to_contain_text("0 of ")
    first = stored(page)[0]["messages"][1]["versions"][0]
    assert first["usage"]["completion_tokens"] == 24 and first["content"]
    page.keyboard.press("Alt+r")
    done(page)
    # The prompt was found in the cache.
    expect(page.locator("#hits-reply")).not_to_contain_text("0 of ")
    second = stored(page)[0]["messages"][1]["versions"][1]
    # The replies are equal because their seed is equal.
    assert second["content"] == first["content"]
    page.keyboard.press("Alt+n")
    page.keyboard.press("Alt+s")
    page.get_by_label("Tokens per reply", exact=True).fill("1000")
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_role("tab", name="Live").click()
    send(page, "the dog ran on the hill")
    expect(note.last).to_contain_text("The context is full: 256 of 256 tokens")
    expect(page.locator("#pool-text")).to_have_text(re.compile("^0 of "))  # all pages are free
    page.locator("#input").fill("the bird sang " * 400)
    expect(page.locator("#draft-note")).to_contain_text("this model reads 256. Shorten it to send.")
    expect(page.locator("#send")).to_be_disabled()
