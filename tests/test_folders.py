"A folder that we write answers in transformers as it answers in our engine."
import json
import pytest
import torch
from moe_rl.config import Settings
from moe_rl.data.tokens import TextTokenizer, byte_tokenizer, says
from moe_rl.moe.checkpoint import load_pretrained, save_pretrained
from moe_rl.moe.families import from_hf, new_afmoe
from moe_rl.moe.model import Model, init_weights
from moe_rl.rl.ask import answers

CHATML = ("{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}{% if "
          "add_generation_prompt %}<|im_start|>assistant\n{% endif %}")
TALK = says("Be brief.", "system") + says("2+2") + says("4", "assistant") + says("3+3")


def chat_tokenizer():
    core = byte_tokenizer().core
    core.add_special_tokens(["<|im_start|>", "<|im_end|>"])
    return TextTokenizer(core, dict(tokenizer_class="PreTrainedTokenizerFast", eos_token="<|im_end|>",
        pad_token="<pad>"), CHATML)


def a_model(kind, size):
    if kind == "afmoe":
        spec = new_afmoe(vocab_size=size, hidden_size=32, intermediate_size=64, moe_intermediate_size=16,
            num_hidden_layers=2,
            num_dense_layers=1, num_attention_heads=2, num_key_value_heads=1, head_dim=16, num_experts=4,
            num_experts_per_tok=2,
            sliding_window=64, max_position_embeddings=256)
    else:
        spec = from_hf(dict(model_type="mixtral", vocab_size=size, hidden_size=32, intermediate_size=32,
            num_hidden_layers=2,
            num_attention_heads=2, num_key_value_heads=1, max_position_embeddings=256, rms_norm_eps=1e-5,
            rope_theta=1e4,
            num_local_experts=4, num_experts_per_tok=2))
    model = init_weights(Model(spec), 0)
    # as if trained: answers differ with what is asked
    for p in model.parameters(): p.data *= 1 if p.ndim == 1 else 3
    return model


@pytest.mark.parametrize("kind,tokenizer", [("afmoe", byte_tokenizer()), ("afmoe", chat_tokenizer()),
    ("mixtral", byte_tokenizer())])
def test_a_pipeline_answers_as_the_engine_does(tmp_path, kind, tokenizer):
    from transformers import pipeline
    folder = save_pretrained(a_model(kind, tokenizer.vocab_size), tmp_path/"model", tokenizer.save)
    s = Settings(engine=dict(max_tokens=12, kv_tokens=1024))
    talks = [says("hi"), TALK, says("Spell sun backward.")]
    ours = answers(s, load_pretrained(folder), tokenizer, talks)
    ask = pipeline("text-generation", str(folder), dtype=torch.float32)
    theirs = [ask(t, max_new_tokens=12, do_sample=False)[0]["generated_text"][-1]["content"] for t in talks]
    specials = ("<pad>", "<bos>", "<eos>", "<|im_start|>", "<|im_end|>")
    def plain(text):
        for t in specials: text = text.replace(t, "")
        return text
    assert [plain(t) for t in theirs] == [plain(t) for t in ours] and len(set(ours)) == 3
    ids = json.loads((folder/"config.json").read_text())
    assert (ids["eos_token_id"], ids["pad_token_id"]) == (tokenizer.eos_id, tokenizer.pad_id)
    assert (folder/"chat_template.jinja").is_file() and (folder/"generation_config.json").is_file()


def test_a_text_begins_as_our_prompts_do(tmp_path):
    "The post-processor puts the first token there, once."
    from transformers import AutoTokenizer
    tokenizer = byte_tokenizer()
    tokenizer.save(tmp_path)
    assert AutoTokenizer.from_pretrained(tmp_path)("hi\n")["input_ids"] == tokenizer.render(says("hi"))
