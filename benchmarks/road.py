"""How much of the package is on the road: the lines that a listed set of commands executes, and sizes of its parts.

    moe-rl bench road [--only NAME,NAME] [--jobs 2]

Every command is a tiny one; what is not executed is listed by module. A line that only a GPU, or a package that is
not installed, could reach is counted as missing too, and has a share of its own. Panels are left out."""
import argparse, ast, json, re, signal, time
from importlib.util import find_spec
from pathlib import Path
from _lines import Watch, lines_of
from _runs import Lanes, folders
from moe_rl.bench import repository

TINY = {"model.hidden_size": 32, "model.intermediate_size": 32, "model.moe_intermediate_size": 16,
        "model.num_hidden_layers": 2, "model.head_dim": 8, "model.num_experts": 4, "warm_start.steps": 2,
        "warm_start.tokens_per_step": 512, "warm_start.threads": 1, "rl.steps": 2, "rl.groups_per_step": 2,
        "rl.group_size": 4, "eval.prompts": 8, "engine.kv_tokens": 4096, "engine.max_seqs": 16, "engine.max_tokens": 6,
        "checkpoint.every": 1}
WIDE = dict(model__hidden_size=128, model__moe_intermediate_size=128, model__intermediate_size=128,
    model__head_dim=32, model__num_key_value_heads=4) # widths that FP8 takes

TASK = '''
import asyncio
from moe_rl import Environment, Task
class Own(Environment):
    "Say a letter, be asked once more, say it again."
    name = "own"
    def __init__(self, wrong=0): self.wrong = wrong
    def problem(self, key):
        if self.wrong and key % self.wrong == 0: raise ValueError("no problem")
        return Task(env=self.name, prompt=f"{key % 5000} {'abcd'[key % 4]}: ", answer="abcd"[key % 4])
    async def reply(self, task, turns): return "again: " if len(turns) < 3 else None
    async def score(self, task, turns):
        if self.wrong and len(turns[0]) % 3 == 0: await asyncio.sleep(9)
        return float(task.answer in turns[-1]) if not self.wrong or len(turns[0]) % 2 else float("nan")
def reward(task, turns): return len(turns[-1])/8
def advantage(rewards): return [r - min(rewards) for r in rewards]
class Tracker:
    def __init__(self, name, folder, settings): pass
    def scalars(self, step, values): pass
    def close(self): pass
'''
FAMILIES = ("mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "llama")


def words(**settings) -> list[str]:
    "Settings as options; `__` is a dot."
    return [w for k, v in (TINY | {k.replace("__", "."): v for k, v in settings.items()}).items() for w in (f"--{k}",
        str(v))]


def tiny_config(kind: str, vocabulary: int) -> dict:
    "A config.json of a family, as small as it can be."
    c = dict(model_type=kind, vocab_size=vocabulary, hidden_size=32, intermediate_size=32, num_hidden_layers=2,
        num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=512, rms_norm_eps=1e-5, head_dim=16,
        rope_theta=1e4)
    experts = dict(num_experts_per_tok=2, moe_intermediate_size=16)
    return c | dict(mixtral=dict(num_local_experts=4, num_experts_per_tok=2), llama={},
        qwen3_moe=dict(experts, num_experts=4), glm4_moe=dict(experts, n_routed_experts=4, n_shared_experts=1,
            first_k_dense_replace=1, n_group=1, topk_group=1, routed_scaling_factor=1., norm_topk_prob=True,
            use_qk_norm=True), deepseek_v3=dict(experts, n_routed_experts=4, n_shared_experts=1,
            first_k_dense_replace=1, n_group=2, topk_group=1, num_key_value_heads=2, q_lora_rank=None,
            kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=16, routed_scaling_factor=1.,
            norm_topk_prob=True))[kind]


def prepare(folder: Path):
    "Files that the commands are given: a task, problems, conversations, models of every family."
    from moe_rl.data.tokens import byte_tokenizer
    from moe_rl.moe.checkpoint import save_pretrained
    from moe_rl.moe.families import from_hf
    from moe_rl.moe.model import Model, init_weights
    (folder / "mytask.py").write_text(TASK)
    rows = [dict(question=f"{a}+{b}", answer=f"so {a + b}") for a in range(20) for b in range(20)]
    (folder / "sums.jsonl").write_text("\n".join(map(json.dumps, rows)))
    talks = [dict(messages=[dict(role="user", content=r["question"]), dict(role="assistant", content=r["answer"])])
        for r in rows]
    (folder / "talks.jsonl").write_text("\n".join(map(json.dumps, talks)))
    tokenizer = byte_tokenizer()
    for kind in FAMILIES:
        spec = from_hf(tiny_config(kind, tokenizer.vocab_size))
        save_pretrained(init_weights(Model(spec), 0), folder / kind, tokenizer.save)


def run(name: str, **settings) -> tuple[str, list[list[str]]]:
    return name, [["run", *words(dir=f"runs/{name}", **settings)]]


def commands(configs: Path) -> list[tuple[str, list[list[str]]]]:
    """Named rows of commands; the rows go side by side, the commands of a row one after the other. A row whose name
    begins with `no` must be refused, one with `break` is interrupted."""
    longer = ["run", "--extend", "runs/first", "--rl.steps", "4"]
    first = run("first", env="calculator:0.5,spell_backward:0.5", rl__max_turns=3, eval__samples=2,
        eval__temperature=1, eval__every=1, track="mytask:Tracker", schedule__env_workers=2)
    plan = str(configs / "plan_node.toml")
    return [
        (first[0], first[1] + [["run", "--resume", "runs/first"], longer, ["run", "--resume", "runs/first", "--step",
            "3"], ["report", "runs/first"], ["eval", "runs/first/model", "--config", "runs/first/config.toml"],
            ["profile", "runs/first/model", "--prompts", "8"], ["plan", plan, "--run", "runs/first"]]),
        run("clock", schedule__deterministic="true", rl__loss="ipo", rl__advantage="grpo_std", engine__replicas=2,
            tokenizer__kind="byte", balance__rule="sign", rl__overlong="mask", engine__kv="recompute"),
        run("bits", rl__loss="icepop", rl__advantage="rloo", tokenizer__kind="bpe", tokenizer__vocab_size=300,
            balance__rule="none", rl__reward="exact", train__precision="bf16", engine__dtype="bfloat16",
            rl__overlong="penalise", rl__zero_variance="filter", rl__patience=2),
        run("own", env="mytask:Own", rl__reward="mytask:reward", rl__advantage="mytask:advantage", rl__loss="tis",
            engine__top_k=5, engine__top_p=0.9, optim__weight_decay=0.01, rl__kl_coef=0.1),
        run("faulty", env='[{"name": "mytask:Own", "params": {"wrong": 7}, "isolate": "none"}]', rl__loss="cispo",
            rl__advantage="maxrl", schedule__env_timeout=2, rl__reward="score"),
        ("lines", run("lines", env='[{"name": "jsonl", "params": {"path": "sums.jsonl", "last_number": true}}]',
            rl__loss="gspo", warm_start__data="talks.jsonl", model__experts="grouped")[1] + [["report", "runs/lines",
            "runs/first"]]),
        run("plain", rl__loss="grpo", rl__replay="false", warm_start__steps=0, warm_start__seconds=4, rl__seconds=3,
            rl__stop_solved=0.9, env="gcd", engine__temperature=0.7),
        ("sft", [["sft", *words(dir="runs/sft")], ["eval", "runs/sft/model", *words()]]),
        ("families", [["run", *words(dir=f"runs/{kind}", model__checkpoint=kind, balance__rule="none"
            if kind in ("mixtral", "qwen3_moe") else "smebu", rl__steps=1)] for kind in FAMILIES[:-1]]),
        ("upcycled", [["upcycle", "llama", "--experts", "4", "--out", "mixture"], ["eval", "mixture", *words(
            balance__rule="none")]]),
        ("fp8", [["sft", *words(dir="runs/wide", **WIDE)],
            ["calibrate", "runs/wide/model", "--prompts", "8", "--held-out", "8", "--max-kl", "9", "--max-drop", "1"],
            ["export", "runs/wide/model", "--fp8", "--held-out", "8", "--max-kl", "9", "--max-drop", "1"]]),
        ("breaks", [["run", *words(dir="runs/breaks", rl__steps=2000)], ["run", "--extend", "runs/breaks",
            "--rl.steps", "3"]]),
        ("words", [["--help"], ["run", "--help"], ["doctor"], ["bench"], ["completion", "bash"], ["run",
            "--print-config", *words()], ["run", "--dry-run", *words(dir="runs/dry")]]),
        ("cluster", [["plan", plan, "--why"], ["plan", plan, "--json"], ["simulate", plan,
            "--steps", "10", "--picture", "loop.png"], ["run", "--slurm", "--dry-run", "--config",
            str(configs / "nodes_4.toml"), "--dir", "runs/cluster"]]),
        ("no", [["run", "--rl.step", "5", "--rl.loss", "dpo"], ["run", "--env", "spell_bakward"], ["run", "--resume",
            "nowhere"], ["eval", "nowhere"], ["rum"], ["run", "--env", "mytask:Oen", "--dir", "runs/no"],
            ["run", "--model.checkpoint", "llama", "--dir", "runs/no"], ["plan", "nowhere.toml"]]),
    ]


def perform(watch: Watch, name: str, row: list[list[str]]) -> list[str]: # what went wrong
    "A row of commands; the words of those that did not end as they should."
    wrong = []
    for i, args in enumerate(row):
        process, began = watch.start(*args), time.monotonic()
        if name == "breaks" and i == 0:
            for line in process.stdout:
                if re.search(r"step +3\b|step=3\b|\b3/2000", line) or time.monotonic() > began + 60: break
            process.send_signal(signal.SIGINT)
        out = process.communicate(timeout=170)[0]
        wanted = 2 if name == "no" else 130 if name == "breaks" and i == 0 else 0
        if process.returncode != wanted:
            wrong.append(f"{' '.join(args)[:80]}: code {process.returncode}: {out.strip()[-300:]}")
    print(f"{name}: {len(row)} commands{', FAILED: ' + ' | '.join(wrong) if wrong else ''}", flush=True)
    return wrong


# ---------------------------------------------------------------- what could not be reached here
GPU = ("gpu/", "fp8/", "ep/deepep", "ep/ranks", "ep/dispatch", "ep/overlap") # kernels, and products of GPUs alone
PACKAGES = {"torchtitan": ("scale/parallel", "scale/context", "scale/world", "scale/distcheckpoint", "scale/muon"),
    "vllm": ("rollout/vllm",)}


def why_not(name: str) -> str: # 'gpu', a package, or 'else'
    "What a line of this file waits for, if it was not executed."
    for package, files in PACKAGES.items():
        if name.startswith(files) and not find_spec(package): return package
    return "gpu" if name.startswith(GPU) else "else"


def shares(package: Path, executed: dict[str, set[int]]) -> dict:
    "Executed lines over all, and what is missing, by what it waits for and by module."
    total, done, missing, rows = 0, 0, {}, {}
    for path in sorted(package.rglob("*.py")):
        name = path.relative_to(package).as_posix()
        if name.startswith("panels/") or name == "_modidx.py": continue
        lines = lines_of(path)
        seen = lines & executed.get(name, set())
        total, done = total + len(lines), done + len(seen)
        kind = why_not(name)
        missing[kind] = missing.get(kind, 0) + len(lines - seen)
        if lines - seen: rows[name.removesuffix(".py")] = [len(lines - seen), len(lines)]
    away = sum(n for kind, n in missing.items() if kind != "else")
    return dict(executed_share=round(done/total, 4), executed_share_here=round(done/(total - away), 4), lines=total,
        missing=missing, not_executed=dict(sorted(rows.items(), key=lambda r: -r[1][0])))


# ---------------------------------------------------------------- sizes and shapes
def code_cells(root: Path):
    "Name of the notebook, and source, of every code cell."
    for path in sorted((root / "nbs").glob("*/[0-9]*.ipynb")):
        for cell in json.loads(path.read_text())["cells"]:
            if cell["cell_type"] == "code": yield path.relative_to(root / "nbs").as_posix(), "".join(cell["source"])


def widest_line(root: Path) -> int:
    "The longest line of code, in cells and in files that are written by hand."
    files = [p for folder in ("tests", "benchmarks", "docs") for p in (root / folder).glob("*.py")]
    texts = [text for _, text in code_cells(root)] + [p.read_text() for p in files]
    return max(len(line) for text in texts for line in text.splitlines())


def class_cells(root: Path) -> dict[str, int]:
    "Classes that are longer than 60 lines in one cell."
    found = {}
    for name, source in code_cells(root):
        tree = ast.parse(re.sub(r"^[!%].*$", "pass", source, flags=re.M))
        for c in tree.body:
            if isinstance(c, ast.ClassDef): found[f"{name} {c.name}"] = c.end_lineno - c.lineno + 1
    return found


WHOLE = {"run", "run_async", "evaluate", "evaluate_async", "submit"} # run, evaluate and launch


def whole_settings(package: Path) -> list[str]:
    "Functions that are given all `Settings`, outside of the module that owns them."
    found = []
    for path in sorted(package.rglob("*.py")):
        if path.name == "config.py": continue
        for f in ast.walk(ast.parse(path.read_text())):
            if not isinstance(f, (ast.FunctionDef, ast.AsyncFunctionDef)) or f.name in WHOLE: continue
            given = [a.annotation for a in [*f.args.posonlyargs, *f.args.args, *f.args.kwonlyargs] if a.annotation]
            if any(re.search(r"\bSettings\b", ast.unparse(a)) for a in given):
                found.append(f"{path.relative_to(package).with_suffix('').as_posix()}:{f.name}")
    return found


def circles(package: Path) -> int:
    "Modules that are imported by what they import."
    def module(path): return ".".join(["moe_rl", *path.relative_to(package).with_suffix("").parts])
    paths = {module(p): p for p in package.rglob("*.py") if p.name not in ("__init__.py", "_modidx.py")}
    graph = {}
    for name, path in paths.items():
        graph[name] = set()
        for node in ast.parse(path.read_text()).body:
            if not isinstance(node, ast.ImportFrom): continue
            base = name.split(".")[:-node.level] if node.level else []
            whole = ".".join([*base, *([node.module] if node.module else [])])
            graph[name] |= {m for m in (whole, *(f"{whole}.{a.name}" for a in node.names)) if m in paths}
    while free := [m for m, needs in graph.items() if not needs & graph.keys()]:
        for m in free: del graph[m]
    return len(graph)


def measure(args: list[str]) -> dict:
    p = argparse.ArgumentParser("moe-rl bench road")
    p.add_argument("--only", default="", help="names of rows, separated by commas")
    p.add_argument("--jobs", type=int, default=2, help="rows side by side")
    a = p.parse_args(args)
    root = repository()
    folder, package, began = folders(root, "road"), root / "moe_rl", time.monotonic()
    prepare(folder)
    watch = Watch(folder)
    rows = [r for r in commands(root / "configs") if not a.only or r[0] in a.only.split(",")]
    with Lanes(a.jobs, 1) as pool: wrong = [w for part in pool.map(lambda r: perform(watch, *r), rows) for w in part]
    if wrong: raise RuntimeError(f"{len(wrong)} commands did not end as they should: " + " | ".join(wrong))
    known, classes, whole = shares(package, watch.executed()), class_cells(root), whole_settings(package)
    missing = known.pop("missing")
    for name, (gone, total) in list(known["not_executed"].items())[:40]: print(f"{gone:5} of {total:5}  {name}")
    figures = {k: v for k, v in known.items() if k != "not_executed"} | dict(
        loop_lines=len((package / "rl" / "orchestrator.py").read_text().splitlines()), widest_line=widest_line(root),
        longest_class_cell=max(classes.values()), settings_passed_whole=len(whole), circles=circles(package),
        commands=sum(len(row) for _, row in rows), seconds=round(time.monotonic() - began))
    figures |= {f"missing_{kind}": n for kind, n in missing.items()}
    bars = [("executed_share", .9, 1), ("loop_lines", 150, -1), ("widest_line", 120, -1), ("longest_class_cell", 60,
        -1), ("settings_passed_whole", 0, -1), ("circles", 0, -1)]
    missed = [f"{k}: {figures[k]}, wanted {'at least' if sign > 0 else 'at most'} {bar}" for k, bar, sign in bars
        if sign*figures[k] < sign*bar]
    return dict(figures=figures, missed=missed, not_executed=known["not_executed"], settings_whole=whole,
        long_classes={k: n for k, n in classes.items() if n > 60}, commands=[[name, *(" ".join(c) for c in row)]
            for name, row in commands(Path("configs")) if name in dict(rows)])
