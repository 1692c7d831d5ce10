"""vLLM as a peer, in a process of its own: reads a JSON line with prompts and a number of tokens, answers with a
JSON line of the seconds it took.

usage: _vllm_peer.py MODEL_FOLDER MAX_SEQS, with the threads in OMP_NUM_THREADS"""
import json, os, sys, time

def main():
    folder, seats = sys.argv[1], int(sys.argv[2])
    answers = os.fdopen(os.dup(1), "w")   # the answers' own way out: whatever vLLM prints goes to stderr
    os.dup2(2, 1)
    from vllm import LLM, SamplingParams
    llm = LLM(model=folder, dtype="float32", max_model_len=256, max_num_seqs=seats, enforce_eager=True, seed=0,
        skip_tokenizer_init=True, enable_prefix_caching=False)
    print(json.dumps({"ready": True}), file=answers, flush=True)
    for line in sys.stdin:
        job = json.loads(line)
        settings = [SamplingParams(max_tokens=job["max_tokens"], temperature=1.0, ignore_eos=True, detokenize=False,
            seed=job["seed"] + i if job["seeded"] else None)
                    for i in range(len(job["prompts"]))]
        started = time.perf_counter()
        out = llm.generate([{"prompt_token_ids": p} for p in job["prompts"]], settings, use_tqdm=False)
        seconds = time.perf_counter() - started
        print(json.dumps({"seconds": seconds, "tokens": sum(len(o.outputs[0].token_ids) for o in out)}), file=answers,
            flush=True)

if __name__ == "__main__": main()
