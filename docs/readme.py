"""README.md from nbs/index.ipynb, offline. `python docs/readme.py` writes it; `--check` says whether it is current.

A cell with `#| echo: false` is a table: computed here, kept in the notebook as its output, and shown without its code.
Other code cells are shown with the output that is stored; `#| hide` cells are left out; links lead from nbs/ to the
folder above."""
import ast
import json
import os
import re
import sys
from pathlib import Path
from tables import learning_picture

ROOT = Path(__file__).resolve().parents[1]
INDEX = ROOT/"nbs"/"index.ipynb"
PICTURE = ROOT/"docs"/"_static"/"learning.svg"

def evaluate(source:str, names:dict):
    "Run a cell; value of its last expression."
    *body, last = ast.parse(source).body
    exec(compile(ast.Module(body, []), "index", "exec"), names)
    return eval(compile(ast.Expression(last.value), "index", "eval"), names)

def lines(text:str) -> list[str]: return text.splitlines(keepends=True)

def render() -> tuple[str, str, str]: # README.md, index.ipynb, the picture of a model that learns
    "All three as they should be."
    nb, names, out = json.loads(INDEX.read_text()), {}, []
    os.chdir(INDEX.parent)   # cells run where the notebook lies
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            out.append(source)
            continue
        if re.search(r"^#\|\s*hide\b", source, re.M): continue
        code = re.sub(r"^#\|.*\n", "", source, flags=re.M).strip("\n")
        if re.search(r"^#\|\s*echo:\s*false", source, re.M):
            table = evaluate(code, names)
            cell["outputs"] = [dict(output_type="execute_result", execution_count=None, metadata={},
                data={"text/markdown": lines(table.data), "text/plain": ["<IPython.core.display.Markdown object>"]})]
            out.append(table.data)
            continue
        shown = "".join("".join(o["data"]["text/plain"]) for o in cell["outputs"] if "data" in o)
        out.append(f"```python\n{code}\n```" + (f"\n\n```\n{shown}\n```" if shown else ""))
    text = "\n\n".join(t.strip("\n") for t in out)
    text = re.sub(r"\]\((?!https?:|#|\.\./)([^)]+)\)", r"](nbs/\1)", text)
    text = re.sub(r"\]\(\.\./([^)]+)\)", r"](\1)", text)
    return "<!-- Made from nbs/index.ipynb by docs/readme.py. -->\n" + text + "\n", json.dumps(nb, indent=1,
        ensure_ascii=False) + "\n", learning_picture()

if __name__ == "__main__":
    targets = dict(zip((ROOT/"README.md", INDEX, PICTURE), render()))
    stale = [p for p, text in targets.items() if not p.exists() or p.read_text() != text]
    if "--check" not in sys.argv:
        for p in stale: p.write_text(targets[p])
    elif stale:
        sys.exit(f'{", ".join(p.name for p in stale)}: not current; run python docs/readme.py and commit the result')
