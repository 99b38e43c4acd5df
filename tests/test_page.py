"""The page of `lamoe serve` in headless Chromium: against page_server.py (replies a random model would never give, and servers that fail), and at the
end against the real server with a tiny random model. Every test also fails when the browser reports an error of the page, a violation of its
Content-Security-Policy, or a request to anywhere else."""

import json
import re
import shutil
import subprocess
import sys
import warnings
from pathlib import Path

import pytest
from page_server import EVIL, PAGE, WINDOW, Server
from tiny_run import BODY, MLA, MOE, trained  # noqa: F401 (trained is a fixture)

CHROMIUM = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
if CHROMIUM is None:
    warnings.warn("NO CHROMIUM: nothing of the page is tested. On Debian: apt-get install chromium", stacklevel=1)
    pytest.skip("NO CHROMIUM: nothing of the page is tested. On Debian: apt-get install chromium", allow_module_level=True)
from playwright.sync_api import Page, expect, sync_playwright  # noqa: E402

FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking", "--disable-component-update", "--disable-sync"]
WIDE, PHONE, NARROWEST = {"width": 1280, "height": 800}, {"width": 390, "height": 844}, {"width": 360, "height": 640}
WATCH = "window.violations = []; addEventListener('securitypolicyviolation', e => violations.push(`${e.violatedDirective} ${e.blockedURI} ${e.sample}`))"


@pytest.fixture(scope="module")
def browser():
    with sync_playwright() as p:
        b = p.chromium.launch(executable_path=CHROMIUM, args=FLAGS)
        yield b
        b.close()


@pytest.fixture
def server():
    s = Server().begin()
    yield s
    s.down = True
    s.shutdown()
    s.server_close()


class Tabs:
    """Opens pages and remembers what each of them did wrong."""

    def __init__(self, browser):
        self.browser, self.contexts, self.pages, self.wrong = browser, [], [], []

    def context(self, size=WIDE, **options):
        self.contexts.append(self.browser.new_context(viewport=size, **options))
        self.contexts[-1].set_default_timeout(8000)
        self.contexts[-1].add_init_script(WATCH)
        return self.contexts[-1]

    def open(self, url: str, context=None, ready: bool = True, **options) -> Page:
        page = (context or self.context(**options)).new_page()
        self.pages.append(page)
        page.on("pageerror", lambda e: self.wrong.append(f"error of the page: {e}"))
        page.on("console", lambda m: self.wrong.append(f"console: {m.text}") if m.type == "error" and "Failed to load resource" not in m.text else None)
        page.on("request", lambda r: self.wrong.append(f"request to {r.url}") if not r.url.startswith((url, "data:", "blob:")) else None)
        page.goto(url)
        if ready:
            expect(page.locator("#dot")).to_have_class("dot ready")
        return page

    def close(self) -> list[str]:
        found = self.wrong + [f"CSP: {v}" for p in self.pages if not p.is_closed() for v in p.evaluate("window.violations")]
        for c in self.contexts:
            c.close()
        return found


@pytest.fixture
def tabs(browser):
    t = Tabs(browser)
    yield t
    assert t.close() == []


@pytest.fixture
def page(tabs, server) -> Page:
    return tabs.open(server.url)


def send(page: Page, text: str, wait: bool = True):
    page.locator("#input").fill(text)
    page.keyboard.press("Enter")
    if wait:
        done(page)


def done(page: Page):
    expect(page.locator(".msg.model").last).to_have_attribute("aria-busy", "false", timeout=8000)
    expect(page.locator("#send")).to_be_visible()


def reply(page: Page):
    return page.locator(".msg.model").last


def stored(page: Page) -> list[dict]:
    return page.evaluate("Object.keys(localStorage).filter(k => k.startsWith('lamoe:c:')).map(k => JSON.parse(localStorage[k]))")


# ---- talking ---------------------------------------------------------------------------------------------------------------
def test_a_message_is_sent_and_its_reply_streams_in_as_markdown(page, server):
    server.delay = 0.02
    send(page, "tell me about the cache", wait=False)
    expect(reply(page)).to_have_attribute("aria-busy", "true")
    expect(reply(page)).to_contain_text("latent vector")
    assert "the paper" not in reply(page).inner_text()  # it streams: the end is not there yet
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
    assert server.bodies == [{"model": server.model, "messages": [{"role": "user", "content": "tell me about the cache"}], "temperature": 0.7, "top_p": 0.95,
                              "top_k": 0, "min_p": 0, "max_tokens": 1024, "stream": True, "stream_options": {"include_usage": True}}]
    send(page, "and then?")
    assert [m["role"] for m in server.bodies[1]["messages"]] == ["user", "assistant", "user"]
    expect(page.locator("#list .open")).to_have_text("tell me about the cache")


def test_shift_enter_makes_a_line_and_nothing_is_sent_without_words(page, server):
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
def test_stop_keeps_what_was_written_and_leaves_the_connection(page, server, how):
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


def test_regenerate_makes_a_second_version_that_can_be_compared(page, server):
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


def test_the_last_message_can_be_edited(page, server):
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
    assert [m["content"] for m in server.bodies[-1]["messages"] if m["role"] == "user"] == ["first", "second"]


def test_settings_go_with_the_request_and_stay(page, server):
    page.keyboard.press("Alt+s")
    expect(page.locator("#system")).to_be_focused()
    page.keyboard.type("Answer in rhymes.")
    for name, value in (("Temperature", "0"), ("Top k", "40"), ("Tokens per reply", "33"), ("Seed", "7")):
        page.get_by_label(name, exact=True).fill(value)
    page.get_by_label("Top p", exact=True).fill("5")  # above its limit: shown as wrong, not used
    page.get_by_label("Min p, slider").fill("0.1")
    expect(page.get_by_label("Min p", exact=True)).to_have_value("0.1")
    send(page, "hello")
    body = server.bodies[0]
    assert body["messages"][0] == {"role": "system", "content": "Answer in rhymes."}
    assert {k: body[k] for k in ("temperature", "top_p", "top_k", "min_p", "max_tokens", "seed")} == {"temperature": 0, "top_p": 0.95, "top_k": 40, "min_p": 0.1,
                                                                                                            "max_tokens": 33, "seed": 7}
    page.reload()
    page.get_by_role("tab", name="Settings").click()
    expect(page.locator("#system")).to_have_value("Answer in rhymes.")
    page.get_by_role("button", name="Back to the defaults").click()
    expect(page.get_by_label("Temperature", exact=True)).to_have_value("0.7")


# ---- keeping ---------------------------------------------------------------------------------------------------------------
def test_a_reload_keeps_conversation_and_draft(page):
    send(page, "remember me")
    page.locator("#input").fill("half a thought")
    page.wait_for_timeout(500)
    page.reload()
    expect(page.locator(".msg.user")).to_have_text("remember me")
    expect(reply(page).locator("table tbody tr")).to_have_count(3)
    expect(page.locator("#input")).to_have_value("half a thought")
    expect(page.locator("#title")).to_have_text("remember me")


def test_a_reload_in_the_middle_of_a_reply_keeps_what_had_come(page, server):
    send(page, "slow", wait=False)
    expect(reply(page)).to_contain_text("word word")
    page.reload()
    expect(reply(page)).to_contain_text("word word")
    expect(reply(page).locator(".note")).to_have_text("The page was closed while this was written.")
    expect(reply(page)).to_have_attribute("aria-busy", "false")
    expect(reply(page).get_by_role("button", name="Regenerate")).to_be_enabled()


def test_conversations_are_listed_renamed_deleted_and_brought_back(page):
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


def test_many_conversations_can_be_searched(tabs, server):
    context = tabs.context()
    context.add_init_script("""for (let i = 0; i < 9; i++) localStorage[`lamoe:c:${i}`] = JSON.stringify({id: `${i}`, title: `talk ${i}`, updated: Date.now() - i * 864e5,
        messages: [{role: 'user', content: i == 4 ? 'the needle' : 'hay'}]})""")
    page = tabs.open(server.url, context)
    expect(page.locator("#list .open")).to_have_count(9)
    expect(page.locator("#list .day")).to_have_text(["Today", "Yesterday", "The last seven days", "Older"])
    page.get_by_label("Find a conversation").fill("NEEDLE")
    expect(page.locator("#list .open")).to_have_text(["talk 4"])
    page.get_by_label("Find a conversation").fill("nothing like it")
    expect(page.locator("#list-empty")).to_have_text("Nothing found.")


def test_conversations_can_be_exported(page):
    send(page, "what to keep")

    def saved(name: str) -> tuple[str, str]:
        with page.expect_download() as info:
            page.get_by_role("button", name=name).click()
        return info.value.suggested_filename, Path(info.value.path()).read_text()

    page.get_by_role("button", name="Options for what to keep").click()
    name, text = saved("Export as Markdown")
    assert name == "what-to-keep.md" and text.startswith("# what to keep\n\n## You\n\nwhat to keep\n\n## Model\n\nAttention keeps **one latent vector**")
    page.get_by_role("button", name="Options for what to keep").click()
    assert json.loads(saved("Export as JSON")[1])["messages"][0]["content"] == "what to keep"
    assert [c["title"] for c in json.loads(saved("Export all conversations")[1])] == ["what to keep"]


def test_another_tab_sees_the_change(tabs, server):
    context = tabs.context()
    one, two = tabs.open(server.url, context), tabs.open(server.url, context)
    send(one, "from the first tab")
    expect(two.locator("#list .open")).to_have_text("from the first tab")


def test_a_reply_goes_on_while_another_conversation_is_open(page, server):
    server.delay = 0.01
    send(page, "first", wait=False)
    expect(reply(page)).to_contain_text("Attention")
    page.keyboard.press("Alt+n")
    expect(page.locator("#empty")).to_be_visible()
    expect(page.locator("#send")).to_be_visible()  # this one is not busy
    expect(page.locator("#list li.busy")).to_have_count(1)
    expect(page.locator("#list li.busy")).to_have_count(0)
    page.locator("#list .open").click()
    expect(reply(page)).to_contain_text("the paper")


def test_damaged_and_full_storage_do_no_harm(tabs, server):
    context = tabs.context()
    context.add_init_script("""localStorage['lamoe:c:bad'] = '{"id": 3'; localStorage['lamoe:c:odd'] = '{"id":"odd","title":"t","messages":[{"role":"x"}]}';
        localStorage['lamoe:prefs'] = 'nonsense'; Storage.prototype.setItem = () => { throw new DOMException('full', 'QuotaExceededError') }""")
    page = tabs.open(server.url, context)
    expect(page.locator("#list-empty")).to_be_visible()
    send(page, "hello")
    expect(page.locator(".toast")).to_contain_text("storage for this page is full")
    expect(reply(page)).to_contain_text("latent vector")


# ---- when things go wrong ----------------------------------------------------------------------------------------------------
def test_a_wrong_key_is_asked_for_again(tabs, server):
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
    assert page.evaluate("sessionStorage['lamoe:key']") == "right-key" and "right-key" not in page.evaluate("JSON.stringify(localStorage)")
    server.key = "another"  # the server was started anew: the next message asks, and goes on by itself
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


def test_a_server_that_is_gone_is_waited_for(page, server):
    server.down = True
    expect(page.locator("#banner")).to_contain_text("cannot be reached")
    send(page, "are you there?", wait=False)
    expect(reply(page)).to_contain_text("cannot be reached. Trying again in")
    server.down = False
    page.get_by_role("button", name="Try now").click()
    expect(page.locator("#banner")).to_be_hidden()
    done(page)
    expect(reply(page)).to_contain_text("latent vector")


def test_waiting_for_a_server_can_be_stopped(page, server):
    server.down = True
    send(page, "anybody?", wait=False)
    expect(reply(page)).to_contain_text("Trying again in")
    page.keyboard.press("Escape")
    done(page)
    expect(reply(page).locator(".note")).to_have_text("You stopped this reply.")
    server.down = False


def test_a_lost_connection_keeps_the_beginning(page):
    send(page, "please die")
    expect(reply(page).locator(".note")).to_have_text("The connection was lost before the reply was complete.")
    expect(reply(page)).to_contain_text("Attention keeps one latent vector")
    expect(reply(page).get_by_role("button", name="Regenerate")).to_be_enabled()


def test_a_model_that_loads_is_waited_for(tabs, server):
    server.loading = True
    page = tabs.open(server.url, ready=False)
    expect(page.locator("#banner")).to_contain_text("loading the model")
    send(page, "early", wait=False)
    expect(reply(page)).to_contain_text("not ready yet. Trying again in")
    server.loading = False
    done(page)
    expect(reply(page)).to_contain_text("latent vector")
    expect(page.locator("#banner")).to_be_hidden()


def test_a_full_queue_is_waited_for(page, server):
    server.busy_left = 1
    send(page, "busy", wait=False)
    expect(reply(page)).to_contain_text("queue is full. Trying again in 1 s")
    done(page)
    expect(reply(page)).to_contain_text("latent vector")
    assert len(server.bodies) == 2


def test_a_refusal_is_told_in_the_servers_words(page):
    send(page, "broken")
    expect(reply(page).locator(".note")).to_have_text("temperature is 9; it must be between 0 and 2")


def test_the_two_ends_by_length_are_told_apart(page):
    send(page, "cut")
    expect(reply(page).locator(".note")).to_contain_text("Cut at the limit of 135 tokens")
    send(page, "full")
    expect(reply(page).locator(".note")).to_contain_text(f"The context is full: {WINDOW:,} of {WINDOW:,} tokens")
    expect(page.locator("#context")).to_have_class("context bad")


def test_a_long_paste_is_counted_refused_when_hopeless_and_folded_when_sent(page, server):
    page.locator("#input").fill("word " * 40_000)
    expect(page.locator("#draft-note")).to_contain_text(f"50,000 tokens with the conversation; this model reads {WINDOW:,}")
    expect(page.locator("#send")).to_be_disabled()
    page.keyboard.press("Enter")
    assert not server.bodies
    height = page.locator("#composer").bounding_box()["height"]
    assert height < WIDE["height"] / 2
    text = "".join(f"line {i} of what was pasted\n" for i in range(200))
    page.locator("#input").fill(text)
    expect(page.locator("#draft-note")).to_contain_text(f"{len(text) // 4:,} tokens with the conversation, of")
    page.keyboard.press("Enter")
    done(page)
    assert server.bodies[0]["messages"][0]["content"] == text
    said = page.locator(".msg.user .said")
    assert said.bounding_box()["height"] < 400
    page.get_by_role("button", name=re.compile("Show all: 201 lines")).click()
    assert said.bounding_box()["height"] > 2000


# ---- nothing gets in -----------------------------------------------------------------------------------------------------------
ALLOWED_TAGS = set("DIV P BR STRONG EM DEL CODE PRE SPAN A UL OL LI BLOCKQUOTE H2 H3 H4 H5 H6 HR TABLE THEAD TBODY TR TH TD BUTTON svg use".split())
VECTORS = [EVIL, "<script>pwned=1</script>", "<img src=x onerror=pwned=1>", "[a](javascript:pwned=1)", "[a](JaVaScRiPt:pwned=1)", "[a]( \x01javascript:pwned=1)",
           "[a](java\nscript:pwned=1)", "[a](vbscript:x)", "[a](data:text/html;base64,PHNjcmlwdD4=)", "<javascript:pwned=1>", "![x](javascript:pwned=1)",
           '[a](https://x.example "t\\" onmouseover=\\"pwned=1")', "[a](<https://x.example/\" onclick=\"pwned=1>)", "```\" onload=\"pwned=1\nx\n```", "`<img src=x onerror=pwned=1>`",
           "| <img src=x onerror=pwned=1> | [b](javascript:pwned=1) |\n|---|---|\n| <svg/onload=pwned=1> | c |", "# <iframe srcdoc='<script>parent.pwned=1</script>'>",
           "- <details open ontoggle=pwned=1>", "> <form><button formaction=javascript:pwned=1>x", "[r]\n\n[r]: javascript:pwned=1", "<a id=input name=scroll>x</a>",
           "&lt;script&gt;pwned=1&lt;/script&gt;", "<noscript><p title='</noscript><img src=x onerror=pwned=1>'>", "<!-- --!><img src=x onerror=pwned=1> -->",
           "<style>@import 'https://x.example/';*{display:none}</style>", "<base href=https://x.example/>", "<meta http-equiv=refresh content='0;url=https://x.example'>",
           "<link rel=stylesheet href=https://x.example/x.css>", "```html\n<img src=x onerror=pwned=1></code></pre><script>pwned=1</script>\n```", ">" * 3000 + "deep", "[" * 3000,
           "*" * 3000 + "a" + "*" * 3000, "\x00<scr\x00ipt>pwned=1</script>", "<x-\ud83d\ude00 onclick=pwned=1>", "http://x.example/<script>pwned=1</script>", "[a](/v1/models) [b](tel:1) [c](ftp://x.example) [d](#input) [e](//x.example)", "www.x.example\"onclick=pwned=1"]
RENDER = """async (vectors) => {
  const { Prose } = await import('/page/markdown.js');
  return vectors.map(v => {
    const el = document.createElement('div');
    document.body.append(el);
    new Prose(el).update(v);
    return { text: el.innerText, nodes: [...el.querySelectorAll('*')].map(n => [n.nodeName, [...n.attributes].map(a => [a.name, a.value])]) };
  });
}"""


def test_markdown_lets_no_html_through(page):
    for vector, out in zip(VECTORS, page.evaluate(RENDER, VECTORS)):
        for tag, attributes in out["nodes"]:
            assert tag in ALLOWED_TAGS, (vector, tag)
            for name, value in attributes:
                assert not name.startswith("on") and name not in ("style", "id", "name", "src", "srcdoc", "action", "formaction"), (vector, name, value)
                if name == "href":
                    assert re.match(r"https?://|mailto:|#i-", value), (vector, value)
    assert "<script>pwned=1</script>" in page.evaluate(RENDER, [VECTORS[1]])[0]["text"]  # shown, not dropped: a reader sees what the model said
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None


def test_nothing_that_anybody_says_becomes_part_of_the_page(tabs, server):
    server.model = "<img src=x onerror=pwned=1>"
    page = tabs.open(server.url)
    page.keyboard.press("Alt+s")
    page.locator("#system").fill(EVIL)
    send(page, f"{EVIL} evil")
    expect(reply(page)).to_contain_text('<img src=x onerror="window.pwned=1">')
    expect(page.locator("#model")).to_contain_text("<img src=x")
    page.locator("#list .open").focus()
    page.keyboard.press("F2")
    page.keyboard.type("<script>pwned=1</script>")
    page.keyboard.press("Enter")
    page.reload()
    expect(reply(page)).to_contain_text('<img src=x onerror="window.pwned=1">')
    assert page.evaluate("window.pwned") is None
    assert page.locator(":is(img, iframe, style, form:not(#composer, dialog form), base, object, embed, math):not(head *)").count() == 0
    assert page.locator("[id=input]").count() == 1 and page.locator("script").count() == 2


def test_the_browser_itself_refuses_html_from_text(tabs, server):
    """Should a later change write text as HTML after all, Trusted Types stop it; and with them the CSP stops inline code."""
    page = tabs.open(server.url)
    failed = page.evaluate("""() => { try { document.createElement('div').innerHTML = '<b>x</b>'; return 'taken' } catch (e) { return e.name } }""")
    assert failed == "TypeError"
    assert len(page.evaluate("new Promise(done => setTimeout(() => done(violations), 50))")) == 1
    page.evaluate("violations.length = 0")
    tabs.wrong.clear()


# ---- how it feels --------------------------------------------------------------------------------------------------------------
@pytest.mark.parametrize("size", [PHONE, NARROWEST], ids=["390", "360"])
def test_on_a_phone_nothing_is_wider_than_the_screen(tabs, server, size):
    page = tabs.open(server.url, size=size, has_touch=True, is_mobile=True)
    fits = "[document.documentElement, document.body, ...document.querySelectorAll('main, .scroll, .panel-body, .side, dialog[open]')].every(e => e.scrollWidth <= e.clientWidth + 1) && visualViewport.scale === 1"
    assert page.evaluate(fits)
    send(page, f"{'x' * 300} and {'longword' * 40}")
    assert page.evaluate(fits)
    assert page.locator("#input").bounding_box()["width"] > 0.8 * size["width"]
    for name, inside in (("side", "#new"), ("panel", "#bars")):
        expect(page.locator(f"#{name}")).not_to_be_in_viewport()
        page.locator(f"#{name}-open").tap()
        expect(page.locator(inside)).to_be_in_viewport(ratio=0.5)
        expect(page.locator(f"#{name}-close")).to_be_focused()
        assert page.locator("#main").evaluate("e => e.inert") and page.evaluate(fits)
        page.keyboard.press("Escape")
        expect(page.locator(f"#{name}")).not_to_be_visible()
        expect(page.locator(f"#{name}-open")).to_be_focused()
    page.locator("#settings-open").tap()
    expect(page.locator("#system")).to_be_in_viewport()
    assert page.evaluate(fits)
    small = page.evaluate("""[...document.querySelectorAll('main button, #panel button')].filter(b => b.checkVisibility() && b.offsetHeight < 24).map(b => b.outerHTML)""")
    assert small == []


def test_everything_works_by_keyboard(page, server):
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("?/")  # in a field these are just letters
    expect(page.locator("#input")).to_have_value("?/")
    page.locator("#input").fill("")
    page.locator("#title").evaluate("() => document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Alt+n")  # not while a dialog is open
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Alt+p")
    expect(page.locator("#panel")).to_be_hidden()
    page.keyboard.press("Alt+b")
    expect(page.locator("#side")).to_be_hidden()
    page.reload()
    expect(page.locator("#side")).to_be_hidden()  # it is remembered
    page.keyboard.press("Alt+b")
    page.keyboard.press("Alt+p")
    send(page, "hello")
    page.reload()
    expect(page.locator("#dot")).to_have_class("dot ready")
    page.locator(".skip").focus()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(page.evaluate("""() => { const e = document.activeElement; const s = getComputedStyle(e);
            return [e.id || e.getAttribute('aria-label') || e.className, s.outlineStyle !== 'none' || s.boxShadow !== 'none' || e.closest('.composer, .segments') !== null] }"""))
    names = [n for n, _ in order]
    places = [names.index(n) for n in ("new", "help-button", "panel-open", "Code, python", "input", "settings-open", "tab-live", "heat-details" if "heat-details" in names else "live")]
    assert places == sorted(places), names
    assert all(seen for n, seen in order if n not in ("", "body")), [n for n, seen in order if not seen]


def test_the_end_is_followed_unless_the_reader_has_left_it(page, server):
    send(page, "long")
    box = page.locator("#scroll")
    assert box.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    page.keyboard.press("PageUp")
    expect(page.locator("#latest")).to_be_visible()
    server.delay = 0.003
    page.locator("#input").fill("x")  # regenerating goes to the end again; scrolling up while it writes stays
    page.keyboard.press("Alt+r")
    expect(reply(page)).to_contain_text("Paragraph 8")
    page.keyboard.press("PageUp")
    top = box.evaluate("e => e.scrollTop")
    expect(reply(page)).to_contain_text("Paragraph 10")
    assert box.evaluate("e => e.scrollTop") == top
    page.locator("#latest").click()
    expect(page.locator("#latest")).to_be_hidden()
    page.keyboard.press("Escape")
    done(page)


def accessible(page: Page) -> list[str]:
    """What is wrong for those who do not see the page: from Chromium's own accessibility tree, and from the document."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    needs = {"button", "link", "textbox", "searchbox", "spinbutton", "slider", "radio", "tab", "tabpanel", "dialog", "img", "image", "region", "complementary", "navigation",
             "article", "heading", "combobox", "checkbox", "Canvas", "canvas"}
    wrong = []
    for n in nodes:
        role, name = n.get("role", {}).get("value"), n.get("name", {}).get("value", "").strip()
        focusable = any(p["name"] == "focusable" and p["value"]["value"] for p in n.get("properties", []))
        if not n.get("ignored") and not name and (role in needs or (focusable and role not in ("RootWebArea", "generic"))):
            wrong.append(f"no name: {role}")
    wrong += page.evaluate("""() => {
      const all = [...document.querySelectorAll('[id]')].map(e => e.id), out = all.filter((id, i) => all.indexOf(id) !== i).map(id => `id twice: ${id}`);
      for (const a of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'])
        for (const e of document.querySelectorAll(`[${a}]`))
          for (const id of e.getAttribute(a).split(' ')) if (!document.getElementById(id)) out.push(`${a} to nothing: ${id}`);
      const shown = [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')].filter(h => h.checkVisibility());
      if (shown.filter(h => h.tagName === 'H1').length !== 1) out.push('not one h1');
      if (!document.documentElement.lang || !document.title || document.querySelectorAll('main').length !== 1) out.push('no language, title or main');
      return out;
    }""")
    return wrong


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_everything_has_a_name_and_can_be_read(tabs, server, theme):
    page = tabs.open(server.url, color_scheme=theme)
    assert accessible(page) == []
    send(page, "slow", wait=False)
    expect(page.locator("#stop")).to_be_visible()
    assert accessible(page) == []
    page.keyboard.press("Escape")
    done(page)
    page.keyboard.press("Alt+n")
    send(page, "hello")
    page.keyboard.press("Alt+r")
    done(page)
    expect(page.locator("#heat")).to_be_visible()
    assert accessible(page) == []
    page.get_by_role("tab", name="Settings").click()
    assert accessible(page) == []
    page.get_by_role("button", name="Options for hello").click()
    assert accessible(page) == []
    page.keyboard.press("Escape")
    page.locator("#help-button").click()
    assert accessible(page) == []
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  // WCAG AA for every text that is shown, against the nearest painted background
  const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = c => { probe.clearRect(0, 0, 1, 1); probe.fillStyle = c; probe.fillRect(0, 0, 1, 1); return [...probe.getImageData(0, 0, 1, 1).data]; };
  const light = ([r, g, b]) => [r, g, b].map(v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4).reduce((s, v, i) => s + v * [.2126, .7152, .0722][i], 0);
  const wrong = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    if (!node.data.trim() || !e.checkVisibility({ opacityProperty: true, visibilityProperty: true }) || e.closest(':disabled, .offscreen, .skip, script, style')) continue;
    let ground = null;
    for (let b = e; b && !ground; b = b.parentElement) { const c = rgba(getComputedStyle(b).backgroundColor); if (c[3] > 250) ground = c; }
    const a = light(rgba(getComputedStyle(e).color)), z = light(ground), ratio = (Math.max(a, z) + .05) / (Math.min(a, z) + .05);
    const size = parseFloat(getComputedStyle(e).fontSize);
    if (ratio < (size >= 24 ? 3 : 4.5)) wrong.add(`${ratio.toFixed(2)} ${e.className || e.id || e.tagName}: ${node.data.trim().slice(0, 30)}`);
  }
  return [...wrong];
}"""


def test_the_theme_follows_the_system_and_can_be_fixed(tabs, server):
    page = tabs.open(server.url, color_scheme="dark")
    ground = "getComputedStyle(document.body).backgroundColor"
    dark = page.evaluate(ground)
    page.emulate_media(color_scheme="light")
    light = page.evaluate(ground)
    assert light != dark
    page.get_by_role("radio", name="Dark").check(force=True)
    assert page.evaluate(ground) == dark
    page.reload()
    assert page.evaluate(ground) == dark
    page.get_by_role("radio", name="Auto").check(force=True)
    assert page.evaluate(ground) == light


# ---- the live panel ------------------------------------------------------------------------------------------------------------
def test_the_panel_shows_the_cache_beside_other_attention(page, server):
    bars = page.locator("#bars li")
    expect(bars).to_have_text(["This model, 6 bits252 B", "MQA, one head cached1.02 kB", "GQA, grouped heads2.05 kB", "MHA, every head4.10 kB"])
    server.delay = 0.02
    send(page, "slow", wait=False)
    expect(page.locator("#cache-tokens")).to_contain_text(re.compile(r"^for \d+ tokens$"))
    expect(page.locator("#queue")).to_have_text("1, 0")
    tokens = int(re.search(r"\d+", page.locator("#cache-tokens").inner_text())[0])
    assert page.locator("#cache-now").inner_text() in (f"{tokens * 252 / 1000:.3g} kB", f"{tokens * 252 / 1000:.2f} kB")
    page.wait_for_timeout(350)  # the bars move
    widths = [w["width"] for w in (bar.bounding_box() for bar in page.locator("#bars i").all())]
    assert widths[0] / widths[3] == pytest.approx(252 / 4096, abs=0.01) and widths[2] / widths[3] == pytest.approx(0.5, abs=0.01)
    assert float(page.locator("#speed").inner_text()) > 0
    page.keyboard.press("Escape")
    done(page)
    expect(page.locator("#cache-tokens")).to_contain_text("for the last")
    expect(page.locator("#queue")).to_have_text("0, 0")
    server.delay = 0
    send(page, "hello")
    expect(page.locator("#hits-reply")).to_have_text("16 of 21 tokens")
    assert re.match(r"\d+ ms", page.locator("#first").inner_text())


def test_the_expert_load_is_a_heat_map_with_words(page, server):
    expect(page.locator("#experts-none")).to_be_visible()
    send(page, "hello")
    heat = page.locator("#heat")
    expect(heat).to_be_visible()
    expect(heat).to_have_attribute("aria-label", re.compile(r"Expert load. 5 layers of 16 experts. Most uneven: layer \d, where expert \d+ had \d\.\d times"))
    colours = heat.evaluate("c => new Set([...new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)]).size")
    assert colours > 8
    page.locator("summary", has_text="As a table").click()
    expect(page.locator("#heat-rows tr")).to_have_count(5)
    heat.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#heat-cell")).to_have_text(re.compile(r"Layer 2, expert 1: chosen \d+ times?, \d\.\d × even\."))
    box = heat.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    expect(page.locator("#heat-cell")).to_contain_text("Layer 5, expert 15")


# ---- the files -----------------------------------------------------------------------------------------------------------------
def test_the_files_are_small_readable_and_licensed():
    own = [p for p in PAGE.iterdir() if not p.name.startswith("vendor-")]
    assert {"index.html", "style.css", "app.js"} <= {p.name for p in own}
    for p in own:
        text = p.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400 and text == "".join(line.rstrip() + "\n" for line in text.splitlines()), p.name
        assert p.suffix != ".js" or not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function", text.replace("no innerHTML", "")), p.name
        assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", text), p.name
    for p in PAGE.glob("vendor-*.js"):
        assert len(p.with_name(f"{p.stem}.LICENSE.txt").read_text()) > 500 and "sourceMappingURL" not in p.read_text()


# ---- the real server -----------------------------------------------------------------------------------------------------------
@pytest.fixture(scope="module")
def real(trained, tmp_path_factory):
    """The URL of `lamoe serve` with a tiny random model that knows letters, and a key."""
    pytest.importorskip("lamoe.serve.run", reason="NO SERVER in this tree: the page is tested against page_server.py only")
    import lamoe
    from lamoe.config import ModelConfig
    from lamoe.model import Transformer
    from lamoe.tokenizer import Tokenizer
    from lamoe.train import checkpoint

    folder = tmp_path_factory.mktemp("real") / "tiny-random"
    config = ModelConfig(**{**BODY, "max_position_embeddings": 256, "initializer_range": 0.2}, **MLA, **MOE)
    lamoe.save(Transformer(config).init_weights(1).eval(), folder)
    Tokenizer.load(checkpoint.latest(trained) / "model").save(folder)
    process = subprocess.Popen([sys.executable, "-m", "lamoe", "serve", str(folder), "--port", "0", "--api-key", "secret", "--threads", "1", "--kv-cache-dtype", "6bit"],
                               stderr=subprocess.PIPE, text=True, cwd=Path(__file__).resolve().parent.parent)
    said = []
    for line in process.stderr:
        said.append(line)
        if line.startswith("{") and "url" in (event := json.loads(line)):
            break
    else:
        raise AssertionError("the server ended: " + "".join(said))
    yield event["url"]
    process.kill()
    process.wait()


def test_the_page_and_the_real_server_understand_each_other(tabs, real):
    page = tabs.open(real, ready=False)
    expect(page.locator("#key-dialog")).to_be_visible(timeout=20000)  # the key is asked before the model is there
    page.locator("#key").fill("secret")
    page.keyboard.press("Enter")
    expect(page.locator("#dot")).to_have_class("dot ready", timeout=20000)
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
    expect(page.locator("#hits-reply")).not_to_contain_text("0 of ")  # the prompt's pages were still there
    assert stored(page)[0]["messages"][1]["versions"][1]["content"] == first["content"]  # the same seed
    page.keyboard.press("Alt+n")
    page.keyboard.press("Alt+s")
    page.get_by_label("Tokens per reply", exact=True).fill("1000")
    page.get_by_label("Temperature", exact=True).fill("0")
    page.get_by_role("tab", name="Live").click()
    send(page, "the dog ran on the hill")
    expect(note.last).to_contain_text("The context is full: 256 of 256 tokens")
    expect(page.locator("#pool-text")).to_have_text(re.compile("^0 of "))  # all pages are free again
    page.locator("#input").fill("the bird sang " * 400)
    expect(page.locator("#draft-note")).to_contain_text("this model reads 256. Shorten it to send.")
    expect(page.locator("#send")).to_be_disabled()
