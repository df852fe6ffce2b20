"""The report in a real browser: nothing is fetched, nothing fails, every picture is shown."""

from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.functional_tests.browser import CHROMIUM, Browser
from tests.unit_tests.report.synthetic_run import write_run
from trinity_megatron.report.report import Report, report_run

pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="needs chromium (apt-get install chromium)"),
]


@pytest.fixture(scope="module")
def report(tmp_path_factory: pytest.TempPathFactory) -> Report:
    # A name that would run a script if it were put into the page as it is.
    run = tmp_path_factory.mktemp("runs") / "<img src=x onerror=console.error(1)>"
    write_run(run / "tensorboard", "balanced", num_steps=40, num_layers=6, num_experts=96)
    return report_run(run)


@pytest.fixture(scope="module")
def browser(report: Report, tmp_path_factory: pytest.TempPathFactory) -> Iterator[Browser]:
    with Browser(tmp_path_factory.mktemp("profile")) as browser:
        browser.open(report.page.as_uri())
        yield browser


def requests(browser: Browser) -> set[str]:
    reports = browser.reports("Network.requestWillBeSent")
    return {report["request"]["url"][:80] for report in reports}


def complaints(browser: Browser) -> list[dict]:
    return browser.reports("Log.entryAdded", "Runtime.consoleAPICalled", "Runtime.exceptionThrown")


def test_all_pictures_are_decoded(browser: Browser, report: Report) -> None:
    decode = "Promise.all([...document.images].map(image => image.decode()))"
    widths = browser.evaluate(f"{decode}.then(() => [...document.images].map(i => i.naturalWidth))")
    assert len(widths) == len(report.pictures) > 8
    assert min(widths) > 1000


def test_nothing_is_requested_but_the_page(browser: Browser, report: Report) -> None:
    others = {url for url in requests(browser) if not url.startswith("data:")}
    assert others == {report.page.as_uri()[:80]}


def test_nothing_fails(browser: Browser) -> None:
    assert complaints(browser) == []
    assert not browser.reports("Network.loadingFailed")


def test_the_page_is_as_wide_as_the_window(browser: Browser) -> None:
    for width in (1280, 1440):
        browser.send(
            "Emulation.setDeviceMetricsOverride",
            width=width,
            height=800,
            deviceScaleFactor=1,
            mobile=False,
        )
        root = "document.documentElement"
        assert browser.evaluate(f"{root}.scrollWidth") == browser.evaluate(f"{root}.clientWidth")
        shown = browser.evaluate("Math.min(...[...document.images].map(i => i.clientWidth))")
        assert shown > 1000


def test_the_print_has_no_cut_figure(browser: Browser) -> None:
    # As high as a page of A4 less its margins, at 96 pixels an inch.
    browser.send("Emulation.setEmulatedMedia", media="print")
    browser.send(
        "Emulation.setDeviceMetricsOverride",
        width=688,
        height=1017,
        deviceScaleFactor=1,
        mobile=False,
    )
    highest = browser.evaluate(
        "Math.max(...[...document.querySelectorAll('figure')].map(f => f.offsetHeight))"
    )
    assert highest <= 1017


def test_what_these_tests_would_catch(browser: Browser, tmp_path: Path) -> None:
    # Last: the browser of the module goes to another page.
    page = tmp_path / "bad.html"
    page.write_text(
        '<img src="http://127.0.0.1:9/picture.png"><script>console.error("no"); missing()</script>'
    )
    browser.open(page.as_uri())
    assert "http://127.0.0.1:9/picture.png" in requests(browser)
    assert len(complaints(browser)) >= 2
