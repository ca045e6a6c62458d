"""The page, in a headless Chromium: what a person clicks, types, sees and shares."""

import json
import os
import re
import shlex
import shutil
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Iterator
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

import httpx
import numpy as np
import polars as pl
import pytest
import uvicorn
from pipeline_fixtures import Run
from worlds import seal

from recsys2stage.serving.app import create_app
from recsys2stage.serving.page_files import FOLDER as FILES
from recsys2stage.serving.settings import Settings

if TYPE_CHECKING:
    from playwright.sync_api import Browser, ConsoleMessage, Page, Route

HOSTILE = '<img src=x onerror="document.title=1">'
AT = os.environ.get("RECSYS_PAGE_AT")  # a running service, whose screenshot goes into the docs
SCREENSHOT = Path(__file__).parent.parent.parent / "docs" / "page.png"
ITEM = "document.querySelectorAll('#final > li')"


def find_chromium() -> str | None:
    """Debian's Chromium, or another one that needs no download."""
    return next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)


@pytest.fixture(scope="module")
def service(informed: Run, tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    """The address of a service whose most popular item has a hostile title."""
    folder = tmp_path_factory.mktemp("page")
    bundle = shutil.copytree(informed.bundle, folder / "bundle")
    items = pl.read_parquet(bundle / "items.parquet")
    first = pl.col("item") == 1 + np.load(bundle / "popularity.npy")[1:].argmax()
    items.with_columns(title=pl.when(first).then(pl.lit(HOSTILE)).otherwise("title")).write_parquet(
        bundle / "items.parquet"
    )
    seal(bundle)
    app = create_app(Settings(bundle=bundle, data=informed.data, store=folder / "store.sqlite", log_requests=False))
    with socket.create_server(("127.0.0.1", 0)) as listening:
        server = uvicorn.Server(uvicorn.Config(app, log_level="error", lifespan="on"))
        thread = threading.Thread(target=server.run, kwargs={"sockets": [listening]})
        thread.start()
        address = f"http://127.0.0.1:{listening.getsockname()[1]}/"
        while thread.is_alive() and not server.started:
            time.sleep(0.02)
        yield address
        server.should_exit = True
        thread.join()


@pytest.fixture(scope="module")
def browser() -> "Iterator[Browser]":
    """A headless Chromium."""
    chromium = find_chromium()
    if chromium is None:
        pytest.skip("there is no Chromium; install it with apt-get install chromium")
    sync_api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed: pip install playwright")
    with sync_api.sync_playwright() as driver:
        browser = driver.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(scope="module")
def desktop(browser: "Browser", service: str) -> "Iterator[Page]":
    """A tab that the tests share."""
    yield from opened(browser, service, permissions=["clipboard-read", "clipboard-write"])


@pytest.fixture
def page(desktop: "Page") -> "Iterator[Page]":
    """The page without a past, which ends without an error in the console."""
    yield from anew(desktop)


@pytest.fixture
def phone(browser: "Browser", service: str) -> "Iterator[Page]":
    """The same on a narrow phone."""
    for tab in opened(browser, service, viewport={"width": 360, "height": 740}, has_touch=True, is_mobile=True):
        yield from anew(tab)


def opened(browser: "Browser", address: str, **options: Any) -> "Iterator[Page]":
    context = browser.new_context(base_url=address, **{"viewport": {"width": 1280, "height": 900}} | options)
    context.set_default_timeout(10_000)
    yield context.new_page()
    context.close()


def anew(page: "Page") -> "Iterator[Page]":
    errors: list[str] = []

    def hear(message: "ConsoleMessage") -> None:
        # Chromium reports each refused request, too; those are what some tests are about
        if message.type == "error" and not message.text.startswith("Failed to load resource"):
            errors.append(message.text)

    page.on("console", hear)
    page.emulate_media(color_scheme="light", reduced_motion="reduce")
    page.goto("/")
    page.wait_for_selector("#hits li")
    yield page
    page.unroute_all()
    page.evaluate("localStorage.clear(); sessionStorage.clear()")
    page.mouse.move(0, 0)
    page.goto("about:blank")
    page.remove_listener("console", hear)
    assert errors == []


def until(page: "Page", condition: str) -> None:
    """Until a condition in the page holds; playwright's own way evaluates text there, which its policy forbids."""
    end = time.monotonic() + 10
    while not page.evaluate(condition):
        assert time.monotonic() < end, f"10 seconds passed without {condition}"
        page.wait_for_timeout(20)


def texts(page: "Page", selector: str) -> list[str]:
    return page.locator(selector).all_inner_texts()


def wait_for_answer(page: "Page") -> None:
    """Until the lists are those of the request that the page stands for."""
    page.wait_for_selector("#final li")
    until(page, "!document.getElementById('lists').hasAttribute('aria-busy')")


def click_history(page: "Page", *places: int) -> list[str]:
    """Clicks the titles at these places of the search, one answer after the other; returns the item ids."""
    for place in places:
        with page.expect_response("**/v1/recommend"):
            page.locator("#hits button").nth(place).click()
    wait_for_answer(page)
    return re.findall(r"h=(\d+)", page.url)


def ask(address: str, **body: Any) -> dict[str, Any]:
    return httpx.post(f"{address}v1/recommend", json={"stages": True, **body}).raise_for_status().json()


def shown(page: "Page", name: str) -> list[str]:
    """Item ids of a list, in order."""
    return page.locator(f"#{name} > li").evaluate_all("rows => rows.map((row) => row.dataset.id)")


# the parts that need no browser


def test_the_files_name_no_other_host_and_carry_no_inline_code() -> None:
    for path in FILES.iterdir():
        text = path.read_text(encoding="utf-8").replace("http://www.w3.org/2000/svg", "")
        assert "://" not in text, path
        assert not re.search(r"\binnerHTML|outerHTML|insertAdjacentHTML|document\.write|\beval\(", text), path
    html = (FILES / "index.html").read_text(encoding="utf-8")
    assert not re.search(r"<style|\sstyle=|\son[a-z]+=|<script>|javascript:", html)
    assert all((FILES / name).is_file() for name in re.findall(r'(?:href|src)="static/([^"]+)"', html))


def test_the_page_and_its_files_are_served_with_their_types(service: str) -> None:
    types = {".html": "text/html", ".js": "text/javascript", ".css": "text/css", ".svg": "image/svg+xml"}
    for path in FILES.iterdir():
        answer = httpx.get(f"{service}static/{path.name}")
        assert answer.status_code == 200
        assert answer.headers["content-type"].startswith(types[path.suffix])
        assert "script-src 'self'" in answer.headers["content-security-policy"]
        assert httpx.get(str(answer.url), headers={"If-None-Match": answer.headers["etag"]}).status_code == 304
    assert httpx.get(service).content == (FILES / "index.html").read_bytes()
    assert httpx.head(service).status_code == 200
    for outside in ("app.py", "../page_files.py", "%2e%2e/page_files.py", "..%2fpage_files.py", ""):
        assert httpx.get(f"{service}static/{outside}").status_code == 404
    assert "/" not in httpx.get(f"{service}openapi.json").json()["paths"]


# what a person does


def test_a_history_clicked_together_gives_both_lists(page: "Page", service: str) -> None:
    assert page.locator("#invitation").is_visible()
    word = texts(page, "#hits .title")[3].split()[0].strip('",:')
    page.fill("#search", word)
    until(page, "document.getElementById('hits-caption').textContent.includes('found')")
    assert all(word.lower() in title.lower() for title in texts(page, "#hits .title"))
    page.fill("#search", "")
    until(page, "document.getElementById('hits-caption').textContent === 'Most popular'")
    items = click_history(page, 1, 4, 2)
    assert texts(page, "#history .title") == [texts(page, "#hits .title")[place] for place in (1, 4, 2)]
    assert not page.locator("#invitation").is_visible()
    body = json.loads(page.evaluate(REQUEST))
    assert body["history"]["items"] == items
    answer = ask(service, **body)
    assert shown(page, "final") == [item["item_id"] for item in answer["items"]]
    assert shown(page, "retrieved") == [item["item_id"] for item in answer["retrieved"]]
    assert page.locator("#status").inner_text().startswith("10 items after 3 events")
    assert {"search", "ranking", "in all", "seen from here"} <= set(texts(page, "#timing dt"))


REQUEST = """async () => {
  const { fromHash, requestBody } = await import('/static/state.js');
  const info = await (await fetch('/v1/info')).json();
  return JSON.stringify(requestBody(fromHash(location.hash), info));
}"""


def test_lines_join_the_places_of_an_item(page: "Page") -> None:
    click_history(page, 1, 4, 2)
    final, retrieved = shown(page, "final"), shown(page, "retrieved")
    ends = page.evaluate(ENDS)
    assert {end["id"] for end in ends} == {*final, *retrieved}
    for end in ends:
        item = end["id"]
        if item in final and item in retrieved:
            step = retrieved.index(item) - final.index(item)
            assert end["kind"] == ("up" if step > 0 else "down" if step < 0 else "same")
            assert end["from"] == pytest.approx(end["left"], abs=1.5)
        else:
            assert end["kind"] == ("enters" if item in final else "leaves")
        if item in final:
            assert end["to"] == pytest.approx(end["right"], abs=1.5)
    page.locator("#final > li").first.hover()
    assert page.locator("#lines path.active").get_attribute("data-id") == final[0]


ENDS = """() => {
  const top = document.getElementById('lines').getBoundingClientRect().top;
  const at = (list, id) => {
    const row = [...document.getElementById(list).children].find((one) => one.dataset.id === id);
    const box = row?.querySelector('.rank').getBoundingClientRect();
    return box ? box.top + box.height / 2 - top : null;
  };
  return [...document.querySelectorAll('#lines path')].map((path) => {
    const numbers = path.getAttribute('d').match(/-?[\\d.]+/g).map(Number);
    return { id: path.dataset.id, kind: path.classList[0], from: numbers[1], to: numbers[7],
             left: at('retrieved', path.dataset.id), right: at('final', path.dataset.id) };
  });
}"""


def test_an_item_shows_its_score_and_all_reasons(page: "Page", service: str) -> None:
    click_history(page, 1, 4, 2)
    answer = ask(service, **json.loads(page.evaluate(REQUEST)))
    item = answer["items"][0]
    row, height = page.locator("#final > li").first, page.locator("#lists").bounding_box()["height"]
    row.locator(".because").click()
    assert row.locator(".because").get_attribute("aria-expanded") == "true"
    assert row.locator(".signal").all_inner_texts() == [reason["signal"] for reason in item["reasons"]]
    effects = [float(text.replace("−", "-")) for text in row.locator(".bars .effect").all_inner_texts()]
    assert effects == pytest.approx([reason["effect"] for reason in item["reasons"]], abs=0.006)
    shown = row.locator(".facts").inner_text().replace("−", "-").split("\n")
    # the page's request and this one may use different cached states of the user, which agree to 1e-5
    assert float(shown[shown.index("score") + 1]) == pytest.approx(item["score"], rel=1e-4, abs=1e-4)
    row.locator(".because").click()
    assert page.locator("#lists").bounding_box()["height"] == height  # closed again, nothing stays stretched
    page.uncheck("#explain")
    wait_for_answer(page)
    until(page, "document.querySelectorAll('#final .reason').length === 0")


def test_a_known_user_and_the_same_events_as_a_history(page: "Page", service: str) -> None:
    user = httpx.get(f"{service}v1/users", params={"limit": 5}).json()["users"][3]
    events = httpx.get(f"{service}v1/users/{user}").json()
    newest = httpx.get(f"{service}v1/info").json()["newest_time"]
    page.fill("#time", datetime.fromtimestamp(newest, UTC).strftime("%Y-%m-%dT%H:%M:%S"))
    page.get_by_label("a known user").check()
    page.fill("#user", user)
    page.keyboard.press("Enter")
    wait_for_answer(page)
    page.wait_for_selector("#events li")
    assert texts(page, "#events .title")[:3] == [event["title"] for event in events["events"][:3]]
    final = shown(page, "final")
    assert final == [item["item_id"] for item in ask(service, user_id=user, request_time=newest)["items"]]
    with page.expect_response("**/v1/recommend"):
        page.click("#adopt")
    wait_for_answer(page)
    assert page.get_by_label("a history", exact=True).is_checked()
    assert page.locator("#history li").count() == events["total"]
    assert shown(page, "final") == final
    page.get_by_label("a known user").check()
    wait_for_answer(page)
    page.locator("#final .acts button").first.click()  # one event more, after those of the user
    until(page, f"document.querySelectorAll('#history li').length === {events['total'] + 1}")
    page.get_by_label("a known user").check()
    page.click("#random")
    until(page, f"/^#u=./.test(location.hash) && !location.hash.startsWith('#u={user}&')")


def test_filters_hold_and_a_link_shares_the_view(page: "Page", service: str) -> None:
    click_history(page, 1, 4)
    page.locator("#filters-box summary").click()
    genre = page.locator("#filters .chip").nth(1)
    name = genre.inner_text()
    with page.expect_response("**/v1/recommend"):
        genre.locator("input").check()
    page.fill("#k", "7")
    page.locator("#diversity").fill("0.3")
    page.locator("#final .acts button[data-key^=exclude]").nth(1).click()
    until(page, "document.querySelectorAll('#final > li').length === 7 && location.hash.includes('&x=')")
    page.wait_for_timeout(300)
    wait_for_answer(page)
    excluded = re.search(r"&x=(\d+)", page.url)[1]
    final = shown(page, "final")
    assert excluded not in final
    catalogue = httpx.get(f"{service}v1/items", params={"limit": 100}).json()
    genres = {item["item_id"]: item["features"]["genres"] for item in catalogue["items"]}
    assert all(name in genres[item] for item in final if item in genres)
    assert page.locator("#filters-count").inner_text() == "1 set"
    page.click("#copy-link")
    link = page.evaluate("navigator.clipboard.readText()")
    assert link == page.url
    titles = texts(page, "#history .title")
    page.goto("about:blank")
    page.goto(link)
    wait_for_answer(page)
    assert shown(page, "final") == final
    until(page, f"document.querySelector('#history .title').textContent === {json.dumps(titles[0])}")
    assert texts(page, "#history .title") == titles
    assert page.locator("#filters .chip input:checked").count() == 1


def test_a_feature_of_many_classes_is_typed(page: "Page") -> None:
    names = [f"class {number}" for number in range(200)]
    features = [
        {"name": "a.b", "kind": "categorical", "values": names, "count": 1000},
        {"name": "price", "kind": "numeric", "min": 0.5, "max": 9.5},
    ]
    page.route("**/v1/info", lambda route: route.fulfill(json=route.fetch().json() | {"features": features}))
    page.route("**/v1/recommend", lambda route: refuse(route, 422, "Wrong", "no such feature"))
    page.reload()
    page.wait_for_selector("#hits li")
    page.locator("#filters-box summary").click()
    page.get_by_label("Add a value of a.b").press_sequentially("class 17")
    assert page.locator("#filters datalist option").count() == 11  # 17 and 170 to 179
    page.keyboard.press("Enter")
    page.get_by_label("Add a value of a.b").fill("class 700")  # known to the service, though not listed
    page.keyboard.press("Enter")
    page.get_by_label("price, at most").fill("2.5")
    page.select_option("[aria-label='How a.b is filtered']", "none")
    page.locator("#hits button").nth(1).click()
    page.wait_for_selector("#error p")
    filters = json.loads(page.evaluate(REQUEST))["filters"]
    assert filters == {"a.b": {"none": ["class 17", "class 700"]}, "price": {"max": 2.5}}
    page.get_by_label("Remove class 17", exact=True).click()
    until(page, "!location.hash.includes('class+17')")


def test_the_request_time_is_sent_as_given(page: "Page") -> None:
    click_history(page, 1)
    assert "request_time" not in json.loads(page.evaluate(REQUEST))
    with page.expect_request("**/v1/recommend") as request:
        page.fill("#time", "2031-05-06T07:08:09")
    assert request.value.post_data_json["request_time"] == 1_935_817_689
    assert request.value.post_data_json["history"]["times"] == [1_935_817_689 - 86_400]
    wait_for_answer(page)
    page.click("#now")
    until(page, "!location.hash.includes('time')")
    wait_for_answer(page)


def test_everything_works_from_the_keyboard(page: "Page") -> None:
    keyboard = page.keyboard
    keyboard.press("Tab")
    assert page.evaluate("document.activeElement.id") == "skip"
    keyboard.press("/")
    assert page.evaluate("document.activeElement.id") == "search"
    titles = texts(page, "#hits .title")
    keyboard.press("Enter")
    page.wait_for_selector("#history li")
    for key in ("ArrowDown", "ArrowDown", "Enter"):
        keyboard.press(key)
    assert texts(page, "#history .title") == [titles[0], titles[1]]
    keyboard.press("Escape")
    assert page.evaluate("document.activeElement.id") == "search"
    page.evaluate("document.getElementById('hits').querySelector('li:last-child button').focus()")
    keyboard.press("Tab")  # Clear
    keyboard.press("Tab")  # the first event's "earlier" is disabled, so its "later"
    assert page.evaluate("document.activeElement.title") == "Move later"
    keyboard.press("Enter")
    assert texts(page, "#history .title") == [titles[1], titles[0]]
    keyboard.press("Alt+ArrowUp")
    assert texts(page, "#history .title") == [titles[0], titles[1]]
    assert page.evaluate("document.activeElement.title") == "Remove"  # "earlier" is disabled in the first row
    keyboard.press("Space")
    assert texts(page, "#history .title") == [titles[1]]
    assert page.evaluate("document.activeElement.title") == "Remove"  # that of the row that took the place
    wait_for_answer(page)
    page.focus("#skip")
    keyboard.press("Enter")
    assert page.evaluate("document.activeElement.id") == "results-heading"
    reached = []
    for _ in range(5):
        keyboard.press("Tab")
        reached.append(page.evaluate("document.activeElement.id || document.activeElement.className"))
    assert reached == ["copy-link", "copy-curl", "copy-python", "because", "icon"]
    assert page.evaluate("getComputedStyle(document.activeElement).outlineStyle") == "solid"
    keyboard.press("Shift+Tab")
    keyboard.press("Enter")
    assert page.locator("#final .why").first.is_visible()


def test_a_title_from_a_stranger_stays_text(page: "Page") -> None:
    assert texts(page, "#hits .title")[0] == HOSTILE
    click_history(page, 0, 2)
    assert texts(page, "#history .title")[0] == HOSTILE
    assert page.locator("img").count() == 0
    assert page.title() == "recsys2stage"
    csp = page.locator("meta[http-equiv=Content-Security-Policy]").get_attribute("content")
    assert "require-trusted-types-for 'script'" in csp  # a later innerHTML would throw


def test_a_phone_needs_no_sideways_scrolling(phone: "Page", service: str) -> None:
    def check() -> None:
        assert phone.evaluate("Math.max(document.documentElement.scrollWidth, document.body.scrollWidth)") == 360
        assert phone.evaluate(SMALL) == []

    check()
    click_history(phone, 0, 1, 2)
    phone.locator("#final .because").first.click()
    phone.locator("#filters-box summary").click()
    check()
    phone.route("**/v1/recommend", lambda route: refuse(route, 422, "Wrong " * 30, "x" * 300))
    phone.locator("#hits button").nth(3).click()
    phone.wait_for_selector("#error p")
    check()
    phone.evaluate("scrollTo(0, 0)")
    phone.locator("#jump").click()
    until(phone, "document.getElementById('results-heading').getBoundingClientRect().top < 100")


# WCAG 2.2 asks for targets of 24 pixels, except in a line of text
SMALL = """[...document.querySelectorAll('button, select, summary')]
  .filter((one) => one.checkVisibility() && !one.matches('.because, #skip'))
  .map((one) => [one.id || one.title || one.textContent, one.getBoundingClientRect().height])
  .filter(([, height]) => height < 24)"""


def refuse(route: "Route", status: int, title: str, detail: str, **headers: str) -> None:
    errors = [{"field": "k", "value": 0, "detail": "one more thing"}] if status == 422 else []
    body = {"title": title, "status": status, "detail": detail, "errors": errors}
    route.fulfill(status=status, headers=headers, content_type="application/problem+json", body=json.dumps(body))


def test_a_refusal_names_what_to_do_and_can_be_tried_again(page: "Page") -> None:
    click_history(page, 1)
    page.route("**/v1/recommend", lambda route: refuse(route, 429, "Too many requests", "wait", **{"Retry-After": "2"}))
    page.locator("#hits button").nth(2).click()
    page.wait_for_selector("#error")
    assert "asks to wait 2 s" in page.locator("#error").inner_text()
    page.unroute("**/v1/recommend")
    page.get_by_role("button", name="Try again").click()
    page.wait_for_selector("#error", state="hidden")
    assert page.locator("#status").inner_text().startswith("10 items after 2 events")
    page.route("**/v1/recommend", lambda route: refuse(route, 422, "Wrong", "k is 0, expected at least 1; ask for 1"))
    page.locator("#hits button").nth(3).click()
    page.wait_for_selector("#error li")
    assert "k: one more thing" in page.locator("#error").inner_text()
    assert page.get_by_role("button", name="Try again").count() == 0  # the same request would be refused again
    page.unroute("**/v1/recommend")
    page.route("**/v1/recommend", lambda route: route.abort())
    page.locator("#hits button").nth(4).click()
    until(page, "document.getElementById('error').textContent.includes('does not answer')")
    page.get_by_label("a known user").check()  # nothing is asked, so nothing is wrong
    page.wait_for_selector("#error", state="hidden")


def test_a_service_with_keys_is_asked_with_the_key_typed_in(page: "Page") -> None:
    def guard(route: "Route") -> None:
        if route.request.headers.get("authorization") == "Bearer sesame-0123456789":
            route.continue_()
        else:
            refuse(route, 401, "Unauthorized", "")

    page.route("**/v1/**", guard)
    page.reload()
    page.wait_for_selector("#key-form")
    assert page.evaluate("document.activeElement.id") == "key"
    page.keyboard.type("wrong")
    page.keyboard.press("Enter")
    until(page, "document.getElementById('key-detail').textContent.includes('refused the key')")
    page.fill("#key", "sesame-0123456789")
    page.keyboard.press("Enter")
    page.wait_for_selector("#hits li")
    page.wait_for_selector("#key-form", state="hidden")
    click_history(page, 1)
    assert "sesame" not in page.url
    page.click("#copy-curl")
    copied = page.evaluate("navigator.clipboard.readText()")
    assert "$RECSYS_API_KEY" in copied
    assert "sesame" not in copied


def test_what_is_copied_asks_for_the_same(page: "Page", service: str) -> None:
    click_history(page, 0, 1, 3)
    final = shown(page, "final")
    page.click("#copy-curl")
    words = shlex.split(page.evaluate("navigator.clipboard.readText()"))
    assert words[:2] == ["curl", "-sS"]
    assert ask(service, **json.loads(words[words.index("-d") + 1]))["items"][0]["item_id"] == final[0]
    assert words[2] == f"{service}v1/recommend"
    page.click("#copy-python")
    until(page, "document.getElementById('status').textContent === 'Copied the Python script'")
    script = page.evaluate("navigator.clipboard.readText()")
    output = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout
    assert [line.split()[0] for line in output.splitlines()] == [str(rank) for rank in range(1, 11)]
    assert output.splitlines()[0].split(maxsplit=1)[1].startswith(texts(page, "#final .title")[0])


def test_nothing_in_a_request_breaks_what_is_copied_or_shared(page: "Page") -> None:
    nasty = ["a'b", '"', "a b&c=d#e", "$(x) `y`", "\\", "é\n\t\u2028", "{}", "x,y", "%41", "😀"]
    body = {"history": {"items": nasty, "ratings": [1.5, None]}, "filters": {"a.b": {"any": nasty}}, "explain": True}
    curl, script, back = page.evaluate(
        """async (body) => {
          const { asCurl, asPython } = await import('/static/snippets.js');
          const { initial, fromHash, toHash } = await import('/static/state.js');
          const state = initial();
          const event = (id, n) => ({ id, time: n % 2 ? n : null, rating: null, action: n ? id : null });
          state.history = body.history.items.map(event);
          state.filters['a.b'] = { mode: 'none', values: body.history.items };
          state.filters.year = { min: -1.5, max: null };
          Object.assign(state, { exclude: body.history.items, k: 50, diversity: 0.25, action: 'a&b', time: 0 });
          state.explain = false;
          const same = JSON.stringify(fromHash('#' + toHash(state))) === JSON.stringify(state);
          return [asCurl("http://h/it's", body, true), asPython('http://h/', body, true), same];
        }""",
        body,
    )
    words = shlex.split(curl)
    assert words[2] == "http://h/it's"
    assert json.loads(words[words.index("-d") + 1]) == body
    sent: dict[str, Any] = {}
    fake = type("Httpx", (), {"post": staticmethod(lambda url, json, headers: sent.update(json))})
    with pytest.raises(AttributeError):  # what the stand-in returns is no response
        exec(script.replace("import httpx\n", "").replace("os.environ['RECSYS_API_KEY']", "'k'"), {"httpx": fake})
    assert sent == body
    assert back


def test_a_wrong_link_falls_back_to_the_defaults(page: "Page") -> None:
    page.goto("/#k=-5&diversity=x&time=soon&f.year.min=&h=nowhere&ht=a,b&seen=never&explain=maybe&f.a.any=%3Cb%3E")
    page.wait_for_selector("#history li")
    assert texts(page, "#history .title") == ["nowhere"]
    assert page.input_value("#k") == "1"
    assert page.input_value("#time") == ""
    page.wait_for_selector("#error li, #error p, #final li, #status:not(:empty)")


def test_the_theme_follows_the_system_until_it_is_chosen(page: "Page") -> None:
    def paper() -> str:
        return page.evaluate("getComputedStyle(document.body).backgroundColor")

    light = paper()
    page.emulate_media(color_scheme="dark")
    dark = paper()
    assert light != dark
    page.select_option("#theme", "light")
    assert paper() == light
    page.reload()
    page.wait_for_selector("#hits li")
    assert (paper(), page.input_value("#theme")) == (light, "light")
    page.select_option("#theme", "auto")
    assert paper() == dark


def test_motion_stops_where_it_is_unwelcome(page: "Page") -> None:
    click_history(page, 1, 3)
    assert page.evaluate("document.getAnimations().length") == 0
    page.emulate_media(reduced_motion="no-preference")
    page.evaluate("window.seen = 0; Element.prototype.animate = () => { window.seen += 1; }")
    click_history(page, 5)
    assert page.evaluate("window.seen") > 0


CONTRAST = """() => {
  const canvas = document.createElement('canvas').getContext('2d', { willReadFrequently: true });
  const rgba = (color) => {
    canvas.clearRect(0, 0, 1, 1); canvas.fillStyle = color; canvas.fillRect(0, 0, 1, 1);
    const [r, g, b, a] = canvas.getImageData(0, 0, 1, 1).data;
    return [r, g, b, a / 255];
  };
  const luminance = (rgb) => rgb.map((v) => v / 255).map((v) => v <= .03928 ? v / 12.92 : ((v + .055) / 1.055) ** 2.4)
    .reduce((sum, v, n) => sum + v * [.2126, .7152, .0722][n], 0);
  const over = (top, under) => top.slice(0, 3).map((v, n) => v * top[3] + under[n] * (1 - top[3]));
  const behind = (node) => {
    if (!node) return rgba(getComputedStyle(document.body).backgroundColor).slice(0, 3);
    const own = rgba(getComputedStyle(node).backgroundColor);
    return own[3] === 1 ? own.slice(0, 3) : over(own, behind(node.parentElement));
  };
  const low = [];
  for (const node of document.querySelectorAll('body *')) {
    const text = [...node.childNodes].some((child) => child.nodeType === 3 && child.data.trim());
    if (!text && !node.matches('input:not([type=checkbox], [type=radio], [type=range]), select')) continue;
    if (!node.checkVisibility() || node.closest('.unseen, .skip, :disabled, option, noscript')) continue;
    const under = behind(node);
    const color = over(rgba(getComputedStyle(node).color), under);
    const [high, dim] = [luminance(color), luminance(under)].sort((a, b) => b - a);
    const ratio = (high + .05) / (dim + .05);
    if (ratio < 4.5) low.push([node.tagName, node.className, node.textContent.slice(0, 30), ratio]);
  }
  return low;
}"""


@pytest.mark.parametrize("scheme", ["light", "dark"])
def test_text_stands_out_from_its_background(page: "Page", scheme: str) -> None:
    page.emulate_media(color_scheme=scheme)
    click_history(page, 0, 1)
    page.locator("#filters-box summary").click()
    page.locator("#filters .chip input").first.check()
    page.locator("#final .because").first.click()
    wait_for_answer(page)
    assert page.evaluate(CONTRAST) == []
    page.route("**/v1/recommend", lambda route: refuse(route, 422, "Wrong", "k is 0"))
    page.locator("#hits button").nth(4).click()
    page.wait_for_selector("#error p")
    page.evaluate("document.getElementById('lists').hidden = true")
    assert page.evaluate(CONTRAST) == []


def test_every_control_has_a_name_and_every_list_its_label(page: "Page") -> None:
    click_history(page, 0, 1)
    page.locator("#filters-box summary").click()
    client = page.context.new_cdp_session(page)
    nodes = client.send("Accessibility.getFullAXTree")["nodes"]
    controls = {
        "button",
        "textbox",
        "searchbox",
        "combobox",
        "checkbox",
        "radio",
        "slider",
        "spinbutton",
        "link",
        "table",
    }
    controls |= {"radiogroup", "region", "main", "DateTime", "Date", "dialog", "alertdialog"}
    nameless = [
        node["role"]["value"]
        for node in nodes
        if not node["ignored"]
        and node["role"]["value"] in controls
        and not node.get("name", {}).get("value", "").strip()
    ]
    assert nameless == []
    roles = [node["role"]["value"] for node in nodes if not node["ignored"]]
    assert roles.count("main") == 1
    assert {"slider", "searchbox", "radio", "status"} <= set(roles)
    assert page.evaluate("""() => {
      const ids = [...document.querySelectorAll('[id]')].map((node) => node.id);
      const named = [...document.querySelectorAll('[aria-labelledby], [aria-controls], [aria-describedby], [for]')]
        .flatMap((node) => ['aria-labelledby', 'aria-controls', 'aria-describedby', 'for']
          .flatMap((name) => (node.getAttribute(name) ?? '').split(' ').filter(Boolean)));
      return [ids.length - new Set(ids).size, named.filter((id) => !ids.includes(id))];
    }""") == [0, []]


def test_the_bundle_tells_what_it_was_trained_on(page: "Page", service: str) -> None:
    info = httpx.get(f"{service}v1/info").json()
    about = page.locator("#about").inner_text()
    assert info["bundle"]["hash"] in about
    assert info["version"] in about
    assert info["bundle"]["hash"] in page.locator("#tagline").inner_text()


def test_a_bundle_of_one_stage_shows_one_list(page: "Page") -> None:
    def one_stage(route: "Route") -> None:
        info = route.fetch().json()
        route.fulfill(json=info | {"stages": ["retriever"], "metrics": METRICS})

    page.route("**/v1/info", one_stage)
    page.reload()
    page.wait_for_selector("#hits li")
    click_history(page, 1)
    assert not page.locator("#retrieved-box").is_visible()
    assert page.locator("#final-heading").inner_text() == "Retriever"
    assert texts(page, "#metrics-head th") == ["stage", "NDCG@10", "Recall@100"]
    assert "0.1234 0.1200 to 0.1300" in page.locator("#metrics-body").inner_text()


METRICS = {"retriever": {"ndcg@10": {"value": 0.1234, "low": 0.12, "high": 0.13}, "recall@100": 0.5}}


def test_a_screenshot_shows_both_lists(browser: "Browser", request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """RECSYS_PAGE_AT=http://127.0.0.1:8000/ (make demo, make serve) writes the one in the docs."""
    for page in opened(
        browser, AT or request.getfixturevalue("service"), color_scheme="light", device_scale_factor=1.5 if AT else 1
    ):
        page.goto("/")
        page.wait_for_selector("#hits li")
        click_history(page, 1, 4, 2, 7)
        page.mouse.move(0, 0)
        page.wait_for_timeout(400)
        picture = page.screenshot(path=SCREENSHOT if AT else tmp_path / "page.png")
        assert picture.startswith(b"\x89PNG")
        assert len(picture) > 20_000
