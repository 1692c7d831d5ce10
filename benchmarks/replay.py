"""Router replay: an engine in bfloat16 and a trainer in float32 choose different experts; replaying the engine's choice brings their probabilities together.

    moe-rl bench replay --model FOLDER     FOLDER: a trained checkpoint with its tokenizer, for instance one that the bench `main_job` leaves behind
"""
import argparse
from pathlib import Path
import torch
from moe_rl.config import UserError
from moe_rl.data.batch import micro_batches, to_torch
from moe_rl.data.tokens import load_tokenizer
from moe_rl.moe.attention import packed_attend
from moe_rl.moe.checkpoint import load_pretrained
from moe_rl.moe.model import moe_modules
from moe_rl.records import Rollout
from moe_rl.rl.loss import k3
from moe_rl.rl.replay import disagreement, require_routes, verify_replay
from moe_rl.rollout.engine import Engine, Request
from moe_rl.rollout.environments import load_env
from moe_rl.train.objective import token_logprobs


def newest_model(root: Path) -> Path:
    "The checkpoint written last below `root`."
    found = sorted(root.rglob('config.json'), key=lambda p: p.stat().st_mtime) if root.is_dir() else []
    found = [p.parent for p in found if list(p.parent.glob('*.safetensors'))]
    if not found: raise UserError(f'replay: no trained model below {root}: run `moe-rl bench main_job` first, or give --model FOLDER')
    return found[-1]


def sample(folder, dtype, prompts, per_prompt, max_tokens) -> list[Rollout]:
    "Rollouts of an engine that computes in `dtype`, with logprobs and routes."
    tokenizer, model = load_tokenizer(folder), load_pretrained(folder)
    engine = Engine(model, kv_tokens=1 << 15, max_seqs=128, dtype=dtype)
    ids = [tokenizer.render_prompt(p) for p in prompts]
    for g, prompt in enumerate(ids):
        for i in range(per_prompt): engine.add(Request(id=f'{g}-{i}', prompt=prompt, max_tokens=max_tokens, seed=g*per_prompt+i, stop_ids=(tokenizer.eos_id,)))
    out = []
    while engine.has_work:
        for f in engine.step():
            g, i = map(int, f.id.split('-'))
            P, n = len(ids[g]), len(f.token_ids)
            out.append(Rollout(token_ids=[*ids[g], *f.token_ids], loss_mask=[False]*P+[True]*n, logprobs=[0.]*P+list(f.logprobs), versions=[-1]*P+[0]*n,
                               routes=f.routes, reward=0., group=g, index=i, env='bench', stop_reason=f.stop_reason))
    return sorted(out, key=lambda r: (r.group, r.index))


def compare(model, rollouts, budget=8192) -> dict:
    "Forward passes of the trainer without and with replay: routes, mismatch KL, gradient of the gate."
    require_routes(rollouts, model.cfg)
    sums, differ, layers, tokens, loss_tokens, exact = dict(off=0., on=0.), 0, 0, 0, 0, 0
    model.zero_grad()
    for mb in micro_batches(rollouts, [0.]*len(rollouts), budget)[0]:
        b = to_torch(mb)
        at = b.loss_mask
        for name in ('off', 'on'):
            with torch.set_grad_enabled(name == 'on'):
                out = model(b.token_ids, b.positions, packed_attend(b.cu_seqlens), replay=b.routes if name == 'on' else None, token_mask=b.token_mask)
                logp = token_logprobs(out.hidden[at], model.lm_head.weight, b.targets[at])[0]
            sums[name] += float(k3(logp.detach() - b.logprobs[at]).double().sum())
            if name == 'off':
                d = disagreement(b.routes, out.routes, b.token_mask)
                differ, layers = differ + d.tokens*mb.tokens, layers + d.layers*mb.tokens
            else:
                verify_replay(out.routes, b.routes, b.token_mask)
                exact += int((out.routes == b.routes).all(-1).all(-1)[b.token_mask].sum())
                (-logp.sum()/len(rollouts)).backward()
        tokens, loss_tokens = tokens + mb.tokens, loss_tokens + mb.loss_tokens
    gate = [float(m.router.weight.grad.norm()) for m in moe_modules(model)]
    return dict(disagree_share=differ/tokens, replayed_share=exact/tokens, kl_off=sums['off']/loss_tokens, kl_on=sums['on']/loss_tokens,
                gate_grad_min=min(gate), layers=(layers/tokens).tolist(), tokens=tokens, loss_tokens=loss_tokens)


def measure(args: list[str]) -> dict:
    "`moe-rl bench replay`; see the module's docstring."
    p = argparse.ArgumentParser(prog='moe-rl bench replay')
    p.add_argument('--model', help='folder of a trained checkpoint (default: the newest below runs/main_job)')
    p.add_argument('--env', default='spell_backward', help='environment whose held-out prompts are sampled')
    p.add_argument('--prompts', type=int, default=512)
    p.add_argument('--samples', type=int, default=4, help='rollouts per prompt')
    p.add_argument('--max-tokens', type=int, default=24)
    o = p.parse_args(args)
    folder = Path(o.model) if o.model else newest_model(Path('runs/main_job'))
    prompts = [t.prompt for t in load_env(o.env).held_out(o.prompts)]
    trainer, rows = load_pretrained(folder), {}
    for name, dtype in (('float32', torch.float32), ('bfloat16', torch.bfloat16)):
        rows[name] = compare(trainer, sample(folder, dtype, prompts, o.samples, o.max_tokens))
    print(f'{folder}: {o.prompts} prompts of {o.env}, {o.samples} samples each, {rows["bfloat16"]["loss_tokens"]} sampled tokens; trainer float32\n')
    print(f'{"engine":10} {"tokens with another route":>26} {"replayed":>9} {"KL without R3":>14} {"KL with R3":>11} {"ratio":>6}   disagreement by MoE layer')
    for name, r in rows.items():
        print(f'{name:10} {r["disagree_share"]:26.2%} {r["replayed_share"]:9.2%} {r["kl_off"]:14.2e} {r["kl_on"]:11.2e} {r["kl_on"]/max(r["kl_off"], 1e-30):6.2f}   '
              + ' '.join(f'{x:.2%}' for x in r['layers']))
    r = rows['bfloat16']
    print(f'\nsmallest gradient norm of a gate with R3: {r["gate_grad_min"]:.2e}')
    if not r['gate_grad_min'] > 0: raise RuntimeError('replay: the gate lost its gradient')
    return dict(figures={k: r[k] for k in ('disagree_share', 'replayed_share', 'kl_off', 'kl_on')} | dict(kl_ratio=r['kl_on']/r['kl_off'], prompts=o.prompts, loss_tokens=r['loss_tokens']))
