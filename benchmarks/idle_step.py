"""Steps without any signal leave every weight, expert bias and momentum as they are, to the bit.

    moe-rl bench idle_step [--steps 100]

First the trainer alone, for every loss; then the program: a run on a task whose reward never differs. Beside it what
the small regularisers would have done at full speed.
"""
import argparse
import torch
from _learning import VOCABULARY, batches, settings, trainer
from _runs import Run, finish, folders
from moe_rl.bench import repository
from moe_rl.rl import trainer as rl
from moe_rl.rl.loss import LOSSES
from moe_rl.train.checkpoint import committed_steps, step_path
from moe_rl.train.step import optimizer_step
from moe_rl.train.weights import load_tensors


def state(t) -> dict:
    "Every tensor that a checkpoint holds."
    return {k: v.detach().clone() for k, v in (t.model.state_dict() | t.optimizers.state_dict()).items()}


def apart(a: dict, b: dict) -> float:
    "Largest difference of any entry of any tensor."
    return max(float((a[k].double() - b[k].double()).abs().max()) for k in a)


def trained(loss: str):
    "A trainer whose moments are no longer zero."
    s = settings(**{"rl.loss": loss})
    t = trainer(rl.build_model(s, VOCABULARY), s)
    for b in batches(t.model, 2, lambda n: [1., -1.]*(n//2)): t.step(b)
    return t


def drift(loss: str, steps: int) -> float:
    "How far `steps` silent steps take a trainer."
    t = trained(loss)
    before, silent = state(t), batches(t.model, 4, lambda n: [0.]*n, seed=7)
    for i in range(steps): row = t.step(silent[i % len(silent)])
    print(f'{loss:>8}: {steps} steps, drift {apart(before, state(t)):.1e}, idle {row["idle"]}, gradient norm '
          f'{row["grad_norm"]:.1e}', flush=True)
    return apart(before, state(t))


def full_speed(steps: int) -> float:
    "The same batches when the regularisers alone decide, as if every token taught something."
    t = trained("dppo")
    before, silent = state(t), batches(t.model, 4, lambda n: [0.]*n, seed=7)
    def loud(model, b):
        b.signal = 1.
        p = rl.rl_loss(model, b, t.how)
        return p._replace(teaching=b.loss_tokens)
    for i in range(steps):
        optimizer_step(t.model, t.optimizers, silent[i % len(silent)], loud, t.how.balance, t.optim.clip)
    weights = t.model.state_dict()
    return apart({k: before[k] for k in weights}, weights)


def program(steps: int) -> tuple[float, int]:
    """A run whose answers end after one token and so are never right: how far its last checkpoint is from its first,
    and its idle steps."""
    root, out = repository(), folders(repository(), "idle_step")
    job = finish(Run(out / "run", "--config", str(root / "configs" / "main_job.toml"), "--dir", str(out / "run"),
                     "--warm_start.steps", "3", "--rl.steps", str(steps),
                     "--rl.seconds", "0", "--rl.stop_at", "0", "--rl.reward", "exact", "--rl.zero_variance", "keep",
                     "--rl.groups_per_step", "2", "--engine.max_tokens", "1",
                     "--eval.prompts", "16", "--eval.every", "0", "--checkpoint.every", str(steps), "--checkpoint.keep",
                     "9"), 600)
    first, last = [step_path(job.folder, n) for n in (committed_steps(job.folder)[0], committed_steps(job.folder)[-1])]
    a, b = [{f"{part}.{k}": v for part in ("model", "optimizer")
        for k, v in load_tensors(p / f"{part}.safetensors").items()} for p in (first, last)]
    return apart(a, b), int(job.metrics[-1]["idle"])


def measure(args: list[str]) -> dict:
    "`moe-rl bench idle_step`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench idle_step")
    p.add_argument("--steps", type=int, default=100)
    a = p.parse_args(args)
    torch.manual_seed(0)
    alone = {loss: drift(loss, a.steps) for loss in LOSSES}
    loud = full_speed(a.steps)
    print(f"regularisers at full speed: drift {loud:.2g}", flush=True)
    run, idle = program(a.steps)
    print(f"a run of {a.steps} steps: drift {run:.1e}, idle {idle}", flush=True)
    return dict(figures=dict(drift=max(*alone.values(), run), drift_at_full_speed=loud, steps=a.steps,
        idle_in_run=idle))
