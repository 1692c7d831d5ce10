"""Router replay: an engine in bfloat16 and a trainer in float32 choose different experts; replaying the engine's
choice brings their probabilities together.

    moe-rl bench replay [--run FOLDER]     a finished run that kept its checkpoints; else the main job's, which is run
    if there is none

The policy is looked at all along its training, at every checkpoint that the run kept; the figures are means over
checkpoints, each with as many prompts. The last one
is also given alone: a policy that has finished learning is nearly deterministic, hardly any KL is left, and what is
left is the rounding of bfloat16 itself.
"""
import argparse
import copy
from pathlib import Path
import torch
from _runs import Run, finish, folders
from moe_rl.bench import repository
from moe_rl.data.batch import micro_batches, to_torch
from moe_rl.data.tokens import load_tokenizer, says
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.checkpoint import load_pretrained
from moe_rl.moe.model import moe_modules
from moe_rl.records import Request, Rollout
from moe_rl.rl.loss import k3
from moe_rl.rl.replay import disagreement, require_routes, verify_replay
from moe_rl.rollout.engine import Engine
from moe_rl.rollout.environments import load_env
from moe_rl.train.checkpoint import committed_steps, step_path
from moe_rl.train.objective import token_logprobs
from moe_rl.train.weights import load_tensors


def main_run() -> Path:
    "What the bench `main_job` left behind, or `scripts/run`; else the main job is run now, in minutes."
    root = repository()
    for run in (root / "runs" / "bench" / "main_job" / "main", root / "runs" / "main_job"):
        if committed_steps(run) and (run / "model").is_dir(): return run
    print("no finished main job below runs/: it is run now, which takes minutes", flush=True)
    run = folders(root, "replay") / "main"
    return finish(Run(run, "--config", str(root / "configs" / "main_job.toml"), "--dir", str(run)), 900).folder


def policies(run: Path):
    "(step, model) of every committed checkpoint of a finished run."
    for step in committed_steps(run):
        model = load_pretrained(run / "model")
        model.load_state_dict(load_tensors(step_path(run, step) / "model.safetensors"))
        yield step, model


def sample(model, tokenizer, dtype, prompts, per_prompt, max_tokens) -> list[Rollout]:
    "Rollouts of an engine that computes in `dtype`, with logprobs and routes."
    engine = Engine(copy.deepcopy(model), kv_tokens=1 << 15, max_seqs=128, dtype=dtype)
    ids = [tokenizer.render(says(p)) for p in prompts]
    for g, prompt in enumerate(ids):
        for i in range(per_prompt):
            engine.add(Request(id=f"{g}-{i}", prompt=prompt, max_tokens=max_tokens, seed=g*per_prompt+i,
                stop_ids=tokenizer.stop_ids))
    out = []
    while engine.has_work:
        for f in engine.step():
            g, i = map(int, f.id.split("-"))
            P, n = len(ids[g]), len(f.token_ids)
            out.append(Rollout(token_ids=[*ids[g], *f.token_ids], loss_mask=[False]*P+[True]*n,
                               logprobs=[0.]*P+list(f.logprobs), versions=[-1]*P+[0]*n,
                               routes=f.routes, reward=0., group=g, index=i, env="bench", stop_reason=f.stop_reason))
    return sorted(out, key=lambda r: (r.group, r.index))


def compare(model, rollouts, budget=8192) -> dict:
    "Forward passes of the trainer without and with replay: routes, mismatch KL, gradient of the gate."
    require_routes(rollouts, model.spec)
    sums, differ, layers, tokens, loss_tokens, exact = dict(off=0., on=0.), 0, 0, 0, 0, 0
    model.zero_grad()
    for mb in micro_batches(rollouts, [0.]*len(rollouts), budget)[0]:
        b = to_torch(mb)
        at = b.loss_mask
        for name in ("off", "on"):
            with torch.set_grad_enabled(name == "on"):
                out = model(b.token_ids, b.positions, packed_attend(b.cu_seqlens),
                    replay=b.routes if name == "on" else None, token_mask=b.token_mask)
                logp = token_logprobs(out.hidden[at], model.lm_head.weight, b.targets[at])[0]
            sums[name] += float(k3(logp.detach() - b.logprobs[at]).double().sum())
            if name == "off":
                d = disagreement(b.routes, out.routes, b.token_mask)
                differ, layers = differ + d.tokens*mb.tokens, layers + d.layers*mb.tokens
            else:
                verify_replay(out.routes, b.routes, b.token_mask)
                exact += int((out.routes == b.routes).all(-1).all(-1)[b.token_mask].sum())
                (-logp.sum()/len(rollouts)).backward()
        tokens, loss_tokens = tokens + mb.tokens, loss_tokens + mb.loss_tokens
    gate = [float(m.router.weight.grad.norm()) for m in moe_modules(model)]
    return dict(disagree_share=differ/tokens, replayed_share=exact/tokens, kl_off=sums["off"]/loss_tokens,
                kl_on=sums["on"]/loss_tokens,
                gate_grad_min=min(gate), layers=(layers/tokens).tolist(), tokens=tokens, loss_tokens=loss_tokens)


def measure(args: list[str]) -> dict:
    "`moe-rl bench replay`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench replay")
    p.add_argument("--run", help="folder of a finished run that kept its checkpoints (default: that of the main job, "
                                 "below runs/)")
    p.add_argument("--env", default="spell_backward", help="environment whose held-out prompts are sampled")
    p.add_argument("--prompts", type=int, default=512)
    p.add_argument("--samples", type=int, default=4, help="rollouts per prompt")
    p.add_argument("--max-tokens", type=int, default=24)
    o = p.parse_args(args)
    run = Path(o.run) if o.run else main_run()
    prompts = [t.prompt for t in load_env(o.env).held_out(o.prompts)]
    tokenizer, rows = load_tokenizer(run / "model"), {}
    print(f"{o.prompts} prompts of {o.env}, {o.samples} samples each, at every checkpoint; trainer float32\n")
    print(f'{"":>14} {"tokens with another route":>26} {"replayed":>9} {"KL without R3":>14} {"KL with R3":>11} '
          f'{"ratio":>6} {"least gate gradient":>20}   disagreement by MoE layer')
    def show(name, r):
        print(f'{name:>14} {r["disagree_share"]:26.2%} {r["replayed_share"]:9.2%} {r["kl_off"]:14.2e} '
              f'{r["kl_on"]:11.2e} {r["kl_on"]/max(r["kl_off"], 1e-30):6.2f} {r["gate_grad_min"]:20.2e}   '
              + " ".join(f"{x:.2%}" for x in r.get("layers", [])), flush=True)
    for step, model in policies(run):
        rows[step] = compare(model, sample(model, tokenizer, torch.bfloat16, prompts, o.samples, o.max_tokens))
        show(f"step {step}", rows[step])
        if not rows[step]["gate_grad_min"] > 0: raise RuntimeError(f"replay: the gate lost its gradient at step {step}")
    last = max(rows)
    show("float32 engine", compare(model, sample(model, tokenizer, torch.float32, prompts, o.samples, o.max_tokens)))
    mean = {k: sum(r[k] for r in rows.values())/len(rows) for k in ("disagree_share", "replayed_share", "kl_off",
        "kl_on")}
    show("mean", mean | dict(gate_grad_min=min(r["gate_grad_min"] for r in rows.values())))
    return dict(figures=mean | dict(kl_ratio=mean["kl_on"]/mean["kl_off"], kl_off_last=rows[last]["kl_off"],
                                    kl_on_last=rows[last]["kl_on"], disagree_share_last=rows[last]["disagree_share"],
                                    prompts=o.prompts, samples=o.samples, checkpoints=len(rows),
                                    tokens=sum(r["loss_tokens"] for r in rows.values())),
                steps={str(n): {k: r[k] for k in ("disagree_share", "kl_off", "kl_on")} for n, r in rows.items()})
