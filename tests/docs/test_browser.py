"""No element of a page overflows in a real browser, if one is installed."""

from pathlib import Path

import pytest

from tests.docs import browser
from tests.reports import write_run
from twa_scale.tools.report import write_report


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_pages_fit_at_three_widths(site: Path) -> None:
    assert browser.overflows(site, (400, 900, 1400)) == []


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_long_line_is_found(site: Path, tmp_path: Path) -> None:
    assets = (site / "assets").as_uri()
    page = (site / "reference/glossary/index.html").read_text().replace("../../assets", assets)
    wide = f"<pre><code>{'x' * 200}</code></pre></article>"
    (tmp_path / "index.html").write_text(page.replace("</article>", wide))
    [(_, width, element, _)] = browser.overflows(tmp_path, (1400,))
    assert width == 1400 and element.startswith("CODE")


@pytest.mark.slow
@pytest.mark.skipif(browser.CHROMIUM is None, reason="needs Chromium: apt-get install chromium")
def test_a_report_fits(tmp_path: Path) -> None:
    (tmp_path / "site").mkdir()
    write_report(write_run(tmp_path), tmp_path / "site/index.html")
    assert browser.overflows(tmp_path / "site", (400, 900, 1400)) == []
