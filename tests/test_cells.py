"An environment, a reward, an advantage and a loss of a notebook's cells, in a real kernel: run, read, gone on with."
import os, subprocess, sys
import pytest
from moe_rl import cells
from moe_rl.errors import UserError
from moe_rl.rl.log import read_lines

IMPORTS = """
import asyncio, random, sys
import numpy as np, torch
from moe_rl import Environment, Settings, Task, run
from moe_rl.rl.loss import LossOut
LETTERS = "abcdefgh"
"""
# a cell that awaits is compiled in another way
TASK = '''
await asyncio.sleep(0)
def word_of(key): return "".join(random.Random(key).choices(LETTERS, k=3))

class First(Environment):
    "Say the first of three letters."
    name = "first"
    def __init__(self, wording="Say the first letter of "): self.wording = wording
    def problem(self, key):
        return Task(env=self.name, prompt=self.wording + word_of(key) + ": ", answer=word_of(key)[0])
'''
PARTS = '''
def half_length(task, turns): return len(turns[-1])/2
def spread(rewards): return np.asarray(rewards) - np.min(rewards)
def plain(logp, logp_old, adv, mask, cu_seqlens, scale=1.):
    return LossOut(-scale*torch.where(mask, logp*adv, 0.), torch.zeros_like(mask), torch.zeros_like(mask))
'''
RUN = '''
SMALL = dict(model=dict(hidden_size=32, intermediate_size=32, moe_intermediate_size=16, num_hidden_layers=2, head_dim=8,
        num_experts=4, max_position_embeddings=256), warm_start=dict(steps=1, tokens_per_step=256, threads=1),
    tokenizer=dict(kind="byte"), eval=dict(prompts=8), engine=dict(kv_tokens=2048, max_seqs=16, max_tokens=4))
settings = Settings(dir="runs/a", env=dict(name=First, params=dict(wording="First of ")), checkpoint=dict(every=1),
    rl=dict(steps=1, groups_per_step=2, group_size=2, tokens_per_batch=512, reward=half_length, advantage=spread,
        loss=plain, loss_params=dict(scale=2.)), **SMALL)
print(run(settings)["step"])
'''
BROKEN = '''
class Broken(First):
    def problem(self, key): return Task(env=self.name, prompt=str(key), answer=str(1/(key % 1)))
class Unfinished(First):
    def problem(self, key): return to_be_written(key)
judge = open("/dev/null")
async def asked(task, turns): return judge.read() == turns[-1]

for name, given in dict(a=dict(env=Broken), b=dict(env=Unfinished), c=dict(env=First, rl=dict(reward=asked))).items():
    try: run(Settings(dir=f"runs/{name}", **given, **SMALL))
    except Exception as e: print(type(e).__name__, e)
'''


def moe_rl(folder, *args):
    "The command, in a process that has never seen the notebook."
    return subprocess.run([sys.executable, "-m", "moe_rl.cli", *map(str, args)], cwd=folder, capture_output=True,
        text=True, timeout=120, env=os.environ | dict(OMP_NUM_THREADS="1"))


@pytest.fixture(scope="module")
def notebook(tmp_path_factory):
    "What the cells of a notebook have printed, and the folder in which it lies."
    nbformat, nbclient = pytest.importorskip("nbformat"), pytest.importorskip("nbclient")
    folder, v4 = tmp_path_factory.mktemp("notebook"), nbformat.v4
    nb = v4.new_notebook(cells=[v4.new_code_cell(t.strip()) for t in (IMPORTS, TASK, PARTS, RUN, BROKEN)],
        metadata=dict(kernelspec=dict(name="python3", display_name="python3", language="python")))
    nbclient.NotebookClient(nb, timeout=120, resources=dict(metadata=dict(path=str(folder)))).execute()
    return folder, ["".join(o.get("text", "") for o in c.outputs) for c in nb.cells]


def test_cells_run(notebook):
    folder, printed = notebook
    assert printed[3].strip() == "1"
    run = folder / "runs" / "a"
    # one module for each, in the folder of the run and named by its settings
    names = sorted(p.stem for p in (run / "cells").iterdir())
    assert [n.rpartition("_")[0] for n in names] == ["First", "half_length", "plain", "spread"]
    assert all(f'"{n}:' in (run / "config.toml").read_text() for n in names)
    [sample, *_] = read_lines(run / "samples.jsonl")
    assert sample["text"].startswith("First of ")               # a parameter, and the prompt of the class
    said = sample["text"].split(": ", 1)[1]
    assert sample["reward"] == len(said) / 2 or "�" in said     # the reward of the cell
    assert read_lines(run / "metrics.jsonl")[0]["loss"] <= 0    # no advantage of `spread` is negative


def test_a_shell_goes_on(notebook):
    "From the run's folder alone, wherever it lies now. An edited text is what counts, and is told."
    folder, _ = notebook
    moved = folder / "elsewhere"
    (folder / "runs" / "a").rename(moved)
    [text] = (moved / "cells").glob("First_*.py")
    text.write_text(text.read_text().replace("Say the first", "The first"))
    done = moe_rl(folder, "run", "--extend", moved, "--rl.steps", 2)
    assert done.returncode == 0, done.stderr
    assert [r["step"] for r in read_lines(moved / "metrics.jsonl")] == [1, 2]
    told = (moved / "events.log").read_text()
    assert told.count("the code of") == 1 and f"the code of {text.stem} has changed" in told
    # another run from the settings of this one
    text.write_text("import nothing_like_it\n" + text.read_text())
    bad = moe_rl(folder, "run", "--config", moved / "config.toml", "--dir", "new", "--dry-run")
    assert bad.returncode == 2 and bad.stderr.count("\n") == 1
    assert f"cells/{text.stem}.py, line 1: ModuleNotFoundError: No module named 'nothing_like_it'" in bad.stderr


def test_a_broken_cell_is_named(notebook):
    broken, unfinished, alive = notebook[1][4].strip().splitlines()
    assert broken.startswith("UserError env first: ") and "ZeroDivisionError" in broken
    assert unfinished == ("UserError Unfinished: uses 'to_be_written', which is not defined: run the cell that defines "
        "it")
    assert alive == "UserError asked: uses 'judge', a live TextIOWrapper: make it inside, or import it"


def test_a_script_that_was_edited(tmp_path):
    "Text that is not what runs is refused; Python's prompt keeps no text."
    script = tmp_path / "script.py"
    lines = ["import sys", "from pathlib import Path", "from moe_rl.cells import name_of",
        "def reward(task, turns): return 1.", "print(name_of(reward).partition('_')[0])",
        "Path(__file__).write_text(Path(__file__).read_text().replace('1.', '2. + 1'))", "import linecache",
        "linecache.clearcache()", "print(name_of(reward))"]
    script.write_text("\n".join(lines))
    told = subprocess.run([sys.executable, str(script)], capture_output=True, text=True)
    assert told.stdout == "reward\n" and "reward: Python keeps no text of it as it is now" in told.stderr
    prompt = subprocess.run([sys.executable, "-c", "\n".join(lines[:5])], capture_output=True, text=True)
    assert "reward: Python keeps no text of it as it is now" in prompt.stderr


def test_what_a_folder_may_hold(tmp_path):
    "Files of somebody else in a folder of that name are none of ours."
    folder = tmp_path / "cells"
    folder.mkdir()
    (folder / "torch.py").write_text("raise SystemExit")
    (folder / "mine_0123abcd.py").write_text("x = 3")
    cells.know_folder(tmp_path)
    assert "torch" not in cells.TEXTS and cells.TEXTS["mine_0123abcd"] == "x = 3"
    (folder / "mine_0123abcd.py").write_bytes(b"\xff")
    with pytest.raises(UserError, match="mine_0123abcd.py"): cells.know_folder(tmp_path)
