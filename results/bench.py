"""Time this repository beside the paper's JAX code, and llm_rlvr.py beside TRL and transformers.

    python results/bench.py bandit                          beside the reference's times as measured elsewhere
    python results/bench.py seqtask                         the same for the transformer, about 5 min
    python results/bench.py llm [--model DIR]               RL steps beside TRL's GRPOTrainer, and how they scale; the
                                                            default job; sampling of a checkpoint beside generate
    python results/bench.py bandit --reference DIR --command "python ..."
                                                            and a command of a clone of it, run in DIR on this machine
(for the clone: pip install jax flax optax; its time is the whole process, so it includes imports and compilation;
for llm: pip install trl==1.16, which brings transformers; without it only our own times are printed)
"""
import argparse
import contextlib
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from statistics import linear_regression, median
from unittest import mock

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import bandit as ours
import llm_rlvr
import seqtask
from tpo import standardize


def bandit():
    """Seconds {what: (ours, the reference's steady state)}; the reference ran on 2 CPU cores, both busy."""
    cfg = ours.Config()
    single, multi = (sum(ours.run(task, algo, cfg, None)[-1]["seconds"] for algo in ("pg", "grpo", "dg", "tpo"))
                     for task in ("single", "multi"))
    rng = torch.Generator().manual_seed(0)                          # pixels at random: the time does not depend on them
    data = [f(n) for n in (60000, 10000) for f in (lambda n: torch.rand(n, 784, generator=rng),
                                                   lambda n: torch.randint(10, (n,), generator=rng))]
    start, steps = time.time(), 600
    list(ours.mnist("tpo", 20, steps, 1.0, data, None))
    mnist = (time.time() - start) / 20 / steps * 10_000
    return {"single, 100 seeds, 4 methods": (single, 8.0), "multi, 100 seeds, 4 methods": (multi, 2.5),
            "mnist, 10,000 steps, per seed (tpo, 20 at once)": (mnist, 18.0)}


def seq():
    """Seconds per episode of one seed {what: (ours, the reference's steady state)}, H 10, V 2, K 8, B 100."""
    def seconds(algo, reward, episodes, epochs=4):
        run = seqtask.Run("reverse_copy", reward, algo, 10, 2, 8, 100, epochs, 1.0, 1e-3, "prompts", 1, episodes)
        return seqtask.train(run, "cpu", True)[2] / episodes

    seconds("tpo", "terminal", 3)                                   # the first optimizer of a process costs seconds
    return {"tpo, terminal, first 20 episodes": (seconds("tpo", "terminal", 20), 1.235),
            "tpo, terminal, mean of 2,000 episodes": (seconds("tpo", "terminal", 2000), 1.235),
            "grpo, terminal, first 20 episodes": (seconds("grpo", "terminal", 20), 1.321),
            "dg, terminal, first 200 episodes": (seconds("dg", "terminal", 200, epochs=1), 0.065),
            "tpo_token, bag, first 50 episodes": (seconds("tpo_token", "bag", 50), 0.833)}


def gpt(width=128):
    """A Qwen3 shape with 64 tokens: 0.8M parameters at width 128."""
    torch.manual_seed(0)
    return llm_rlvr.GPT(llm_rlvr.ModelConfig(64, width, 4, 4, 2, width // 4, 3 * width))


def rl_step(tokens, K, T, scores, width=128, compiled=""):
    """Median seconds (sampling, training) of three updates of llm_rlvr.Trainer after an untimed one, one epoch each.

    Prompts and scores are given, and no end token occurs: every completion has T tokens. compiled: "" or "--compile".
    """
    flags = (f"--epochs 1 --lr 1e-6 --device cpu --prompts {len(tokens)} --candidates {K} --max-new-tokens {T} --eval-puzzles 1 "
             + compiled)
    t, times = llm_rlvr.Trainer(llm_rlvr.parse(flags.split())), []
    t.model, t.end, t.encode = gpt(width), -1, list
    t.trained = list(t.model.parameters())
    t.optimizer = torch.optim.AdamW(t.trained, 1e-6, **llm_rlvr.ADAMW)
    with mock.patch.multiple(llm_rlvr, puzzles=lambda *_: [(row, "") for row in tokens.tolist()], score=lambda *_: scores):
        for _ in range(4):
            before = dict(t.tally)
            t.update()
            times.append([t.tally[phase] - before[phase] for phase in ("sample_seconds", "train_seconds")])
    if compiled:
        print(f"--compile: {sum(times[0]):.0f} s for the first update (less where something like it was compiled before)")
    return [median(phase) for phase in zip(*times[1:])]


def trl_step(model, tokens, K, T):
    """The same by GRPOTrainer: generate, decoding, rewards; then loss, gradients, AdamW. One micro-batch, no KL."""
    from datasets import Dataset
    from tokenizers import Tokenizer, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast, Qwen3Config, Qwen3ForCausalLM
    from trl import GRPOConfig, GRPOTrainer
    words, c, times = ["<pad>", "<eos>", *(f"w{i}" for i in range(2, 64))], model.config, []
    splitter = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<pad>"))
    splitter.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=splitter, pad_token="<pad>", eos_token="<eos>")
    peer = Qwen3ForCausalLM(Qwen3Config(
        vocab_size=c.vocab, hidden_size=c.width, intermediate_size=c.hidden, num_hidden_layers=c.layers,
        num_attention_heads=c.heads, num_key_value_heads=c.kv_heads, head_dim=c.head_dim, tie_word_embeddings=False,
        pad_token_id=0, eos_token_id=1, bos_token_id=None))
    peer.load_state_dict(model.state_dict())

    class Timed(GRPOTrainer):
        def _generate_and_score_completions(self, inputs):
            times.append(time.perf_counter())
            batch = super()._generate_and_score_completions(inputs)
            times.append(time.perf_counter())
            assert batch["completion_mask"].sum() == len(tokens) * K * T
            return batch

    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):             # TRL prints a log
        args = GRPOConfig(folder, use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", max_steps=5,
                          per_device_train_batch_size=K * len(tokens), num_generations=K, max_completion_length=T,
                          generation_kwargs={"min_new_tokens": T}, optim="adamw_torch_fused", learning_rate=1e-6,
                          beta=0.0, max_grad_norm=0, save_strategy="no", logging_strategy="no", disable_tqdm=True)
        prompts = Dataset.from_dict({"prompt": [" ".join(words[i] for i in row) for row in tokens]})
        Timed(peer, reward_funcs=lambda completions, **_: torch.rand(len(completions)).tolist(), args=args,
              train_dataset=prompts, processing_class=tokenizer).train()
    phases = [after - before for before, after in zip(times, times[1:])]          # sampling, training, sampling, ...
    return [median(phases[2::2][:3]), median(phases[3::2])]


def flops(c, B, P, K, T):
    """Of an RL step, sampling (one pass) and training (three): 2 per weight and token, 4 head_dim per key seen."""
    block = c.width * (2 * (c.heads + c.kv_heads) * c.head_dim + 3 * c.hidden)
    keys = P * P / 2 + K * T * (P + T / 2)
    return 4 * B * (2 * (c.layers * block + c.vocab * c.width) * (P + K * T) + 4 * c.layers * c.width * keys)


def rl(B=16, P=33):
    size = sum(p.numel() for p in gpt().parameters())                                             # seeds what follows
    tokens, uniform = torch.randint(2, 64, (B, P)), torch.rand(B, 16)
    few = torch.zeros(B, 16)
    few[:2, :13] = 1                                                     # the same success rate, on two prompts of 16
    print(f"RL step, {size:,} parameters, {B} prompts of {P} tokens x 16, fp32: seconds, sampling + training = all")
    print(f"{'':58}{'ours':>22}{'TRL GRPOTrainer':>22}{'ratio':>8}")
    for T in (16, 64):
        try:
            peer = trl_step(gpt(), tokens, 16, T)
        except ImportError:
            peer = print("for TRL beside it: pip install trl==1.16")
        some = (uniform < 0.1).float()
        for name, scores, compiled in (("scores differ", uniform, ""), ("scores differ", uniform, "--compile"),
                                       ("10% success", some, ""), ("10% success", some, "--compile"), ("10% success", few, "")):
            mine, groups = rl_step(tokens, 16, T, scores, compiled=compiled), int((standardize(scores) != 0).any(-1).sum())
            print(f"{f'{T} new tokens, {name} in {groups} of {B} groups {compiled}':58}" + "".join(
                f"{f'{s[0]:.2f} + {s[1]:.2f} = {sum(s):.2f}':>22}" for s in (mine, peer) if s)
                + (f"{sum(peer) / sum(mine):8.1f}" if peer else ""), flush=True)
    for name, values in (("K", (4, 8, 16, 32)), ("T", (8, 16, 32, 64)), ("width", (64, 128, 256))):
        seconds, work = [], []
        for value in values:
            at = {"K": 16, "T": 16, "width": 128} | {name: value}
            K, T, width = at["K"], at["T"], at["width"]
            seconds.append(sum(rl_step(tokens, K, T, torch.rand(B, K), width)))
            work.append(flops(gpt(width).config, B, P, K, T))
        fitted, expected = (linear_regression([math.log(x) for x in values], [math.log(y) for y in ys]).slope
                            for ys in (seconds, work))
        print(f"{name} {', '.join(map(str, values))}: {', '.join(f'{s:.2f}' for s in seconds)} s, "
              f"exponent {fitted:.2f}, of the operations {expected:.2f}", flush=True)


def job():
    """Seconds of the default job until pass@1 on the held-out puzzles has passed 90%, its warm start included."""
    with tempfile.TemporaryDirectory() as folder, contextlib.redirect_stdout(sys.stderr):
        evals = [r for r in llm_rlvr.Trainer(llm_rlvr.parse([])).run(Path(folder), Path(folder)) if r["kind"] == "eval"]
    seconds = next((f"{r['seconds']:.0f} s" for r in evals if r["pass1"] >= 0.9), "not reached")
    print(f"python llm_rlvr.py until 90% pass@1: {seconds}; at the end {evals[-1]['pass1']:.1%}", flush=True)


def sampling(folder, B=4, P=33, K=16, T=64):
    """Tokens per second of a checkpoint in folder, the same 64 rows of fp32: 4 prompts x 16 here, 64 for generate."""
    model = llm_rlvr.read_model(folder)
    tokens = torch.randint(model.config.vocab, (B, P))

    def rate(run):
        run(2)
        begun = time.perf_counter()
        run(T)
        return B * K * T / (time.perf_counter() - begun)

    valid, generator = torch.ones_like(tokens, dtype=torch.bool), torch.Generator()
    mine = rate(lambda n: llm_rlvr.sample(model, tokens, valid, K, n, -1, generator))
    print(f"sampling {B} prompts x {K} of {T} tokens from {folder}: ours {mine:.0f} tok/s", flush=True)
    try:
        import transformers
    except ImportError:
        return print("for generate beside it: pip install transformers")
    peer = transformers.AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    rows = tokens.repeat_interleave(K, 0)
    peer.generation_config.eos_token_id = None                                                       # exactly T tokens
    for cache in ("dynamic", "static"):
        theirs = rate(lambda n: peer.generate(rows, attention_mask=torch.ones_like(rows), max_new_tokens=n,
                                              do_sample=True, top_k=0, top_p=1.0, temperature=1.0, pad_token_id=0,
                                              cache_implementation=cache))
        print(f"transformers generate, {cache} cache: {theirs:.0f} tok/s, ratio {mine / theirs:.2f}", flush=True)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("what", choices=["bandit", "seqtask", "llm"])
    parser.add_argument("--reference", metavar="DIR", help="a clone of the paper's repository")
    parser.add_argument("--command", help="what to time in it")
    parser.add_argument("--model", metavar="DIR", type=Path, help="llm: a checkpoint to sample from")
    args = parser.parse_args()
    if args.model and args.what != "llm":
        parser.error(f"--model {args.model}: goes with llm")
    if bool(args.reference) != bool(args.command):
        parser.error("--reference and --command go together: the clone's folder, and what to time in it")
    if args.reference and args.what == "llm":
        parser.error(f"--reference {args.reference}: goes with bandit and seqtask")
    print(f"{torch.get_num_threads()} threads, torch {torch.__version__}")
    if args.what == "llm":
        rl()
        job()
        if args.model:
            sampling(Path(args.model))
        sys.exit()
    print(f"{'seconds':50}{'ours':>8}{'reference, measured elsewhere':>32}{'ratio':>8}")
    digits = 1 if args.what == "bandit" else 3
    for name, (mine, reference) in (bandit if args.what == "bandit" else seq)().items():
        print(f"{name:50}{mine:8.{digits + 1}f}{reference:32.{digits}f}{reference / mine:8.1f}")
    if args.reference:
        start = time.time()
        subprocess.run(args.command, shell=True, cwd=args.reference, check=True)
        print(f"{args.command}: {time.time() - start:.1f} s")
