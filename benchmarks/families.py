"""Six families of models against transformers: logprobs, gradients, files byte for byte, decoding from the cache,
and parameters. Configurations are drawn at random, quirks included."""
import argparse, copy, random, shutil, tempfile
from pathlib import Path

import torch
from parity import difference, draw_documents, forward_of_one, serve, stir
from safetensors import safe_open
from torch import Tensor

from moe_rl.moe.attention import packed_attend, packed_positions
from moe_rl.moe.checkpoint import load_pretrained, save_pretrained
from moe_rl.moe.model import Model
from moe_rl.moe.spec import count_parameters, kv_bytes
from moe_rl.moe.zoo import PRESETS, preset
from moe_rl.rollout.engine import Engine, Request


def draw_common(rng:random.Random) -> dict:
    kv = rng.choice([1, 2, 3])
    return dict(vocab_size=rng.randint(60, 200), hidden_size=rng.choice([24, 32, 48, 64]),
                intermediate_size=rng.choice([40, 64, 96]), num_hidden_layers=rng.randint(2, 5),
                num_attention_heads=kv*rng.choice([1, 2, 4]), num_key_value_heads=kv, head_dim=rng.choice([8, 16, 24]),
                max_position_embeddings=256,
                rms_norm_eps=rng.choice([1e-4, 1e-5, 1e-6]), rope_parameters=dict(rope_type="default",
                    rope_theta=rng.choice([1e4, 5e5])), pad_token_id=None)


def draw_experts(rng:random.Random, name:str, groups:bool=False) -> dict:
    experts = rng.choice([4, 8, 12]) if groups else rng.randint(4, 16)
    return {name: experts, "num_experts_per_tok": rng.randint(1, min(6, experts//2)),
        "moe_intermediate_size": rng.choice([8, 16, 24])}


def draw_yarn(rng:random.Random) -> dict:
    "Stretched positions; the texts are longer than the pretended pretraining."
    own = dict(rope_type="yarn", rope_theta=1e4, factor=rng.choice([2., 8.]), original_max_position_embeddings=16,
        beta_fast=32, beta_slow=1)
    return dict(rope_parameters=own | rng.choice([{}, dict(mscale=1., mscale_all_dim=1.),
        dict(mscale=0.7, mscale_all_dim=1.2), dict(attention_factor=1.1)]))


def draw_afmoe(rng:random.Random) -> dict:
    c = draw_common(rng)
    kinds = rng.choice([None, rng.choices(["full_attention", "sliding_attention"], k=c["num_hidden_layers"])])
    return c | draw_experts(rng, "num_experts") | dict(num_dense_layers=rng.randint(0, c["num_hidden_layers"]-1),
        num_shared_experts=rng.randint(1, 2), route_scale=rng.choice([1., 2.448]),
        global_attn_every_n_layers=rng.choice([2, 3, 4]), layer_types=kinds, sliding_window=rng.randint(2, 12),
        mup_enabled=rng.random() < 0.75)


def draw_mixtral(rng:random.Random) -> dict:
    own = {k: v for k, v in draw_experts(rng, "num_local_experts").items() if k != "moe_intermediate_size"}
    return draw_common(rng) | own | dict(sliding_window=rng.choice([None, 5, 12]), head_dim=rng.choice([None, 16]),
        hidden_size=48)


def draw_qwen3_moe(rng:random.Random) -> dict:
    c = draw_common(rng)
    layers = dict(mlp_only_layers=rng.sample(range(c["num_hidden_layers"]),
        rng.randint(0, 1))) if rng.random() < 0.7 else dict(decoder_sparse_step=2)
    return c | draw_experts(rng, "num_experts") | layers | dict(norm_topk_prob=rng.random() < 0.7,
        attention_bias=rng.random() < 0.4, use_sliding_window=rng.random() < 0.3,
        sliding_window=7) | (draw_yarn(rng) if rng.random() < 0.3 else {})


def draw_sigmoid(rng:random.Random, layers:int) -> dict:
    own = draw_experts(rng, "n_routed_experts", groups=True)
    # transformers sums the two best of a group
    n_group = rng.choice([n for n in (1, 2, 4) if own["n_routed_experts"] >= 2*n])
    open_groups = rng.randint(1, n_group)
    while open_groups*(own["n_routed_experts"]//n_group) < own["num_experts_per_tok"]: open_groups += 1
    return own | dict(n_group=n_group, topk_group=open_groups, n_shared_experts=rng.randint(1, 2),
                      routed_scaling_factor=rng.choice([1., 2.5]), norm_topk_prob=rng.random() < 0.8,
                      first_k_dense_replace=rng.randint(0, layers-1))


def draw_glm4_moe(rng:random.Random) -> dict:
    c = draw_common(rng)
    part = rng.choice([0.5, 0.25, 1.]) if c["head_dim"] == 16 else 0.5
    return c | draw_sigmoid(rng, c["num_hidden_layers"]) | dict(use_qk_norm=rng.random() < 0.5,
        attention_bias=rng.random() < 0.5, head_dim=16 if part == 0.25 else c["head_dim"],
        rope_parameters=c["rope_parameters"] | dict(partial_rotary_factor=part))


def draw_deepseek_v3(rng:random.Random) -> dict:
    c = draw_common(rng)
    del c["head_dim"]
    return c | draw_sigmoid(rng, c["num_hidden_layers"]) | dict(num_key_value_heads=c["num_attention_heads"],
        q_lora_rank=rng.choice([None, 16, 24]), kv_lora_rank=rng.choice([8, 16, 32]),
        qk_rope_head_dim=rng.choice([4, 8]),
        qk_nope_head_dim=rng.choice([8, 12]), v_head_dim=rng.choice([6, 8, 16]), rope_interleave=rng.random() < 0.7,
        attention_bias=rng.random() < 0.3) | (draw_yarn(rng) if rng.random() < 0.5 else {})


def draw_llama(rng:random.Random) -> dict:
    return draw_common(rng) | dict(hidden_size=48, tie_word_embeddings=rng.random() < 0.5,
        attention_bias=rng.random() < 0.3)


FAMILIES = dict(afmoe=draw_afmoe, mixtral=draw_mixtral, qwen3_moe=draw_qwen3_moe, glm4_moe=draw_glm4_moe,
    deepseek_v3=draw_deepseek_v3, llama=draw_llama)


def their_model(family:str, config:dict, gen:torch.Generator):
    "transformers' model of a drawn configuration, with weights and biases that all matter."
    import transformers
    given = {k: v for k, v in config.items() if v is not None or k in ("q_lora_rank", "sliding_window", "pad_token_id")}
    m = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(family, **given)).eval()
    tensors = dict(m.named_parameters()) | {n: b for n, b in m.named_buffers() if "correction_bias" in n}
    for n, t in sorted(tensors.items()):
        if t.ndim > 1: t.data = torch.randn(t.shape, generator=gen)*0.5/config["hidden_size"]**0.5
        elif "norm" not in n: t.data = torch.randn(t.shape, generator=gen)*0.2
    stir({n: t.data for n, t in tensors.items()}, gen)
    return m


def tensors_of(folder:Path) -> dict[str, Tensor]:
    out = {}
    for f in sorted(folder.glob("*.safetensors")):
        with safe_open(f, "pt") as handle: out |= {k: handle.get_tensor(k) for k in handle.keys()}
    return out


def same_bytes(a:Path, b:Path) -> bool:
    "Do two checkpoints hold the same tensors, to the last byte?"
    one, two = tensors_of(a), tensors_of(b)
    return one.keys() == two.keys() and all(t.dtype == two[n].dtype
        and torch.equal(t.view(torch.uint8), two[n].view(torch.uint8)) for n, t in one.items())


def same_config(a:Path, b:Path) -> bool:
    "Does transformers read the same configuration from both? The layers that predict several tokens are in neither."
    import transformers
    one, two = (transformers.AutoConfig.from_pretrained(f).to_dict() for f in (a, b))
    return all(one[k] == two[k] for k in one if k not in ("num_nextn_predict_layers", "num_mtp_layers",
        "transformers_version", "_name_or_path"))


def gradients(theirs, ours:Model, docs:list[Tensor], cu:Tensor, gen:torch.Generator, home:Path) -> tuple[float, float]:
    """Largest difference of a logprob, and of a gradient relative to the largest of its tensor; theirs are named by way
    of a checkpoint.

    A gradient under a thousandth of the model's largest counts as that: with one expert per token and normed gates, a
    router's is 0 but for rounding."""
    flat = torch.cat(docs)
    g = torch.randn(len(flat), ours.spec.vocab_size, generator=gen)
    want = torch.cat([theirs(d[None]).logits[0] for d in docs]).log_softmax(-1)
    got = ours.logits(ours(flat, packed_positions(cu), packed_attend(cu)).hidden).log_softmax(-1)
    (want*g).sum().backward(), (got*g).sum().backward()
    for p in theirs.parameters(): p.data = torch.zeros_like(p) if p.grad is None else p.grad # a balancing bias has none
    theirs.save_pretrained(home)
    named = load_pretrained(home).state_dict()
    least = 1e-3*max(t.abs().max() for t in named.values())
    off = [((p.grad-named[n]).abs().max()/named[n].abs().max().clamp(min=least)).item()
        for n, p in ours.named_parameters()]
    return (want-got).abs().max().item(), max(off)


def decoding(model:Model, rng:random.Random, gen:torch.Generator) -> float:
    "The engine against one forward pass: pages shared, requests pushed out and taken in again."
    model.requires_grad_(False)
    prompts = [torch.randint(0, model.spec.vocab_size, (rng.randint(1, 30),), generator=gen).tolist() for _ in range(3)]
    requests = [Request(id=f"{i}-{j}", prompt=p, max_tokens=rng.randint(6, 16), seed=10*i+j,
        temperature=rng.choice([1., 0.7])) for i, p in enumerate(prompts) for j in range(3)]
    engine = Engine(copy.deepcopy(model), kv_tokens=112, block_size=rng.choice([1, 4, 16]), max_seqs=8,
        max_step_tokens=24)
    if (have := engine.cache.kv[:,0].nbytes) != kv_bytes(model.spec, 1, 4):
        raise AssertionError(f"a token takes {have} bytes of the cache, the record says {kv_bytes(model.spec, 1, 4)}")
    done, worst = serve(engine, requests), 0.
    for r in requests:
        f = done[r.id]
        logits, routes = forward_of_one(model, torch.tensor(r.prompt+f.token_ids)[:-1])
        every = [True]*len(f.token_ids)
        worst = max(worst, difference(r, f, logits, routes, every, [True]*len(f.routes))[0])
    return worst


def one(family:str, seed:int, home:Path) -> dict:
    "One drawn configuration of a family."
    rng, gen = random.Random(f"{family}{seed}"), torch.Generator().manual_seed(seed)
    config = FAMILIES[family](rng)
    theirs = their_model(family, config, gen)
    theirs.save_pretrained(home/"theirs", max_shard_size=rng.choice(["20KB", "1GB"]))
    ours = load_pretrained(home/"theirs")
    save_pretrained(ours, home/"ours", shard_bytes=rng.choice([1 << 14, 1 << 30]))
    row = dict(bytes_equal=same_bytes(home/"theirs", home/"ours") and same_config(home/"theirs", home/"ours"),
               params_equal=count_parameters(ours.spec)[0] == sum(p.numel() for p in theirs.parameters()))
    docs, cu = draw_documents(rng, gen, ours.spec.vocab_size, 12)
    row["logprob"], row["gradient"] = gradients(theirs, ours, docs, cu, gen, home/"gradients")
    return row | dict(decode=decoding(ours, rng, gen))


def published() -> bool:
    "Are the zoo's counts those of transformers' classes?"
    import transformers
    good = True
    for name, config in PRESETS.items():
        spec, kind = preset(name), {"kimi_k2": "deepseek_v3"}.get(config["model_type"], config["model_type"])
        with torch.device("meta"):
            m = transformers.AutoModelForCausalLM.from_config(transformers.AutoConfig.for_model(kind,
                **{k: v for k, v in config.items() if k != "model_type"}))
        total = sum(p.numel() for p in m.parameters())
        unchosen = sum(p.numel() for n, p in m.named_parameters()
            if ".experts." in n)*(spec.num_experts-spec.num_experts_per_tok)//spec.num_experts
        good &= (same := count_parameters(spec) == (total, total-unchosen))
        print(f"  {name:<18}{total:>20,}{total-unchosen:>18,}  {'equal' if same else 'NOT EQUAL'}", flush=True)
    return good


def measure(args:list[str]) -> dict:
    import transformers
    parser = argparse.ArgumentParser(prog="moe-rl bench families")
    parser.add_argument("--configs", type=int, default=12, help="drawn configurations of each family")
    parser.add_argument("--seed", type=int, default=0, help="of the first configuration")
    parser.add_argument("--family", choices=FAMILIES, action="append", help="only this one; may be given again")
    a = parser.parse_args(args)
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    rows, names = [], a.family or list(FAMILIES)
    print(f"{a.configs} configurations each{'logprob':>14}{'gradient':>12}{'decode':>12}  files  parameters")
    for family in names:
        mine = []
        for seed in range(a.seed, a.seed+a.configs):
            home = Path(tempfile.mkdtemp(prefix="families-"))
            try: mine.append(one(family, seed, home))
            finally: shutil.rmtree(home)
        worst = {k: max(r[k] for r in mine) for k in ("logprob", "gradient", "decode")}
        print(f"  {family:<21}{worst['logprob']:>14.1e}{worst['gradient']:>12.1e}{worst['decode']:>12.1e}  "
              f"{'same' if all(r['bytes_equal'] for r in mine) else 'DIFFER':<6} {all(r['params_equal'] for r in mine)}", flush=True)
        rows += mine
    print("published models, parameters in all and for one token, against transformers'")
    counted = published()
    worst = lambda key: max(r[key] for r in rows)
    return {"figures": {"worst_logprob": worst("logprob"), "worst_gradient": worst("gradient"),
                        "worst_decode": worst("decode"), "configs": len(rows), "families": len(names),
                        "bytes_equal": all(r["bytes_equal"] for r in rows),
                        "params_equal": counted and all(r["params_equal"] for r in rows)}}
