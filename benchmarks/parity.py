"""Two parities. Our checkpoints in transformers and theirs in our model: same logits.

Decoding in the engine and one forward pass: same numbers."""
import argparse, copy, random, shutil, tempfile
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from moe_rl.moe.attention import masked_attend, packed_attend, packed_positions
from moe_rl.moe.checkpoint import load_pretrained, save_pretrained, to_hf_config
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights
from moe_rl.moe.spec import ModelSpec
from moe_rl.records import Finished, Request
from moe_rl.rollout.engine import Engine
from moe_rl.train.objective import sampling_logprobs


def draw_config(rng:random.Random) -> ModelSpec:
    "A small model with everything that can differ drawn at random; windows are shorter than the documents."
    kv, dense = rng.choice([1, 2, 3]), rng.randint(1, 3)
    experts = rng.randint(4, 16)
    return new_afmoe(vocab_size=rng.randint(60, 200), hidden_size=rng.choice([24, 32, 48, 64]),
        intermediate_size=rng.choice([40, 64, 96]),
        moe_intermediate_size=rng.choice([8, 16, 24]), num_hidden_layers=dense+rng.randint(1, 4),
        num_dense_layers=dense,
        num_attention_heads=kv*rng.choice([1, 2, 3, 4]), num_key_value_heads=kv, head_dim=rng.choice([8, 16, 24]),
        num_experts=experts, num_experts_per_tok=rng.randint(1, min(8, experts)), num_shared_experts=rng.randint(1, 2),
        route_scale=rng.choice([1., 2.448, 2.826]),
        global_attn_every_n_layers=rng.choice([2, 3, 4]), sliding_window=rng.randint(2, 12),
        rope_theta=rng.choice([1e4, 5e5]),
        rms_norm_eps=rng.choice([1e-5, 1e-6]), max_position_embeddings=256, mup_enabled=rng.random() < 0.75)


@torch.no_grad()
def stir(tensors:dict[str, Tensor], gen:torch.Generator) -> None:
    "Move every gain and every expert bias away from where it starts, so that a swapped or forgotten one shows."
    for name, t in sorted(tensors.items()):
        if "norm" in name: t.mul_(1+0.2*torch.randn(t.shape, generator=gen))
        elif "expert_bias" in name: t.copy_(0.2*torch.randn(t.shape, generator=gen))


def draw_documents(rng:random.Random, gen:torch.Generator, vocab_size:int, window:int) -> tuple[list[Tensor], Tensor]:
    "Documents longer than the window, and their cumulative lengths."
    docs = [torch.randint(0, vocab_size, (rng.randint(window+3, 48),), generator=gen) for _ in range(3)]
    return docs, torch.tensor([0]+[len(d) for d in docs]).cumsum(0)


@torch.no_grad()
def our_logits(model:Model, docs:list[Tensor], cu:Tensor) -> Tensor: # [N,V], documents packed in one row
    return model.logits(model(torch.cat(docs), packed_positions(cu), packed_attend(cu)).hidden)


@torch.no_grad()
def their_logits(model, docs:list[Tensor]) -> Tensor: # [N,V], documents one by one
    return torch.cat([model(d[None]).logits[0] for d in docs])


def hf_parity(seed:int, home:Path) -> tuple[ModelSpec, float, float]:
    """One drawn configuration both ways: largest difference of logits when transformers reads our files, and when we
    read theirs."""
    from transformers import AfmoeConfig, AfmoeForCausalLM
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    cfg = draw_config(rng)
    docs, cu = draw_documents(rng, gen, cfg.vocab_size, cfg.config["sliding_window"])

    ours = init_weights(Model(cfg), seed)
    stir(ours.state_dict(), gen)
    save_pretrained(ours, home/f"ours-{seed}", shard_bytes=rng.choice([1 << 14, 1 << 30]))
    there = (their_logits(AfmoeForCausalLM.from_pretrained(home/f"ours-{seed}"), docs)
        - our_logits(ours, docs, cu)).abs().max().item()

    torch.manual_seed(seed)
    theirs = AfmoeForCausalLM(AfmoeConfig(**to_hf_config(cfg), pad_token_id=None)).eval()
    for p in theirs.parameters():
        # the router too, which starts as zeros
        if p.ndim > 1: p.data = torch.randn(p.shape, generator=gen)*0.5/cfg.hidden_size**0.5
    stir({n: p.data for n, p in theirs.named_parameters()}, gen)
    theirs.save_pretrained(home/f"theirs-{seed}", max_shard_size=rng.choice(["20KB", "1GB"]))
    loaded = load_pretrained(home/f"theirs-{seed}")
    if loaded.spec != cfg: raise AssertionError(f"configuration changed on the way: {cfg} became {loaded.spec}")
    back = (their_logits(theirs, docs) - our_logits(loaded, docs, cu)).abs().max().item()
    return cfg, there, back


def hf_parities(count:int, first_seed:int) -> list[tuple[ModelSpec, float, float]]:
    import transformers
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    home, rows = Path(tempfile.mkdtemp(prefix="parity-")), []
    print(f"{'L':>3}{'dense':>6}{'H/KV':>6}{'W':>4}{'E':>4}{'k':>3}  theirs reads ours  ours reads theirs")
    try:
        for seed in range(first_seed, first_seed+count):
            cfg, there, back = hf_parity(seed, home)
            rows.append((cfg, there, back))
            c = cfg.config
            print(
                  f"{c['num_hidden_layers']:>3}{c['num_dense_layers']:>6}{c['num_attention_heads']:>4}/{c['num_key_value_heads']}{c['sliding_window']:>4}{cfg.num_experts:>4}"
                  f"{cfg.num_experts_per_tok:>3}  {there:>17.1e}  {back:>17.1e}", flush=True)
    finally: shutil.rmtree(home)
    return rows


# Decoding


class Growing:
    "Keys and values of one text, kept as they were computed: an `AttendFn` that knows nothing of pages."
    def __init__(self): self.kv = {}
    def __call__(self, layer:int, q:Tensor, k:Tensor, v:Tensor, window:int|None) -> Tensor:
        before = self.kv.get(layer, (k[:0], v[:0]))
        k, v = self.kv[layer] = tuple(torch.cat((old, new)) for old, new in zip(before, (k, v)))
        # how far query i looks back to see key j
        back = torch.arange(len(k)-len(q), len(k))[:,None]-torch.arange(len(k))
        return masked_attend(q, k, v, (back >= 0) & (back < (window or len(k))))


@torch.no_grad()
# logits [T,V], routes [T,L_moe,k]
def forward_of_versions(models:list[Model], ids:Tensor, made:np.ndarray) -> tuple[Tensor, Tensor]:
    """One pass over a text whose inputs were computed by different versions: `made[t]` is that of input t, never
    falling."""
    attend, parts = Growing(), []
    for version in np.unique(made):
        at = torch.from_numpy(np.flatnonzero(made == version))
        out = models[version](ids[at], at, attend)
        parts.append((models[version].logits(out.hidden), out.routes))
    return tuple(torch.cat(p) for p in zip(*parts))


@torch.no_grad()
def forward_of_one(model:Model, ids:Tensor) -> tuple[Tensor, Tensor]: # logits [T,V], routes [T,L_moe,k]
    "One packed pass over a text."
    out = model(ids, torch.arange(len(ids)), packed_attend(torch.tensor([0, len(ids)])))
    return model.logits(out.hidden), out.routes


def difference(r:Request, f:Finished, logits:Tensor, routes:Tensor, sampled:np.ndarray,
        inputs:np.ndarray) -> tuple[float, int]:
    """Largest difference of a log-probability over the `sampled` tokens, and how many of the `inputs` went through
    other experts."""
    if f.stop_reason != "length" or len(f.token_ids) != r.max_tokens:
        raise AssertionError(f"request {r.id} gave {len(f.token_ids)} of {r.max_tokens} tokens ({f.stop_reason})")
    want = sampling_logprobs(logits[len(r.prompt)-1:], r.temperature, r.top_k, r.top_p).gather(1,
        torch.tensor(f.token_ids)[:,None])[:,0].numpy()
    off = (routes.sort(-1).values.numpy() != np.sort(f.routes.astype(np.int64), -1)).any((1, 2))
    return float(np.abs(want-f.logprobs)[sampled].max(initial=0)), int(off[inputs].sum())


def serve(engine:Engine, requests:list[Request], update:tuple[int, dict[str, Tensor]]|None=None) -> dict[str, Finished]:
    "Run requests to their end, with new weights after some steps if `update` says so."
    for r in requests: engine.add(r)
    done, steps = [], 0
    while engine.has_work:
        if update is not None and steps == update[0]: engine.update_weights(1, update[1])
        done, steps = done + engine.step(), steps+1
    return {f.id: f for f in done}


def decode_parity(seed:int) -> tuple[dict[str, float], Counter]:
    "One drawn configuration: differences per situation, and what really happened in them."
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    cfg = draw_config(rng)
    models = [init_weights(Model(cfg), 2*seed+v).requires_grad_(False) for v in (0, 1)]
    for m in models: stir(m.state_dict(), gen)
    news = {n: t.clone() for n, t in models[1].state_dict().items()}
    prompts = [torch.randint(0, cfg.vocab_size, (rng.randint(1, 40),), generator=gen).tolist() for _ in range(4)]
    requests = [Request(id=f"{i}-{j}", prompt=p, max_tokens=rng.randint(8, 24), seed=10*i+j,
        temperature=rng.choice([1., 0.7])) for i, p in enumerate(prompts) for j in range(4)]
    block, diff, seen = rng.choice([1, 4, 16]), {}, Counter()

    def compare(name:str, done:dict[str, Finished], reference) -> None:
        results = [difference(r, done[r.id], *reference(r, done[r.id])) for r in requests]
        diff[name] = max(d for d, _ in results)
        seen["routes_differ"] += sum(n for _, n in results)

    text = lambda r, f: torch.tensor(r.prompt+f.token_ids)[:-1]
    every = lambda f: (np.ones(len(f.token_ids), bool), np.ones(len(f.routes), bool))
    engine = Engine(copy.deepcopy(models[0]), kv_tokens=128, block_size=block, max_seqs=12, max_step_tokens=24)
    compare("pages, sharing, preemption", serve(engine, requests),
        lambda r, f: (*forward_of_one(models[0], text(r, f)), *every(f)))
    seen.update({k: engine.stats()[k] for k in ("preemptions", "prefix_hits")})

    def mixture(r:Request, f:Finished): # an input is computed by the version that samples the token after it
        made = np.concatenate((np.full(len(r.prompt)-1, f.versions[0]), f.versions))
        seen["mixed"] += int(made[0] != made[-1])
        return *forward_of_versions(models, text(r, f), made), *every(f)
    engine = Engine(copy.deepcopy(models[0]), kv_tokens=2048, block_size=block, max_seqs=16, kv_update="keep")
    compare("new weights, KV kept", serve(engine, requests, (6, news)), mixture)

    # all that is sampled after the update, and the routes of the whole text if anything was
    def renewed(r:Request, f:Finished):
        new = f.versions == 1
        return *forward_of_one(models[1], text(r, f)), new, np.full(len(f.routes), new.any())
    engine = Engine(copy.deepcopy(models[0]), kv_tokens=2048, block_size=block, max_seqs=16, kv_update="recompute")
    compare("new weights, KV recomputed", serve(engine, requests, (6, news)), renewed)
    seen["recomputes"] += engine.stats()["recomputes"]
    return diff, seen


def decode_parities(count:int, first_seed:int) -> tuple[float, Counter]:
    worst, total = {}, Counter()
    for seed in range(first_seed, first_seed+count):
        diff, seen = decode_parity(seed)
        worst, total = {k: max(worst.get(k, 0.), v) for k, v in diff.items()}, total+seen
    print("\nengine against forward pass, largest difference of a log-probability")
    for name, value in worst.items(): print(f"  {name:<28}{value:.1e}")
    print("  that happened: " + ", ".join(f"{n} {k}" for k, n in total.items()))
    if missing := [k for k in ("preemptions", "prefix_hits", "mixed", "recomputes") if not total[k]]:
        raise AssertionError(f"the draws contain no {missing[0]}: nothing was shown")
    return max(worst.values()), total


def measure(args:list[str]) -> dict:
    parser = argparse.ArgumentParser(prog="moe-rl bench parity")
    parser.add_argument("--configs", type=int, default=24, help="drawn configurations")
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration")
    a = parser.parse_args(args)
    rows = hf_parities(a.configs, a.seed)
    decode, happened = decode_parities(a.configs, a.seed)
    return {"figures": {"hf_max_diff": max(max(there, back) for _, there, back in rows), "decode_max_diff": decode,
        "configs": len(rows), "routes_differ": happened["routes_differ"]}}
