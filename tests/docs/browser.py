"""Load pages in Chromium at several widths, and return the elements that overflow."""

import json
import re
import shutil
import subprocess
from collections.abc import Sequence
from pathlib import Path

CHROMIUM = shutil.which("chromium")

# Frames are loaded one after the other, so that each page is complete when it is measured. `pre` and tables may
# scroll on narrow screens. The page itself may not.
_SCRIPT = """
const found = [];
const frame = document.querySelector('iframe');
async function measure(page, width) {
  frame.style.width = width + 'px';
  await new Promise(done => { frame.onload = done; frame.src = page; });
  const inside = frame.contentDocument, body = inside.documentElement;
  if (body.scrollWidth > width) found.push([page, width, 'page', body.scrollWidth]);
  if (width < 1400) return;
  for (const box of inside.querySelectorAll('article pre > code, article .md-typeset__scrollwrap, article svg, math'))
    if (box.scrollWidth > box.clientWidth + 1 && box.clientWidth > 0)
      found.push([page, width, box.tagName + ' ' + box.textContent.trim().slice(0, 40), box.scrollWidth]);
}
(async () => {
  for (const page of PAGES) for (const width of WIDTHS) await measure(page, width);
  const result = document.createElement('p');
  result.id = 'result';
  result.textContent = JSON.stringify(found);
  document.body.append(result);
})();
"""


def overflows(site: Path, widths: Sequence[int]) -> list[tuple[str, int, str, int]]:
    """Return (page, width of the window, element, its width in pixels) of all elements that overflow."""
    assert CHROMIUM is not None
    pages = [path.as_uri() for path in sorted(site.rglob("index.html"))]
    script = _SCRIPT.replace("PAGES", json.dumps(pages)).replace("WIDTHS", json.dumps(list(widths)))
    harness = site / "measure.html"
    harness.write_text(f"<!doctype html><body><iframe style='height:900px'></iframe><script>{script}</script></body>")
    command = [CHROMIUM, "--headless", "--no-sandbox", "--disable-gpu", "--allow-file-access-from-files"]
    command += ["--window-size=1600,1000", "--virtual-time-budget=600000", "--dump-dom", harness.as_uri()]
    done = subprocess.run(command, capture_output=True, text=True, check=True, timeout=300)
    result = re.search(r'<p id="result">(.*?)</p>', done.stdout, re.DOTALL)
    assert result, done.stderr[-2000:]
    return [tuple(entry) for entry in json.loads(result[1].replace("&amp;", "&").replace("&lt;", "<"))]
