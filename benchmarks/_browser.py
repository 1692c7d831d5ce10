"A real Chromium without a window, and a folder served to it: for what only a browser can answer."
import functools
import http.server
import shutil
import socket
import subprocess
import sys
import threading
import time
import urllib.request
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

@contextmanager
def lab(folder:Path): # -> address
    "A JupyterLab whose notebooks are in `folder`, reachable from this machine alone."
    with socket.socket() as s:
        s.bind(("127.0.0.1", 0))
        port = s.getsockname()[1]
    quiet = ["--ServerApp.token=", "--ServerApp.password=", "--LabApp.news_url=null",
             "--LabApp.check_for_updates_class="
             "jupyterlab.NeverCheckForUpdate", "--ServerApp.log_level=ERROR"]
    settings = folder/".settings"
    for name, text in (("apputils-extension/notification", '{"fetchNews": "false", "checkForUpdates": false}'),
            ("docmanager-extension/plugin", '{"autosave": false}')):
        path = settings/f"@jupyterlab/{name}.jupyterlab-settings"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    command = [sys.executable, "-m", "jupyterlab", "--no-browser", "--allow-root", "--ip=127.0.0.1", f"--port={port}",
        "--expose-app-in-browser", f"--LabApp.user_settings_dir={settings}", f"--ServerApp.root_dir={folder}", *quiet]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, start_new_session=True)
    address = f"http://127.0.0.1:{port}/"
    try:
        for _ in range(300):
            try:
                urllib.request.urlopen(address + "api", timeout=2).close()
                break
            except OSError: time.sleep(.2)
            if process.poll() is not None: raise SystemExit(process.stderr.read().decode()[-2000:])
        yield address
    finally:
        process.terminate()
        process.wait()

def open_notebook(page, name:str) -> None:
    "Open a notebook in a page that shows JupyterLab, wait for its kernel, and run all cells."
    page.evaluate("""async name => {
        const app = window.jupyterapp, panel = await app.commands.execute('docmanager:open', {path: name})
        await panel.revealed
        await panel.sessionContext.ready
        await panel.sessionContext.session.kernel.info
        await app.commands.execute('notebook:run-all-cells') }""", name)

def close_notebook(page) -> None:
    "End the kernel of the notebook in front, and close it."
    page.evaluate("""async () => {
        const panel = window.jupyterapp.shell.currentWidget
        await panel.sessionContext.shutdown()
        panel.dispose() }""")
