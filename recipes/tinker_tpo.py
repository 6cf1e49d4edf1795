"""TPO through the Tinker API: any anchor, any number of epochs, on an engine for many GPUs.

    pip install tinker==0.22.0                             and, where the engine is SkyRL's JAX,
    pip install "skyrl[tinker,jax]==0.3.0"                 or uv and SkyRL's checkout, where
    uv run --extra tinker --extra NAME -m skyrl.tinker.api --base-model Qwen/Qwen3-0.6B \\
        --backend NAME --backend-config 'FLAGS'            serves it (NAME, FLAGS below)
    python recipes/tinker_tpo.py --check                   an example: adds numbers
Your own task is a file beside this one that ends with these lines, and takes the same flags:
    import tinker_tpo
    tinker_tpo.main(prompt, reward)      prompt(rng) -> (text, key), reward(key, answer) -> float

The loss runs here. The engine samples, returns log-probs, takes dL/dlogp and steps Adam on LoRA:
    sample     K completions of each prompt, s = rewards; one cut off at --max-tokens scores 0
    leave out  groups of equal scores, on every epoch (tpo_loss would pull them back on later
               ones): loss and KL are means over the others
    epochs     l = log-probs now, l_old = the first epoch's (the sampler's differ by rounding, which
               adds up over tokens); tpo_loss(l, l_old, s), its slopes back, Adam
Two ways take the slopes back, and both are meant to be the gradient of -sum_t w_t logp_t:
    custom      the SDK's forward_backward_custom: loss "cross_entropy", weights w = -dL/dlogp
    importance  loss "importance_sampling" at ratio 1: weights 1/T, advantages T w, T tokens
SkyRL 0.3.0's JAX backend divides a sequence's loss by max(sum of its weights, 1e-9): custom counts
a completion that loses probability 1e9 times. Weights 1/T add up to 1, with or without that
division: importance is right, and the default. --check tells: with betas 0 and a huge eps Adam is
SGD, which lowers the loss by rate * |gradient|^2 * N (the engine averages over N sequences) or * 1
(it adds). It takes custom if that holds, else importance.

jax       FLAGS {"train_micro_batch_size": K}: groups left out then compile nothing anew.
fsdp      not run. {"trainer.placement.policy_num_gpus_per_node": 8,
          "generator.inference_engine.num_engines": 8,
          "trainer.policy.optimizer_config.weight_decay": 0}
megatron  not run. The same, and "trainer.policy.megatron_config.tensor_model_parallel_size": 8.
By their source these two (Ray, vLLM, CUDA) add up, so both ways are right, if their temperature,
entropy and KL stay as they are; but they fix betas and eps at the start: --check cannot judge them.
Thinking Machines' own service was not tried. For SkyRL's own trainer see verl_tpo.py.
"""
import argparse
import math
import os
import random
import re
import sys
import urllib.request
from numbers import Real
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import standardize, tpo_loss, tpo_target

try:
    import tinker
except ImportError as error:
    sys.exit(f"recipes/tinker_tpo.py needs tinker: pip install tinker==0.22.0 ({error})")

FALL, EPS = 0.001, 1e6     # --check: by how much the loss is to fall; far above any slope


def encode(tokenizer, text):
    """One user message in the chat template, or the bare text if there is none. Control tokens in
    the text stay control: cut them from data of others."""
    if not tokenizer.chat_template:
        return tokenizer(text).input_ids
    return tokenizer.apply_chat_template([{"role": "user", "content": text}], return_dict=False,
                                         add_generation_prompt=True, enable_thinking=False)


def rollout(training, tasks, reward, K, max_tokens, seed):
    """K samples of each (text, key) -> rows (prompts * K) and scores (prompts, K).

    A row's weights are 1 on the completion, end token included. The engine's log-probs are those
    at temperature 1, whatever it samples at: so it samples at 1.
    """
    tokenizer = training.get_tokenizer()
    sampler = training.save_weights_and_get_sampling_client()
    prompts, asked = [encode(tokenizer, text) for text, _ in tasks], []
    for i, prompt in enumerate(prompts):
        params = tinker.SamplingParams(max_tokens=max_tokens, stop=[tokenizer.eos_token_id],
                                       temperature=1.0, seed=seed + i * K)   # sample j: seed + j
        asked.append(sampler.sample(tinker.ModelInput.from_ints(prompt), K, params))
    rows, scores = [], []
    for prompt, (_, key), samples in zip(prompts, tasks, asked):
        for sample in samples.result().sequences:
            ids = prompt + sample.tokens                                               # (P + T,)
            completion = torch.arange(1, len(ids)) >= len(prompt)
            rows.append(tinker.Datum(
                model_input=tinker.ModelInput.from_ints(ids[:-1]), loss_fn_inputs={
                    "target_tokens": torch.tensor(ids[1:]), "weights": completion.float()}))
            closed = sample.tokens[-1:] == [tokenizer.eos_token_id]
            answer = tokenizer.decode(sample.tokens[:-1] if closed else sample.tokens)
            score = reward(key, answer) if sample.stop_reason == "stop" else 0.0
            if not (isinstance(score, Real) and math.isfinite(score)):
                sys.exit(f"reward({key!r}, {answer!r}) gave {score!r}: allowed are finite numbers")
            scores.append(float(score))
    return rows, torch.tensor(scores).view(-1, K)


def make_loss(scores, eta, anchor):
    """(groups, K) -> loss_fn(rows, their log-probs) -> loss, {"loss", "KL"}. Its first call's
    log-probs, of the policy that sampled, are l_old."""
    first = []

    def loss_fn(rows, logps):
        l = torch.stack([(logp * row.loss_fn_inputs["weights"].to_torch()).sum()
                         for row, logp in zip(rows, logps, strict=True)]).view_as(scores)
        if not first:
            first.append(l.detach())
        l_old, = first
        q = tpo_target(l_old, scores, eta, anchor)
        floor = torch.special.entr(q).sum(-1).mean()                # KL(q || p) = loss - H(q)
        loss = tpo_loss(l, l_old, scores, eta, anchor)
        return loss, {"loss": loss.item(), "KL": (loss - floor).item()}
    return loss_fn


def backward(training, rows, loss_fn, way):
    """Adds loss_fn's gradient to the engine's; returns loss_fn's metrics."""
    if way == "custom":
        return training.forward_backward_custom(rows, loss_fn).result().metrics
    now = training.forward(rows, "cross_entropy").result().loss_fn_outputs
    logps = [out["logprobs"].to_torch().clone().requires_grad_() for out in now]
    loss, metrics = loss_fn(rows, logps)
    loss.backward()
    data = []
    for row, logp in zip(rows, logps):
        x, completion = row.loss_fn_inputs, row.loss_fn_inputs["weights"].to_torch()
        T = completion.sum()
        data.append(tinker.Datum(model_input=row.model_input, loss_fn_inputs={
            "target_tokens": x["target_tokens"], "logprobs": logp.detach(),
            "weights": completion / T, "advantages": -T * logp.grad}))
    training.forward_backward(data, "importance_sampling").result()
    return metrics


def check(training, rows, loss_fn):
    """The way by which an SGD step lowers the loss as its gradient says; custom is tried first."""
    N = len(rows)
    for way in ("custom", "importance"):
        losses, rate = [], 0.0
        for _ in range(3):                                   # measure, step, measure
            losses.append(backward(training, rows, loss_fn, way)["loss"])
            adam = tinker.AdamParams(learning_rate=rate * EPS, beta1=0.0, beta2=0.0, eps=EPS)
            norm = training.optim_step(adam).result().metrics.get("skyrl.ai/grad_norm")
            if not norm:
                sys.exit("--check: the engine reports no gradient norm, or 0: nothing to compare")
            rate = FALL / (N * norm**2) if len(losses) == 1 else 0.0
        ratio = (losses[0] - losses[2]) / FALL
        right = min(abs(ratio - 1), abs(N * ratio - 1)) < 0.05
        print(f"check: {way}: the loss falls by {ratio:.4f} of what the gradient says (1, or 1/{N})"
              f"{'' if right else ': wrong on this engine'}", flush=True)
        if right:
            return way
    sys.exit("--check: no way is right; fsdp and megatron, which do not take its eps, look so")


def read_flags(argv):
    parser = argparse.ArgumentParser(formatter_class=argparse.ArgumentDefaultsHelpFormatter)
    parser.error, add = sys.exit, parser.add_argument                     # one line, without usage
    add("--url", default="http://127.0.0.1:8000", help="the server")
    add("--model", help="as the server calls it; without it, the server's first")
    add("--rank", type=int, default=32, help="of LoRA, at most the server's max_lora_rank")
    add("--updates", type=int, default=50, help="rollouts")
    add("--prompts", type=int, default=8, help="groups a rollout")
    add("--samples", type=int, default=16, help="completions K of each prompt")
    add("--max-tokens", type=int, default=128, help="of a completion")
    add("--epochs", type=int, default=1, help="gradient steps a rollout")
    add("--lr", type=float, default=1e-4, help="Adam's")
    add("--eta", type=float, default=1.0, help="temperature of the target")
    add("--anchor", type=float, default=0.0, help="alpha; 1 is the paper")
    add("--seed", type=int, default=0, help="of prompts, samples and LoRA")
    add("--way", default="importance", choices=("importance", "custom"), help="of the slopes")
    add("--check", action="store_true", help="test the engine's gradient, and choose the way so")
    add("--save", help="name for the trained weights on the server")
    flags, other = parser.parse_known_args(argv)
    if other:
        sys.exit(f"{other[0]}: no such flag; samples are drawn at temperature 1 without top_p or "
                 "top_k, for their log-probs are p_old")
    counts = "updates", "prompts", "epochs", "max_tokens", "rank"
    for name, fine, allowed in (("samples", flags.samples > 1, "2 or more"),
                                *((name, getattr(flags, name) > 0, "1 or more") for name in counts),
                                ("eta", flags.eta > 0, "above 0"), ("lr", flags.lr > 0, "above 0"),
                                ("anchor", 0 <= flags.anchor <= 1, "0 to 1")):
        if not fine:
            sys.exit(f"--{name.replace('_', '-')} {getattr(flags, name)}: allowed is {allowed}")
    return flags


def connect(flags):
    """A function that makes a new LoRA adapter on the server."""
    os.environ.setdefault("TINKER_API_KEY", "tml-local")             # SkyRL takes any with tml-
    os.environ.setdefault("TINKER_TELEMETRY", "0")
    try:                                               # the SDK would try again for many minutes
        urllib.request.urlopen(f"{flags.url}/api/v1/healthz", timeout=10).close()
    except (OSError, ValueError) as error:
        sys.exit(f"--url {flags.url}: no Tinker server answers there ({error})")
    service = tinker.ServiceClient(base_url=flags.url)
    models = [m.model_name for m in service.get_server_capabilities().supported_models]
    model = flags.model or models[0]
    if model not in models:
        sys.exit(f"--model {model}: the server has {', '.join(models)}")

    def new():
        try:
            return service.create_lora_training_client(model, rank=flags.rank, seed=flags.seed)
        except (tinker.TinkerError, ValueError) as error:      # the rank, or no adapter left
            sys.exit(f"--rank {flags.rank}: the server makes no such adapter ({error})")
    return new


def main(prompt, reward, argv=None):
    """Trains; prompt(rng) -> (text, key) and reward(key, answer) -> float are the task."""
    flags = read_flags(argv)
    new, rng, way, K = connect(flags), random.Random(flags.seed), flags.way, flags.samples
    adam = tinker.AdamParams(learning_rate=flags.lr)

    def sample(training):
        tasks = [prompt(rng) for _ in range(flags.prompts)]
        return rollout(training, tasks, reward, K, flags.max_tokens, rng.randrange(2**30))

    if flags.check:                                                 # on an adapter thrown away
        rows, scores = sample(training := new())
        noise = torch.rand(scores.shape, generator=torch.Generator().manual_seed(flags.seed))
        way = check(training, rows, make_loss(noise, flags.eta, 0.0))       # far from its target
    training = new()
    for update in range(1, flags.updates + 1):
        rows, scores = sample(training)
        told = standardize(scores).abs().amax(-1) > 0                                 # (prompts,)
        rows = [row for i, row in enumerate(rows) if told[i // K]]
        KL = []
        if rows:
            loss_fn = make_loss(scores[told], flags.eta, flags.anchor)
            for _ in range(flags.epochs):
                KL.append(backward(training, rows, loss_fn, way)["KL"])
                training.optim_step(adam).result()
        fit = ", ".join(f"{x:.3f}" for x in KL) or "-"
        print(f"update {update}: reward {scores.mean():.3f}, KL(q||p) {fit}, "
              f"informative {told.float().mean():.0%}", flush=True)
    if flags.save:
        print(training.save_weights_for_sampler(flags.save).result().path)


def sum_of_two(rng):
    a, b = rng.randrange(100), rng.randrange(100)
    return f"What is {a} + {b}? Answer with the number alone.", a + b


def is_last_number(key, answer):
    return float(re.findall(r"\d+", answer)[-1:] == [str(key)])


if __name__ == "__main__":
    main(sum_of_two, is_last_number)
