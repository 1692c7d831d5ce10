"""Deterministic mode: two runs, and a run killed at random moments and resumed, agree bit for bit in weights and in
every metric that is not a time."""
import argparse, random, time
from _runs import Run, finish, folders
from moe_rl.bench import repository
from moe_rl.train.checkpoint import latest
from moe_rl.train.weights import describe, load_tensors

TIMES = ("seconds", "tokens_per_s", "waits")  # endings of metrics that are times


def fingerprint(run) -> dict:
    "Weights, optimizer state and metrics of a finished run, without times."
    checkpoint = latest(run.folder)
    tensors = {name: describe(load_tensors(checkpoint / f"{name}.safetensors")).fingerprint
        for name in ("model", "optimizer")}
    clean = lambda rows: [{k: v for k, v in r.items() if not k.endswith(TIMES)} for r in rows]
    return dict(step=checkpoint.name, **tensors, metrics=clean(run.metrics), evals=clean(run.evals),
        ledger=run.lines("ledger.jsonl"))


def measure(args):
    p = argparse.ArgumentParser(prog="moe-rl bench determinism")
    p.add_argument("--steps", type=int, default=120)
    p.add_argument("--kills", type=int, default=4)
    p.add_argument("--seed", type=int, default=0)
    a = p.parse_args(args)
    root, rng = repository(), random.Random(a.seed)
    out = folders(root, "determinism")

    def job(name):
        return Run(out / name, "--config", str(root / "configs" / "main_job.toml"), "--dir", str(out / name),
                              "--schedule.deterministic", "true", "--warm_start.steps", "40", "--rl.reward", "score",
                              "--rl.seconds", "0", "--rl.stop_at", "0", "--rl.steps", str(a.steps),
                              "--checkpoint.every", "4", "--eval.every", "10", "--eval.prompts", "64")
    first, second = finish(job("first"), 600), finish(job("second"), 600)
    print(f"two runs: {first.seconds:.1f} s and {second.seconds:.1f} s", flush=True)
    killed = job("killed").start()
    moments = []
    for _ in range(a.kills):
        moment = rng.uniform(*((0.12, 0.3) if moments else (0.35, 0.6))) * first.seconds
        time.sleep(moment)
        if killed.process.poll() is not None: break
        killed.kill()
        moments.append(round(moment, 1))
        print(f"killed after {moment:.1f} s, at committed step {(latest(killed.folder) or killed.folder).name}",
            flush=True)
        time.sleep(1)
        killed.args = ("--resume", str(killed.folder))
        killed.start()
    if code := killed.wait(600):
        raise RuntimeError(f"resumed run ended with code {code}: "
            + killed.folder.with_suffix(".log").read_text()[-600:])
    prints = [fingerprint(r) for r in (first, second, killed)]
    for key in prints[0]:
        for name, other in (("second run", prints[1]), ("resumed run", prints[2])):
            if prints[0][key] != other[key]:
                print(f"{name} differs in {key}")
                if isinstance(other[key], list):
                    row = next(((x, y) for x, y in zip(prints[0][key], other[key]) if x != y),
                        (len(prints[0][key]), len(other[key])))
                    print("  ", {k: (row[0][k], row[1].get(k)) for k in row[0] if row[0][k] != row[1].get(k)}
                        if isinstance(row[0], dict) else row)
    return dict(figures=dict(equal=prints[0] == prints[1], resumed_equal=prints[0] == prints[2], kills=len(moments),
        steps=a.steps))
