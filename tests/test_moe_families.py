"""Families of models: each against transformers, with the slips of the pen that give a model that runs and is wrong
put in and caught; hostile config.json files."""
import importlib.util, inspect, json, random, sys, textwrap
from pathlib import Path

import pytest, torch
from hypothesis import given, settings, strategies as st
from safetensors.torch import load_file, save_file

from moe_rl.moe import attention, families, mla, model as model_module
from moe_rl.moe.checkpoint import CheckpointError, load_pretrained
from moe_rl.moe.families import ARCHITECTURES, from_hf
from moe_rl.moe.model import Model, init_weights
from moe_rl.moe.zoo import PRESETS

BENCH = Path(__file__).parents[1]/"benchmarks"


@pytest.fixture(scope="module")
def bench():
    import transformers
    transformers.logging.set_verbosity_error(), transformers.logging.disable_progress_bar()
    sys.path.insert(0, str(BENCH))
    try:
        spec = importlib.util.spec_from_file_location("bench_families", BENCH/"families.py")
        module = importlib.util.module_from_spec(spec)
        spec.loader.exec_module(module)
    finally: sys.path.remove(str(BENCH))
    return module


@pytest.mark.parametrize("family", ["afmoe", "mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3", "llama"])
def test_a_family_is_transformers_and_decodes_from_its_cache(bench, tmp_path, family):
    row = bench.one(family, 100, tmp_path)
    assert row["bytes_equal"] and row["params_equal"]
    assert row["logprob"] < 1e-5 and row["decode"] < 1e-5 and row["gradient"] < 1e-4


SMALL = dict(vocab_size=64, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=4, max_position_embeddings=256, rms_norm_eps=1e-5, num_experts_per_tok=2,
    moe_intermediate_size=16, pad_token_id=None)
ROPE = dict(rope_parameters=dict(rope_type="default", rope_theta=1e4))
YARN = dict(rope_parameters=dict(rope_type="yarn", rope_theta=1e4, factor=8., original_max_position_embeddings=16,
    mscale=0.7, mscale_all_dim=1.2))
LATENT = dict(n_routed_experts=8, n_group=4, topk_group=2, q_lora_rank=16, kv_lora_rank=16, qk_rope_head_dim=8,
    qk_nope_head_dim=12, v_head_dim=10, first_k_dense_replace=1, routed_scaling_factor=2.5)
GLM = dict(n_routed_experts=8, head_dim=16, attention_bias=True, use_qk_norm=True, routed_scaling_factor=2.5)


def apart(bench, folder:Path, family:str, config:dict) -> float:
    "Largest difference of a logprob between transformers' model and ours of the same folder."
    gen = torch.Generator().manual_seed(0)
    theirs = bench.their_model(family, config, gen)
    theirs.save_pretrained(folder)
    docs, cu = bench.draw_documents(random.Random(0), gen, 64, 12)
    ours = load_pretrained(folder)
    with torch.no_grad():
        want = torch.cat([theirs(d[None]).logits[0] for d in docs])
        got = ours.logits(ours(torch.cat(docs), attention.packed_positions(cu), attention.packed_attend(cu)).hidden)
    return (want.log_softmax(-1)-got.log_softmax(-1)).abs().max().item()


@pytest.mark.parametrize("family, own, owner, name, old, new", [
    # neighbours taken for halves
    ("deepseek_v3", LATENT | ROPE, mla.LatentAttention, "turn", "apart(x) if self.interleaved else x", "x"),
    ("deepseek_v3", LATENT | ROPE | dict(rms_norm_eps=0.1), mla.LatentAttention, "__init__", "RMSNorm(kv_rank, 1e-6)",
        "RMSNorm(kv_rank, 0.1)"), # the model's eps in an inner norm
    # groups forgotten
    ("deepseek_v3", LATENT | ROPE, model_module.MoE, "route", "m.n_group, m.topk_group", "1, 1"),
    # wavelengths not stretched
    ("deepseek_v3", LATENT | YARN, attention, "stretch", "return freq/yarn.factor*slow + freq*(1-slow)", "return freq"),
    # the scores' own scale forgotten
    ("deepseek_v3", LATENT | YARN, mla, "_attend", "m.scale*q.shape[-1]**0.5", "1"),
    # all of a head turns
    ("glm4_moe", GLM | ROPE, families, "read_gqa", "int(head_dim*rotated)", "head_dim"),
    # gates not scaled
    ("glm4_moe", GLM | ROPE, model_module.MoE, "route", "m.scale, replay", "1., replay"),
    ("qwen3_moe", ROPE | dict(num_experts=4, head_dim=16, norm_topk_prob=False), families, "qwen3_moe",
        'f.flag("norm_topk_prob", False)', "True"), # gates normed
    ("mixtral", ROPE | dict(num_local_experts=4, sliding_window=5), families, "mixtral",
        'f.count("sliding_window", None)', "None")]) # the window forgotten
def test_a_slip_of_the_pen_shows(bench, tmp_path, monkeypatch, family, own, owner, name, old, new):
    config = SMALL | own
    if family == "mixtral": del config["moe_intermediate_size"]
    assert apart(bench, tmp_path/"right", family, config) < 1e-5
    source = textwrap.dedent(inspect.getsource(getattr(owner, name)))
    assert old in source, f"{name} has no {old!r}: adapt the mutant"
    space = dict(getattr(owner, name).__globals__)
    exec(source.replace(old, new).replace("super()", "super(LatentAttention, self)"), space)
    # a method may call a function of its own name
    slip, space[name] = space[name], getattr(owner, name).__globals__.get(name)
    monkeypatch.setattr(owner, name, slip)
    for table in (ARCHITECTURES,):
        for key, fn in list(table.items()):
            if fn.__name__ == name: monkeypatch.setitem(table, key, slip)
    assert apart(bench, tmp_path/"wrong", family, config) > 1e-4


def test_layers_that_predict_several_tokens_are_left_unread(bench, tmp_path):
    theirs = bench.their_model("deepseek_v3", SMALL | LATENT | ROPE, torch.Generator().manual_seed(0))
    theirs.save_pretrained(tmp_path)
    tensors, config = load_file(tmp_path/"model.safetensors"), json.loads((tmp_path/"config.json").read_text())
    assert config["num_nextn_predict_layers"] == 1
    save_file(tensors | {"model.layers.2.eh_proj.weight": torch.zeros(2, 2)}, tmp_path/"model.safetensors")
    load_pretrained(tmp_path)
    save_file(tensors | {"model.layers.3.eh_proj.weight": torch.zeros(2, 2)}, tmp_path/"model.safetensors")
    with pytest.raises(CheckpointError, match="has an unknown tensor model.layers.3.eh_proj.weight"):
        load_pretrained(tmp_path)


@pytest.mark.parametrize("family", ["mixtral", "qwen3_moe", "glm4_moe", "deepseek_v3"])
def test_a_family_learns(family):
    from moe_rl.train.optim import build_optimizer
    from moe_rl.train.sft import example, run_sft
    own = dict(mixtral=dict(num_local_experts=4), qwen3_moe=dict(num_experts=4), glm4_moe=GLM,
        deepseek_v3=LATENT)[family]
    model = init_weights(Model(from_hf(SMALL | ROPE | own | dict(model_type=family))), 0)
    report = run_sft(model, build_optimizer(model, muon_lr=0.02, adamw_lr=0.01),
        [example([1, 2], [3, 4, 5, i % 3], i) for i in range(12)], batch=12, budget=512, steps=12)
    assert report.steps[-1].loss < 0.6*report.steps[0].loss


junk = st.one_of(st.none(), st.booleans(), st.integers(-2**70, 2**70), st.floats(), st.text(max_size=8),
    st.lists(st.integers(-3, 3), max_size=3), st.dictionaries(st.text(max_size=3), st.integers(), max_size=2))


@given(name=st.sampled_from(sorted(PRESETS)), data=st.data())
@settings(max_examples=200, deadline=None)
def test_any_config_is_a_model_or_one_line(name, data):
    config = dict(PRESETS[name])
    for key in data.draw(st.lists(st.sampled_from(sorted(config)), min_size=1, max_size=2)):
        config[key] = data.draw(junk)
    try: from_hf(config)
    except ValueError as e: assert "\n" not in str(e) and len(str(e)) < 400
