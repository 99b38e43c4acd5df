"""How the page of `lamoe serve` looks and feels, and what it keeps out: hostile text, phones, the keyboard, names and contrast, the live panel, its files."""

import re

import pytest
from playwright.sync_api import Page, expect

from chromium import NARROWEST, PHONE, browser, done, page, reply, send, server, tabs  # noqa: F401 (some are fixtures)
from page_server import EVIL, PAGE, REPLY

# ---- nothing gets in -----------------------------------------------------------------------------------------------------------
ALLOWED_TAGS = set(
    "DIV P BR STRONG EM DEL CODE PRE SPAN A UL OL LI BLOCKQUOTE H2 H3 H4 H5 H6 HR TABLE THEAD TBODY TR TH TD BUTTON svg use".split()
)
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
    "| <img src=x onerror=pwned=1> | [b](javascript:pwned=1) |\n|---|---|\n| <svg/onload=pwned=1> | c |",
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
                assert not name.startswith("on") and name not in (
                    "style",
                    "id",
                    "name",
                    "src",
                    "srcdoc",
                    "action",
                    "formaction",
                ), (vector, name, value)
                if name == "href":
                    assert re.match(r"https?://|mailto:|#i-", value), (vector, value)
    assert (
        "<script>pwned=1</script>" in page.evaluate(RENDER, [VECTORS[1]])[0]["text"]
    )  # shown, not dropped: a reader sees what the model said
    page.wait_for_timeout(100)
    assert page.evaluate("window.pwned") is None


def test_markdown_that_grows_ends_like_markdown_that_came_at_once(page):
    text = f"{REPLY}\n{EVIL}\n- a\n- b\n  - c\n\n  more of b\n\n[ref]\n\nSetext\n===\n\n1) x\n\n    indented\n\n[ref]: https://x.example\n"
    same = page.evaluate(
        """async (text) => {
      const { Prose } = await import('/page/markdown.js');
      const [grown, whole] = [document.createElement('div'), document.createElement('div')];
      const prose = new Prose(grown);
      for (let i = 1; i < text.length; i += 3) prose.update(text.slice(0, i));
      prose.update(text);
      new Prose(whole).update(text);
      return [grown.innerHTML === whole.innerHTML, whole.children.length];
    }""",
        text,
    )
    assert same == [True, 15]


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
    assert (
        page.locator(
            ":is(img, iframe, style, form:not(#composer, dialog form), base, object, embed, math):not(head *)"
        ).count()
        == 0
    )
    assert page.locator("[id=input]").count() == 1 and page.locator("script").count() == 2


def test_the_browser_itself_refuses_html_from_text(tabs, server):
    """Should a later change write text as HTML after all, Trusted Types stop it; and with them the CSP stops inline code."""
    page = tabs.open(server.url)
    failed = page.evaluate(
        """() => { try { document.createElement('div').innerHTML = '<b>x</b>'; return 'taken' } catch (e) { return e.name } }"""
    )
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
    small = page.evaluate(
        """[...document.querySelectorAll('main button, #panel button')].filter(b => b.checkVisibility() && b.offsetHeight < 24).map(b => b.outerHTML)"""
    )
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
        order.append(
            page.evaluate("""() => { const e = document.activeElement; const s = getComputedStyle(e);
            return [e.id || e.getAttribute('aria-label') || e.className, s.outlineStyle !== 'none' || s.boxShadow !== 'none' || e.closest('.composer, .segments') !== null] }""")
        )
    names = [n for n, _ in order]
    places = [
        names.index(n)
        for n in (
            "new",
            "help-button",
            "panel-open",
            "Code, python",
            "input",
            "settings-open",
            "tab-live",
            "heat-details" if "heat-details" in names else "live",
        )
    ]
    assert places == sorted(places), names
    assert all(seen for n, seen in order if n not in ("", "body")), [
        n for n, seen in order if not seen
    ]


def test_the_end_is_followed_unless_the_reader_has_left_it(page, server):
    send(page, "long")
    box = page.locator("#scroll")
    assert box.evaluate("e => e.scrollHeight - e.scrollTop - e.clientHeight") < 2
    page.keyboard.press("PageUp")
    expect(page.locator("#latest")).to_be_visible()
    server.delay = 0.002
    page.locator("#input").fill(
        "x"
    )  # regenerating goes to the end again; scrolling up while it writes stays
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
    needs = {
        "button",
        "link",
        "textbox",
        "searchbox",
        "spinbutton",
        "slider",
        "radio",
        "tab",
        "tabpanel",
        "dialog",
        "img",
        "image",
        "region",
        "complementary",
        "navigation",
        "article",
        "heading",
        "combobox",
        "checkbox",
        "Canvas",
        "canvas",
    }
    wrong = []
    for n in nodes:
        role, name = n.get("role", {}).get("value"), n.get("name", {}).get("value", "").strip()
        focusable = any(
            p["name"] == "focusable" and p["value"]["value"] for p in n.get("properties", [])
        )
        if (
            not n.get("ignored")
            and not name
            and (role in needs or (focusable and role not in ("RootWebArea", "generic")))
        ):
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
    page.wait_for_timeout(350)  # the bars move
    widths = [w["width"] for w in (bar.bounding_box() for bar in page.locator("#bars i").all())]
    assert widths[0] / widths[3] == pytest.approx(252 / 4096, abs=0.01) and widths[2] / widths[
        3
    ] == pytest.approx(0.5, abs=0.01)
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
    expect(heat).to_have_attribute(
        "aria-label",
        re.compile(
            r"Expert load. 5 layers of 16 experts. Most uneven: layer \d, where expert \d+ had \d\.\d times"
        ),
    )
    colours = heat.evaluate(
        "c => new Set([...new Uint32Array(c.getContext('2d').getImageData(0, 0, c.width, c.height).data.buffer)]).size"
    )
    assert colours > 8
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


# ---- the files -----------------------------------------------------------------------------------------------------------------
def test_the_files_are_small_readable_and_licensed():
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
        assert (
            len(p.with_name(f"{p.stem}.LICENSE.txt").read_text()) > 500
            and "sourceMappingURL" not in p.read_text()
        )
