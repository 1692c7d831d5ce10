"Tables that README.md and the pages of docs/ share: made from nbs/ and benchmarks/results/, never typed."
import ast
import functools
import json
import re
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FOLDERS = { # title, what its notebooks are about
    "00_start": ("Start", "From nothing to a trained model, and the leaves that everything else stands on."),
    "01_moe": ("Mixture of experts", "Routers, balance, experts and attention; models as records, and their "
                                     "checkpoints."),
    "02_data": ("Data", "What stages hand to one another, text as tokens, and sequences packed into budgets."),
    "03_train": ("Training", "Optimisers, objectives, a step, a mesh, checkpoints, and supervised training."),
    "04_rollout": ("Rollouts", "An inference engine, environments, and code of others that is run with care."),
    "05_rl": ("Reinforcement learning", "Advantages, losses, router replay, and the asynchronous loop."),
    "06_app": ("The program", "What a person sees: settings, the command line, reports."),
    "10_gpu": ("GPU kernels", "Experts, router, head and optimizers in Triton, equal to the plain ones."),
    "11_fp8": ("Eight bits", "Numbers of eight bits in training and in deployment, and when to refuse them."),
    "12_ep": ("Expert parallelism", "Experts spread over GPUs and nodes: dispatch, placement, traffic."),
    "13_scale": ("Scale", "Several GPUs and clusters: what they need, what they cost, and how a run gets there."),
    "14_panels": ("Panels", "The same functions with sliders: look, touch, compare."),
    "90_howto": ("Guides", "One task each, from the question to something that works."),
}
ROADS = [ # for whom, what it leads to, notebooks without their numbers
    ("Student", "How a Mixture-of-Experts model works and learns, in ten notebooks.",
        ["00_start/tour", "01_moe/routing", "01_moe/balance", "01_moe/model", "02_data/packing",
            "03_train/objective", "04_rollout/engine", "05_rl/loss", "05_rl/replay", "05_rl/orchestrator"]),
    ("RL engineer", "A task, a reward and a model of your own, and what to do when nothing is learned.",
        ["90_howto/environment", "90_howto/reward", "90_howto/loss", "90_howto/tools",
            "90_howto/not_learning", "05_rl/advantage", "05_rl/orchestrator", "14_panels/live"]),
    ("Cluster engineer", "What a cluster needs and costs, and the parts that make it fast.",
        ["90_howto/node", "13_scale/plan", "13_scale/parallel", "13_scale/slurm", "12_ep/dispatch",
            "12_ep/placement", "90_howto/fp8", "90_howto/engine", "90_howto/family"]),
]

@functools.cache
def notebooks() -> list[tuple[str, Path, str, str, str]]: # folder, path below nbs/, title, subtitle, module or ''
    "Every notebook in reading order, by its first cell and its `default_exp`."
    out = []
    for path in sorted((ROOT/"nbs").glob("*/*.ipynb")):
        if path.parent.name[0] in "._": continue
        cells = ["".join(c["source"]) for c in json.loads(path.read_text())["cells"]]
        first = re.match(r"# (.+)\n+> (.+)", cells[0].strip())
        if not first: raise SystemExit(f'{path}: the first cell has no "# Title" and "> subtitle"')
        module = next((m[1] for c in cells if (m := re.search(r"^#\|\s*default_exp\s+(\S+)", c, re.M))), "")
        out.append((path.parent.name, path.relative_to(ROOT/"nbs"), first[1], first[2], module))
    return out

def notebook_table(link:str="{}") -> str: # Markdown
    "All notebooks, by folder; `link` makes a target of a path below nbs/."
    rows, last = ["| notebook | what it is about | module |", "|---|---|---|"], None
    for folder, path, title, subtitle, module in notebooks():
        if folder != last: rows.append(f"| **{FOLDERS[folder][0]}** | | |")
        last = folder
        about = subtitle.rstrip(".").replace("|", r"\|")
        rows.append(f'| [{title}]({link.format(path.as_posix())}) | {about} | {f"`{module}`" if module else ""} |')
    return "\n".join(rows)

def stops(names:list[str]) -> list[tuple[str, str]]: # title, path below nbs/
    "Notebooks of a road, whatever their numbers are."
    have = {(folder, re.sub(r"^\d+_", "", path.stem)): (title, path.as_posix())
        for folder, path, title, *_ in notebooks()}
    if gone := [n for n in names if tuple(n.split("/")) not in have]:
        raise SystemExit(f"docs/tables.py: no notebook {', '.join(gone)} for a road")
    return [have[tuple(n.split("/"))] for n in names]

def roads() -> str: # Markdown
    "The three roads, a line each."
    return "\n".join(f"- **{who}.** {what} " + ", ".join(f"[{t}]({p})" for t, p in stops(names)) + "."
        for who, what, names in ROADS)

def records(name:str="*") -> list[dict]:
    "Recorded figures, by name and machine."
    return [json.loads(p.read_text()) for p in sorted((ROOT/"benchmarks"/"results").glob(f"{name}/*.json"))]

def about(name:str) -> str:
    "First sentence of the docstring of a bench."
    text = ast.get_docstring(ast.parse((ROOT/"benchmarks"/f"{name}.py").read_text())) or name
    return " ".join(text.split("\n\n")[0].split())

def number(x) -> str:
    "A figure as a reader wants it: four digits that count."
    if isinstance(x, list): return ", ".join(map(number, x))
    if isinstance(x, bool) or x is None: return {True: "yes", False: "no", None: "-"}[x]
    if isinstance(x, int) or (isinstance(x, float) and x.is_integer() and abs(x) < 1e6): return f"{int(x):,}"
    return f"{x:.4g}" if isinstance(x, float) else str(x)

# What README.md shows of a bench: figure and meaning. A line whose figures are not recorded is left out.
HEADLINES = [
    ("main_job", "{reward_before} to {reward_after}", "held-out words spelled backward exactly, before and after "
        "asynchronous RL on two CPU cores"),
    ("async_ratio", "{ratio} x", "time to 0.9 exact, synchronous over asynchronous"),
    ("chaos", "{lost} and {duplicated}", "rollouts lost, and rollouts trained twice, by {kills} kills in every phase "
        "of runs that were resumed to their ends"),
    ("determinism", "{resumed_equal}", "a run that was killed and resumed equals one that was not, bit for bit"),
    ("vllm_parity", "{worst_after_updates} nats", "largest difference of a log-probability between vLLM and the "
        "trainer's model after {updates} updates, {configs} models of {families} families; share of tokens with the "
        "same experts: {routes_equal}"),
    ("mfu", "{ratio_titan} x", "tokens/s of a whole bf16 training step over compiled torchtitan's on one H100, at "
        "{mfu} of its peak FLOP/s"),
]

def learning_picture() -> str: # SVG
    "The recorded main job: held-out share of exact answers over minutes of RL, beside the run that cannot learn."
    figures = records("main_job")[0]["figures"]
    curves = [(figures.get("control_curve", []), "#8a8a8a", "learning rate 0"),
        (figures.get("curve", []), "#2f7fd6", "asynchronous RL")]
    width, height, left, top, right, bottom = 640, 246, 44, 12, 120, 40
    last = max((minute for curve, *_ in curves for minute, _ in curve), default=1.)
    x = lambda minute: left + minute/last*(width - left - right)
    y = lambda share: height - bottom - share*(height - top - bottom)
    out = [f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" font-family="sans-serif" '
           'font-size="12" fill="#8a8a8a" role="img">',
           "<title>Share of held-out problems answered exactly, over minutes of reinforcement learning</title>"]
    for share in (0, .25, .5, .75, 1):
        out += [f'<path d="M{left} {y(share):.1f}H{width - right}" stroke="#8a8a8a" stroke-opacity=".3"/>',
            f'<text x="{left - 8}" y="{y(share) + 4:.1f}" text-anchor="end">{share:g}</text>']
    for minute in range(int(last) + 1):
        out.append(f'<text x="{x(minute):.1f}" y="{height - bottom + 16}" text-anchor="middle">{minute}</text>')
    out.append(f'<text x="{(left + width - right)/2:.1f}" y="{height - 2}" text-anchor="middle">minutes of '
               'reinforcement learning</text>')
    for curve, colour, name in curves:
        if not curve: continue
        out += [f'<polyline fill="none" stroke="{colour}" stroke-width="2.5" '
                f'points="{" ".join(f"{x(m):.1f},{y(s):.1f}" for m, s in curve)}"/>',
                f'<text x="{x(curve[-1][0]) + 8:.1f}" y="{y(curve[-1][1]) + 4:.1f}" fill="{colour}">{name}</text>']
    return "\n".join([*out, "</svg>", ""])

def headline_table() -> str: # Markdown
    "The recorded figures that README.md shows; of several machines the newest record."
    newest = {r["name"]: r for r in sorted(records(), key=lambda r: r["date"])}
    out = ["| figure | | machine | command |", "|---|---|---|---|"]
    for name, value, text in HEADLINES:
        r = newest.get(name)
        if r is None: continue
        words = {k: number(v) for k, v in r["figures"].items()}
        try: out.append(f"| {text.format(**words)} | {value.format(**words)} | {r['machine']} | `{r['command']}` |")
        except KeyError: pass
    return "\n".join(out)

def printed(name:str) -> str: # Markdown
    "What the program of a bench has printed when it was recorded, and where."
    [*_, r] = sorted(records(name), key=lambda r: r["date"]) or [None]
    if r is None: return ""
    f = r["figures"]
    return (f"```\n{r['printed']}\n```\n\nRecorded on {r['machine']} in {number(f['seconds'])} s by "
        f"`{r['command']}`, which runs the text above.")

def spark(points:list, width:int=220, height:int=40) -> str: # SVG
    "A curve as small as a word."
    xs, ys = [p[0] for p in points], [p[1] for p in points]
    x = lambda v: 3 + (v - min(xs))/((max(xs) - min(xs)) or 1)*(width - 6)
    y = lambda v: height - 3 - (v - min(ys))/((max(ys) - min(ys)) or 1)*(height - 6)
    line = " ".join(f"{x(a):.1f},{y(b):.1f}" for a, b in points)
    return (f'<svg class="spark" viewBox="0 0 {width} {height}" width="{width}" height="{height}" role="img"><title>'
        f'from {number(ys[0])} to {number(ys[-1])}</title><polyline fill="none" stroke="currentColor" '
        f'stroke-width="1.5" points="{line}"/></svg>')

def shown(x) -> str: # Markdown of one cell
    "A recorded figure; a list of pairs is drawn."
    pairs = isinstance(x, list) and len(x) > 2 and all(isinstance(p, list) and len(p) == 2 for p in x)
    if pairs and all(isinstance(v, (int, float)) for p in x for v in p): return spark(x)
    if isinstance(x, dict): return ", ".join(f"{k} {shown(v)}" for k, v in x.items())
    return number(x).replace("|", r"\|")

def record_section(r:dict) -> list[str]: # lines of Markdown
    "One run of one command: its figures, the command under them, and where and when that was."
    versions = ", ".join(f"{k} {v}" for k, v in r["versions"].items())
    return [f"### {r['machine']}", "", "| figure | value |", "|---|---|",
        *(f"| `{k}` | {shown(v)} |" for k, v in r["figures"].items()), "", "```bash", r["command"], "```", "",
        f"<p class=\"source\">{r['date']}, commit {r['commit'] or 'unknown'}, {r['cpu']}; {versions}.</p>", ""]

def results_page() -> str: # Markdown
    "Every recorded figure, with machine, versions, date, commit and command."
    out = ["# Results", "", "Read from `benchmarks/results/`; each table is one run of the command under it. To "
                            "measure on "
        "your own machine and keep it: the same command with `--record`.", ""]
    last = None
    for r in records():
        if r["name"] != last: out += [f"## {r['name']}", "", about(r["name"]), ""]
        last = r["name"]
        out += record_section(r)
    return "\n".join(out)
