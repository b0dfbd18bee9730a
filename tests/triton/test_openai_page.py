"""The playground in a real headless browser, before a real server."""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Awaitable, Callable

import pytest

from pt_trtllm.testing.browser import Page, browser_page, find_browser
from pt_trtllm.testing.front_end import API_KEYS, FrontEnd

pytestmark = [
    pytest.mark.triton,
    pytest.mark.skipif(find_browser() is None, reason="no Chromium on this machine (Debian: apt-get install chromium)"),
]

READY = "modelName && document.querySelector('#health').dataset.state === 'ready'"
ENDED = "document.querySelectorAll('.facts button').length"
ANSWER = "[...document.querySelectorAll('.assistant .text')].at(-1).textContent"
FACTS = "[...document.querySelectorAll('.facts')].at(-1).textContent"
WIDTHS = (1440, 1100, 768, 390, 320)
ATTEMPTS = 10
"""An answer takes less than a second: on a busy machine, now and then, it has ended before anybody looks."""
WATCHED = """window.seen?.disconnect(), window.lengths = new Set(), (window.seen = new MutationObserver(() => {
  const shown = document.querySelector('.assistant[aria-busy=true] .text')?.textContent.length;
  if (shown) lengths.add(shown);
  const { x, y, width, height } = by('stop').getBoundingClientRect();
  if (shown > %d) document.elementFromPoint(x + width / 2, y + height / 2).click();
})).observe(by('log'), {childList: true, subtree: true})"""
"""Notes the lengths of an answer that has not ended, and stops it when it is longer than this."""

Visit = Callable[[Page], Awaitable[None]]


def visit(server: FrontEnd, steps: Visit, *, width: int = 1440, dark: bool = False) -> None:
    """Opens the page, does the steps, and makes sure that nothing went wrong and nothing came from elsewhere."""

    async def run() -> None:
        async with browser_page() as page:
            await page.open(server.address, width=width, dark=dark)
            await page.until(READY)
            await steps(page)
            assert page.problems == []
            assert {url for url in page.requested if not url.startswith((server.address, "data:"))} == set()

    asyncio.run(run())


async def choose(page: Page, mode: str) -> None:
    await page.evaluate(f"document.querySelector('input[value={mode}]').click()")


async def attempts(page: Page, text: str, *, max_tokens: int, stop_above: int = 10**6) -> AsyncIterator[None]:
    """Types a prompt into an empty log, each time with another seed; the answer to it will be watched."""
    for seed in range(ATTEMPTS):
        watched = WATCHED % stop_above
        await page.evaluate(f"by('max_tokens').value = {max_tokens}, by('seed').value = {seed}, {watched}")
        await page.click("#clear")
        await page.click("#prompt")
        await page.type(text)
        yield


def test_a_visitor_chats_watches_the_tokens_and_the_charts(openai_front_end: FrontEnd) -> None:
    async def steps(page: Page) -> None:
        assert await page.evaluate("document.querySelector('h1').textContent") == "tiny-pt"
        assert await page.evaluate("mode()") == "continue"  # the example model was never taught to chat
        await choose(page, "chat")
        async for _ in attempts(page, "What is a truth?", max_tokens=400):
            await page.press("Enter")
            await page.until(ENDED)
            if await page.evaluate("lengths.size") > 1 and "400 tokens" in await page.evaluate(FACTS):
                break
        else:
            pytest.fail("no answer of 400 tokens grew before the visitor's eyes")
        facts = await page.evaluate(FACTS)
        assert facts.startswith("400 tokens")
        assert "tokens/s" in facts
        assert "first after" in facts
        assert "ended at max tokens" in facts

        # The next question goes out with the conversation so far.
        await page.evaluate("by('max_tokens').value = 20")
        await page.type("And another?")
        await page.press("Enter")
        await page.until(f"{ENDED} === 4")
        roles = await page.evaluate("history.map((turn) => turn.role)")
        assert roles == ["user", "assistant", "user", "assistant"]

        peak = "[...document.querySelectorAll('.chart')].map((chart) => chart.querySelector('.scale').textContent)"
        await page.until(f"/highest [1-9]/.test({peak}[0])")  # tokens per second
        await page.until(f"/highest [0-9.]+ ms/.test({peak}[3])")  # time to first token
        assert await page.evaluate("document.querySelectorAll('.chart path').length") >= 3
        await page.click("#clear")
        assert await page.evaluate("history.length + document.querySelectorAll('.message').length") == 0

    visit(openai_front_end, steps)


def test_stop_ends_an_answer_and_the_options_reach_the_server(openai_front_end: FrontEnd) -> None:
    async def steps(page: Page) -> None:
        async for _ in attempts(page, "She had never been", max_tokens=480, stop_above=30):
            await page.click("#send")
            await page.until(ENDED)
            if "stopped by you" in await page.evaluate(FACTS):
                break
        else:
            pytest.fail("no answer was stopped")
        assert (await page.evaluate(ANSWER)).startswith("She had never been")
        await page.evaluate("seen.disconnect()")
        await page.click("#clear")

        # With a seed, "Ask again" gives the same text; shading shows every token's probability.
        await page.evaluate(
            "Object.entries({max_tokens: 12, seed: 7}).forEach(([id, value]) => by(id).value = value), "
            "by('show_probabilities').click()"
        )
        answers = []
        for count in (2, 4):
            await page.type("It is")
            await page.press("Enter")
            await page.until(f"{ENDED} === {count}")
            answers.append(await page.evaluate(ANSWER))
        assert answers[0] == answers[1]
        marks = "[...document.querySelectorAll('.assistant')].at(-1).querySelectorAll('mark')"
        assert await page.evaluate(f"{marks}.length") == 12
        assert await page.evaluate(f"[...{marks}].every((mark) => /^[0-9.]+ %$/.test(mark.title))")

        # What the server refuses is told in its own words.
        await page.evaluate("by('top_p').min = -1, by('top_p').value = -1")
        await page.type("a")
        await page.press("Enter")
        await page.until("document.querySelector('.failure')")
        assert "top_p is -1" in await page.evaluate("document.querySelector('.failure').textContent")
        page.problems.clear()  # the browser's own note about the 400

    visit(openai_front_end, steps)


def test_an_answer_offers_nothing_before_it_has_ended(openai_front_end: FrontEnd) -> None:
    """Its reason comes before its last events: who asks again meanwhile would not be heard."""
    made = """(() => {
      const answer = new Answer("chat", "a"), count = () => answer.root.querySelectorAll("button").length;
      answer.take({ choices: [{ delta: { content: "b" }, finish_reason: "stop" }] });
      answer.draw();
      const before = count();
      answer.end();
      return [before, count()];
    })()"""

    async def steps(page: Page) -> None:
        assert await page.evaluate(made) == [0, 2]

    visit(openai_front_end, steps)


def test_markdown_becomes_elements_and_html_stays_text(openai_front_end: FrontEnd) -> None:
    cases = {
        "a **b** `c` *d* 2*3*4": "<p>a <strong>b</strong> <code>c</code> <em>d</em> 2*3*4</p>",
        "# Title\n\n- one\n- two": "<h3>Title</h3><ul><li>one</li><li>two</li></ul>",
        "1. one\n2. two": "<ol><li>one</li><li>two</li></ol>",
        "```py\nx = [1]\n\n<b>\n```\nafter": '<pre tabindex="0"><code>x = [1]\n\n&lt;b&gt;</code></pre><p>after</p>',
        "```\nnot yet closed": '<pre tabindex="0"><code>not yet closed</code></pre>',
        "<img src=x onerror=alert(1)>": "<p>&lt;img src=x onerror=alert(1)&gt;</p>",
    }

    async def steps(page: Page) -> None:
        for text, expected in cases.items():
            made = f"element('div', {{}}, ...markup({json.dumps(text)})).innerHTML"
            assert await page.evaluate(made) == expected

    visit(openai_front_end, steps)


def test_the_page_fits_every_width_in_both_schemes(openai_front_end: FrontEnd) -> None:
    grounds = []

    async def steps(page: Page) -> None:
        grounds.append(await page.evaluate("getComputedStyle(document.body).backgroundColor"))
        for width in WIDTHS:
            await page.resize(width, 800)
            await page.until(f"document.documentElement.clientWidth === {width}")
            views = ["chat"] if width > 980 else ["chat", "options", "live"]
            for view in views:
                if width <= 980:
                    await page.click(f"[data-show={view}]")
                overflow = await page.evaluate(
                    "document.documentElement.scrollWidth - document.documentElement.clientWidth"
                )
                assert overflow <= 0, f"{view} at {width} is {overflow} pixels too wide"
                if view == "chat":
                    box = await page.evaluate("document.querySelector('#send').getBoundingClientRect().toJSON()")
                    assert 0 <= box["left"] < box["right"] <= width
                    assert box["bottom"] <= 800

    for dark in (False, True):
        visit(openai_front_end, steps, dark=dark)
    assert len(set(grounds)) == 2


def test_everything_has_a_name_and_enough_contrast(openai_front_end: FrontEnd) -> None:
    async def steps(page: Page) -> None:
        await page.command("Accessibility.enable")
        nodes = (await page.command("Accessibility.getFullAXTree"))["nodes"]
        controls = {"button", "textbox", "slider", "spinbutton", "checkbox", "radio", "link", "log"}
        for node in nodes:
            if not node.get("ignored") and node["role"]["value"] in controls:
                assert node["name"]["value"].strip(), f"a {node['role']['value']} without a name"
        assert sum(node["role"]["value"] == "spinbutton" for node in nodes) >= 5
        texts = ("--ink --ground", "--soft --ground", "--soft --surface", "--accent --surface", "--on-accent --accent",
                 "--bad --bad-tint", "--ink --tint")  # fmt: skip
        for pair in texts:
            front, back = pair.split()
            ratio = await page.evaluate(CONTRAST % (front, back))
            assert ratio >= 4.5, f"{pair}: contrast {ratio:.2f}, expected at least 4.5"
        # The keyboard alone reaches the prompt, and can ask.
        await page.evaluate("document.activeElement.blur()")
        await page.press("Tab")
        assert await page.evaluate("document.activeElement.textContent") == "Skip to the prompt"
        await page.press("Enter")
        assert await page.evaluate("location.hash") == "#prompt"

    for dark in (False, True):
        visit(openai_front_end, steps, dark=dark)


def test_a_visitor_is_asked_for_the_key(locked_front_end: FrontEnd) -> None:
    async def give(page: Page, key: str) -> None:
        await page.until("!by('unlock').hidden")
        await page.click("#api_key")
        await page.type(key)
        await page.press("Enter")

    async def run() -> None:
        async with browser_page() as page:
            await page.open(locked_front_end.address)
            await give(page, "not-a-key")
            await page.until("!by('unlock_failure').hidden")
            await give(page, API_KEYS[0])
            await page.until(READY)
            assert await page.evaluate("by('unlock').hidden && by('all_metrics').hidden")
            await page.evaluate("by('max_tokens').value = 5")
            await page.click("#prompt")
            await page.type("It is")
            await page.press("Enter")
            await page.until(ENDED)
            assert "5 tokens" in await page.evaluate(FACTS)
            await page.until("!document.querySelector('.chart .scale').textContent.includes('no data')")
            # It is kept for the tab, and nowhere else.
            assert await page.evaluate("sessionStorage.length === 1 && !localStorage.length && !document.cookie")
            refused = [problem for problem in page.problems if "401" not in problem]
            assert refused == []

    asyncio.run(run())


CONTRAST = """(() => {
  const light = (name) => {
    const hex = getComputedStyle(document.documentElement).getPropertyValue(name).trim().slice(1);
    const part = (at) => {
      const v = parseInt(hex.slice(at, at + 2), 16) / 255;
      return v <= 0.03928 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4;
    };
    return 0.2126 * part(0) + 0.7152 * part(2) + 0.0722 * part(4);
  };
  const [low, high] = [light('%s'), light('%s')].sort((a, b) => a - b);
  return (high + 0.05) / (low + 0.05);
})()"""
"""WCAG's contrast of two of the page's colours."""
