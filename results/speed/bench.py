"""Time this repository beside the paper's JAX code, and llm_rlvr.py beside TRL and transformers.

    python results/speed/bench.py bandit                  beside the reference's times as measured
                                                          elsewhere
    python results/speed/bench.py seqtask                 the same for the transformer, 5 min
    python results/speed/bench.py job --before TREE       the default job, and that of another
                                                          checkout behind it, 5 min
    python results/speed/bench.py llm                     RL steps beside TRL's GRPOTrainer, and
                                                          how they scale
    python results/speed/bench.py llm --model DIR         ... and sampling of a pretrained model
                                                          beside transformers' generate
For llm: pip install trl==1.16, which brings transformers; without it only our times are printed.
"""
import argparse
import contextlib
import json
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from types import SimpleNamespace
from unittest import mock

import torch

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "recipes")]
import bandit as bandits
import llm_rlvr
import pretrained
import seqtask
from tpo import standardize


# --------------------------------------------------------------- the paper's tasks: bandit, seqtask
def bandit():
    """Seconds {what: (ours, the reference's steady state)}; that ran on 2 CPU cores, both busy."""
    def seconds(task):
        algos = "pg", "grpo", "dg", "tpo"
        runs = [bandits.run(task, algo, bandits.Config(), None) for algo in algos]
        return sum(records[-1]["seconds"] for records in runs)

    rng = torch.Generator().manual_seed(0)              # the time does not depend on the pixels
    data = []
    for n in (60_000, 10_000):
        data += [torch.rand(n, 784, generator=rng), torch.randint(10, (n,), generator=rng)]
    single, multi, start, steps = seconds("single"), seconds("multi"), time.time(), 600
    list(bandits.mnist("tpo", 20, steps, 1.0, data, None))
    mnist = (time.time() - start) / 20 / steps * 10_000
    return {"single, 100 seeds, 4 methods": (single, 8.0),
            "multi, 100 seeds, 4 methods": (multi, 2.5),
            "mnist, 10,000 steps, per seed (tpo, 20 at once)": (mnist, 18.0)}


def sequences():
    """Seconds per episode of one seed {what: (ours, the reference's)}, H 10, V 2, K 8, B 100."""
    def seconds(algo, reward, episodes, epochs=4):
        run = seqtask.Run("reverse_copy", reward, algo, 10, 2, 8, 100, epochs, 1.0, 1e-3,
                          "prompts", 1, episodes)
        return seqtask.train(run, "cpu", True)[2] / episodes

    seconds("tpo", "terminal", 3)                       # a process's first optimizer costs seconds
    return {"tpo, terminal, first 20 episodes": (seconds("tpo", "terminal", 20), 1.235),
            "tpo, terminal, mean of 2,000 episodes": (seconds("tpo", "terminal", 2000), 1.235),
            "grpo, terminal, first 20 episodes": (seconds("grpo", "terminal", 20), 1.321),
            "dg, terminal, first 200 episodes": (seconds("dg", "terminal", 200, epochs=1), 0.065),
            "tpo_token, bag, first 50 episodes": (seconds("tpo_token", "bag", 50), 0.833)}


# ------------------------------------------------------------------------ an RL step of llm_rlvr.py
def gpt(width=128):
    """A Qwen3 shape with 64 tokens: 0.8M parameters at width 128."""
    torch.manual_seed(0)
    return llm_rlvr.GPT(llm_rlvr.ModelConfig(64, width, 4, 4, 2, width // 4, 3 * width))


def rl_step(tokens, K, T, scores, width=128, compiled=False):
    """Median seconds (sampling, training) of three updates after an untimed one, one epoch each.

    Prompts and scores are given, and no end token occurs: every completion has T tokens.
    """
    class Trainer(llm_rlvr.Trainer):
        def build(self):
            return SimpleNamespace(encode=list, ends=[-1]), gpt(width)

        make_optimizers = pretrained.Pretrained.make_optimizers             # AdamW alone

        def score(self, items, y):
            return scores

    t = Trainer(llm_rlvr.Config(epochs=1, lr=1e-6, device="cpu", prompts=len(tokens), candidates=K,
                                max_new_tokens=T, eval_puzzles=1, compile=compiled))
    prompts, times = [(row, "") for row in tokens.tolist()], []
    with mock.patch.object(llm_rlvr, "puzzles", lambda *_: prompts):
        for _ in range(4):
            metrics = t.update()
            times.append([len(tokens) * K * T / metrics[name]
                          for name in ("sample_tok_s", "train_tok_s")])
    if compiled:
        print(f"--compile: {sum(times[0]):.0f} s for the first update (less where something like "
              "it was compiled before)")
    return [median(phase) for phase in zip(*times[1:])]


def trl_step(model, tokens, K, T):
    """The same by GRPOTrainer: generate, decoding, rewards; then loss, gradients, AdamW.

    One micro-batch, no KL.
    """
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    words, c, times = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 64))], model.config, []
    ranks = {word: i for i, word in enumerate(words)}
    splitter = Tokenizer(models.WordLevel(ranks, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>",
                                        eos_token="<eos>")
    peer = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden,
        num_hidden_layers=c.layers, num_attention_heads=c.heads, num_key_value_heads=c.kv_heads,
        head_dim=c.head_dim, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1,
        bos_token_id=None))
    peer.load_state_dict(model.state_dict())

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            times.append(time.perf_counter())
            batch = super()._generate_and_score_completions(inputs)
            times.append(time.perf_counter())
            assert batch["completion_mask"].sum() == len(tokens) * K * T
            return batch

    # TRL prints a log
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        args = GRPOConfig(
            folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none",
            max_steps=5, per_device_train_batch_size=K * len(tokens), num_generations=K,
            max_completion_length=T, generation_kwargs={"min_new_tokens": T},
            optim="adamw_torch_fused", learning_rate=1e-6, beta=0.0, max_grad_norm=0,
            save_strategy="no", logging_strategy="no", disable_tqdm=True)
        prompts = [" ".join(words[i] for i in row) for row in tokens]
        Timed(peer, args=args, train_dataset=Dataset.from_dict({"prompt": prompts}),
              reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(),
              processing_class=tokenizer).train()
    # sampling, training, sampling, ...
    phases = [after - before for before, after in zip(times, times[1:])]
    return [median(phases[2::2][:3]), median(phases[3::2])]


def flops(c, B, P, K, T):
    """Of an RL step, sampling (one pass) and training (three): 2 per weight and token, 4 head_dim
    per key seen."""
    block = c.width * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.hidden)
    weights = c.layers * block + c.vocab * c.width
    keys = P * P / 2 + K * T * (P + T / 2)
    return 4 * B * (2 * weights * (P + K * T) + 4 * c.layers * c.width * keys)


def rl(B=16, P=33):
    parameters = sum(p.numel() for p in gpt().parameters())             # seeds what follows
    tokens, uniform = torch.randint(2, 64, (B, P)), torch.rand(B, 16)
    spread, few = (uniform < 0.1).float(), torch.zeros(B, 16)
    few[:2, :13] = 1                                    # the same success rate, on 2 prompts of 16
    print(f"RL step, {parameters:,} parameters, {B} prompts of {P} tokens x 16, fp32: seconds, "
          "sampling + training = all")
    print(f"{'':58}{'ours':>22}{'TRL GRPOTrainer':>22}{'ratio':>8}")
    for T in (16, 64):
        try:
            peer = trl_step(gpt(), tokens, 16, T)
        except ImportError:
            peer = print("for TRL beside it: pip install trl==1.16")
        for name, scores, compiled in (("scores differ", uniform, False),
                                       ("scores differ", uniform, True),
                                       ("10% success", spread, False),
                                       ("10% success", spread, True),
                                       ("10% success", few, False)):
            ours = rl_step(tokens, 16, T, scores, compiled=compiled)
            groups = int((standardize(scores) != 0).any(-1).sum())
            what = f"{T} new tokens, {name} in {groups} of {B} groups" + " --compile" * compiled
            cells = [f"{s[0]:.2f} + {s[1]:.2f} = {sum(s):.2f}" for s in (ours, peer) if s]
            ratio = f"{sum(peer) / sum(ours):8.1f}" if peer else ""
            print(f"{what:58}" + "".join(f"{cell:>22}" for cell in cells) + ratio, flush=True)
    for name, values in (("K", (4, 8, 16, 32)), ("T", (8, 16, 32, 64)), ("width", (64, 128, 256))):
        seconds, work = [], []
        for value in values:
            K, T, width = ({"K": 16, "T": 16, "width": 128} | {name: value}).values()
            seconds.append(sum(rl_step(tokens, K, T, torch.rand(B, K), width)))
            work.append(flops(gpt(width).config, B, P, K, T))
        logs = [math.log(value) for value in values]
        fitted, expected = (linear_regression(logs, [math.log(y) for y in ys]).slope
                            for ys in (seconds, work))
        print(f"{name} {', '.join(map(str, values))}: {', '.join(f'{s:.2f}' for s in seconds)} s, "
              f"exponent {fitted:.2f}, of the operations {expected:.2f}", flush=True)


def job(name, tree):
    """Seconds of the default job in a checkout, its warm start included."""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "run"
        subprocess.run([sys.executable, "llm_rlvr.py", "--algo", "tpo", "--out", out], cwd=tree,
                       check=True, stdout=sys.stderr)
        lines = next(out.rglob("log.jsonl")).read_text(encoding="utf-8").splitlines()
    *records, result = map(json.loads, lines)
    reached = next((f"{r['seconds']:.0f} s" for r in records
                    if r["kind"] == "eval" and r["pass1"] >= 0.9), "not reached")
    print(f"python llm_rlvr.py --algo tpo, {name}: {result['seconds']:.0f} s, 90% pass@1: "
          f"{reached}; at the end {result['pass1_after']:.1%}", flush=True)


def sampling(folder, B=4, P=33, K=16, T=64):
    """Tokens per second of a pretrained model, 64 rows of fp32: here 4 prompts x 16."""
    peer, _ = pretrained.read_folder(folder)
    model = pretrained.as_gpt(peer)
    tokens = torch.randint(model.config.vocab, (B, P))
    no_end, generator = torch.tensor([-1]), torch.Generator()

    def rate(run):
        run(2)
        start = time.perf_counter()
        run(T)
        return B * K * T / (time.perf_counter() - start)

    ours = rate(lambda n: llm_rlvr.sample(model, tokens, K, n, no_end, generator))
    print(f"sampling {B} prompts x {K} of {T} tokens from {Path(folder).name}: "
          f"ours {ours:.0f} tok/s", flush=True)
    rows = tokens.repeat_interleave(K, 0)
    peer.generation_config.eos_token_id = None                          # exactly T tokens
    for cache in ("dynamic", "static"):
        theirs = rate(lambda n: peer.generate(
            rows, attention_mask=torch.ones_like(rows), max_new_tokens=n, do_sample=True, top_k=0,
            top_p=1.0, temperature=1.0, pad_token_id=0, cache_implementation=cache))
        print(f"transformers generate, {cache} cache: {theirs:.0f} tok/s, "
              f"ratio {ours / theirs:.2f}", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bandit", "seqtask", "job", "llm"])
    parser.add_argument("--before", metavar="TREE", help="job: another checkout of this repository")
    parser.add_argument("--model", metavar="DIR", help="llm: a pretrained model to sample from")
    args = parser.parse_args()
    if args.before and args.what != "job" or args.model and args.what != "llm":
        parser.error("--before goes with job, --model with llm")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.what == "llm":
        rl()
        if args.model:
            sampling(args.model)
        return
    if args.what == "job":
        job("this checkout", ROOT)
        if args.before:
            job("the other", args.before)
        return
    print(f"{'seconds':50}{'ours':>8}{'reference, measured elsewhere':>32}{'ratio':>8}")
    measure, digits = {"bandit": (bandit, 1), "seqtask": (sequences, 3)}[args.what]
    for name, (ours, reference) in measure().items():
        print(f"{name:50}{ours:8.{digits + 1}f}{reference:32.{digits}f}{reference / ours:8.1f}")


if __name__ == "__main__":
    main()
