"""pytest: the mathematics of the losses, then the behaviour of each script, run as a user runs it."""
import itertools
import json
import math
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

import baselines
import llm_rlvr
from tpo import standardize, tpo_loss, tpo_target, tpo_weights

torch.manual_seed(0)
F64 = dict(dtype=torch.float64)


def group(*shape, **kw):
    """Log-probs, old log-probs and scores of one shape, fp64."""
    return (torch.randn(*shape, **F64).requires_grad_(), torch.randn(*shape, **F64), torch.rand(*shape, **F64))


def grad(loss, x):
    return torch.autograd.grad(loss, x)[0]


# --------------------------------------------------------------------------------------------------------------- tpo.py
def test_target_by_hand():
    logp_old, scores = torch.tensor([0.5, 0.3, 0.2], **F64).log(), torch.tensor([1.0, 0.0, 0.0])
    u = [math.sqrt(2), -1 / math.sqrt(2), -1 / math.sqrt(2)]                # mean 1/3, population sigma sqrt(2)/3
    w = [p * math.exp(x / 0.5) for p, x in zip((0.5, 0.3, 0.2), u)]
    torch.testing.assert_close(tpo_target(logp_old, scores, eta=0.5), torch.tensor([x / sum(w) for x in w], **F64))


def test_gradient_is_p_minus_q_per_group():
    logp, logp_old, scores = group(4, 3, 6)
    q = tpo_target(logp_old, scores, eta=0.7)
    torch.testing.assert_close(grad(tpo_loss(logp, logp_old, scores, eta=0.7), logp), (logp.softmax(-1) - q).detach() / 12)
    matched = q.log().requires_grad_()
    assert grad(tpo_loss(matched, logp_old, scores, eta=0.7), matched).abs().max() < 1e-15


def test_no_gradient_into_old_policy_or_scores():
    logp, logp_old, scores = (x.detach().requires_grad_() for x in group(2, 5))
    tpo_loss(logp, logp_old, scores, anchor=0.5).backward()
    assert logp.grad is not None and logp_old.grad is None and scores.grad is None


def test_target_maximizes_the_kl_regularized_score():
    """Eq. 4: q = argmax_r sum r u - eta KL(r || p_old), found here by gradient ascent that knows nothing of Eq. 2."""
    _, logp_old, scores = group(5)
    log_p, u, z, eta = logp_old.log_softmax(-1), standardize(scores), torch.zeros(5, **F64, requires_grad=True), 0.6
    optimizer = torch.optim.LBFGS([z], max_iter=500, tolerance_grad=1e-12, tolerance_change=1e-15, line_search_fn="strong_wolfe")

    def closure():
        optimizer.zero_grad()
        r = z.softmax(-1)
        loss = -(r * u).sum() + eta * (r * (z.log_softmax(-1) - log_p)).sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    torch.testing.assert_close(z.detach().softmax(-1), tpo_target(logp_old, scores, eta), atol=1e-7, rtol=0)


@pytest.mark.parametrize("anchor", [0.0, 0.25, 1.0, 2.0])
def test_every_anchor_has_the_same_fixed_point(anchor):
    _, logp_old, scores = group(3, 6)
    fixed = (logp_old + standardize(scores) / 0.5 - 3.0).requires_grad_()
    assert grad(tpo_loss(fixed, logp_old, scores, 0.5, anchor), fixed).abs().max() < 1e-14
    other = (fixed.detach() + torch.linspace(0, 1, 6)).requires_grad_()
    assert grad(tpo_loss(other, logp_old, scores, 0.5, anchor), other).abs().max() > 1e-3


def test_uniform_anchor_first_epoch():
    _, logp_old, scores = group(2, 4)
    torch.testing.assert_close(tpo_weights(logp_old, logp_old, scores, anchor=0.0), (0.25 - standardize(scores).softmax(-1)) / 2)
    assert tpo_loss(logp_old, logp_old, scores, anchor=0.0).item() == pytest.approx(math.log(4))


def test_standardize_has_zero_mean_unit_population_sigma_and_ignores_shift_and_scale():
    s = torch.rand(7, 5, **F64)
    u = standardize(s)
    torch.testing.assert_close(u.mean(-1), torch.zeros(7, **F64))
    torch.testing.assert_close(u.square().mean(-1), torch.ones(7, **F64))
    torch.testing.assert_close(standardize(3 * s + 20), u)


def test_one_hot_scores_of_ten():
    u = standardize(torch.eye(10, **F64)[3])
    torch.testing.assert_close(u, torch.eye(10, **F64)[3] * 10 / 3 - 1 / 3)
    q = tpo_target(torch.zeros(10, **F64), torch.eye(10)[3])
    assert (q[3] / q[0]).item() == pytest.approx(math.exp(10 / 3))
    logp = torch.tensor([0.1] + [0.1] * 9, **F64).log()                     # beta_TPO(p) = (q_y - p) / (1 - p) at p = 0.1
    assert ((tpo_target(logp, torch.eye(10)[0])[0] - 0.1) / 0.9).item() == pytest.approx(0.73, abs=0.005)


@pytest.mark.parametrize("scores, expected", [
    ([0.1] * 16, [0] * 16), ([1 / 3, 1 / 3, 1 - 2 / 3], [0, 0, 0]), ([1.0, 1.0 + 1e-9], [0, 0]), ([0.0] * 4, [0] * 4),
    ([0.001, 0, 0, 0], [3 ** 0.5] + [-3 ** -0.5] * 3), ([1e30, -1e30], [1, -1]), ([1e-30, 0.0], [1, -1]),
    ([True, False], [1, -1]), ([3, 1], [1, -1]), ([7.0], [0])])
@pytest.mark.parametrize("dtype", [None, torch.float64])
def test_standardize_tells_signal_from_noise(scores, expected, dtype):
    u = standardize(torch.tensor(scores, dtype=dtype))
    torch.testing.assert_close(u, torch.tensor(expected, dtype=u.dtype))
    assert (u == 0).all() or any(expected)


def test_zero_variance_group_rests_then_pulls_back():
    logp, logp_old, _ = group(2, 5)
    equal = torch.full((2, 5), 0.1)
    torch.testing.assert_close(tpo_target(logp_old, equal), logp_old.softmax(-1))
    assert tpo_weights(logp_old, logp_old, equal).abs().max() == 0
    torch.testing.assert_close(grad(tpo_loss(logp, logp_old, equal), logp),
                               (logp.softmax(-1) - logp_old.softmax(-1)).detach() / 2)


@pytest.mark.parametrize("anchor", [0.0, 0.3, 1.0])
def test_masked_candidates_might_as_well_not_exist(anchor):
    logp, logp_old, scores = group(1, 6)
    mask = torch.tensor([[True, False, True, True, False, True]])
    short = logp.detach()[mask][None].requires_grad_()
    rest = logp_old[mask][None], scores[mask][None]
    poisoned = [x.masked_fill(~mask, bad) for x, bad in ((logp_old, math.nan), (scores, math.inf))]
    loss = tpo_loss(logp, *poisoned, 0.7, anchor, mask)
    torch.testing.assert_close(loss, tpo_loss(short, *rest, 0.7, anchor))
    g = grad(loss, logp)
    assert (g[~mask] == 0).all() and (tpo_target(*poisoned, 0.7, anchor, mask)[~mask] == 0).all()
    torch.testing.assert_close(g[mask], grad(tpo_loss(short, *rest, 0.7, anchor), short)[0])
    torch.testing.assert_close(tpo_weights(logp, *poisoned, 0.7, anchor, mask), g)
    assert tpo_loss(logp, logp_old, scores, mask=torch.zeros_like(mask)).item() == 0


@pytest.mark.parametrize("anchor", [0.0, 0.25, 1.0])
@pytest.mark.parametrize("extreme", [-1e4, -math.inf])
def test_extreme_old_log_probs_stay_finite(anchor, extreme):
    logp_old = torch.tensor([[extreme, -1.0, -2.0, extreme], [extreme] * 4, [extreme, 0.0, extreme, extreme]])
    logp, scores = torch.zeros(3, 4, requires_grad=True), torch.tensor([[1.0, 0, 0, 1], [0, 1, 0, 0], [1e30, 0, 0, 0]])
    q, loss = tpo_target(logp_old, scores, anchor=anchor), tpo_loss(logp, logp_old, scores, anchor=anchor)
    assert loss.isfinite() and grad(loss, logp).isfinite().all()
    torch.testing.assert_close(q.sum(-1), torch.ones(3))
    if anchor == 1:
        assert q[0, 0] == 0 and q[0, 1] == pytest.approx(1 / (1 + math.exp(-1)))


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_non_finite_score_is_loud(bad):
    scores = torch.tensor([[1.0, bad, 0.0], [1.0, 0.0, 0.0]])
    q = tpo_target(torch.zeros(2, 3), scores)
    assert q[0].isnan().all() and q[1].isfinite().all() and tpo_loss(torch.zeros(2, 3), torch.zeros(2, 3), scores).isnan()


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_computed_in_fp32_or_fp64(dtype):
    logp, logp_old, scores = (x.detach().to(dtype) for x in group(2, 8))
    loss = tpo_loss(logp, logp_old, scores)
    assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    torch.testing.assert_close(loss.double(), tpo_loss(logp.double(), logp_old.double(), scores.double()), rtol=1e-6, atol=1e-6)


def test_weights_give_the_gradient_in_any_micro_batches():
    theta, logp_old, scores = torch.randn(3, **F64).requires_grad_(), torch.randn(4, 6, **F64), torch.rand(4, 6, **F64)
    features = torch.randn(4, 6, 3, **F64)                                  # a policy whose candidates share parameters
    logp = lambda rows: features.flatten(0, 1)[rows] @ theta
    everything = logp(slice(None)).view(4, 6)
    whole = grad(tpo_loss(everything, logp_old, scores, 0.8, 0.5), theta)
    w = tpo_weights(everything, logp_old, scores, 0.8, 0.5).flatten()
    assert not w.requires_grad
    torch.testing.assert_close(sum(grad((w[rows] * logp(rows)).sum(), theta) for rows in torch.randperm(24).split(5)), whole)


@pytest.mark.parametrize("call", [
    lambda: tpo_loss(torch.zeros(2, 4), torch.zeros(2, 3), torch.zeros(2, 4)), lambda: tpo_target(torch.zeros(2, 3), torch.zeros(2, 4)),
    lambda: tpo_weights(torch.zeros(2, 3), torch.zeros(2, 4), torch.zeros(2, 4)),
    lambda: standardize(torch.zeros(2, 4), torch.ones(2, 3, dtype=torch.bool))])
def test_shape_errors_name_both_shapes(call):
    with pytest.raises(ValueError, match=r"\(2, 4\).*\(2, 3\)"):
        call()


# --------------------------------------------------------------------------------------------------------- baselines.py
def test_pg_ppo_dg_formulas():
    """Against loops over B prompts, K candidates and T tokens; the last token of sample (1, 2) is padding."""
    logp, logp_old = torch.randn(2, 3, 4, **F64) - 1, torch.randn(2, 3, 4, **F64) - 1
    scores, mask = torch.rand(2, 3, **F64), torch.ones(2, 3, 4, dtype=torch.bool)
    mask[1, 2, 3] = False
    pg = ppo = dg = 0.0
    for b, k, t in itertools.product(range(2), range(3), range(4)):
        if mask[b, k, t]:
            A, l, ratio = float(scores[b, k] - scores.mean()), float(logp[b, k, t]), math.exp(logp[b, k, t] - logp_old[b, k, t])
            pg -= A * l / 6
            ppo -= min(ratio * A, min(max(ratio, 0.8), 1.2) * A) / 6
            dg -= A * l / (1 + math.exp(A * l / 0.5)) / 6                   # sigmoid(A * surprisal / eta), surprisal = -l
    assert baselines.pg_loss(logp, logp_old, scores, mask=mask).item() == pytest.approx(pg, rel=1e-5)
    assert baselines.ppo_loss(logp, logp_old, scores, mask=mask).item() == pytest.approx(ppo, rel=1e-5)
    assert baselines.dg_loss(logp, logp_old, scores, eta=0.5, mask=mask).item() == pytest.approx(dg, rel=1e-5)


def test_rewards_per_token_get_a_baseline_per_position():
    logp, scores = torch.randn(5, 1, 3), torch.rand(5, 1, 3)
    expected = -((scores - scores.mean(0, keepdim=True)) * logp).sum(-1).mean()
    torch.testing.assert_close(baselines.pg_loss(logp, logp, scores), expected)


def test_dg_gate_carries_no_gradient():
    logp, scores = (torch.randn(4, 1, **F64) - 1).requires_grad_(), torch.rand(4, 1, **F64)
    A = scores - scores.mean()
    expected = -(A * torch.sigmoid(-A * logp.detach())) / 4
    torch.testing.assert_close(grad(baselines.dg_loss(logp, logp, scores), logp), expected, rtol=1e-6, atol=1e-8)


def test_grpo_formula():
    logp, logp_old, scores = (x.detach() for x in group(2, 4))
    logp[0, 0] += 50                                                        # beyond the clamp of the log-ratio at 20
    scores[1] = 0.3                                                         # zero variance: only its KL penalty remains
    per_prompt = []
    for b in range(2):
        sigma, total = float(scores[b].std(correction=0)), 0.0
        for k in range(4):
            u = 0.0 if b == 1 else float(scores[b, k] - scores[b].mean()) / (sigma + 1e-8)
            r = min(max(float(logp[b, k] - logp_old[b, k]), -20), 20)
            total -= min(math.exp(r) * u, min(max(math.exp(r), 0.8), 1.2) * u) - 0.04 * (math.exp(-r) + r - 1)
        per_prompt.append(total)
    assert baselines.grpo_loss(logp, logp_old, scores).item() == pytest.approx(sum(per_prompt) / 2, rel=1e-6)
    assert baselines.grpo_masked_loss(logp, logp_old, scores).item() == pytest.approx(per_prompt[0], rel=1e-6)
    assert baselines.grpo_masked_loss(logp, logp_old, torch.ones(2, 4)).item() == 0
    free = baselines.grpo_loss(logp[1:], logp_old[1:], scores[1:], beta=0.0)
    assert free.item() == 0


def test_group_pg_and_no_anchor_formulas():
    logp, logp_old, scores = group(3, 5)
    u = standardize(scores)
    torch.testing.assert_close(grad(baselines.group_pg_loss(logp, logp_old, scores), logp), -u / 3)
    torch.testing.assert_close(grad(baselines.tpo_no_anchor_loss(logp, logp_old, scores, eta=2.0), logp),
                               (logp.softmax(-1).detach() - (u / 2).softmax(-1)) / 3)


def test_on_policy_group_gradients_differ_as_the_table_says():
    """On the first epoch GRPO's gradient is Group PG's, -u; TPO's is p - q: bounded, and zero at the target."""
    logp, _, scores = group(2, 6)
    same = logp.detach()
    torch.testing.assert_close(grad(baselines.grpo_loss(logp, same, scores), logp), -standardize(scores) / 2)
    assert grad(tpo_loss(logp, same, scores), logp).abs().sum(-1).max() <= 2 / 2


# ------------------------------------------------------------------------------------------------------------ llm_rlvr.py
TINY = ["--width", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--prompts", "6", "--candidates", "4", "--device", "cpu"]


def tiny_model(vocab=20, **kw):
    torch.manual_seed(1)
    return llm_rlvr.GPT(llm_rlvr.ModelConfig(vocab, 32, 2, 4, 2, 8, 48, **kw))


def plain_logp(model, prompt, completion):
    """Token log-probs of one unpadded sequence by one ordinary causal forward: nothing shared, nothing cached."""
    ids = torch.tensor([prompt + completion])
    S = ids.shape[1]
    h = model(ids, torch.arange(S)[None], torch.ones(S, S, dtype=torch.bool).tril()[None, None])
    return model.lm_head(h)[0].log_softmax(-1)[len(prompt) - 1:-1].gather(-1, ids[0, len(prompt):, None])[:, 0]


@pytest.mark.parametrize("kw", [{}, dict(qk_norm=False, qkv_bias=True, tied=True)])
def test_shared_prompt_and_cache_give_the_plain_log_probs(kw):
    model, prompts = tiny_model(**kw), [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
    tokens = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    valid = torch.tensor([[False] * (5 - len(p)) + [True] * len(p) for p in prompts])
    y, real, cached = llm_rlvr.sample(model, tokens, valid, 3, 6, end=19, generator=torch.Generator().manual_seed(0))
    logp = llm_rlvr.token_logp(model, tokens, valid, y)
    for b, k in itertools.product(range(3), range(3)):
        n = int(real[b, k].sum())
        expected = plain_logp(model, prompts[b], y[b, k].tolist())
        torch.testing.assert_close(logp[b, k], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached[b, k, :n], expected[:n], atol=1e-5, rtol=1e-5)
        assert (cached[b, k, n:] == 0).all()


def test_end_token_counts_and_padding_does_not():
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3]] * 8)
    model.lm_head.weight.data[19] += model.model["norm"].weight * 0                       # the end token at about chance
    y, real, _ = llm_rlvr.sample(model, tokens, torch.ones_like(tokens, dtype=torch.bool), 16, 8, 19, torch.Generator().manual_seed(0))
    lengths = real.sum(-1)
    for row, n in zip(y.flatten(0, 1).tolist(), lengths.flatten().tolist()):
        assert n == (row.index(19) + 1 if 19 in row else 8)
    assert lengths.min() < 8 == lengths.max()


def test_sampler_draws_from_the_policy():
    """First-token frequencies of 20,000 draws within 5 standard errors of the softmax at temperature 1."""
    model, tokens = tiny_model(vocab=8), torch.tensor([[1, 2]])
    y, _, _ = llm_rlvr.sample(model, tokens, tokens > 0, 20_000, 1, 7, torch.Generator().manual_seed(0))
    p = torch.stack([plain_logp(model, [1, 2], [v])[0] for v in range(8)]).exp().detach()
    seen = torch.bincount(y.flatten(), minlength=8) / 20_000
    assert ((seen - p).abs() < 5 * (p * (1 - p) / 20_000).sqrt()).all()
    greedy, _, _ = llm_rlvr.sample(model, tokens, tokens > 0, 1, 1, 7, None, greedy=True)
    assert greedy.item() == p.argmax()


def test_parameter_names_are_those_of_hugging_face_qwen():
    names = {n for n, _ in tiny_model(qkv_bias=True).named_parameters()}
    block = {f"{m}_proj.{w}" for m in ("self_attn.q", "self_attn.k", "self_attn.v") for w in ("weight", "bias")} | {
        "self_attn.o_proj.weight", "self_attn.q_norm.weight", "self_attn.k_norm.weight", "mlp.gate_proj.weight", "mlp.up_proj.weight",
        "mlp.down_proj.weight", "input_layernorm.weight", "post_attention_layernorm.weight"}
    assert names == {f"model.layers.{i}.{n}" for i in range(2) for n in block} | {
        "model.embed_tokens.weight", "model.norm.weight", "lm_head.weight"}
    assert "lm_head.weight" not in {n for n, _ in tiny_model(tied=True).named_parameters()}


@pytest.mark.parametrize("name", llm_rlvr.TASKS)
def test_tasks(name):
    """Guesses have the right form and are sometimes right; the encoding is lossless and one token per word; splits are disjoint."""
    task, rng = llm_rlvr.TASKS[name], random.Random(0)
    enc, split = llm_rlvr.make_encoding(task), {s: llm_rlvr.puzzles(task, random.Random(1), 50, s) for s in ("train", "heldout", "test")}
    T = llm_rlvr.parse(["--task", name]).max_new_tokens
    scores = []
    for text, key in split["train"]:
        for _ in range(20):
            guess = task.guess(rng, key)
            scores.append(task.check(key, guess))
            assert enc.decode(enc.encode_ordinary(text + guess)) == text + guess
            assert len(enc.encode_ordinary(guess)) < T                             # room for the end token
        assert task.check(key, "") == task.check(key, guess + guess) == task.check(key, "nonsense") == 0
    assert 0 < sum(scores) / len(scores) < 0.3 or name == "addition"
    texts = {s: {text for text, _ in items} for s, items in split.items()}
    assert not texts["train"] & texts["heldout"] and not texts["train"] & texts["test"] and not texts["test"] & texts["heldout"]


def test_knights_knaves_solutions_are_unique_and_right():
    """Every printed puzzle parsed and solved again from its text alone."""
    task = llm_rlvr.TASKS["knights_knaves"]

    def claim(words, w):
        x, y, kind = words[0], words[2], words[-1].rstrip("s")
        return w[x] == kind if words[1] == "is" else (w[x] == kind) + (w[y] == kind) >= (2 if words[1] == "and" else 1)

    for text, key in llm_rlvr.puzzles(task, random.Random(2), 100, "train"):
        said = {s.split()[0]: s.split()[2:] for s in text.removesuffix(" Who?").rstrip(".").split(". ")}
        worlds = [w for w in itertools.product(("knight", "knave"), repeat=len(key))
                  if all((dict(zip("ABCDE", w))[p] == "knight") == claim(words, dict(zip("ABCDE", w))) for p, words in said.items())]
        assert worlds == [tuple(key.values())]
        named = [f" {p} {kind}" for p, kind in key.items()]
        assert all(task.check(key, "".join(order)) == 1 for order in itertools.permutations(named))
        lie = " A " + {"knight": "knave", "knave": "knight"}[key["A"]]
        for wrong in ([lie, *named[1:]], named[1:], [*named, named[0]], [named[0], named[0], named[2]], [lie, *named], [*named, " A"]):
            assert task.check(key, "".join(wrong)) == 0


def test_graph_color_and_addition_checkers():
    color, edges = llm_rlvr.TASKS["graph_color"], ["A-B", "B-C", "C-F"]
    assert color.check(edges, " red green red red red blue") == 1 == color.check(edges, " green red blue red green green")
    for wrong in (" red red green red red red", " red green red red red", " red green red red red blue blue", " red pink red red red blue"):
        assert color.check(edges, wrong) == 0
    assert llm_rlvr.TASKS["addition"].check("42", "42") == 1 and llm_rlvr.TASKS["addition"].check("42", "042") == 0


def test_unfinished_completion_scores_zero():
    task = llm_rlvr.TASKS["addition"]
    enc = llm_rlvr.make_encoding(task)
    y = torch.tensor([[enc.encode_ordinary("42") + [enc.n_vocab - 1], enc.encode_ordinary("421")]])
    assert llm_rlvr.score(task, enc, [("40+2=", "42")], y).tolist() == [[1, 0]]
    assert llm_rlvr.score(task, enc, [("40+381=", "421")], y).tolist() == [[0, 0]]


@pytest.mark.parametrize("algo", ["tpo", "group_pg", "grpo", "grpo_no_kl"])
def test_leaving_out_equal_groups_keeps_the_gradient(algo, monkeypatch):
    """One update with zero-variance groups left out and one with all groups end in the same parameters."""
    def after(at_rest):
        c = llm_rlvr.check(llm_rlvr.parse([*TINY, "--algo", algo, "--steps", "2"]))
        t = llm_rlvr.Trainer(c)
        t.at_rest, sizes = at_rest, []
        t.token_logp = lambda *a: (sizes.append(len(a[1])), llm_rlvr.token_logp(*a))[1]
        t.optimizer = torch.optim.SGD(t.model.parameters(), 1.0)
        monkeypatch.setattr(llm_rlvr, "score", lambda *a: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]] + [[1.0] * 4] * 3))
        t.update()
        return sizes, [p.detach() for p in t.model.parameters()]

    (few, left_out), (many, plain) = after(True), after(False)
    assert few == [2] and many == [6]
    torch.testing.assert_close(left_out, plain, atol=1e-7, rtol=1e-4)


def test_user_task_in_a_few_lines(tmp_path, monkeypatch, capsys):
    class Reverse:
        """Reverse two letters."""
        defaults = {"max_new_tokens": 3}

        def prompt(self, rng):
            text = " ".join(rng.choices("abcd", k=2))
            return text + ">", " ".join(reversed(text.split()))

        def check(self, key, answer):
            return float(answer == " " + key)

        def guess(self, rng, key):
            return " " + " ".join(rng.choices("abcd", k=2))

    monkeypatch.setitem(llm_rlvr.TASKS, "reverse", Reverse())
    monkeypatch.setattr(llm_rlvr, "puzzles", lambda task, rng, n, split: [task.prompt(rng) for _ in range(n)])
    llm_rlvr.main([*TINY, "--task", "reverse", "--steps", "2", "--warm-steps", "3", "--out", str(tmp_path)])
    assert "took reverse from" in capsys.readouterr().out


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def untimed(rows):
    clocks = ("seconds", "sample_tok_s", "train_tok_s", "peak_mb", "out", "resume")
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows]


def test_resume_is_bit_for_bit(tmp_path, monkeypatch):
    """A run that dies in the middle of an interval, resumed, ends in the same bits and the same log as an uninterrupted one."""
    run = lambda name, *more: llm_rlvr.main([*TINY, "--steps", "7", "--eval-every", "3", "--warm-steps", "5", "--epochs", "2",
                                            "--out", str(tmp_path / name), *more])
    run("whole")
    plain, calls = llm_rlvr.Trainer.update, []

    def dies(self):
        calls.append(1)
        if len(calls) == 6:
            raise ConnectionError("power cut")
        return plain(self)

    monkeypatch.setattr(llm_rlvr.Trainer, "update", dies)
    with pytest.raises(ConnectionError):
        run("cut")
    monkeypatch.setattr(llm_rlvr.Trainer, "update", plain)
    run("cut", "--resume")
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["rng"] == b["rng"]
    assert untimed(records(tmp_path / "whole")) == untimed(records(tmp_path / "cut"))
    kinds = [r["kind"] for r in records(tmp_path / "cut")]
    assert kinds[0] == "config" and kinds[-1] == "result" and kinds.count("eval") == 4 and kinds.count("update") == 7


def test_ctrl_c_saves_first_and_resume_continues(tmp_path):
    command = [sys.executable, "llm_rlvr.py", *TINY, "--warm-steps", "2", "--steps", "60", "--eval-every", "1000", "--out", str(tmp_path)]
    process = subprocess.Popen(command, cwd=Path(__file__).parent, stderr=subprocess.PIPE, text=True)
    while not (tmp_path / "log.jsonl").exists() or len(records(tmp_path)) < 5:
        time.sleep(0.05)
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130 and "--resume" in message and message.count("\n") == 1
    done = torch.load(tmp_path / "checkpoint.pt", weights_only=True)["step"]
    assert 3 <= done < 60
    again = subprocess.run([*command, "--resume"], cwd=Path(__file__).parent, capture_output=True, text=True)
    assert again.returncode == 0 and records(tmp_path)[-1]["kind"] == "result"
    assert [r["step"] for r in records(tmp_path) if r["kind"] == "update"] == list(range(1, 61))


def test_failed_save_leaves_the_old_file(tmp_path, monkeypatch, capsys):
    path = tmp_path / "checkpoint.pt"
    llm_rlvr.write(path, {"step": 1})

    def full_disk(value, f):
        f.write(b"half")
        raise RuntimeError("No space left on device")

    monkeypatch.setattr(torch, "save", full_disk)
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.write(path, {"step": 2})
    assert stop.value.code == 1 and capsys.readouterr().err.count("\n") == 1
    assert llm_rlvr.load(path) == {"step": 1} and list(tmp_path.iterdir()) == [path]


def test_non_finite_gradient_stops_with_the_good_weights(tmp_path, monkeypatch, capsys):
    good = []

    def poisoned(self, *a, plain=llm_rlvr.Trainer.update):
        if self.step == 2:
            good.append([p.detach().clone() for p in self.model.parameters()])
            self.loss, self.at_rest = lambda logp, *_, **__: (logp * math.nan).sum(), False
        return plain(self)

    monkeypatch.setattr(llm_rlvr.Trainer, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main([*TINY, "--warm-steps", "2", "--steps", "5", "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "update 2" in message and "--lr" in message and message.count("\n") == 1
    saved = llm_rlvr.load(tmp_path / "last-good.pt")
    assert all(torch.equal(a, b) for a, b in zip(saved["model"].values(), good[0]))


def test_list_of_algorithms_shares_the_warm_start_and_ends_in_a_table(tmp_path, capsys):
    names = [*llm_rlvr.algorithms(llm_rlvr.Config()), "tpo:anchor=0.25:lr=2e-3"]
    llm_rlvr.main([*TINY, "--algo", ",".join(names), "--steps", "1", "--warm-steps", "4", "--out", str(tmp_path)])
    runs = [records(tmp_path / name.replace(":", "-")) for name in names]
    assert len({r[1]["pass1"] for r in runs}) == 1 and len(list(tmp_path.glob("warm-*.pt"))) == 1
    assert all(set(r[-1]) == {"kind", "task", "algo", "seed", "params", "steps", "pass1_before", "pass1_after", "greedy_after",
                              "seconds", "sample_tok_s", "train_tok_s", "peak_mb"} for r in runs)
    assert runs[-1][0]["anchor"] == 0.25 and runs[-1][0]["lr"] == 2e-3 and runs[0][0]["anchor"] == llm_rlvr.Config().anchor
    table = capsys.readouterr().out.split("algorithm")[-1]
    assert all(name in table for name in names)


@pytest.mark.parametrize("flags, words", [
    (["--algo", "dpo"], "--algo dpo tpo grpo"), (["--task", "chess"], "--task chess knights_knaves"), (["--banana"], "--banana --algo --task"),
    (["--candidates", "1"], "--candidates 1 2"), (["--prompts", "0"], "--prompts 0 1"), (["--steps", "0"], "--steps 0 1"),
    (["--eta", "0"], "--eta 0.0 above"), (["--lr", "nan"], "--lr nan above"), (["--lr", "fast"], "--lr fast"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere"), (["--resume"], "--resume checkpoint.pt"), (["--device", "tpu9"], "--device tpu9 cpu cuda"),
    (["--kv-heads", "3"], "--kv-heads 3"), (["--algo", "tpo:lr=-1"], "--lr -1.0 above"), (["--algo", "tpo:speed=2"], "--speed")])
def test_command_line_errors(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main(flags)
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and all(word in message for word in words.split())
    assert not list(tmp_path.rglob("*.*"))


@pytest.mark.parametrize("damage", ["settings", "truncated"])
def test_resume_refuses(damage, tmp_path, capsys):
    run = [*TINY, "--steps", "1", "--warm-steps", "1", "--out", str(tmp_path)]
    llm_rlvr.main(run)
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main([*run, "--resume", *(["--lr", "0.5"] if damage == "settings" else [])])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and str(path) in message
    assert damage == "truncated" or "--lr 0.5" in message
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name in text for name in (
        "algo task steps prompts candidates epochs lr eta anchor seed eval-every max-new-tokens out resume device compile plot").split())


def test_a_small_run_learns(tmp_path):
    """80 updates on knights and knaves move pass@1 by more than five standard errors (1,024 samples)."""
    llm_rlvr.main(["--anchor", "0.25", "--steps", "80", "--warm-steps", "60", "--width", "64", "--lr", "3e-3",
                   "--prompts", "24", "--out", str(tmp_path), "--device", "cpu"])
    r = records(tmp_path)[-1]
    assert r["pass1_before"] < 0.12 and r["pass1_after"] > r["pass1_before"] + 5 * (0.2 * 0.8 / 1024) ** 0.5


# ------------------------------------------------------------------------------------------------------------------- CUDA
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device")
def test_cuda_bf16_run_learns_nothing_wrong(tmp_path):
    """Losses agree with the CPU, and a bf16 run with and without --compile finishes with finite, on-policy first updates."""
    logp, logp_old, scores = (x.detach().float() for x in group(4, 8))
    torch.testing.assert_close(tpo_loss(logp.cuda(), logp_old.cuda(), scores.cuda()).cpu(), tpo_loss(logp, logp_old, scores))
    for extra in ([], ["--compile"]):
        llm_rlvr.main(["--width", "64", "--steps", "5", "--warm-steps", "20", "--epochs", "2", "--device", "cuda", "--out",
                       str(tmp_path / str(len(extra))), *extra])
        updates = [r for r in records(tmp_path / str(len(extra))) if r["kind"] == "update"]
        assert len(updates) == 5 and all(math.isfinite(v) for r in updates for v in r.values() if not isinstance(v, str))
