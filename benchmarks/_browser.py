"A real Chromium without a window, and a folder served to it: for what only a browser can answer."
import functools
import http.server
import shutil
import threading
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from moe_rl.bench import NeedsHardware

PATHS = ("chromium", "chromium-browser", "google-chrome")

@contextmanager
def chromium(): # -> playwright's Browser
    "A headless Chromium of the system; `NeedsHardware` names what is missing."
    program = next(filter(None, map(shutil.which, PATHS)), None)
    if program is None: raise NeedsHardware("Chromium (Debian: apt-get install chromium)")
    if not find_spec("playwright"): raise NeedsHardware("playwright (pip install playwright)")
    from playwright.sync_api import sync_playwright
    with sync_playwright() as p:
        browser = p.chromium.launch(executable_path=program, args=["--no-sandbox", "--disable-gpu",
            "--disable-background-networking"])
        try: yield browser
        finally: browser.close()

class Quiet(http.server.SimpleHTTPRequestHandler):
    "Serves without a word."
    def log_message(self, *args): pass

@contextmanager
def served(folder:Path): # -> address
    "A folder behind an address of this machine."
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=str(folder)))
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try: yield f"http://127.0.0.1:{server.server_port}/"
    finally: server.shutdown()
