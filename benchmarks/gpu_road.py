"""What `moe-rl run` gains from one GPU: a decode step that is recorded, experts that are fused, 16 and 8 bits.

The model is an AFMoE whose widths FP8 takes: width 768, 12 layers, 32 experts of width 384, 4 a token, and a shared
one. Parts, each in a process of its own:

    check    the recorded decode step against the plain one on this GPU, in float32 and in bf16
    engine   256 sequences at a time: tokens a second by the recorded step and by the plain one
    train    steps of RL on 64 rollouts of 513 tokens, routes replayed: float32 plain, 16 bits plain, with fused experts
             and with fused pieces, 8 bits
    curves   `moe-rl run` of the main job with a model of width 256 in float32, bf16 and fp8, three seeds each: held-out
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
BUDGET = 32768 # rows of a micro-batch: all of a step


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


def serve(engine, asked):
    "Finished requests by id, seconds, and the seconds of each step."
    for r in asked: engine.add(r)
    done, steps, began = {}, [], time.perf_counter()
    while engine.has_work:
        at = time.perf_counter()
        done |= {f.id: f for f in engine.step()}
        steps.append(time.perf_counter()-at)
    return done, time.perf_counter()-began, steps


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


JOB = {"model.hidden_size": 256, "model.intermediate_size": 512, "model.moe_intermediate_size": 128,
    "model.num_hidden_layers": 4, "model.head_dim": 64, "engine.dtype": "bfloat16", "rl.steps": 100, "rl.stop_at": 0,
    "warm_start.seconds": 60, "eval.every": 25, "eval.prompts": 256}
SEEDS, AT_ONCE, PATIENCE = 3, 5, 480


def curves(job=JOB):
    "Held-out share of exact answers by step, of each precision and seed."
    from concurrent.futures import ThreadPoolExecutor
    from _runs import Run, finish
    root, began = Path(__file__).resolve().parents[1], time.monotonic()
    with tempfile.TemporaryDirectory() as home, ThreadPoolExecutor(AT_ONCE) as pool:
        def one(precision, seed):
            folder = Path(home)/f"{precision}-{seed}"
            words = dict(job) | {"seed": seed, "train.precision": precision, "dir": str(folder)}
            args = [w for k, v in words.items() for w in (f"--{k}", str(v))]
            left = PATIENCE-(time.monotonic()-began)
            if left < 60: raise RuntimeError(f"{folder.name} was not begun: no time left")
            run = finish(Run(folder, "--config", str(root/"configs"/"main_job.toml"), *args), left)
            m = run.metrics
            print(f"{folder.name}: mismatch KL {np.mean([x['mismatch_kl'] for x in m]):.2e}, "
                  f"{np.median([x['train_seconds'] for x in m]):.3f} s a step", flush=True)
            return [round(e["exact"], 4) for e in run.evals]
        jobs = {(p, s): pool.submit(one, p, s) for s in range(SEEDS) for p in ("float32", "bf16", "fp8")}
        out = {}
        for (p, s), future in jobs.items():
            try: out[f"{p}-{s}"] = future.result()
            except Exception as e: print(f"curves {p}-{s}: {str(e)[-700:]}", flush=True)
    return out


def spread_of(curves):
    "Last evaluations: the mean of each precision, the widest range of seeds, the largest distance from float32's mean."
    ends = {}
    for name, curve in curves.items(): ends.setdefault(name.split("-")[0], []).append(curve[-1])
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
