"""A run of the main job followed in a browser: when is a step on screen, and does a resumed run go on in the same view?

JupyterLab in a real Chromium shows `Live`; its button starts the run. The lag of a step is the time from the first
moment at which its line is in the file to the first at which the page says that step or a later one; for pictures,
the first at which the picture of rewards does. Then the run is killed (SIGKILL, all of its processes), and the button
resumes it.

    moe-rl bench live [SECONDS]     of each of its two lives, 60 unless said otherwise
"""
import json
import signal
import tempfile
import threading
import time
from pathlib import Path
from statistics import median
import psutil
from _browser import chromium, lab, open_notebook

from moe_rl.panels.live import process_of
from moe_rl.rl.log import read_lines

ROOT = Path(__file__).resolve().parents[1]
CELLS = """from moe_rl.panels import Live
settings = {{"warm_start.seconds": 30, "checkpoint.every": 5, "eval.prompts": 64}}
live = Live({folder!r}, config={config!r}, settings=settings)
live"""
# The page notes when it shows a step: in words, and in the picture of rewards.
WATCH = """() => { window.seen = []
    const note = () => {
        const words = document.querySelector('.live-state')?.dataset.step
        const picture = document.querySelector('.panel-Live figure img')?.alt.match(/^Step (\\d+)/)?.[1]
        for (const [what, step] of [['words', words], ['picture', picture]])
            if (step !== undefined && window.last[what] !== step) {
                window.last[what] = step; window.seen.push([what, +step, Date.now()/1000]) } }
    window.last = {}
    const all = {subtree: true, childList: true, attributes: true, characterData: true}
    new MutationObserver(note).observe(document.body, all) }"""
# How long the kernel takes to answer, while it follows.
ASK = """async () => { const began = performance.now()
    await window.jupyterapp.shell.currentWidget.sessionContext.session.kernel.requestExecute({code: '1+1'}).done
    return (performance.now() - began)/1000 }"""

class Writes(threading.Thread):
    "When each step came into a file of metrics; a life begins anew after a resume."
    def __init__(self, path:Path):
        super().__init__(daemon=True)
        self.path, self.at, self.size = path, [], 0
    def run(self):
        while True:
            size = self.path.stat().st_size if self.path.exists() else 0
            if size != self.size:
                rows, now, self.size = read_lines(self.path), time.time(), size
                if rows and (not self.at or rows[-1]["step"] != self.at[-1][0]): self.at.append((rows[-1]["step"], now))
            time.sleep(.01)

def lags(writes:list[tuple], seen:list[tuple]) -> list[float]: # seconds
    "From a step's line to the first moment at which it, or a later one, was shown."
    out = []
    for step, at in writes:
        later = [t for s, t in seen if s >= step and t >= at - .02]
        if later: out.append(min(later) - at)
    return out

def kill(folder:Path) -> None:
    "End all processes of a run at once."
    process = process_of(folder)
    family = [process, *process.children(recursive=True)]
    for p in family:
        try: p.send_signal(signal.SIGKILL)
        except psutil.NoSuchProcess: pass
    psutil.wait_procs(family, timeout=20)

def life(page, button:str, writes:Writes, seconds:float, beyond:int=0) -> tuple[list, list]: # writes, what was seen
    "Press a button and watch a life of the run, until it is beyond a step."
    page.evaluate("() => { window.seen = [] }")
    before = len(writes.at)
    page.locator(f".control-{button}").last.click()
    end = time.monotonic() + 240
    while len(writes.at) == before or writes.at[-1][0] <= beyond:
        if time.monotonic() > end:
            shown = page.locator(".panel-Live").inner_text()[:400]
            raise SystemExit(f"no step beyond {beyond} after {button}: {shown}")
        time.sleep(.1)
    page.wait_for_timeout(1000*seconds)
    return writes.at[before:], page.evaluate("() => window.seen")

def measure(args):
    seconds = float(args[0]) if args else 60.
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        folder = Path(scratch)/"run"
        source = CELLS.format(folder=str(folder), config=str(ROOT/"configs"/"main_job.toml"))
        cell = dict(cell_type="code", id="live", execution_count=None, metadata={}, outputs=[], source=source)
        kernel = dict(display_name="python3", language="python", name="python3")
        notebook = dict(cells=[cell], metadata=dict(kernelspec=kernel), nbformat=4, nbformat_minor=5)
        (Path(scratch)/"live.ipynb").write_text(json.dumps(notebook))
        writes = Writes(folder/"metrics.jsonl")
        with lab(Path(scratch)) as address:
            page = browser.new_page(viewport=dict(width=1280, height=1000))
            page.goto(address + "lab?reset")
            page.wait_for_function("window.jupyterapp?.shell")
            page.evaluate("async () => { await window.jupyterapp.restored }")
            open_notebook(page, "live.ipynb")
            page.locator(".panel-Live").wait_for(timeout=120_000)
            page.evaluate(WATCH)
            writes.start()
            try:
                first = life(page, "start", writes, seconds)
                answer = max(page.evaluate(ASK) for _ in range(5))
                screens = ROOT/"runs"/"screens"
                screens.mkdir(parents=True, exist_ok=True)
                page.locator(".panel-Live").screenshot(path=screens/"Live_training.png")
                kill(folder)
                page.locator(".control-resume:not([disabled])").wait_for(timeout=20_000)
                killed = writes.at[-1][0]
                second = life(page, "resume", writes, seconds, killed)
            finally:
                if process_of(folder): kill(folder)
                page.close()
        of = lambda what, life: lags(life[0], [(s, t) for w, s, t in life[1] if w == what])
        words, pictures = (of(what, first) + of(what, second) for what in ("words", "picture"))
        return dict(figures=dict(lag_s=max(words), lag_median_s=median(words), picture_lag_s=max(pictures),
            picture_lag_median_s=median(pictures), kernel_answer_s=answer, steps=len(words), killed_at=killed,
            resumed_to=max(s for s, _ in second[0]),
            same_view=max(s for w, s, _ in second[1] if w == "words") > killed))
