"""The site of docs/build.py: CPU seconds to build it, pages, broken links, weight of its first page.

Every page is opened in a headless Chromium at 390 pixels and in dark mode: no request to another machine, no error in
its console, nothing wider than the window, no picture that does not load; the search finds a word.

    moe-rl bench site           builds into a temporary folder
    moe-rl bench site FOLDER    builds into FOLDER/html and leaves it there
"""
import re
import resource
import subprocess
import sys
import tempfile
from html.parser import HTMLParser
from pathlib import Path
from urllib.parse import unquote, urlsplit
from _browser import chromium, served

ROOT = Path(__file__).resolve().parents[1]

# Elements of the text that stick out of the window, and lie in nothing that scrolls sideways.
WIDE = """[...document.querySelectorAll('article *')].filter(e => {
    if (e.getBoundingClientRect().right <= innerWidth + 1 || !e.getClientRects().length) return false
    for (let p = e; p.tagName != 'ARTICLE'; p = p.parentElement)
        if (['auto', 'scroll'].includes(getComputedStyle(p).overflowX)) return false
    return true }).map(e => e.tagName + ' ' + e.className).slice(0, 3)"""

class Page(HTMLParser):
    "Addresses that a page names, and places in it that can be jumped to."
    def __init__(self, text:str):
        super().__init__()
        self.links, self.assets, self.ids = [], [], set()
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        attrs = dict(attrs)
        if "id" in attrs: self.ids.add(attrs["id"])
        if tag == "a" and attrs.get("href"): self.links.append(attrs["href"])
        if tag in ("img", "script") and attrs.get("src"): self.assets.append(attrs["src"])
        if tag == "link" and attrs.get("href") and attrs.get("rel") != "canonical": self.assets.append(attrs["href"])

def broken_links(html:Path) -> list[str]:
    "Links and assets of all pages that lead nowhere, and assets that lie on another machine."
    pages = {p: Page(p.read_text()) for p in sorted(html.rglob("*.html"))}
    bad = []
    for path, page in pages.items():
        here = path.relative_to(html)
        for target in page.assets + page.links:
            parts = urlsplit(target)
            if parts.scheme in ("http", "https", "mailto"):
                if target in page.assets: bad.append(f"{here}: {target} is not here")
                continue
            if parts.scheme == "data": continue
            file = (path.parent/unquote(parts.path)).resolve() if parts.path else path
            if not file.is_file(): bad.append(f"{here}: no {target}")
            elif parts.fragment and file in pages and unquote(parts.fragment) not in pages[file].ids:
                bad.append(f"{here}: {target} jumps nowhere")
    for line in re.findall(r"\]\((?!http)([^)]+)\)", (html/"llms.txt").read_text()):
        if not (html/line).is_file(): bad.append(f"llms.txt: no {line}")
    return bad

def first_page(browser, address:str) -> float:
    "KiB that a first visit brings over the wire."
    page, sizes = browser.new_page(), []
    page.on("response", lambda r: sizes.append(len(r.body())) if r.ok else None)
    page.goto(address, wait_until="networkidle")
    page.close()
    return sum(sizes)/1024

def visit(browser, html:Path, address:str) -> tuple[list[str], list[str]]: # what went wrong, requests to other machines
    "Every page on a telephone in the dark."
    context = browser.new_context(color_scheme="dark", viewport=dict(width=390, height=844))
    page, bad, outside, where = context.new_page(), [], [], [""]
    page.on("console", lambda m: bad.append(f"{where[0]}: {m.text}") if m.type == "error" else None)
    page.on("pageerror", lambda e: bad.append(f"{where[0]}: {e}"))
    page.on("request", lambda r: outside.append(f"{where[0]}: {r.url}") if not r.url.startswith((address, "data:"))
        else None)
    for path in sorted(html.rglob("*.html")):
        where[0] = path.relative_to(html).as_posix()
        page.goto(address + where[0])
        wide = page.evaluate(WIDE)
        blank = page.evaluate("[...document.images].filter(i => i.complete && !i.naturalWidth).map(i => i.src)")
        if wide: bad.append(f"{where[0]}: wider than a telephone: {', '.join(wide)}")
        bad += [f"{where[0]}: {src} does not load" for src in blank]
    where[0] = "the search"
    page.goto(address + "search.html?q=staleness")
    page.wait_for_selector("ul.search li a", timeout=20_000)
    context.close()
    return bad, outside

def measure(args):
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        out = Path(args[0] if args else scratch)
        r = subprocess.run([sys.executable, "docs/build.py", out], cwd=ROOT, capture_output=True, text=True)
        if r.returncode: raise SystemExit(r.stdout[-2000:] + r.stderr[-4000:])
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        html = out/"html"
        pages, broken = len(list(html.rglob("*.html"))), broken_links(html)
        with served(html) as address:
            kib = first_page(browser, address)
            bad, outside = visit(browser, html, address)
    for line in [*broken, *bad, *outside]: print(line)
    return dict(figures=dict(pages=pages, broken_links=len(broken),
        kib_first_page=kib, seconds=used.ru_utime + used.ru_stime, page_errors=len(bad), requests_outside=len(outside)))
