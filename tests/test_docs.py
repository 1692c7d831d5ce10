"docs/: what the pages say is what the program does, and the site builds without a network."
import json, re, shlex, subprocess, sys
from importlib.util import find_spec
from pathlib import Path
import pytest

ROOT = Path(__file__).resolve().parents[1]
MISTAKES = [(a, c.replace("\\|", "|")) for a, c in re.findall(r"^\|[^|]*\| `([^`]+)` \| (.+?) \|$",
    (ROOT/"docs"/"errors.md").read_text(), re.M)]

@pytest.mark.parametrize("command, answer", MISTAKES)
def test_bad_input_is_answered_as_the_table_says(command, answer, tmp_path, monkeypatch, capsys):
    from moe_rl.cli import main
    monkeypatch.chdir(tmp_path)
    for folder in ("full", "llama", "strange"): (tmp_path/folder).mkdir()
    (tmp_path/"full"/"x").touch()
    (tmp_path/"llama"/"config.json").write_text('{"architectures": ["LlamaForCausalLM"], "model_type": "llama"}')
    (tmp_path/"strange"/"config.json").write_text('{"architectures": ["StrangeForCausalLM"], "model_type": "strange"}')
    (tmp_path/"broken.jsonl").write_text('{"question": "1+1", "answer": "2"}\n{"question": ')
    before = {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")}
    assert main(shlex.split(command)) == 2
    assert capsys.readouterr().err == "".join(f"moe-rl: {line}\n" for line in answer.split("<br>"))
    assert {p: p.stat().st_mtime_ns for p in tmp_path.rglob("*")} == before, "something was written"

def test_the_table_of_bad_input_is_read(): assert len(MISTAKES) >= 15

def test_links_lead_somewhere():
    bad = []
    for page in sorted((ROOT/"docs").glob("*.md")):
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            if not (page.parent/target).exists(): bad.append(f"{page.name}: {target}")
    for path in sorted((ROOT/"nbs").rglob("*.ipynb")):
        if ".ipynb_checkpoints" in path.parts: continue
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] != "markdown": continue
            for target in re.findall(r"\]\((?!https?:|#|attachment:)([^)#\s]+)\)",
                    re.sub(r"`[^`]*`", "", "".join(cell["source"]))):
                if "$" not in target and not (path.parent/target).exists():
                    bad.append(f"{path.relative_to(ROOT)}: {target}")
    assert not bad, "\n".join(bad)

def test_the_site_builds(tmp_path):
    missing = [m for m in ("sphinx", "myst_nb", "furo", "latex2mathml") if not find_spec(m)]
    if missing: pytest.skip(f'needs the extra [docs] ({", ".join(missing)}): scripts/test --docs')
    r = subprocess.run([sys.executable, "docs/build.py", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert r.returncode == 0, r.stdout[-2000:] + r.stderr[-4000:]
    pages = {p.relative_to(tmp_path/"html").as_posix(): p.read_text() for p in (tmp_path/"html").rglob("*.html")}
    notebooks = [p.relative_to(ROOT/"nbs").with_suffix(".html").as_posix() for p in (ROOT/"nbs").glob("*/[0-9]*.ipynb")]
    assert set(notebooks) <= pages.keys()
    outside = {(name, url) for name, text in pages.items()
        for url in re.findall(r'<(?:script|link|img)[^>]+(?:src|href)="(https?:[^"]+)"', text)}
    assert not outside, f"pages that need a network: {sorted(outside)[:5]}"
    assert "<math" in pages["05_rl/11_orchestrator.html"] and "$$" not in pages["05_rl/11_orchestrator.html"]
    assert "#| export" not in "".join(pages.values()) and "#|export" not in "".join(pages.values())

def test_the_program_of_the_readme_learns(tmp_path):
    "The very text, as a script in an empty folder: it ends in something learned."
    [text] = [block for block in re.findall(r"^```python\n(.*?)^```$", (ROOT/"README.md").read_text(), re.M | re.S)
        if " run(" in block]
    (tmp_path/"pasted.py").write_text(text)
    done = subprocess.run([sys.executable, "pasted.py"], cwd=tmp_path, capture_output=True, text=True, timeout=240)
    assert done.returncode == 0 and not done.stderr, done.stderr
    said = re.fullmatch(r"vowels: learned: score ([\d.]+) to ([\d.]+) in 30 steps\n", done.stdout)
    assert said and float(said[1]) < .1 and float(said[2]) > .8, done.stdout
