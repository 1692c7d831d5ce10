"""The program of README.md, word for word: what it prints, what it has learned, and how long it took.

It is run as a script in an empty folder, as somebody would who has copied it."""
import re, subprocess, sys, time
from _runs import folders
from moe_rl.bench import repository
from moe_rl.rl.log import read_lines


def program(text: str) -> str:
    "The one block of Python of a page that starts a run."
    [found] = [block for block in re.findall(r"^```python\n(.*?)^```$", text, re.M | re.S) if " run(" in block]
    return found


def measure(args: list[str]) -> dict:
    root = repository()
    folder = folders(root, "readme")
    (folder / "program.py").write_text(program((root / "README.md").read_text()))
    began = time.monotonic()
    done = subprocess.run([sys.executable, "program.py"], cwd=folder, capture_output=True, text=True)
    seconds = time.monotonic() - began
    if done.returncode: raise RuntimeError(f"the program of README.md ended with code {done.returncode}: {done.stderr}")
    print(done.stdout, end="")
    [run] = (folder / "runs").iterdir()
    first, *_, last = read_lines(run / "evals.jsonl")
    figures = dict(before=first["score"], after=last["score"], steps=last["step"], seconds=round(seconds, 1),
        seconds_of_rl=round(last["seconds"], 1), prompts=last["prompts"], lines=program((root / "README.md")
            .read_text()).count("\n"))
    return dict(figures=figures, printed=done.stdout.strip())
