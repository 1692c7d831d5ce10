"""Exact mode: engine and trainer agree to the last bit, whatever family, batch, chunk, cache, preemption or update; and
the ordinary way does not, in the same test."""
import numpy as np, pytest, torch
from hypothesis import given, settings, strategies as st

from moe_rl.config import BalanceSection, OptimSection, RLSection
from moe_rl.data.batch import micro_batches
from moe_rl.moe.attention import packed_attend, packed_positions
from moe_rl.moe.families import from_hf, new_afmoe
from moe_rl.moe.model import Model, init_weights, moe_modules
from moe_rl.records import Request, Rollout, Sampling
from moe_rl.rl.trainer import Trainer
from moe_rl.rollout.engine import Engine, plain_step
from moe_rl.rollout.exact import ExactForward, ExactStep, mismatches
from moe_rl.train.precision import Working, logprobs_of, working

SMALL = dict(vocab_size=40, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, max_position_embeddings=128, rms_norm_eps=1e-5)
MOE = SMALL | dict(num_experts_per_tok=2, moe_intermediate_size=24, n_routed_experts=8, first_k_dense_replace=1,
    routed_scaling_factor=2.5)
LATENT = MOE | dict(model_type="deepseek_v3", num_key_value_heads=4, n_group=4, topk_group=2, q_lora_rank=16,
    kv_lora_rank=16, qk_rope_head_dim=8, qk_nope_head_dim=12, v_head_dim=10, rope_theta=1e4,
    rope_scaling=dict(type="yarn", factor=8., original_max_position_embeddings=16, mscale=.7, mscale_all_dim=1.2,
        beta_fast=32, beta_slow=1))
SPECS = dict(
    afmoe=new_afmoe(**SMALL, moe_intermediate_size=24, num_dense_layers=1, head_dim=10, num_experts=8,
        num_experts_per_tok=2, global_attn_every_n_layers=2, sliding_window=6),
    qwen3=from_hf(SMALL | dict(model_type="qwen3_moe", head_dim=10, num_experts=8, num_experts_per_tok=3,
        moe_intermediate_size=24, norm_topk_prob=True, rope_theta=1e4)),
    mixtral=from_hf(SMALL | dict(model_type="mixtral", num_local_experts=4, num_experts_per_tok=2, rope_theta=1e4)),
    glm=from_hf(MOE | dict(model_type="glm4_moe", head_dim=16, attention_bias=True, use_qk_norm=True, rope_theta=1e4)),
    latent=from_hf(LATENT),
    tied=from_hf(SMALL | dict(model_type="llama", tie_word_embeddings=True, rope_theta=1e4)))


@torch.no_grad()
def model_of(name:str, version:int=0)->Model:
    gen = torch.Generator().manual_seed(version)
    model = init_weights(Model(SPECS[name]).requires_grad_(False), version)
    for p in model.parameters():
        p.copy_(torch.randn(p.shape, generator=gen)*.25 if p.ndim > 1 else 1+.1*torch.randn(p.shape, generator=gen))
    for m in moe_modules(model):
        if m.expert_bias is not None: m.expert_bias.copy_(torch.randn(m.expert_bias.shape, generator=gen)*.05)
    return model


def life(name, dtype, compute, seed, *, kv=96, chunk=24, seats=9, updates=2, threads=1):
    "Requests come, versions come in flight, some are aborted, the cache is tight; what was answered."
    rng, short = np.random.default_rng(seed), None if dtype == torch.float32 else dtype
    engine = Engine(model_of(name), kv_tokens=kv, block_size=8, max_seqs=seats, max_step_tokens=max(chunk, seats+1),
        compute=compute, kv_update="recompute", dtype=short)
    common, asked, out = rng.integers(0, 40, 20).tolist(), {}, []
    torch.set_num_threads(threads)
    try:
        for step in range(400):
            if step < 16 and step % 2 == 0:
                prompt = common[:int(rng.integers(1, 20))] + rng.integers(0, 40, int(rng.integers(1, 9))).tolist()
                r = Request(id=f"{step}", prompt=prompt, max_tokens=int(rng.integers(1, 24)), seed=step,
                    temperature=(1., .7, 0.)[step % 3], top_k=(0, 12)[step % 4 == 2], top_p=(1., .8)[step % 5 == 4])
                asked[r.id] = r
                engine.add(r)
            if step in (7, 13)[:updates]: engine.update_weights(engine.version+1,
                model_of(name, engine.version+1).state_dict())
            if step == 11 and (f := engine.abort("6")) and f.token_ids: out.append(f)
            out += engine.step()
            if step > 17 and not engine.has_work: break
    finally: torch.set_num_threads(1)
    return [(asked[f.id], f) for f in out], engine.stats()


def worst(name, dtype, played, forward)->float:
    "Largest difference of any token to its version's forward pass; text of one version replays its routes."
    found = 0.
    for version in range(3):
        work = forward(model_of(name, version), dtype)
        for alone in (True, False):
            part = [(r, f) for r, f in played if version in f.versions and (len(set(f.versions)) == 1) == alone]
            if not part: continue
            mine = torch.from_numpy(np.concatenate([f.versions for _, f in part]) == version)
            found = max(found, mismatches(work, part, replay=alone)[mine].max().item())
    return found


@pytest.mark.parametrize("name, dtype", [("afmoe", torch.float32), ("afmoe", torch.bfloat16), ("qwen3", torch.bfloat16),
    ("mixtral", torch.float32), ("glm", torch.bfloat16), ("latent", torch.bfloat16), ("tied", torch.bfloat16)])
def test_engine_and_trainer_agree_to_the_last_bit(name, dtype):
    played, stats = life(name, dtype, ExactStep(), 0)
    assert stats["prefix_hits"] and stats["preemptions"] and stats["recomputes"] and stats["aborted"]
    assert len({tuple(set(f.versions)) for _, f in played}) > 2        # some were written by two versions
    assert worst(name, dtype, played, ExactForward) == 0
    assert worst(name, dtype, life(name, dtype, plain_step, 0)[0], Working) > 0


@settings(max_examples=4)
@given(st.integers(0, 10**6), st.sampled_from(list(SPECS)), st.sampled_from([torch.float32, torch.bfloat16]),
    st.integers(72, 700), st.integers(8, 90), st.integers(2, 16), st.integers(0, 2), st.integers(1, 2))
def test_whatever_the_company(seed, name, dtype, kv, chunk, seats, updates, threads):
    played, _ = life(name, dtype, ExactStep(), seed, kv=kv, chunk=chunk, seats=seats, updates=updates, threads=threads)
    assert worst(name, dtype, played, ExactForward) == 0


def test_company_changes_no_token():
    "The same requests, alone and together: the same tokens, routes and log-probabilities."
    together, _ = life("afmoe", torch.bfloat16, ExactStep(), 3, updates=0)
    for r, f in together[:6]:
        if f.stop_reason == "aborted": continue
        engine = Engine(model_of("afmoe"), kv_tokens=512, compute=ExactStep(), dtype=torch.bfloat16)
        engine.add(r)
        while engine.has_work: done = engine.step()
        assert done[0].token_ids == f.token_ids and (done[0].logprobs == f.logprobs).all()
        assert (done[0].routes == f.routes).all()


@pytest.mark.parametrize("name", ["afmoe", "latent", "tied"])
def test_gradients_are_the_ordinary_ones(name):
    "Of every parameter, also where log-probabilities are made again in the backward pass, a chunk at a time."
    gen, cu = torch.Generator().manual_seed(0), torch.tensor([0, 11, 12, 30])
    ids, targets = torch.randint(0, 40, (2, 30), generator=gen)
    def grads(work):
        out = work(ids, packed_positions(cu), packed_attend(cu))
        logprobs, entropy, _ = logprobs_of(work)(out.hidden, work.lm_head.weight, targets, chunk=8)
        (logprobs.mean() + .1*entropy.mean()).backward()
        return {n: p.grad for n, p in model.named_parameters()}
    model = model_of(name).requires_grad_(True)
    want = {n: g if g is None else g.clone() for n, g in grads(model).items()}
    model.zero_grad()
    for n, g in grads(ExactForward(model)).items():
        assert (g is None) == (want[n] is None), n
        if g is not None: assert (g-want[n]).norm() <= 1e-4*want[n].norm() + 1e-9, n


@pytest.mark.parametrize("precision", ["float32", "bf16"])
def test_a_step_on_fresh_rollouts_has_no_mismatch(precision):
    "By the trainer's own metrics, with packing, fillers and replay: 0 in exact mode, and more than 0 without."
    def mismatch(compute, forward):
        short = None if precision == "float32" else torch.bfloat16
        engine, rollouts = Engine(model_of("afmoe"), kv_tokens=512, max_seqs=5, compute=compute, dtype=short), []
        for i in range(12):
            engine.add(Request(id=f"{i}", prompt=[3, 5+i % 3, 7], max_tokens=4+2*i, seed=i, temperature=.8))
        while engine.has_work:
            for f in engine.step():
                i, n = int(f.id), len(f.token_ids)
                rollouts.append(Rollout(token_ids=[3, 5+i % 3, 7, *f.token_ids], loss_mask=[False]*3 + [True]*n,
                    logprobs=[0.]*3 + list(f.logprobs), versions=[-1]*3 + [0]*n, routes=f.routes, reward=float(i % 2),
                    group=i//4, index=i % 4, env="e", stop_reason=f.stop_reason))
        model = model_of("afmoe").requires_grad_(True)
        trainer = Trainer(model, RLSection(tokens_per_batch=64), OptimSection(), BalanceSection(),
            Sampling(temperature=.8), work=working(model, precision, forward, "auto"))
        row = trainer.step(micro_batches(rollouts, [(-1.)**r.index for r in rollouts], 64, pad_multiple=16))
        assert row["route_disagreement"] == 0 or forward == "auto"
        return row["mismatch_kl"]
    assert mismatch(ExactStep(), "exact") == 0 < abs(mismatch(plain_step, "auto"))
