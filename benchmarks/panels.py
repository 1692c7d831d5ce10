"""The panels as a hand meets them: JupyterLab in a real Chromium, every control moved, and page and package compared.

Every notebook of nbs/14_panels with a panel is run, every control is moved twice by keyboard. The picture must then
be the same bytes that the package computes, its text alternative and its line of code the same text; no error in a cell
or
in the console, and nothing wider than a telephone.

    moe-rl bench panels                 screenshots go to runs/screens
    moe-rl bench panels Loss Packing    only these
"""
import base64
import json
import re
import shutil
import tempfile
import time
from pathlib import Path
from _browser import chromium, close_notebook, lab, open_notebook

import moe_rl.panels
from moe_rl.errors import UserError
from moe_rl.panels.base import Pick, Slide, Tick, Write

ROOT = Path(__file__).resolve().parents[1]
SCREENS = ROOT/"runs"/"screens"
TEXTS = ["hello, world", "mixture of experts"]
PHONE = dict(width=390, height=844)

# What a panel shows: the bytes of its picture, the texts, and the mistake that it names.
SHOWN = """panel => { const of = s => panel.querySelector(s)
    return {source: of('figure img')?.src ?? '', alt: of('figure img')?.alt ?? '',
        said: of('figcaption')?.textContent ?? '', code: of('pre')?.textContent ?? '',
        problem: of('[role=alert]')?.textContent ?? ''} }"""

def notebooks() -> dict[str, tuple[str, type]]: # name of a panel -> notebook, class
    "The panels with controls, and the notebooks that show them."
    out = {}
    for path in sorted((ROOT/"nbs"/"14_panels").glob("*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if m := re.search(r"#\| panel\n(?:\w+ = )?(\w+)\.show\(\)", "".join(cell["source"])):
                if m[1] in moe_rl.panels.__all__: out[m[1]] = path.name, getattr(moe_rl.panels, m[1])
    return out

def value_of(control, box):
    "What a control in the page says, as Python has it."
    match control:
        case Slide(): return {control.show(v): v
            for v in control.values}[box.locator(".widget-readout").inner_text().strip()]
        case Pick():
            said = box.locator("button.mod-active").inner_text().strip()
            return {str(v): v for v in control.values}[said]
        case Tick(): return box.locator("input").is_checked()
        case Write(): return box.locator("input").input_value()

def move(page, control, box, turn:int):
    "Move a control once, by keyboard alone."
    target = box.locator(".noUi-handle" if isinstance(control, Slide) else "input")
    if isinstance(control, Pick): target = box.locator("button:not(.mod-active)").nth(turn)
    if target.evaluate("e => e.tabIndex") < 0: raise AssertionError("the tabulator key does not reach it")
    target.focus()
    match control:
        case Slide():
            at = control.values.index(value_of(control, box))
            up = at == 0 if turn else at + 1 < len(control.values)
            page.keyboard.press("ArrowRight" if up else "ArrowLeft")
        case Pick() | Tick(): page.keyboard.press("Space")
        case Write():
            page.keyboard.press("Control+a")
            page.keyboard.type(TEXTS[turn % 2])
            page.keyboard.press("Enter")

def wanted(panel, values:dict) -> tuple[bytes, str, str, str]: # picture, text, code, problem
    "What the package computes for these values."
    try: picture = panel.picture(**values)
    except (UserError, ValueError) as e: return b"", "", "", str(e)
    return picture.png, picture.text, panel.code(**values), ""

def differs(box, panel, values:dict, seconds:float=40.) -> str: # empty: the page shows what it should
    "Wait until the page shows what the package computes, or say what it shows instead."
    png, text, code, problem = wanted(panel, values)
    end = time.monotonic() + seconds
    while True:
        shown = box.evaluate(SHOWN)
        if problem: bad = [] if shown["problem"] == problem else ["problem"]
        else:
            same = dict(source=base64.b64decode(shown["source"].partition(",")[2]) == png, alt=shown["alt"] == text,
                said=shown["said"] == text, code=shown["code"] == code, problem=shown["problem"] == "")
            bad = [k for k, ok in same.items() if not ok]
        if not bad: return ""
        if time.monotonic() > end:
            return f"{panel.__name__}({values}): {', '.join(bad)} differ: {shown['said'][:120]!r}"
        time.sleep(.1)

def journey(page, name:str, panel) -> tuple[int, list[str]]: # interactions, errors
    "Move every control of one panel twice."
    box, bad, moves = page.locator(f".panel-{name}").last, [], 0
    box.wait_for(timeout=120_000)
    box.scroll_into_view_if_needed()
    controls = {n: (c, box.locator(f".control-{n}").last) for n, c in panel.controls.items()}
    values = lambda: {n: value_of(c, b) for n, (c, b) in controls.items()}
    if said := differs(box, panel, values()): bad.append(said)
    box.screenshot(path=SCREENS/f"{name}.png")
    for n, (c, b) in controls.items():
        for turn in range(2):
            before = value_of(c, b)
            move(page, c, b, turn)
            for _ in range(200):
                if value_of(c, b) != before: break
                time.sleep(.05)
            else: bad.append(f"{name}.{n}: a key does not move it")
            moves += 1
            if said := differs(box, panel, values()): bad.append(said)
    return moves, bad

def narrow(page, name:str) -> list[str]: # errors
    "The same panel on a telephone."
    page.set_viewport_size(PHONE)
    page.wait_for_timeout(500)
    box = page.locator(f".panel-{name}").last
    box.scroll_into_view_if_needed()
    box.screenshot(path=SCREENS/f"{name}_390.png")
    over = box.evaluate("e => e.scrollWidth - e.clientWidth")
    wide = box.locator("figure img").first.evaluate("e => e.getBoundingClientRect().width")
    page.set_viewport_size(dict(width=1280, height=1000))
    return [f"{name}: {over} pixels wider than a telephone has room for"]*(over
        > 1) + [f"{name}: its picture is {wide:.0f} pixels wide on "
        "a telephone"]*(wide < 200)

def cell_errors(page) -> list[str]:
    "Tracebacks of cells."
    found = page.locator('.jp-OutputArea-output[data-mime-type="application/vnd.jupyter.error"]').all_inner_texts()
    return [text.strip().splitlines()[-1] for text in found]

def measure(args):
    SCREENS.mkdir(parents=True, exist_ok=True)
    panels = {n: p for n, p in notebooks().items() if not args or n in args}
    moves, bad, where = 0, [], [""]
    with tempfile.TemporaryDirectory() as scratch, chromium() as browser:
        for path in (ROOT/"nbs"/"14_panels").glob("*.ipynb"): shutil.copy(path, scratch)
        with lab(Path(scratch)) as address:
            page = browser.new_page(viewport=dict(width=1280, height=1000))
            page.on("console", lambda m: bad.append(f"{where[0]}: {m.text}") if m.type == "error" else None)
            page.on("pageerror", lambda e: bad.append(f"{where[0]}: {e}"))
            page.goto(address + "lab?reset")
            page.wait_for_function("window.jupyterapp?.shell")
            page.evaluate("""async () => { await window.jupyterapp.restored
                window.jupyterapp.shell.mode = 'single-document'
                window.jupyterapp.shell.collapseLeft() }""")
            for name, (notebook, panel) in panels.items():
                where[0], began = name, time.monotonic()
                open_notebook(page, notebook)
                n, wrong = journey(page, name, panel)
                wrong += narrow(page, name) + cell_errors(page)
                moves, bad = moves + n, bad + wrong
                close_notebook(page)
                took = time.monotonic() - began
                print(f"{name}: {n} moves, {len(wrong)} errors, {took:.0f} s", *wrong, sep="\n  ", flush=True)
            page.close()
    for line in bad: print(line)      # those of the console among them
    return dict(figures=dict(panels=len(panels), interactions=moves, errors=len(bad)))
