"""The site, offline: `python docs/build.py [OUTPUT]` (docs/_build by default); needs the extra [docs].

It is made of nbs/, docs/*.md, the docstrings of moe_rl/, and benchmarks/results/.

Notebooks are shown with their stored outputs; cells marked `#| hide` and lines with directives are left out."""
import ast
import functools
import hashlib
import html
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path
import api
import tables

ROOT = Path(__file__).resolve().parents[1]
PAGES = ["install", "design", "errors", "names"]

# ---------------------------------------------------------------- notebooks
@functools.cache
def known() -> dict[str, str]: # public name -> its address below the site's root
    "Names that one module alone defines, and that prose may therefore mean."
    return {name: f"api/{m[0]}.html#moe_rl.{m[0]}.{name}" for name, m in api.where().items()
        if len(m) == 1 and (len(name) > 4 or not name.islower())}

def linked(text:str, up:str, done:set) -> str:
    "Prose whose first mention of each of our names leads to the reference."
    parts = re.split(r"(^```.*?^```|\[[^\]]*\]\([^)]*\)|^#.*?$|\$\$.*?\$\$)", text, flags=re.M | re.S)
    def link(m):
        name = m[1]
        if name not in known() or name in done: return m[0]
        done.add(name)
        return f'<a class="api" href="{up}{known()[name]}"><code>{name}</code></a>'
    return "".join(p if i % 2 else re.sub(r"(?<!`)`(\w+)`(?!`)", link, p) for i, p in enumerate(parts))

def site_links(text:str) -> str:
    "Links as the site has them: pages of docs/ lie beside the notebooks; what is no page is named without a link."
    text = re.sub(r"\]\((?:\.\./)+docs/(_static/\S+?|\w+\.md(?:#[\w-]+)?)\)", r"](/\1)", text)
    return re.sub(r"\[([^\]]+)\]\((?:\.\./)+(?:configs|benchmarks|scripts|tests|slurm)?(?:/\S*?|LICENSE)\)", r"\1",
        text)

def defined(source:str) -> list[str]:
    "Names of the definitions in a cell that is exported."
    kinds = (ast.FunctionDef, ast.AsyncFunctionDef, ast.ClassDef)
    return [n.name for n in ast.parse(source).body if isinstance(n, kinds)]

def markdown(text:str) -> dict:
    "A cell of prose."
    return dict(cell_type="markdown", metadata={}, source=text, id=hashlib.sha1(text.encode()).hexdigest()[:12])

def notebook(path:Path) -> dict:
    "A notebook without what is only for the machine, with a place to jump to at every definition."
    nb, kept, done = json.loads(path.read_text()), [], set()
    up = "../"*(len(path.relative_to(ROOT/"nbs").parts) - 1)
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        said = set(re.findall(r"^#\|\s*(\w+)", source, re.M)) if cell["cell_type"] == "code" else set()
        if said & {"hide", "default_exp"}: continue
        if cell["cell_type"] == "code":
            if "export" in said and (names := defined(source)):
                kept.append(markdown("".join(f'<span class="anchor" id="def-{n}"></span>' for n in names)))
            cell["source"] = re.sub(r"^#\|.*\n?", "", source, flags=re.M).strip("\n")
            cell["metadata"] = dict(tags=["remove-input"]) if "echo" in said else {}
            # links of a table that was computed
            for data in (o["data"] for o in cell["outputs"] if "text/markdown" in o.get("data", {})):
                data["text/markdown"] = re.sub(r"(\]\((?!https?:)[^)#]+)\.ipynb\b", r"\1.html",
                    "".join(data["text/markdown"]))
        else:
            cell["source"] = linked(site_links(source), up, done) if kept else source
        kept.append(cell)
    return nb | dict(cells=kept)

def plain_text(path:Path) -> str: # Markdown
    "A notebook as text for programs that read: prose and code, and what was printed."
    out = []
    for cell in notebook(path)["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "markdown":
            if not source.startswith("<span"): out.append(re.sub(r'<a class="api"[^>]*><code>(\w+)</code></a>', r"`\1`",
                source))
            continue
        out.append(f"```python\n{source}\n```")
        for o in cell["outputs"]:
            text = "".join(o.get("text", "")) or "".join(o.get("data", {}).get("text/plain", ""))
            if text and not text.startswith("<Figure"): out.append(f"```\n{text.rstrip()}\n```")
    return "\n\n".join(out) + "\n"

# ---------------------------------------------------------------- pages that are made
def toctree(names, *options:str) -> str:
    return "\n".join(["```{toctree}", *options, "", *names, "```", ""])

def folder_page(folder:str) -> str: # Markdown
    "The page of a folder of notebooks."
    title, about = tables.FOLDERS[folder]
    mine = [(p, t, s, m) for f, p, t, s, m in tables.notebooks() if f == folder]
    lines = [f"[**{t}**]({p.name})<br>{s.rstrip('.')}" + (f"<br>[`moe_rl.{m}`](../api/{m}.md)" if m else "") + "\n"
        for p, t, s, m in mine]
    return "\n".join([f"# {title}", "", f"> {about}", "", *lines, toctree([p.stem for p, *_ in mine], ":hidden:")])

def road_cards() -> str: # HTML
    "The three roads as cards."
    cards = []
    for who, what, names in tables.ROADS:
        items = "".join(f'<li><a href="{path.replace(".ipynb", ".html")}">{html.escape(title)}</a></li>'
            for title, path in tables.stops(names))
        cards.append(f"<section><h3>{who}</h3><p>{html.escape(what)}</p><ol>{items}</ol></section>")
    return f'<div class="roads">{"".join(cards)}</div>'

def landing_page() -> dict: # a notebook
    "The index notebook, which is README.md too, with its roads as cards and the whole table of contents behind it."
    nb = notebook(ROOT/"nbs"/"index.ipynb")
    for cell in nb["cells"]:
        source = "".join(cell["source"])
        if "tables.roads()" in source: cell |= markdown(road_cards())
        if "tables.notebook_table()" in source: cell |= markdown(folders_table())
        if cell["cell_type"] == "markdown":
            for extra in ("outputs", "execution_count"): cell.pop(extra, None)
    trees = [toctree(["Start here <self>", "install", *guides(), "results"], ":hidden:", ":caption: Begin")]
    trees += [toctree([f"{f}/index" for f in folders() if f != "90_howto"], ":hidden:", ":caption: Notebooks")]
    trees += [toctree(["api/index", "design", "errors", "names"], ":hidden:", ":caption: Reference")]
    nb["cells"].append(markdown("\n".join(trees)))
    return nb

def folders() -> list[str]: return [f for f in tables.FOLDERS if any(g == f for g, *_ in tables.notebooks())]
def guides() -> list[str]: return ["90_howto/index"] if "90_howto" in folders() else []

def folders_table() -> str: # Markdown
    "One line a folder."
    rows = []
    for f in folders():
        title, about = tables.FOLDERS[f]
        rows.append(f"| [{title}]({f}/index.md) | {about} | {sum(g == f for g, *_ in tables.notebooks())} |")
    return "\n".join(["| folder | what it is about | notebooks |", "|---|---|---|", *rows])

def llms() -> str: # Markdown, https://llmstxt.org
    "A map of the site for programs that read; every notebook has a page of plain text beside it."
    first = json.loads((ROOT/"nbs"/"index.ipynb").read_text())["cells"]
    title, about = re.match(r"# (.+)\n+> (.+)", "".join(first[0]["source"])).groups()
    words = re.sub(r"^\s*!\[.*\n+", "", "".join(first[1]["source"])).partition("\n\n")[0]
    out = [f"# {title}", "", f"> {about}", "", words, ""]
    for f in folders():
        out += [f"## {tables.FOLDERS[f][0]}", ""]
        out += [f"- [{t}]({p.with_suffix('.md').as_posix()}): {s.rstrip('.')}" + (f"; exports moe_rl.{m}" if m else "")
            for g, p, t, s, m in tables.notebooks() if g == f] + [""]
    out += ["## Optional", ""] + [f"- [{n}]({n}.md)" for n in [*PAGES, "results"]]
    return "\n".join(out) + "\n"

# ---------------------------------------------------------------- all of it
def collect(source:Path):
    "Everything that Sphinx reads, in one folder."
    shutil.rmtree(source, ignore_errors=True)
    for folder in ("api", *folders()): (source/folder).mkdir(parents=True)
    dump = lambda target, nb: target.write_text(json.dumps(nb))
    dump(source/"index.ipynb", landing_page())
    for _, path, *_ in tables.notebooks(): dump(source/path, notebook(ROOT/"nbs"/path))
    for folder in folders(): (source/folder/"index.md").write_text(folder_page(folder))
    for page in PAGES:
        text = (ROOT/"docs"/f"{page}.md").read_text().replace("](../nbs/", "](")
        (source/f"{page}.md").write_text(linked(text, "", set()) if page == "design" else text)
    (source/"results.md").write_text(tables.results_page())
    (source/"api"/"index.md").write_text(api.index_page())
    for module in api.modules(): (source/"api"/f"{module}.md").write_text(api.module_page(module))
    shutil.copy(ROOT/"docs"/"conf.py", source)
    shutil.copytree(ROOT/"docs"/"_static", source/"_static")

def for_programs(source:Path, out:Path):
    "llms.txt, and the plain text that it names."
    (out/"llms.txt").write_text(llms())
    for _, path, *_ in tables.notebooks(): (out/path.with_suffix(".md")).write_text(plain_text(ROOT/"nbs"/path))
    for page in [*PAGES, "results"]: shutil.copy(source/f"{page}.md", out)

def build(out:Path) -> int: # exit code
    "The site in OUT/html."
    collect(out/"source")
    r = subprocess.run([sys.executable, "-m", "sphinx", "-q", "-W", "--keep-going", "-b", "html", out/"source",
        out/"html"])
    if not r.returncode: for_programs(out/"source", out/"html")
    return r.returncode

if __name__ == "__main__":
    out = Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT/"docs"/"_build"
    if code := build(out): sys.exit(code)
    print(out/"html"/"index.html")
