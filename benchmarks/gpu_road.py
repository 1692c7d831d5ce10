"""What `moe-rl run` gains from one GPU: a decode step that is recorded, experts that are fused, 16 and 8 bits.

The model is an AFMoE whose widths FP8 takes: width 768, 12 layers, 32 experts of width 384, 4 a token, and a shared
one. Parts, each in a process of its own:

    check    the recorded decode step against the plain one on this GPU, in float32 and in bf16
    engine   256 sequences at a time: tokens a second by the recorded step and by the plain one
    train    steps of RL on 64 rollouts of 513 tokens, routes replayed: float32 plain, 16 bits plain, with fused experts
             and with fused pieces, 8 bits
    curves   RL in one process, words backward, a model of width 256 in float32, bf16 and fp8, three seeds each: exact
             answers over steps, and whether the curves lie within their seeds' spread

    moe-rl bench gpu_road [PART ...]        all parts unless said otherwise
"""
import json
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import numpy as np
import torch

from moe_rl.bench import NeedsHardware

PARTS = ("check", "engine", "train", "curves")
SEATS, PROMPT, ANSWER = 256, 64, 192
BUDGET = 16384 # rows of a micro-batch: two make a step


def model_of(dtype, vocab=32768, layers=12, seed=0):
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights, lower_precision
    spec = new_afmoe(vocab_size=vocab, hidden_size=768, intermediate_size=2048, moe_intermediate_size=384,
        num_hidden_layers=layers, num_dense_layers=1, num_attention_heads=12, num_key_value_heads=4, head_dim=64,
        num_experts=32, num_experts_per_tok=4, num_shared_experts=1, route_scale=2., sliding_window=512,
        max_position_embeddings=4096)
    model = init_weights(Model(spec), seed).requires_grad_(False)
    if dtype != torch.float32: lower_precision(model, dtype)
    return model.cuda()


def requests(n, prompt, answer, seed=0, vocab=32768):
    from moe_rl.records import Request
    rng = np.random.default_rng(seed)
    texts = [rng.integers(0, vocab, prompt).tolist() for _ in range(n)]
    return [Request(id=f"{seed}-{i}", prompt=p, max_tokens=answer, seed=1000*seed+i) for i, p in enumerate(texts)]


def engine_of(model, compute, seats=SEATS):
    from moe_rl.rollout.engine import Engine
    return Engine(model, kv_tokens=seats*(PROMPT+ANSWER+16), max_seqs=seats, compute=compute)


def drive(engine, asked):
    "Finished requests by id, seconds, and the seconds of each step, of an engine that speaks the protocol."
    engine.submit(asked)
    done, steps, began = {}, [], time.perf_counter()
    while engine.busy:
        at = time.perf_counter()
        done |= {f.id: f for f in engine.poll()}
        steps.append(time.perf_counter()-at)
    return done, time.perf_counter()-began, steps


def serve(engine, asked):
    "`drive`, of our own engine."
    from moe_rl.rollout.protocol import Embedded
    return drive(Embedded(engine), asked)


def check():
    "Both ways on the same requests: equal tokens and log-probabilities up to the first difference by rounding."
    from moe_rl.gpu.decode import GraphStep
    from moe_rl.rollout.engine import plain_step
    out = {}
    for dtype in (torch.float32, torch.bfloat16):
        model, asked = model_of(dtype, layers=4), requests(12, 40, 24)
        plain, _, _ = serve(engine_of(model, plain_step, 8), asked)
        step = GraphStep()
        fast, _, _ = serve(engine_of(model, step, 8), asked)
        again, _, _ = serve(engine_of(model, GraphStep(), 8), asked)
        same, worst, routes = [], 0., []
        for r in asked:
            a, b = plain[r.id], fast[r.id]
            n = next((i for i, (x, y) in enumerate(zip(a.token_ids, b.token_ids)) if x != y), len(a.token_ids))
            same.append(n/len(a.token_ids))
            worst = max(worst, float(np.abs(a.logprobs[:n]-b.logprobs[:n]).max(initial=0)))
            routes.append(float((a.routes[:39+n] == b.routes[:39+n]).mean()))
        pairs = [(fast[r.id], again[r.id]) for r in asked]
        exact = all(a.token_ids == b.token_ids and (a.logprobs == b.logprobs).all() for a, b in pairs)
        name = str(dtype).removeprefix("torch.")
        print(f"check {name}: tokens equal {np.mean(same):.3f}, worst |d logprob| up to there {worst:.2e}, routes "
              f"equal {np.mean(routes):.4f}, twice the same bits {exact}, steps {step.counts}", flush=True)
        out |= {f"equal_{name}": float(np.mean(same)), f"dlogprob_{name}": worst, f"repeats_{name}": exact}
        if worst > (1e-3 if dtype == torch.float32 else .2) or not exact:
            raise AssertionError("the recorded step computes something else, or not the same twice")
    return out


def engine():
    "Tokens per second of 256 sequences, all present from the beginning, then with twice as many that wait for seats."
    from moe_rl.gpu.decode import GraphStep
    from moe_rl.rollout.engine import plain_step
    out = {}
    for dtype in (torch.bfloat16, torch.float32):
        model, name = model_of(dtype), str(dtype).removeprefix("torch.")
        e = engine_of(model, GraphStep())
        _, seconds, _ = serve(e, requests(SEATS, PROMPT, 8, seed=1))
        print(f"{name}: first 8 tokens of {SEATS} sequences, all graphs made: {seconds:.1f} s", flush=True)
        for label, n in (("full", SEATS), ("waiting", 2*SEATS)):
            before = e.counters["tokens"]
            _, seconds, steps = serve(e, requests(n, PROMPT, ANSWER, seed=2+n))
            rate, step = (e.counters["tokens"]-before)/seconds, float(np.median(steps))*1e3
            print(f"{name} graphs, {label}: {rate:.0f} tokens/s, median step {step:.2f} ms, {e.compute.counts}",
                flush=True)
            out |= {f"{name}_{label}": rate, f"{name}_{label}_step_ms": step}
        del e
        plain = engine_of(model, plain_step)
        _, seconds, steps = serve(plain, requests(SEATS, PROMPT, 24, seed=3))
        rate, step = plain.counters["tokens"]/seconds, float(np.median(steps))*1e3
        print(f"{name} plain: {rate:.0f} tokens/s, median step {step:.2f} ms", flush=True)
        out |= {f"{name}_plain": rate, f"{name}_plain_step_ms": step}
    return out


def rollouts(model, n=64, tokens=513, at_once=16):
    "Made-up texts with the log-probabilities and the routes that this model gives them, and rewards of either sign."
    from moe_rl.moe.attention import packed_attend, packed_positions
    from moe_rl.records import Rollout
    from moe_rl.routes import narrow_routes
    from moe_rl.train.objective import token_logprobs
    gen, out = torch.Generator().manual_seed(0), []
    for first in range(0, n, at_once):
        ids = torch.randint(model.spec.vocab_size, (at_once, tokens), generator=gen)
        cu = (torch.arange(at_once+1)*tokens).cuda()
        with torch.no_grad():
            made = model(ids.flatten().cuda(), packed_positions(cu), packed_attend(cu))
            logprobs = token_logprobs(made.hidden, model.lm_head.weight, ids.flatten().roll(-1).cuda())[0]
        logprobs, routes = logprobs.cpu().view(ids.shape), made.routes.cpu().unflatten(0, ids.shape)
        for i in range(at_once):
            sampled = np.arange(tokens) >= 65
            lp = np.where(sampled, np.append(0., logprobs[i,:-1].numpy()), 0.).astype(np.float32)
            out.append(Rollout(token_ids=ids[i].numpy(), loss_mask=sampled, logprobs=lp,
                versions=np.where(sampled, 0, -1), group=(first+i)//8, index=(first+i)%8, env="made up",
                routes=narrow_routes(routes[i,:-1].numpy(), model.spec.num_experts), reward=float(i % 2),
                stop_reason="length"))
    return out


WAYS = dict(float32=("float32", "plain", "auto"), bf16=("bf16", "plain", "grouped"),
    gpu_bf16=("bf16", "plain", "gpu"), fused_bf16=("bf16", "plain", "fused"), pieces_bf16=("bf16", "fused", "fused"),
    fp8=("fp8", "plain", "auto"),
    pieces_fp8=("fp8", "fused", "auto"))


def train(repeats=5):
    "Trained tokens a second of whole RL steps, Muon and AdamW included, and the first step's numbers of each way."
    from moe_rl.config import BalanceSection, OptimSection, RLSection
    from moe_rl.data.batch import micro_batches
    from moe_rl.records import Sampling
    from moe_rl.rl.trainer import Trainer
    from moe_rl.train.precision import working
    base = model_of(torch.float32)
    texts = rollouts(base)
    batches = micro_batches(texts, [2*r.reward-1 for r in texts], BUDGET)
    start = {n: t.clone() for n, t in base.state_dict().items()}
    base.requires_grad_(True)
    out = {}
    for name, (precision, forward, experts) in WAYS.items():
        try:
            base.load_state_dict(start)
            trainer = Trainer(base, RLSection(tokens_per_batch=BUDGET), OptimSection(muon_lr=1e-6, adamw_lr=1e-6),
                BalanceSection(), Sampling(), work=working(base, precision, forward, experts))
            first = trainer.step(batches)
            trainer.step(batches)
            torch.cuda.synchronize()
            torch.cuda.reset_peak_memory_stats()
            began = time.perf_counter()
            for _ in range(repeats): row = trainer.step(batches)
            torch.cuda.synchronize()
            seconds = (time.perf_counter()-began)/repeats
        except Exception as e:
            import traceback
            traceback.print_exc()
            print(f"train {name}: {type(e).__name__}: {str(e)[:300]}", flush=True)
            continue
        rate = first["tokens"]/seconds
        gib = torch.cuda.max_memory_allocated()/2**30
        print(f"train {name}: {rate:.0f} tokens/s, {seconds*1e3:.0f} ms a step, {gib:.1f} GiB; first step: loss "
              f"{first['loss']:.5f}, gradient {first['grad_norm']:.4f}, mismatch KL {first['mismatch_kl']:.2e}, routes "
              f"that the router would not choose {first.get('route_disagreement', 0):.4f}, outcome idle {row['idle']}",
              flush=True)
        out[name] = dict(tokens_per_s=rate, ms=seconds*1e3, gib=gib, loss=first["loss"], grad_norm=first["grad_norm"],
            mismatch_kl=first["mismatch_kl"])
        del trainer
    return out


STEPS, WARM, GROUPS, GROUP = 45, 150, 32, 8
SEEDS, PRECISIONS = 3, ("float32", "bf16", "fp8")


def problem(tok, rng):
    "A word of three to six letters, and the word backward."
    word = "".join(rng.choice(list("abcdefghij"), rng.integers(3, 7)))
    return [*tok.encode(word), *tok.encode("=")], [*tok.encode(word[::-1]), tok.eos_id]


def play(engine, tok, rng, step, seed):
    "One step's rollouts, and their rewards [groups, answers]."
    from moe_rl.records import Request, Rollout
    asked, done = {}, {}
    for g in range(GROUPS):
        prompt, answer = problem(tok, rng)
        for j in range(GROUP):
            id, noise = f"{step}-{g}-{j}", hash((seed, step, g, j)) & (2**62-1)
            asked[id] = g, j, prompt, answer
            engine.add(Request(id=id, prompt=prompt, max_tokens=10, seed=noise, stop_ids=(tok.eos_id,)))
    while engine.has_work: done |= {f.id: f for f in engine.step()}
    rollouts, rewards = [], np.zeros((GROUPS, GROUP))
    for id, (g, j, prompt, answer) in asked.items():
        f, n, m = done[id], len(prompt), len(done[id].token_ids)
        rewards[g,j] = float(list(f.token_ids) == answer)
        rollouts.append(Rollout(token_ids=prompt+list(f.token_ids), loss_mask=[False]*n+[True]*m,
            logprobs=np.concatenate([np.zeros(n, np.float32), f.logprobs]), routes=f.routes, reward=rewards[g,j],
            versions=np.concatenate([np.full(n, -1), np.full(m, step)]), group=g, index=j, env="reverse",
            stop_reason=f.stop_reason))
    return rollouts, rewards


def learn(precision, seed):
    "Warm start and RL of a model of width 256, trainer and engine in turns: share of exact answers by step."
    import copy
    from moe_rl.config import BalanceSection, OptimSection, RLSection
    from moe_rl.data.batch import micro_batches
    from moe_rl.data.tokens import byte_tokenizer
    from moe_rl.gpu.decode import GraphStep
    from moe_rl.moe.families import new_afmoe
    from moe_rl.moe.model import Model, init_weights, lower_precision
    from moe_rl.records import Sampling
    from moe_rl.rl.trainer import Trainer
    from moe_rl.rollout.engine import Engine
    from moe_rl.train.optim import build_optimizer
    from moe_rl.train.precision import working
    from moe_rl.train.sft import example, run_sft
    rng, tok, began = np.random.default_rng(seed), byte_tokenizer(), time.perf_counter()
    spec = new_afmoe(vocab_size=tok.vocab_size, hidden_size=256, intermediate_size=512, moe_intermediate_size=128,
        num_hidden_layers=4, num_dense_layers=1, num_attention_heads=4, num_key_value_heads=2, head_dim=64,
        num_experts=8, num_experts_per_tok=2, num_shared_experts=1, sliding_window=64, max_position_embeddings=512)
    model = init_weights(Model(spec), seed).cuda()
    work = working(model, precision, "auto", "auto")
    rows = [example(*problem(tok, rng), i) for i in range(4096)]
    run_sft(model, build_optimizer(model, .015, .004), rows, batch=256, budget=8192, steps=WARM, seed=seed, work=work)
    trainer = Trainer(model, RLSection(tokens_per_batch=8192, groups_per_step=GROUPS), OptimSection(muon_lr=.002,
        adamw_lr=.001), BalanceSection(), Sampling(), work=work)
    twin = lower_precision(copy.deepcopy(model).requires_grad_(False), torch.bfloat16)
    engine = Engine(twin, kv_tokens=GROUPS*GROUP*48, max_seqs=GROUPS*GROUP, compute=GraphStep())
    curve, kl = [], []
    for step in range(STEPS):
        rollouts, rewards = play(engine, tok, rng, step, seed)
        advantages = (rewards-rewards.mean(1, keepdims=True))/(rewards.std(1, keepdims=True)+1e-4)
        row = trainer.step(micro_batches(rollouts, list(advantages.ravel()), 8192))
        curve.append(float(rewards.mean()))
        kl.append(row["mismatch_kl"])
        with torch.no_grad():
            for a, b in zip(twin.state_dict().values(), model.state_dict().values()): a.copy_(b)
        engine.scheduler.new_version(step+1, False)
        engine.version = step+1
    print(f"{precision}, seed {seed}: exact {np.mean(curve[:5]):.3f} -> {np.mean(curve[-5:]):.3f}, mismatch KL "
          f"{np.mean(kl):.2e}, {time.perf_counter()-began:.1f} s", flush=True)
    return curve


def curves():
    "Curves of each precision and seed; an environment, a wire and files that nobody compares are left out."
    return {f"{p}-{seed}": learn(p, seed) for seed in range(SEEDS) for p in PRECISIONS}


def spread_of(curves):
    "Means of the last five steps: of each precision, the widest range of seeds, the largest distance from float32's."
    ends = {}
    for name, curve in curves.items(): ends.setdefault(name.split("-")[0], []).append(float(np.mean(curve[-5:])))
    means = {p: float(np.mean(x)) for p, x in ends.items()}
    spread = max(max(x)-min(x) for x in ends.values())
    apart = max(abs(m-means["float32"]) for m in means.values()) if "float32" in means else float("nan")
    return {f"exact_{p}": m for p, m in means.items()} | dict(seed_spread=spread, apart=apart,
        seeds=min(map(len, ends.values())))


def figures(r):
    f = {}
    if "check" in r: f |= r["check"]
    if "engine" in r:
        e = r["engine"]
        f |= dict(engine_tokens_per_s=e["bfloat16_full"], engine_waiting_tokens_per_s=e["bfloat16_waiting"],
            engine_float32_tokens_per_s=e["float32_full"], engine_plain_tokens_per_s=e["bfloat16_plain"],
            engine_step_ms=e["bfloat16_full_step_ms"])
    if r.get("curves"): f |= spread_of(r["curves"])
    if "train" in r:
        rate = {n: w["tokens_per_s"] for n, w in r["train"].items()}
        f |= {f"tokens_per_s_{n}": v for n, v in rate.items()}
        ways = dict(ratio_fused="pieces_bf16", ratio_plain_fused="fused_bf16", ratio_fp8="pieces_fp8")
        for name, way in ways.items():
            if way in rate and "float32" in rate: f[name] = rate[way]/rate["float32"]
    return f


def measure(args):
    if not torch.cuda.is_available(): raise NeedsHardware("a GPU")
    if bad := set(args) - set(PARTS):
        raise SystemExit(f"bench gpu_road: no part {', '.join(bad)}; there are {', '.join(PARTS)}")
    results = {}
    with tempfile.TemporaryDirectory() as folder:
        for part in args or PARTS:
            out, began = Path(folder)/f"{part}.json", time.time()
            code = subprocess.run([sys.executable, __file__, part, str(out)]).returncode
            if code: print(f"part {part} ended with code {code} after {time.time()-began:.0f} s", flush=True)
            else: results[part] = json.loads(out.read_text())
    return dict(figures=figures(results), parts=results)


if __name__ == "__main__": Path(sys.argv[2]).write_text(json.dumps(globals()[sys.argv[1]]()))
