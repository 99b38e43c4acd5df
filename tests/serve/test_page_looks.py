"""Tests of the appearance and the security of the web page.

They cover hostile text, phones, keyboard use, accessibility, themes, the live panel and the files.
"""

import re

import pytest
from playwright.sync_api import Page, expect

from chromium import NARROWEST, PHONE, browser, done, page, reply, send, server, tabs  # noqa: F401 (some are fixtures)
from page_server import EVIL, PAGE, REPLY

# ---- hostile text --------------------------------------------------------------------------------
ALLOWED_TAGS = set(
    (
        "DIV P BR STRONG EM DEL CODE PRE SPAN A UL OL LI BLOCKQUOTE H2 H3 H4 H5 H6 HR "
        "TABLE THEAD TBODY TR TH TD BUTTON svg use"
    ).split()
)
FORBIDDEN_ATTRIBUTES = {"style", "id", "name", "src", "srcdoc", "action", "formaction"}
VECTORS = [
    EVIL,
    "<script>pwned=1</script>",
    "<img src=x onerror=pwned=1>",
    "[a](javascript:pwned=1)",
    "[a](JaVaScRiPt:pwned=1)",
    "[a]( \x01javascript:pwned=1)",
    "[a](java\nscript:pwned=1)",
    "[a](vbscript:x)",
    "[a](data:text/html;base64,PHNjcmlwdD4=)",
    "<javascript:pwned=1>",
    "![x](javascript:pwned=1)",
    '[a](https://x.example "t\\" onmouseover=\\"pwned=1")',
    '[a](<https://x.example/" onclick="pwned=1>)',
    '```" onload="pwned=1\nx\n```',
    "`<img src=x onerror=pwned=1>`",
    "| <img src=x onerror=pwned=1> | [b](javascript:pwned=1) |\n"
    "|---|---|\n| <svg/onload=pwned=1> | c |",
    "# <iframe srcdoc='<script>parent.pwned=1</script>'>",
    "- <details open ontoggle=pwned=1>",
    "> <form><button formaction=javascript:pwned=1>x",
    "[r]\n\n[r]: javascript:pwned=1",
    "<a id=input name=scroll>x</a>",
    "&lt;script&gt;pwned=1&lt;/script&gt;",
    "<noscript><p title='</noscript><img src=x onerror=pwned=1>'>",
    "<!-- --!><img src=x onerror=pwned=1> -->",
    "<style>@import 'https://x.example/';*{display:none}</style>",
    "<base href=https://x.example/>",
    "<meta http-equiv=refresh content='0;url=https://x.example'>",
    "<link rel=stylesheet href=https://x.example/x.css>",
    "```html\n<img src=x onerror=pwned=1></code></pre><script>pwned=1</script>\n```",
    ">" * 3000 + "deep",
    "[" * 3000,
    "*" * 3000 + "a" + "*" * 3000,
    "\x00<scr\x00ipt>pwned=1</script>",
    "<x-\ud83d\ude00 onclick=pwned=1>",
    "http://x.example/<script>pwned=1</script>",
    "[a](/v1/models) [b](tel:1) [c](ftp://x.example) [d](#input) [e](//x.example)",
    'www.x.example"onclick=pwned=1',
]
RENDER = """async (vectors) => {
  const { Prose } = await import('/page/markdown.js');
  return Promise.all(vectors.map(async v => {
    const el = document.createElement('div');
    document.body.append(el);
    await new Prose(el).update(v);
    const attributes = node => [...node.attributes].map(a => [a.name, a.value]);
    const nodes = [...el.querySelectorAll('*')].map(node => [node.nodeName, attributes(node)]);
    return { text: el.innerText, nodes };
  }));
}"""


def test_html_in_markdown_is_inert(page):
    for vector, out in zip(VECTORS, page.evaluate(RENDER, VECTORS)):
        for tag, attributes in out["nodes"]:
            assert tag in ALLOWED_TAGS, (vector, tag)
            for name, value in attributes:
                is_allowed = not name.startswith("on") and name not in FORBIDDEN_ATTRIBUTES
                assert is_allowed, (vector, name, value)
                if name == "href":
                    assert re.match(r"https?://|mailto:|#i-", value), (vector, value)
    # HTML is shown as text instead of being dropped, so the reader sees what the model wrote
    assert "<script>pwned=1</script>" in page.evaluate(RENDER, [VECTORS[1]])[0]["text"]
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None


def test_streamed_markdown_equals_whole_markdown(page):
    lists = "- a\n- b\n  - c\n\n  more of b\n\n[ref]\n\nSetext\n===\n\n1) x\n\n    indented\n"
    text = f"{REPLY}\n{EVIL}\n{lists}\n[ref]: https://x.example\n"
    same = page.evaluate(
        """async (text) => {
      const { Prose } = await import('/page/markdown.js');
      const [grown, whole] = [document.createElement('div'), document.createElement('div')];
      const prose = new Prose(grown);
      for (let i = 1; i < text.length; i += 3) await prose.update(text.slice(0, i));
      await prose.update(text);
      await new Prose(whole).update(text);
      return [grown.innerHTML === whole.innerHTML, whole.children.length];
    }""",
        text,
    )
    assert same == [True, 15]


# Each takes marked or highlight.js minutes.
SLOW_TEXTS = {
    "a long word in code": "```ini\n" + "a" * 49_000,
    "an address": "a." * 200_000 + "@",
    "emphasis": "a_" * 200_000,
    "quotes": ">" * 100_000,
    "rows": "- a\n" * 30_000,
}
WATCH = """async (text) => {
  const { Prose, limits } = await import('/page/markdown.js');
  limits.workerMs = 300;
  const [slow, next] = [document.createElement('div'), document.createElement('div')];
  let [longest, last] = [0, performance.now()];
  const timer = setInterval(() => {
    const now = performance.now();
    [longest, last] = [Math.max(longest, now - last), now];
  }, 10);
  await Promise.all([new Prose(slow).update(text), new Prose(next).update('**b**')]);
  clearInterval(timer);
  return { longest, length: slow.textContent.length, next: next.innerHTML };
}"""


@pytest.mark.parametrize("text", SLOW_TEXTS.values(), ids=SLOW_TEXTS)
def test_text_that_takes_minutes_does_not_block_the_page(page, text):
    out = page.evaluate(WATCH, text)
    assert out["longest"] < 5000  # milliseconds; a busy machine may stall for a second
    assert out["length"] >= len(text) / 5
    assert "<strong>b</strong>" in out["next"]


def test_html_in_messages_names_and_settings_is_inert(tabs, server):
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
    foreign = "img, iframe, style, form:not(#composer, dialog form), base, object, embed, math"
    assert page.locator(f":is({foreign}):not(head *)").count() == 0
    assert page.locator("[id=input]").count() == 1 and page.locator("script").count() == 2


def test_trusted_types_refuse_html_from_text(tabs, server):
    """The browser refuses text that is written as HTML, so a future bug cannot do it either."""
    page = tabs.open(server.url)
    error = page.evaluate("""() => {
      try { document.createElement('div').innerHTML = '<b>x</b>'; return null }
      catch (e) { return e.name }
    }""")
    assert error == "TypeError"
    assert len(page.evaluate("new Promise(done => setTimeout(() => done(violations), 50))")) == 1
    page.evaluate("violations.length = 0")
    tabs.errors.clear()


# ---- devices and keyboard ------------------------------------------------------------------------
@pytest.mark.parametrize("size", [PHONE, NARROWEST], ids=["390", "360"])
def test_phone_layout_fits_the_screen(tabs, server, size):
    page = tabs.open(server.url, size=size, has_touch=True, is_mobile=True)
    fits = """() => {
      const parts = document.querySelectorAll('main, .scroll, .panel-body, .side, dialog[open]');
      return [document.documentElement, document.body, ...parts]
        .every(e => e.scrollWidth <= e.clientWidth + 1) && visualViewport.scale === 1;
    }"""
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
    small_buttons = page.evaluate("""
      [...document.querySelectorAll('main button, #panel button')]
        .filter(b => b.checkVisibility() && b.offsetHeight < 24).map(b => b.outerHTML)
    """)
    assert small_buttons == []


def test_shortcuts(page):
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.type("?/")  # typed into a field, so not shortcuts
    expect(page.locator("#input")).to_have_value("?/")
    page.locator("#input").fill("")
    page.locator("#title").evaluate("() => document.activeElement.blur()")
    page.keyboard.press("?")
    expect(page.get_by_role("dialog", name="Keyboard shortcuts")).to_be_visible()
    page.keyboard.press("Alt+n")  # ignored while a dialog is open
    page.keyboard.press("Escape")
    expect(page.locator("#help")).to_be_hidden()
    page.keyboard.press("/")
    expect(page.locator("#input")).to_be_focused()
    page.keyboard.press("Alt+p")
    expect(page.locator("#panel")).to_be_hidden()
    page.keyboard.press("Alt+b")
    expect(page.locator("#side")).to_be_hidden()
    page.reload()
    expect(page.locator("#side")).to_be_hidden()  # the hidden side bar stays hidden
    page.keyboard.press("Alt+b")
    page.keyboard.press("Alt+p")


def test_tab_order(page):
    send(page, "hello")
    page.reload()
    expect(page.locator("#dot")).to_have_class("dot ready")
    done(page)
    page.locator(".skip").focus()
    order = []
    for _ in range(40):
        page.keyboard.press("Tab")
        order.append(
            page.evaluate("""() => {
              const e = document.activeElement, style = getComputedStyle(e);
              const showsFocus = style.outlineStyle !== 'none' || style.boxShadow !== 'none'
                || e.closest('.composer, .segments') !== null;
              return [e.id || e.getAttribute('aria-label') || e.className, showsFocus];
            }""")
        )
    names = [name for name, _ in order]
    stops = ["new", "help-button", "panel-open", "Code, python", "input", "settings-open"]
    stops += ["tab-live", "heat-details" if "heat-details" in names else "live"]
    places = [names.index(stop) for stop in stops]
    assert places == sorted(places), names
    without_focus_ring = [name for name, shows_focus in order if not shows_focus]
    assert set(without_focus_ring) <= {"", "body"}


def test_view_follows_the_reply_until_the_user_scrolls_up(page, server):
    send(page, "long")
    box = page.locator("#scroll")
    expect(reply(page).locator(".prose")).to_contain_text("Paragraph 29")
    expect(page.locator("#latest")).to_be_hidden()
    at_end = "(e) => e.scrollHeight - e.scrollTop - e.clientHeight < 2"
    page.wait_for_function(at_end, arg=box.element_handle())
    page.keyboard.press("PageUp")
    expect(page.locator("#latest")).to_be_visible()
    server.delay = 0.002
    # Regenerating scrolls to the end again. Scrolling up during the reply stops that.
    page.locator("#input").fill("x")
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


def accessibility_errors(page: Page) -> list[str]:
    """Find accessibility errors in Chromium's accessibility tree and in the document."""
    session = page.context.new_cdp_session(page)
    nodes = session.send("Accessibility.getFullAXTree")["nodes"]
    session.detach()
    needs_name = {
        *("button", "link", "textbox", "searchbox", "spinbutton", "slider", "radio", "checkbox"),
        *("combobox", "tab", "tabpanel", "dialog", "img", "image", "Canvas", "canvas"),
        *("region", "complementary", "navigation", "article", "heading"),
    }
    wrong = []
    for n in nodes:
        role, name = n.get("role", {}).get("value"), n.get("name", {}).get("value", "").strip()
        properties = {p["name"]: p["value"].get("value") for p in n.get("properties", [])}
        is_widget = properties.get("focusable") and role not in ("RootWebArea", "generic")
        if not n.get("ignored") and not name and (role in needs_name or is_widget):
            wrong.append(f"no name: {role}")
    wrong += page.evaluate("""() => {
      const all = [...document.querySelectorAll('[id]')].map(e => e.id);
      const out = all.filter((id, i) => all.indexOf(id) !== i).map(id => `duplicate id: ${id}`);
      for (const a of ['aria-labelledby', 'aria-describedby', 'aria-controls', 'for'])
        for (const e of document.querySelectorAll(`[${a}]`))
          for (const id of e.getAttribute(a).split(' '))
            if (!document.getElementById(id)) out.push(`${a} to a missing id: ${id}`);
      const headings = [...document.querySelectorAll('h1,h2,h3,h4,h5,h6')];
      const shown = headings.filter(h => h.checkVisibility());
      if (shown.filter(h => h.tagName === 'H1').length !== 1) out.push('not one h1');
      const mains = document.querySelectorAll('main');
      if (!document.documentElement.lang || !document.title || mains.length !== 1)
        out.push('no language, title or main');
      return out;
    }""")
    return wrong


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_accessibility_and_contrast(tabs, server, theme):
    page = tabs.open(server.url, color_scheme=theme)
    assert accessibility_errors(page) == []
    send(page, "slow", wait=False)
    expect(page.locator("#stop")).to_be_visible()
    assert accessibility_errors(page) == []
    page.keyboard.press("Escape")
    done(page)
    page.keyboard.press("Alt+n")
    send(page, "hello")
    page.keyboard.press("Alt+r")
    done(page)
    expect(page.locator("#heat")).to_be_visible()
    assert accessibility_errors(page) == []
    page.get_by_role("tab", name="Settings").click()
    assert accessibility_errors(page) == []
    page.get_by_role("button", name="Options for hello").click()
    assert accessibility_errors(page) == []
    page.keyboard.press("Escape")
    page.locator("#help-button").click()
    assert accessibility_errors(page) == []
    assert page.evaluate(CONTRAST) == []


CONTRAST = """() => {
  // Checks the WCAG AA contrast of every visible text against the nearest opaque background.
  const probe = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = color => {
    probe.clearRect(0, 0, 1, 1);
    probe.fillStyle = color;
    probe.fillRect(0, 0, 1, 1);
    return [...probe.getImageData(0, 0, 1, 1).data];
  };
  const linear = v => (v /= 255) <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4;
  const luminance = ([r, g, b]) => .2126 * linear(r) + .7152 * linear(g) + .0722 * linear(b);
  const background = e => {
    for (; e; e = e.parentElement) {
      const color = rgba(getComputedStyle(e).backgroundColor);
      if (color[3] > 250) return color;
    }
  };
  const visible = { opacityProperty: true, visibilityProperty: true };
  const ignored = ':disabled, .offscreen, .skip, script, style';
  const wrong = new Set(), walker = document.createTreeWalker(document.body, NodeFilter.SHOW_TEXT);
  for (let node; (node = walker.nextNode());) {
    const e = node.parentElement;
    const text = node.data.trim();
    if (!text || !e.checkVisibility(visible) || e.closest(ignored)) continue;
    const [a, b] = [rgba(getComputedStyle(e).color), background(e)].map(luminance);
    const ratio = (Math.max(a, b) + .05) / (Math.min(a, b) + .05);
    const size = parseFloat(getComputedStyle(e).fontSize);
    if (ratio < (size >= 24 ? 3 : 4.5))
      wrong.add(`${ratio.toFixed(2)} ${e.className || e.id || e.tagName}: ${text.slice(0, 30)}`);
  }
  return [...wrong];
}"""


def test_theme_follows_the_system_or_the_choice(tabs, server):
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


# ---- the live panel ------------------------------------------------------------------------------
def test_panel_compares_the_cache_with_other_attention(page, server):
    bars = page.locator("#bars li")
    expect(bars).to_have_text(
        [
            "This model, 6 bits252 B",
            "MQA, one head cached1.02 kB",
            "GQA, grouped heads2.05 kB",
            "MHA, every head4.10 kB",
        ]
    )
    server.delay = 0.02
    send(page, "slow", wait=False)
    expect(page.locator("#cache-tokens")).to_contain_text(re.compile(r"^for \d+ tokens$"))
    expect(page.locator("#queue")).to_have_text("1, 0")
    tokens = int(re.search(r"\d+", page.locator("#cache-tokens").inner_text())[0])
    assert page.locator("#cache-now").inner_text() in (
        f"{tokens * 252 / 1000:.3g} kB",
        f"{tokens * 252 / 1000:.2f} kB",
    )
    page.wait_for_timeout(350)  # until the bars' transition has ended
    widths = [w["width"] for w in (bar.bounding_box() for bar in page.locator("#bars i").all())]
    assert widths[0] / widths[3] == pytest.approx(252 / 4096, abs=0.01)
    assert widths[2] / widths[3] == pytest.approx(0.5, abs=0.01)
    assert float(page.locator("#speed").inner_text()) > 0
    page.keyboard.press("Escape")
    done(page)
    expect(page.locator("#cache-tokens")).to_contain_text("for the last")
    expect(page.locator("#queue")).to_have_text("0, 0")
    server.delay = 0
    send(page, "hello")
    expect(page.locator("#hits-reply")).to_have_text("16 of 21 tokens")
    assert re.match(r"\d+ ms", page.locator("#first").inner_text())


def test_expert_load_heat_map(page, server):
    expect(page.locator("#experts-none")).to_be_visible()
    send(page, "hello")
    heat = page.locator("#heat")
    expect(heat).to_be_visible()
    expect(heat).to_have_attribute(
        "aria-label",
        re.compile(
            r"Expert load. 5 layers of 16 experts. "
            r"Most uneven: layer \d, where expert \d+ had \d\.\d times"
        ),
    )
    num_colours = heat.evaluate("""canvas => {
      const pixels = canvas.getContext('2d').getImageData(0, 0, canvas.width, canvas.height).data;
      return new Set(new Uint32Array(pixels.buffer)).size;
    }""")
    assert num_colours > 8
    page.locator("summary", has_text="As a table").click()
    expect(page.locator("#heat-rows tr")).to_have_count(5)
    heat.focus()
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowRight")
    page.keyboard.press("ArrowDown")
    expect(page.locator("#heat-cell")).to_have_text(
        re.compile(r"Layer 2, expert 1: chosen \d+ times?, \d\.\d × even\.")
    )
    box = heat.bounding_box()
    page.mouse.move(box["x"] + box["width"] - 2, box["y"] + box["height"] - 2)
    expect(page.locator("#heat-cell")).to_contain_text("Layer 5, expert 15")


# ---- the files -----------------------------------------------------------------------------------
def test_files_are_short_and_licensed():
    own = [p for p in PAGE.iterdir() if not p.name.startswith("vendor-")]
    assert {"index.html", "style.css", "app.js"} <= {p.name for p in own}
    for p in own:
        text = p.read_text(encoding="utf-8")
        assert len(text.splitlines()) <= 400 and text == "".join(
            line.rstrip() + "\n" for line in text.splitlines()
        ), p.name
        assert p.suffix != ".js" or not re.search(
            r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(|new Function",
            text.replace("no innerHTML", ""),
        ), p.name
        assert not re.search(r"""(src|href)=["']?https?:|@import|url\(""", text), p.name
    for p in PAGE.glob("vendor-*.js"):
        assert len(p.with_name(f"{p.stem}.LICENSE.txt").read_text()) > 500
        assert "sourceMappingURL" not in p.read_text()
