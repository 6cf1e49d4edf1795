"""pytest: the mathematics of the losses, then the behaviour of each script, run as a user runs it."""
import gzip
import importlib.util
import io
import itertools
import json
import math
import os
import random
import re
import runpy
import signal
import struct
import subprocess
import sys
import time
import types
import urllib.request
from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

import bandit
import baselines
import llm_rlvr
import seqtask
from baselines import grpo_loss, pg_loss
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


def test_readme_shows_the_code_of_tpo_py():
    root = Path(__file__).parent
    shown = (root / "README.md").read_text().split("```python\n")[1].split("```")[0]
    code = (root / "tpo.py").read_text()
    assert "def tpo_loss" in shown and all(part.strip() in code for part in shown.split("\n\n\n"))


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
    assert pg_loss(logp, logp_old, scores, mask=mask).item() == pytest.approx(pg, rel=1e-5)
    assert baselines.ppo_loss(logp, logp_old, scores, mask=mask).item() == pytest.approx(ppo, rel=1e-5)
    assert baselines.dg_loss(logp, logp_old, scores, eta=0.5, mask=mask).item() == pytest.approx(dg, rel=1e-5)


def test_rewards_per_token_get_a_baseline_per_position():
    logp, scores = torch.randn(5, 1, 3), torch.rand(5, 1, 3)
    expected = -((scores - scores.mean(0, keepdim=True)) * logp).sum(-1).mean()
    torch.testing.assert_close(pg_loss(logp, logp, scores), expected)


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
    assert grpo_loss(logp, logp_old, scores).item() == pytest.approx(sum(per_prompt) / 2, rel=1e-6)
    assert baselines.grpo_masked_loss(logp, logp_old, scores).item() == pytest.approx(per_prompt[0], rel=1e-6)
    assert baselines.grpo_masked_loss(logp, logp_old, torch.ones(2, 4)).item() == 0
    free = grpo_loss(logp[1:], logp_old[1:], scores[1:], beta=0.0)
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
    torch.testing.assert_close(grad(grpo_loss(logp, same, scores), logp), -standardize(scores) / 2)
    assert grad(tpo_loss(logp, same, scores), logp).abs().sum(-1).max() <= 2 / 2


SAMPLE_LOSSES = [baselines.pg_loss, baselines.ppo_loss, baselines.dg_loss, baselines.kondo_loss]
SEQUENCE_LOSSES = [baselines.dr_grpo_loss, baselines.dapo_loss, baselines.gspo_loss, baselines.cispo_loss]
GROUP_LOSSES = [baselines.group_pg_loss, baselines.tpo_no_anchor_loss, baselines.grpo_loss, baselines.grpo_masked_loss,
                baselines.rloo_loss, baselines.maxrl_loss, baselines.rebel_loss, baselines.oapl_loss]


@pytest.mark.parametrize("loss", SAMPLE_LOSSES)
def test_padding_might_as_well_hold_anything(loss):
    """A padded log-ratio of 1e4 has exp = inf; its gradient must be 0, not 0 * inf. Padding has no part in the baseline."""
    for T, score_shape in ((4, (3, 2)), (4, (3, 2, 4)), (None, (3, 2))):
        shape = (3, 2, T) if T else (3, 2)
        logp, logp_old, _ = group(*shape)
        scores, mask = torch.rand(*score_shape, **F64), torch.ones(shape, dtype=torch.bool)
        mask[0, 1], mask[2, 0] = False, torch.tensor([True, True, False, False]) if T else True
        real = mask if scores.shape == mask.shape else mask.any(-1)
        clean = grad(loss(logp, logp_old, scores.masked_fill(~real, 0), mask=mask), logp)
        for bad in (1e4, math.inf, math.nan):
            dirty = loss(logp.masked_fill(~mask, bad), logp_old.masked_fill(~mask, -1e4), scores.masked_fill(~real, bad), mask=mask)
            assert torch.equal(grad(dirty, logp), clean) and clean[~mask].abs().max() == 0 and clean.abs().max() > 0
        if not T:                                                           # the absent sample might as well not be there
            keep = mask.flatten()
            short = [x.flatten()[keep][:, None] for x in (logp, logp_old, scores)]
            torch.testing.assert_close(grad(loss(*short), logp), clean)


def test_baseline_per_position_is_the_mean_over_the_samples_that_reach_it():
    logp, mask = torch.zeros(3, 1, 2, **F64, requires_grad=True), torch.ones(3, 1, 2, dtype=torch.bool)
    r = torch.tensor([[[1.0, 4]], [[3, 9]], [[5, 2]]])
    mask[1, 0, 1] = False                                                   # means 3 and (4 + 2) / 2 = 3
    g = grad(pg_loss(logp, logp, r, mask=mask), logp)
    torch.testing.assert_close(g, torch.tensor([[[2.0, -1]], [[0, 0]], [[-2, 1]]], **F64) / 3)


@pytest.mark.parametrize("loss", [*GROUP_LOSSES, *SAMPLE_LOSSES, *SEQUENCE_LOSSES])
def test_baselines_refuse_shapes_that_broadcasting_would_hide(loss):
    for shapes in (((2, 4), (2, 1), (2, 4)), ((2, 4), (2, 4), (2, 1)), ((2, 4), (2, 4), (4,)), ((2, 1), (2, 4), (2, 4))):
        with pytest.raises(ValueError) as error:
            loss(*(torch.zeros(s) for s in shapes))
        assert sum(str(s) in str(error.value) for s in {*shapes}) >= 2, (shapes, error.value)
    with pytest.raises(ValueError, match=r"\(2, 4.*\(2, 3"):
        loss(*[torch.zeros(2, 4)] * 3, mask=torch.ones(2, 3, dtype=torch.bool))


@pytest.mark.parametrize("loss", [*SAMPLE_LOSSES, *SEQUENCE_LOSSES])
@pytest.mark.parametrize("scores", [(2, 3, 1), (2, 4), (2, 3, 4, 1), (3, 4)])
def test_sample_losses_refuse_scores_that_fit_neither_samples_nor_tokens(loss, scores):
    with pytest.raises(ValueError, match=r"\(2, 3, 4\)"):
        loss(torch.zeros(2, 3, 4), torch.zeros(2, 3, 4), torch.zeros(scores))
    if loss in SEQUENCE_LOSSES:                                             # one score per candidate: it is compared in its group
        with pytest.raises(ValueError, match=r"scores \(2, 3, 4\)"):
            loss(*[torch.zeros(2, 3, 4)] * 3)


@pytest.mark.parametrize("loss", [*GROUP_LOSSES, *SAMPLE_LOSSES, *SEQUENCE_LOSSES])
def test_baselines_survive_impossible_candidates_and_keep_fp64(loss):
    """log p = -inf (or a log-ratio that overflows exp) gives a finite loss and gradient; fp64 in, fp64 out and precise."""
    for extreme in (-math.inf, -1e4, 1e4):
        logp, logp_old = torch.tensor([[extreme, -1.0, -2.0]], requires_grad=True), torch.tensor([[-1.0, extreme, -2.0]])
        for scores in (torch.tensor([[1.0, 0.0, 0.5]]), torch.tensor([[0.5, 0.5, 0.5]])):
            value = loss(logp, logp_old, scores)
            assert value.isfinite() and grad(value, logp).isfinite().all(), (extreme, scores)
    scores = torch.tensor([[1.0, 1 / 3, 0.7]], **F64)
    shift = scores + 1e-9 * torch.tensor([[1.0, 0.0, 0.0]], **F64)          # fp32 cannot tell the two apart
    a, b = (loss(torch.tensor([[-1.0, -2.0, -0.9]], **F64), torch.full((1, 3), -1.0, **F64), s) for s in (scores, shift))
    assert a.dtype == torch.float64 and a != b


def clipped(delta, A, low, high):
    rho = math.exp(delta.item())
    stopped = A > 0 and rho > 1 + high or A < 0 and rho < 1 - low
    return min(max(rho, 1 - low), 1 + high) * A if stopped else torch.exp(delta) * A


def formula(name, l, old, r, real):
    """The losses of one batch by loops over prompts, candidates and tokens; real[b][k] lists the completion's tokens."""
    B, K = r.shape
    sums, D = ({(b, k): sum(x[b, k, t] for t in real[b][k]) for b in range(B) for k in range(K)} for x in (l, l - old))
    tokens, total = sum(len(ts) for row in real for ts in row), 0.0
    batch = float(r.mean())
    delight = {s: (float(r[s]) - batch) * -sums[s].item() for s in sums}
    best = sorted(delight, key=delight.get)[-max(1, int(0.3 * B * K)):]
    for b in range(B):
        R = r[b].tolist()
        mean, sigma = sum(R) / K, float(r[b].std(correction=0))
        u = [(x - mean) / sigma if sigma > 1e-9 else 0.0 for x in R]
        V = math.log(sum(math.exp(x / 0.5) for x in R) / K) * 0.5
        for k in range(K):
            others = [R[j] for j in range(K) if j != k]
            delta = lambda t: l[b, k, t] - old[b, k, t]
            total = total + {
                "rloo": lambda: -(R[k] - sum(others) / (K - 1)) * sums[b, k] / (B * K),
                "maxrl": lambda: -(R[k] - mean) / mean * sums[b, k] / (B * K) if mean else 0 * sums[b, k],
                "rebel": lambda: sum(((D[b, k] - D[b, j]) / 0.7 - (R[k] - R[j])) ** 2 for j in range(k)) / (K * (K - 1) / 2) / B,
                "oapl": lambda: (0.2 * D[b, k] - (R[k] - V)) ** 2 / (B * K),
                "kondo": lambda: -(R[k] - batch) * sums[b, k] / (B * K) if (b, k) in best else 0 * sums[b, k],
                "dr_grpo": lambda: -sum(clipped(delta(t), R[k] - mean, 0.2, 0.2) for t in real[b][k]) / 7 / (B * K),
                "dapo": lambda: -sum(clipped(delta(t), u[k], 0.2, 0.28) for t in real[b][k]) / tokens,
                "gspo": lambda: -clipped(D[b, k] / len(real[b][k]), u[k], 3e-4, 4e-4) / (B * K),
                "cispo": lambda: -sum(min(math.exp(delta(t).item()), 1.3) * u[k] * l[b, k, t] for t in real[b][k]) / tokens}[name]()
    return total


SETTINGS = {"rloo": {}, "maxrl": {}, "rebel": dict(eta=0.7), "oapl": dict(b1=0.5, b2=0.2), "kondo": dict(keep=0.3),
            "dr_grpo": dict(length=7), "dapo": {}, "gspo": {}, "cispo": dict(cap=1.3)}
GROUPED = ("rloo", "maxrl", "rebel", "oapl")


@pytest.mark.parametrize("name", SETTINGS)
@pytest.mark.parametrize("shift", [0.0, 1e-3, 0.3])                          # on policy; around GSPO's clip; around the others'
def test_comparators_are_their_formulas(name, shift):
    l, noise = (torch.randn(3, 4, 5, **F64, generator=torch.Generator().manual_seed(i)) for i in (1, 2))
    l, real = (l - 1).requires_grad_(), [[range(1 + (3 * b + 2 * k) % 5) for k in range(4)] for b in range(3)]
    old, mask = l.detach() - shift * noise, torch.tensor([[[t in ts for t in range(5)] for ts in row] for row in real])
    r = torch.tensor([[1.0, 0, 0, 1], [0, 0, 0, 0], [0, 1, 0, 0]] if name == "maxrl" else
                     [[1.0, 0.2, 0, 0.7], [0.1] * 4, [0, 3, 2, 1]], **F64)
    loss = getattr(baselines, name + "_loss")
    if name in GROUPED:
        value = loss(l.masked_fill(~mask, 0).sum(-1), old.masked_fill(~mask, 0).sum(-1), r, **SETTINGS[name])
    else:
        value = loss(l, old, r, **SETTINGS[name], mask=mask)
    expected = formula(name, l, old, r, real)
    torch.testing.assert_close(value, expected, rtol=1e-9, atol=1e-12)
    g = grad(expected, l)
    torch.testing.assert_close(grad(value, l), g, rtol=1e-9, atol=1e-12)
    assert g.abs().max() > 1e-3


@pytest.mark.parametrize("name", SETTINGS)
def test_comparators_skip_absent_candidates(name):
    """Candidates without a token, full of NaN, might as well not exist; a group of one and a group of none stay finite."""
    tail = () if name in GROUPED else (3,)
    logp, logp_old, _ = group(2, 5, *tail)
    scores, mask = (torch.rand(2, 5, **F64) > 0.5).double(), torch.ones(2, 5, *tail, dtype=torch.bool)
    scores[:, 0], mask[:, 1], mask[:, 4] = 1, False, False
    keep, loss = [0, 2, 3], getattr(baselines, name + "_loss")
    hide = lambda x: x.masked_fill(~mask if x.ndim == mask.ndim else ~mask.any(-1), math.nan)
    dirty, short = loss(*map(hide, (logp, logp_old, scores)), mask=mask), loss(logp[:, keep], logp_old[:, keep], scores[:, keep])
    torch.testing.assert_close(dirty, short)
    torch.testing.assert_close(grad(dirty, logp), grad(short, logp))
    mask[0], mask[1, 1:] = False, False
    lone = loss(logp, logp_old, scores, mask=mask)
    assert lone.isfinite() and grad(lone, logp).isfinite().all()


def test_comparator_defaults():
    """Each default, by a case that another value would change."""
    l = torch.tensor([[[math.log(1.27)], [0.0]]], requires_grad=True)       # A > 0 at ratio 1.27: inside DAPO's 1.28, not .2
    zeros, r = torch.zeros(1, 2, 1), torch.tensor([[1.0, 0.0]])
    for loss, moves in ((baselines.dapo_loss, True), (baselines.dr_grpo_loss, False)):
        assert (grad(loss(l, zeros, r), l)[0, 0] != 0) == moves
    for ratio, moves in ((3.9e-4, True), (4.1e-4, False)):
        l = torch.tensor([[[math.log1p(ratio)], [0.0]]], **F64, requires_grad=True)
        assert (grad(baselines.gspo_loss(l, zeros.double(), r), l)[0, 0] != 0) == moves
    l = torch.tensor([[[math.log(9.0)], [0.0]]], requires_grad=True)        # CISPO: weight 5, never 0
    assert grad(baselines.cispo_loss(l, zeros, r), l)[0, 0].item() == pytest.approx(-5 / 2)
    l = torch.randn(10, 10, requires_grad=True)
    assert (grad(baselines.kondo_loss(l, l.detach(), torch.rand(10, 10)), l) != 0).sum() == 3


# ------------------------------------------------------------------------------------------------------------ llm_rlvr.py
TINY = ["--width", "32", "--layers", "2", "--heads", "4", "--kv-heads", "2", "--prompts", "6", "--candidates", "4", "--device", "cpu"]


def tiny_model(vocab=20, **kw):
    torch.manual_seed(1)
    return llm_rlvr.GPT(llm_rlvr.ModelConfig(vocab, 32, 2, 4, 2, 8, 48, **kw))


def plain_logits(model, ids):
    """Of unpadded sequences (B, S) by one ordinary causal forward: nothing shared, nothing cached."""
    def attend(_, q, k, v):
        q, k, v = (x.transpose(1, 2) for x in (q, k, v))
        return F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True).transpose(1, 2)

    return model.lm_head(model(ids, torch.arange(ids.shape[1]).expand(ids.shape), attend))


def plain_logp(model, prompt, completion):
    ids = torch.tensor([prompt + completion])
    return plain_logits(model, ids)[0].log_softmax(-1)[len(prompt) - 1:-1].gather(-1, ids[0, len(prompt):, None])[:, 0]


@pytest.mark.parametrize("kw", [{}, dict(qk_norm=False, qkv_bias=True, tied=True)])
def test_shared_prompt_and_cache_give_the_plain_log_probs(kw):
    model, prompts = tiny_model(**kw), [[3, 1, 4, 1, 5], [9, 2], [6, 5, 3, 5]]
    tokens = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    valid = torch.tensor([[False] * (5 - len(p)) + [True] * len(p) for p in prompts])
    y, real, cached = llm_rlvr.sample(model, tokens, valid, 3, 6, end=19, generator=torch.Generator().manual_seed(0))
    logp = llm_rlvr.token_logp(model, tokens, valid, y.flatten(0, 1), torch.arange(3).repeat_interleave(3)).view(y.shape)
    for b, k in itertools.product(range(3), range(3)):
        n = int(real[b, k].sum())
        expected = plain_logp(model, prompts[b], y[b, k].tolist())
        torch.testing.assert_close(logp[b, k], expected, atol=1e-5, rtol=1e-5)
        torch.testing.assert_close(cached[b, k, :n], expected[:n], atol=1e-5, rtol=1e-5)
        assert (cached[b, k, n:] == 0).all()


def test_shrinking_batch_and_any_set_of_rows_give_the_plain_log_probs():
    """50 tokens, so that rows whose completions have ended are dropped on the way."""
    torch.manual_seed(1)
    model, prompts = llm_rlvr.GPT(llm_rlvr.ModelConfig(8, 32, 2, 4, 2, 8, 48)), [[3, 1, 4, 1, 5], [6, 2], [6, 5, 3, 5]]
    sizes, block = [], model.model["layers"][0]
    hook = block.register_forward_pre_hook(lambda _, args: sizes.append(args[0].shape[0]))
    tokens = torch.tensor([[0] * (5 - len(p)) + p for p in prompts])
    valid = torch.tensor([[False] * (5 - len(p)) + [True] * len(p) for p in prompts])
    y, real, cached = llm_rlvr.sample(model, tokens, valid, 4, 50, 7, torch.Generator().manual_seed(0))
    hook.remove()
    assert sizes[0] == 3 and sizes[1] == 12 > sizes[-1] > 0
    rows, of = torch.tensor([11, 4, 0, 7, 1]), torch.tensor([2, 1, 0, 1, 0])
    logp = llm_rlvr.token_logp(model, tokens, valid, y.flatten(0, 1)[rows], of)
    expected = torch.stack([plain_logp(model, prompts[b], y.flatten(0, 1)[r].tolist()) for r, b in zip(rows, of)])
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    real = real.flatten(0, 1)[rows]
    torch.testing.assert_close(cached.flatten(0, 1)[rows], expected.masked_fill(~real, 0), atol=1e-5, rtol=1e-5)
    assert real.sum(-1).max() > 16


def test_completions_of_one_token():
    model, tokens = tiny_model(), torch.tensor([[3, 1, 4], [0, 9, 2]])
    y, real, cached = llm_rlvr.sample(model, tokens, tokens > 0, 2, 1, 19, torch.Generator().manual_seed(0))
    logp = llm_rlvr.token_logp(model, tokens, tokens > 0, y.flatten(0, 1), torch.tensor([0, 0, 1, 1]))
    expected = torch.stack([plain_logp(model, p, y[b, k].tolist()) for b, p in enumerate(([3, 1, 4], [9, 2])) for k in (0, 1)])
    torch.testing.assert_close(logp, expected, atol=1e-5, rtol=1e-5)
    torch.testing.assert_close(cached.flatten(0, 1), expected, atol=1e-5, rtol=1e-5)


@pytest.mark.parametrize("algo", ["tpo", "grpo", "pg", "dapo"])
@pytest.mark.parametrize("flags", [["--micro-tokens", "40"], ["--micro-tokens", "200"], ["--recompute"]], ids=" ".join)
def test_micro_batches_and_recomputing_give_the_same_update(algo, flags, monkeypatch):
    """Groups are split over micro-batches, over two epochs; scores are fixed, one group has equal ones."""
    scores = torch.randint(0, 2, (6, 4), generator=torch.Generator().manual_seed(0)).float()
    scores[2] = 0
    monkeypatch.setattr(llm_rlvr, "score", lambda *a: scores)

    def after(*flags):
        t = llm_rlvr.Trainer(llm_rlvr.parse([*TINY, "--algo", algo, "--epochs", "2", "--max-new-tokens", "40", "--lr", "0.01",
                                              *flags]))
        t.end, t.optimizer = -1, torch.optim.SGD(t.model.parameters(), 1.0)        # no end: all completions have 40 tokens
        calls = []
        t.token_logp = lambda *a: (calls.append(len(a[1])), llm_rlvr.token_logp(*a))[1]
        t.model.model["embed_tokens"].weight.data *= 0.5
        t.update()
        return calls, torch.cat([p.detach().flatten() for p in t.model.parameters()])

    (calls, split), (one, whole) = after(*flags), after()
    assert len(one) <= 3 and (len(calls) > 3 or flags == ["--recompute"])
    torch.testing.assert_close(split, whole, atol=1e-6, rtol=1e-4)


def test_large_vocabulary_in_chunks(monkeypatch):
    model = tiny_model(vocab=50)
    tokens, y = torch.tensor([[1, 2, 3]] * 2), torch.randint(0, 50, (6, 5), generator=torch.Generator().manual_seed(0))

    def results():
        model.zero_grad()
        logp = llm_rlvr.token_logp(model, tokens, tokens > 0, y, torch.tensor([0, 0, 0, 1, 1, 1]))
        logp.square().sum().backward()
        return [logp.detach(), *(p.grad for p in model.parameters())]

    whole, max_ = results(), max
    monkeypatch.setattr(llm_rlvr, "max", lambda *a: 7 if a == (1, 2**24 // 50) else max_(*a), raising=False)
    heads = []
    model.lm_head.register_forward_hook(lambda *a: heads.append(a[2].shape[0]))
    scale = max_(g.abs().max().item() for g in whole)                              # rounding is relative to the largest
    torch.testing.assert_close(results(), whole, atol=1e-6 * scale, rtol=1e-5)
    assert max(heads) == 7


def test_two_processes_are_one_with_the_same_batch(tmp_path, monkeypatch):
    """Whole groups to each rank: the same samples, losses and weights up to rounding, also where one process began."""
    words = ["llm_rlvr.py", *TINY, "--algo", "grpo", "--steps", "3", "--eval-every", "1", "--eval-puzzles", "8",
             "--warm-steps", "60", "--max-new-tokens", "40", "--micro-tokens", "500", "--out"]
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(llm_rlvr.Trainer, "update", dies_at(2))
        llm_rlvr.main([*words[1:], str(tmp_path / "cut")])
    env, both = {**os.environ, "OMP_NUM_THREADS": "1"}, "-m torch.distributed.run --nproc-per-node 2 --master-port 29517".split()
    for name, launcher, more in (("one", [], []), ("two", both, []), ("cut", both, ["--resume"])):
        done = subprocess.run([sys.executable, *launcher, *words, str(tmp_path / name), *more], env=env, capture_output=True,
                              text=True, cwd=Path(__file__).parent)
        assert done.returncode == 0, done.stderr
        assert done.stdout.count("took graph_color") == 1
    one, two, cut = (torch.load(tmp_path / name / "checkpoint.pt", weights_only=True) for name in ("one", "two", "cut"))
    for other in (two, cut):
        torch.testing.assert_close(one["model"], other["model"], atol=1e-5, rtol=1e-4)
        for i, moments in one["optimizer"]["state"].items():             # each rank kept a part of them, the file has all
            torch.testing.assert_close(moments, other["optimizer"]["state"][i], atol=1e-4, rtol=1e-2)
    one, two = ([{k: v for k, v in r.items() if k != "kind"} for r in records(tmp_path / name) if r["kind"] == "update"]
                for name in ("one", "two"))
    for a, b in zip(one, two, strict=True):
        assert a == pytest.approx(b, rel=1e-3, abs=1e-4)
    assert any(r["grad_norm"] > 0 for r in one)


def test_end_token_counts_and_padding_does_not():
    model, tokens = tiny_model(), torch.tensor([[1, 2, 3]] * 8)
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
    """Guesses have the right form and are rarely right; the encoding is lossless and leaves room for the end token."""
    task, rng = llm_rlvr.TASKS[name], random.Random(0)
    enc, T = llm_rlvr.make_encoding(task), llm_rlvr.parse(["--task", name]).max_new_tokens
    scores = []
    for text, key in llm_rlvr.puzzles(task, random.Random(1), 50, "train"):
        for _ in range(20):
            guess = task.guess(rng, key)
            scores.append(task.check(key, guess))
            assert enc.decode(llm_rlvr.encode(enc, text + guess)) == text + guess
            assert len(llm_rlvr.encode(enc, guess)) < T
        assert task.check(key, "") == task.check(key, guess + " " + guess) == task.check(key, "nonsense") == 0
    assert scores.count(1) / len(scores) < 0.2 and (scores.count(1) > 0 or name == "addition")


PARTS = {"knights_knaves": lambda text: tuple(frozenset(re.findall(r"(\w) is a (\w+)", claim)) | {claim.count(" or ")}
                                              for claim in text.split(". ")),
         "graph_color": lambda text: frozenset(map(frozenset, re.findall(r"(\w)-(\w)", text))),
         "addition": lambda text: frozenset(text[:-1].split("+"))}


@pytest.mark.parametrize("name", llm_rlvr.TASKS)
def test_evaluation_puzzles_are_in_no_other_split_under_any_spelling(name):
    """Puzzles compared as sets of what they say: edges or terms in another order are the same puzzle."""
    task, same = llm_rlvr.TASKS[name], PARTS[name]
    heldout, test = ([same(text) for text, _ in llm_rlvr.exam(task, split, 256)] for split in ("heldout", "test"))
    train = {same(text) for text, _ in llm_rlvr.puzzles(task, random.Random(1), 2000, "train")}
    assert len(set(heldout)) == len(heldout) > 200 and len(set(test)) == len(test) > 200
    assert not train & set(heldout) and not train & set(test) and not set(heldout) & set(test)
    assert len(train) > 900 and llm_rlvr.exam(task, "test", 256) == llm_rlvr.exam.__wrapped__(task, "test", 256)


def test_knights_knaves_solutions_are_unique_and_right():
    """Every printed puzzle parsed and solved again from its text alone; then every kind of answer to it."""
    task = llm_rlvr.TASKS["knights_knaves"]
    for text, key in llm_rlvr.puzzles(task, random.Random(2), 100, "train"):
        said = dict(s.split(" says ") for s in text.removesuffix(". Who?").split(". "))
        worlds = []
        for w in itertools.product(("knight", "knave"), repeat=3):
            w = dict(zip("ABC", w))
            true = {p: eval(re.sub(r"(\w) is a (\w+)", lambda m: str(w[m[1]] == m[2]), claim)) for p, claim in said.items()}
            worlds += [w] if all(true[p] == (w[p] == "knight") for p in "ABC") else []
        assert worlds == [key]
        named = [f" {p} {kind}" for p, kind in key.items()]
        assert all(task.check(key, "".join(order)) == 1 for order in itertools.permutations(named))
        lie = " A " + {"knight": "knave", "knave": "knight"}[key["A"]]
        assert task.check(key, "".join([lie, *named[1:]])) == pytest.approx(2 / 3)             # partial credit
        for wrong in (named[1:], [*named, named[0]], [named[0], named[0], named[2]], [lie, *named], [*named, " A"]):
            assert task.check(key, "".join(wrong)) == 0


def test_graph_color_and_addition_checkers():
    color, edges = llm_rlvr.TASKS["graph_color"], ["A-B", "B-C", "C-F"]
    assert color.check(edges, " red green red red red blue") == 1 == color.check(edges, " green red blue red green green")
    for wrong in (" red red green red red red", " red green red red red", " red green red red red blue blue", " red pink red red red blue"):
        assert color.check(edges, wrong) == 0
    assert llm_rlvr.TASKS["addition"].check("42", "42") == 1 and llm_rlvr.TASKS["addition"].check("42", "042") == 0


@pytest.mark.parametrize("text, number", [
    ("#### 18", 18), ("6 + 4 = 10, so #### 1,080", 1080), ("#### 109,200,000 people", 109_200_000), ("The answer is $18.00.", 18),
    ("The answer is 18.", 18), ("the ANSWER IS: -3 degrees", -3), ("-$3.50", -3.5), ("$-3", -3), ("\u22127", -7), ("**Answer:** 50%", 50), ("**Answer**: 5", 5),
    (r"\boxed{18} dollars, 3 each", 18), (r"The answer is $\boxed{1{,}080}$.", 1080), ("The answer is 5, not 7", 5), (".5", 0.5),
    ("The answer is 3. No, wait: the answer is 4 of 9.", 4), ("12 eggs and 10-3 left", 3), ("in 2020, 5 were left", 5), ("007", 7),
    ("The answer is 18. Is this answer: correct?", 18), ("9,87", 87), ("1" + "0" * 30, 10 ** 30), ("none", None), ("", None), ("The answer is N.", None)])
def test_number_of_an_answer(text, number):
    assert llm_rlvr.final_number(text) == number
    task = llm_rlvr.Gsm8k.check
    assert number is None or [task(None, llm_rlvr.final_number(f"#### {n}"), text) for n in (number, number + 1)] == [1, 0]


def gsm8k_folder(folder, train=60, test=20):
    """Lines in the form of GSM8K: a calculator mark, a thousands comma, the answer behind ####."""
    for name, n, start in (("train", train, 0), ("test", test, 1000)):
        lines = [{"question": f"What is {i} + 1000?", "answer": f"{i} + 1000 = <<{i}+1000={i + 1000}>>{i + 1000}\n#### {i + 1000:,}"}
                 for i in range(start, start + n)]
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return ["--init-from", "checkpoint", "--task", "gsm8k", "--data", str(folder)]


def found(argv):
    return llm_rlvr.find_task(llm_rlvr.parse(argv))


def prompts_of(task, split):
    return dict(llm_rlvr.puzzles(task, random.Random(0), 400, split))


@pytest.mark.parametrize("shots", [0, 2])
def test_gsm8k_splits_shots_and_score(shots, tmp_path):
    flags = [*gsm8k_folder(tmp_path), "--shots", str(shots)]
    task = found(flags)
    train, heldout, test = (prompts_of(task, split) for split in ("train", "heldout", "test"))
    asked = [{text.split("Question: ")[-1].removesuffix("\nAnswer:") for text in part} for part in (train, heldout, test)]
    assert asked[2] == {f"What is {i} + 1000?" for i in range(1000, 1020)}                     # test.jsonl, all of it and no more
    assert len(asked[0]) > 4 * len(asked[1]) > 0 and len(asked[0] | asked[1]) == 60 - shots and not asked[0] & asked[1]
    heads = {text.rpartition("Question: ")[0] for text in train | heldout | test}
    assert len(heads) == 1 and (head := heads.pop()).startswith("Think step by step") and "<<" not in head
    shown = re.findall(r"Question: (.*)\nAnswer: (\d+) \+ 1000 = (\d+)\nThe answer is ([\d,]+)\.\n\n", head)
    assert len(shown) == shots == head.count("Question: ") and not {q for q, *_ in shown} & set.union(*asked)
    assert all(int(a) + 1000 == int(b) == int(c.replace(",", "")) for _, a, b, c in shown)
    assert all(task.check(key, f"1 and 1. The answer is {key}.") == 1 > task.check(key, "#### 1") for key in test.values())
    assert found(flags) is task and llm_rlvr.exam(task, "test", 8) is llm_rlvr.exam(task, "test", 8)


def test_malformed_lines_are_named_counted_and_left_out(tmp_path, capsys):
    flags, path = gsm8k_folder(tmp_path), tmp_path / "train.jsonl"
    bad = ["{", "[1]", "3", "{}", '{"question": 3, "answer": "#### 3"}', '{"question": " ", "answer": "#### 3"}', '{"question": "q", "answer": null}',
           '{"question": "q", "answer": "3"}', '{"question": "q", "answer": "####"}', '{"question": "\\ud800", "answer": "#### 3"}', "\u00e9", "[" * 99_999]
    good = path.read_text().splitlines()
    path.write_bytes("\n".join([good[0], "", *bad, *good[1:]]).encode("latin-1"))
    assert len(set(prompts_of(task := found(flags), "train")) | set(prompts_of(task, "heldout"))) == 60
    err = capsys.readouterr().err.splitlines()
    assert [line.split(": ")[0] for line in err] == [f"{path}:{n}" for n in range(3, 13)] + [str(path)]
    assert "12 of 73 lines" in err[-1] and all("####" in line for line in err[:-1])


def test_jsonl_scores_numbers_by_value_and_text_by_the_last_line(tmp_path):
    path, flags = tmp_path / "mine.jsonl", ["--init-from", "checkpoint", "--task", "jsonl", "--data", str(tmp_path / "mine.jsonl")]
    path.write_text("".join(json.dumps({"prompt": f"say {i}", "answer": i / 2 if i % 2 else "Yes, it is"}) + "\n" for i in range(100)))
    task = found(flags)
    parts = [prompts_of(task, split) for split in ("train", "heldout", "test")]
    assert sum(map(len, parts)) == len(parts[0] | parts[1] | parts[2]) == 100 and all(parts)
    assert all(llm_rlvr.hash_split(text) == "heldout" for text in parts[1])
    key = (parts[0] | parts[1] | parts[2])["say 7"]
    assert [task.check(key, a) for a in ("so 7/2 = 3.50.", "The answer is $3.5, not 4", "3", "", "3.5 or 4")] == [1, 1, 0, 0, 0]
    for text, right in (("Hm.\n\n answer: yes, IT is \n\n", 1), ("yes, it is", 1), ("yes, it is\nor not", 0), ("yes", 0), ("", 0)):
        assert task.check("Yes, it is", text) == right


def test_reasoning_gym(capsys):
    pytest.importorskip("reasoning_gym", reason="needs: pip install reasoning-gym")
    task = found(["--init-from", "checkpoint", "--task", "rg:chain_sum"])
    for text, entry in llm_rlvr.puzzles(task, random.Random(0), 20, "train"):
        assert entry["question"] in text and "<answer>" in text and llm_rlvr.hash_split(text) == "train"
        right = entry["answer"]
        assert task.check(entry, f" {right}\n") == task.check(entry, f"<answer>0.5</answer> no: <answer>\n{right} </answer>.") == 1
        assert task.check(entry, "zebra") == task.check(entry, f"{right}: <answer>zebra</answer>") == 0
    color = found(["--init-from", "checkpoint", "--task", "rg:graph_color"])
    text, entry = color.prompt(random.Random(0))
    assert color.check(entry, f"<answer>{json.dumps(entry['metadata']['possible_answer'])}</answer>") == 1
    primes = found(["--init-from", "checkpoint", "--task", "rg:prime_factorization"])       # its checker raises on what is no number
    assert primes.check(primes.prompt(random.Random(0))[1], "zebra") == 0
    one_line(lambda: found(["--init-from", "checkpoint", "--task", "rg:chess9"]), capsys, "--task rg:chess9 reasoning_gym.factory.DATASETS")


def test_tasks_for_pretrained_models_name_what_is_missing(tmp_path, capsys, monkeypatch):
    for task in ("gsm8k", "jsonl", "rg:chain_sum"):
        one_line(lambda: found(["--task", task]), capsys, f"--task {task} --init-from")
    init = ["--init-from", "checkpoint", "--task"]
    for task in ("gsm8k", "jsonl"):
        one_line(lambda: found([*init, task]), capsys, f"--task {task} --data")
    one_line(lambda: found([*init, "jsonl", "--data", str(tmp_path)]), capsys, f"--data {tmp_path} directory")
    one_line(lambda: found([*init, "gsm8k", "--data", str(tmp_path)]), capsys, f"--data {tmp_path / 'train.jsonl'}")
    one_line(lambda: found([*gsm8k_folder(tmp_path), "--shots", "-1"]), capsys, "--shots -1")
    (tmp_path / "empty.jsonl").write_text("\n\n")
    one_line(lambda: found([*init, "jsonl", "--data", str(tmp_path / "empty.jsonl")]), capsys, "--data empty.jsonl")
    one_line(lambda: found(["--data", "mine.jsonl"]), capsys, "--data mine.jsonl gsm8k jsonl graph_color")
    one_line(lambda: found([*init, "rg:chain_sum", "--shots", "4"]), capsys, "--shots 4 gsm8k rg:chain_sum")
    one_line(lambda: found([*init, "chess"]), capsys, "--task chess knights_knaves gsm8k jsonl rg:NAME")
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    one_line(lambda: found([*init, "rg:leg_counting"]), capsys, "--task rg:leg_counting pip install reasoning-gym")


def test_broken_chat_template_is_one_line(tmp_path, capsys):
    bpe_folder("qwen", tmp_path)
    for template in ("{% if %}", "{{ messages[0].nothing.more }}"):
        (tmp_path / "chat_template.jinja").write_text(template)
        _, _, encode = llm_rlvr.read_tokenizer(tmp_path)
        one_line(lambda: encode("hello"), capsys, "chat template does not render")


def test_score_that_is_not_finite_names_the_task(monkeypatch, capsys):
    t = llm_rlvr.Trainer(llm_rlvr.parse(TINY))
    monkeypatch.setattr(llm_rlvr, "score", lambda *_: torch.full((6, 4), math.nan))
    one_line(t.update, capsys, "--task graph_color check not finite", status=1)


def test_errors_of_a_checker_are_not_hidden():
    enc = llm_rlvr.make_encoding(llm_rlvr.TASKS["addition"])
    y = torch.tensor([[[*enc.encode_ordinary("42"), enc.n_vocab - 1]]])
    with pytest.raises(KeyError, match="typo"):
        llm_rlvr.score(types.SimpleNamespace(check=lambda key, answer: {}["typo"]), enc, enc.n_vocab - 1, [("40+2=", "42")], y)


def test_unfinished_completion_scores_zero():
    task = llm_rlvr.TASKS["addition"]
    enc = llm_rlvr.make_encoding(task)
    y = torch.tensor([[enc.encode_ordinary("42") + [enc.n_vocab - 1], enc.encode_ordinary("421")]])
    assert llm_rlvr.score(task, enc, enc.n_vocab - 1, [("40+2=", "42")], y).tolist() == [[1, 0]]
    assert llm_rlvr.score(task, enc, enc.n_vocab - 1, [("40+381=", "421")], y).tolist() == [[0, 0]]


@pytest.mark.parametrize("algo", [name for name, (*_, rests) in llm_rlvr.algorithms(llm_rlvr.Config()).items() if rests])
def test_leaving_out_equal_groups_keeps_the_gradient(algo, monkeypatch):
    """One update with zero-variance groups left out and one with every row that has a slope end in the same parameters."""
    def after(at_rest):
        c = llm_rlvr.parse([*TINY, "--algo", algo, "--epochs", "1", "--steps", "2"])
        t = llm_rlvr.Trainer(c)
        t.at_rest, sizes = at_rest, []
        t.token_logp = lambda *a: (sizes.append(len(a[1])), llm_rlvr.token_logp(*a))[1]
        t.optimizer = torch.optim.SGD(t.model.parameters(), 1.0)
        monkeypatch.setattr(llm_rlvr, "score", lambda *a: torch.tensor([[1.0, 0, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]] + [[1.0] * 4] * 3))
        t.update()
        return sizes, [p.detach() for p in t.model.parameters()]

    (few, left_out), (many, plain) = after(True), after(False)
    assert few == [2] and many == ([6] if algo == "tpo" else [2])              # tpo's p - q is rounding there, not 0
    torch.testing.assert_close(left_out, plain, atol=1e-7, rtol=1e-4)


@pytest.mark.parametrize("epochs", ["1", "2"])
@pytest.mark.parametrize("algo, moves", [("tpo", False), ("grpo", False), ("pg", False), ("tpo_no_anchor", True)])
def test_groups_of_equal_scores_leave_the_weights_alone(algo, moves, epochs, monkeypatch):
    """Bit for bit on the first update: AdamW would turn a gradient of 1e-9 into a full step."""
    t = llm_rlvr.Trainer(llm_rlvr.parse([*TINY, "--algo", algo, "--epochs", epochs]))
    before = [p.detach().clone() for p in t.model.parameters()]
    monkeypatch.setattr(llm_rlvr, "score", lambda *a: torch.ones(6, 4))
    t.update()
    assert all(torch.equal(a, b) for a, b in zip(before, t.model.parameters())) != moves


def test_update_trains_the_end_token_and_nothing_behind_it(monkeypatch):
    """The gradient of an update: unmoved by tokens behind the end token, moved by the end token's own log-prob."""
    def gradients(change):
        t = llm_rlvr.Trainer(llm_rlvr.parse([*TINY, "--algo", "tpo", "--epochs", "1", "--steps", "2"]))
        y = torch.randint(0, t.end, (6, 4, 7), generator=torch.Generator().manual_seed(3))
        y[:, :, 4] = t.end
        change(y, t.end)
        real = llm_rlvr.up_to_end(y, t.end)
        monkeypatch.setattr(llm_rlvr, "sample", lambda *a, **kw: (y, real, torch.zeros(6, 4, 7)))
        monkeypatch.setattr(llm_rlvr, "score", lambda *a: torch.eye(4)[[0, 1, 2, 3, 0, 1]])
        t.optimizer = torch.optim.SGD(t.model.parameters(), 1.0)
        t.update()
        return torch.cat([p.detach().flatten() for p in t.model.parameters()])

    plain = gradients(lambda y, end: None)
    assert torch.equal(plain, gradients(lambda y, end: y[:, :, 5:].fill_(0)))
    weight = {}                               # the gradient with respect to the log-prob of the end token is p - q

    def watched(*args, real=llm_rlvr.token_logp):
        logp = real(*args)
        logp.register_hook(lambda g: weight.update(logp=g))
        return logp

    monkeypatch.setattr(llm_rlvr, "token_logp", watched)
    gradients(lambda y, end: None)
    g = weight["logp"]
    assert g.shape == (24, 5) and (g[:, 4] != 0).all() and torch.equal(g[:, 4], g[:, 0])


def test_user_task_in_a_few_lines(tmp_path, monkeypatch, capsys):
    class Reverse:
        """Reverse three letters."""
        defaults = {"max_new_tokens": 4}

        def prompt(self, rng):
            text = " ".join(rng.choices("abcdefgh", k=3))
            return text + ">", " ".join(reversed(text.split()))

        def check(self, key, answer):
            return float(answer == " " + key)

        def guess(self, rng, key):
            return " " + " ".join(rng.choices("abcdefgh", k=3))

    monkeypatch.setitem(llm_rlvr.TASKS, "reverse", Reverse())
    run = [*TINY, "--task", "reverse", "--steps", "2", "--warm-steps", "3", "--out", str(tmp_path)]
    llm_rlvr.main(run)
    assert "took reverse from" in capsys.readouterr().out

    class Small(Reverse):
        prompt = lambda self, rng: ("a b>", "b a")

    monkeypatch.setitem(llm_rlvr.TASKS, "reverse", Small())
    one_line(lambda: llm_rlvr.main(run), capsys, "--task more puzzles")
    one_line(lambda: llm_rlvr.encode(llm_rlvr.make_encoding(Reverse()), "a zebra"), capsys, "--task zebra")


def one_line(call, capsys, words, status=2):
    """The call ends the program with this status and one line on stderr that holds all the words."""
    with pytest.raises(SystemExit) as stop:
        call()
    message = capsys.readouterr().err
    assert stop.value.code == status and message.count("\n") == 1 and all(word in message for word in words.split()), message


def records(folder):
    return [json.loads(line) for line in (Path(folder) / "log.jsonl").read_text().splitlines()]


def untimed(rows):
    clocks = ("seconds", "sample_tok_s", "train_tok_s", "peak_mb", "out", "resume")
    return [{k: v for k, v in r.items() if k not in clocks} for r in rows]


def dies_at(n, update=llm_rlvr.Trainer.update):
    calls = []

    def dying(self):
        calls.append(1)
        if len(calls) == n:
            raise ConnectionError("power cut")
        return update(self)

    return dying


def test_resume_is_bit_for_bit(tmp_path, monkeypatch):
    """A run that dies in the middle of an interval, resumed, ends in the same bits and the same log as an uninterrupted one."""
    run = lambda name, *more: llm_rlvr.main([*TINY, "--steps", "7", "--eval-every", "3", "--warm-steps", "5", "--epochs", "2",
                                            "--out", str(tmp_path / name), *more])
    run("whole")
    with monkeypatch.context() as patch, pytest.raises(ConnectionError):
        patch.setattr(llm_rlvr.Trainer, "update", dies_at(6))
        run("cut")
    run("cut", "--resume")
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"]) and a["rng"] == b["rng"]
    assert untimed(records(tmp_path / "whole")) == untimed(records(tmp_path / "cut"))
    kinds = [r["kind"] for r in records(tmp_path / "cut")]
    assert kinds[0] == "config" and kinds[-1] == "result" and kinds.count("eval") == 4 and kinds.count("update") == 7


def test_ctrl_c_saves_first_and_resume_continues(tmp_path):
    """A run interrupted by the keyboard and resumed ends in the same bits as one that was left alone."""
    command = lambda name, *more: [sys.executable, "llm_rlvr.py", *TINY, "--warm-steps", "2", "--steps", "20", "--eval-every", "4",
                                   "--out", str(tmp_path / name), *more]
    options = dict(cwd=Path(__file__).parent, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    process = subprocess.Popen(command("cut"), **options)
    while "4/20" not in process.stdout.readline():
        assert process.poll() is None
    process.send_signal(signal.SIGINT)
    shown, message = process.communicate()
    assert "stopping soon, with a checkpoint" in shown
    assert process.returncode == 130 and "--resume" in message and message.count("\n") == 1
    assert 4 <= torch.load(tmp_path / "cut" / "checkpoint.pt", weights_only=True)["step"] < 20
    (tmp_path / "cut" / "log.jsonl").write_text("{half a li")                # the checkpoint holds the log as well
    for name, more in (("cut", ["--resume"]), ("whole", [])):
        assert subprocess.run(command(name, *more), **options).returncode == 0
    a, b = (torch.load(tmp_path / n / "checkpoint.pt", weights_only=True) for n in ("whole", "cut"))
    assert all(torch.equal(a["model"][k], b["model"][k]) for k in a["model"])
    assert untimed(records(tmp_path / "whole")) == untimed(records(tmp_path / "cut"))


def test_ctrl_c_in_the_warm_start_is_one_line(tmp_path):
    process = subprocess.Popen([sys.executable, "-u", "-c", "import llm_rlvr, sys\n"
                                "llm_rlvr.warmup = lambda step: print('warm') or 1.0\nllm_rlvr.main(sys.argv[1:])", *TINY,
                                "--warm-steps", "100000", "--out", str(tmp_path)], cwd=Path(__file__).parent,
                               stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "warm\n"
    process.send_signal(signal.SIGINT)
    message = process.communicate()[1]
    assert process.returncode == 130 and message.count("\n") == 1 and not list(tmp_path.iterdir())


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


@pytest.mark.parametrize("bad_loss", [lambda logp: (logp - logp.detach()).abs().sqrt().sum(),               # the gradient
                                      lambda logp: logp.sum() + torch.where(logp < 9, math.inf, logp).sum().detach()])
def test_non_finite_loss_or_gradient_stops_with_the_good_weights(bad_loss, tmp_path, monkeypatch, capsys):
    good = []

    def poisoned(self, *a, plain=llm_rlvr.Trainer.update):
        if self.step == 2:
            good.append([p.detach().clone() for p in self.model.parameters()])
            self.loss, self.at_rest = lambda logp, *_, **__: bad_loss(logp), False
        return plain(self)

    monkeypatch.setattr(llm_rlvr.Trainer, "update", poisoned)
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main([*TINY, "--warm-steps", "2", "--steps", "5", "--out", str(tmp_path)])
    message = capsys.readouterr().err
    assert stop.value.code == 1 and "update 2" in message and "--lr" in message and message.count("\n") == 1
    saved = llm_rlvr.load(tmp_path / "last-good.pt")
    assert all(torch.equal(a, b) for a, b in zip(saved["model"].values(), good[0], strict=True))


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
    (["--candidates", "1"], "--candidates 1 2"), (["--candidates", "1", "--algo", "dapo"], "--candidates 1 2"), (["--prompts", "0"], "--prompts 0 1"), (["--steps", "0"], "--steps 0 1"),
    (["--eta", "0"], "--eta 0.0 1e-6"), (["--eta", "1e-300"], "--eta 1e-6"), (["--lr", "nan"], "--lr nan above"),
    (["--lr", "fast"], "--lr fast allowed float"), (["--anchor", "inf"], "--anchor inf"), (["--seed", str(2**64)], "--seed 2^63"),
    (["--device", "meta"], "--device meta cpu"), (["--algo", "tpo,tpo"], "--algo tpo,tpo repeats"), (["--algo", "tpo:"], "--algo lr"),
    (["--algo", "tpo:out=x"], "--algo tpo:out=x lr"), (["--algo", "tpo:lr=fast"], "--lr fast float"),
    (["--out", "/proc/nowhere"], "--out /proc/nowhere"), (["--algo", "tpo,pg", "--export", "x"], "--export x one algorithm"), (["--resume"], "--resume checkpoint.pt"), (["--device", "tpu9"], "--device tpu9 cpu cuda"),
    (["--kv-heads", "3"], "--kv-heads 3"), (["--width", "0"], "--width 0 1"), (["--algo", "tpo:lr=-1"], "--lr -1.0 above"), (["--algo", "tpo:speed=2"], "--algo tpo:speed=2 lr")])
def test_command_line_errors(flags, words, tmp_path, capsys, monkeypatch):
    monkeypatch.chdir(tmp_path)
    one_line(lambda: llm_rlvr.main(flags), capsys, words)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("damage", ["settings", "truncated", "foreign", "device"])
def test_resume_refuses(damage, tmp_path, capsys):
    run = [*TINY, "--steps", "1", "--warm-steps", "1", "--out", str(tmp_path)]
    llm_rlvr.main(run)
    path = tmp_path / "checkpoint.pt"
    if damage == "truncated":
        path.write_bytes(path.read_bytes()[:500])
    if damage == "foreign":
        torch.save({"weights": torch.zeros(3)}, path)
    if damage == "device":
        torch.save(torch.load(path, weights_only=True) | {"device": "cuda"}, path)
    before = {f: f.read_bytes() for f in tmp_path.iterdir()}
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main([*run, "--resume", *(["--lr", "0.5"] if damage == "settings" else [])])
    message = capsys.readouterr().err
    assert stop.value.code == 2 and message.count("\n") == 1 and str(path) in message
    assert {"settings": "--lr 0.5", "device": "--device cpu"}.get(damage, "") in message
    assert before == {f: f.read_bytes() for f in tmp_path.iterdir()}


def test_help_explains_every_flag(capsys):
    with pytest.raises(SystemExit) as stop:
        llm_rlvr.main(["--help"])
    text = capsys.readouterr().out
    assert stop.value.code == 0 and all("--" + name in text for name in (
        "algo task steps prompts candidates epochs lr eta anchor seed eval-every max-new-tokens out resume device compile plot").split())


def test_a_small_run_learns(tmp_path):
    """70 updates on graph coloring move pass@1 by more than five standard errors (1,024 samples)."""
    llm_rlvr.main(["--task", "graph_color", "--epochs", "2", "--anchor", "0.25", "--steps", "70", "--warm-steps", "60",
                   "--width", "64", "--lr", "3e-3", "--prompts", "24", "--out", str(tmp_path), "--device", "cpu"])
    r = records(tmp_path)[-1]
    assert r["pass1_before"] < 0.12 and r["pass1_after"] > r["pass1_before"] + 5 * (0.2 * 0.8 / 1024) ** 0.5


# ----------------------------------------------------------------------------------------- llm_rlvr.py, real checkpoints
def family(name, tied=False, **kw):
    """A tiny random transformers model of a family, the same sizes for all."""
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    pytest.importorskip("safetensors", reason="pip install safetensors")
    torch.manual_seed(0)
    config = getattr(transformers, f"{name}Config")(
        vocab_size=48, hidden_size=32, intermediate_size=40, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        tie_word_embeddings=tied, rms_norm_eps=1e-5, rope_parameters={"rope_type": "default", "rope_theta": 5e4}, **kw)
    model = getattr(transformers, f"{name}ForCausalLM")(config).eval()
    for p in model.parameters():
        torch.nn.init.normal_(p, std=0.3)                                         # biases and norms must count as well
    return model


@pytest.mark.parametrize("shard", [None, "10KB"])
@pytest.mark.parametrize("name, kw", [("Llama", {}), ("Llama", dict(tied=True)), ("Qwen2", {}), ("Qwen2", dict(tied=True)),
                                      ("Qwen3", dict(head_dim=12)), ("Qwen3", dict(tied=True, head_dim=8))])
def test_checkpoints_of_three_families_give_the_logits_of_transformers_and_go_back(name, kw, shard, tmp_path):
    peer, ids = family(name, **kw), torch.randint(0, 48, (2, 9))
    peer.save_pretrained(tmp_path / "in", **({"max_shard_size": shard} if shard else {}))
    assert (tmp_path / "in/model.safetensors.index.json").exists() == bool(shard)
    model = llm_rlvr.read_model(tmp_path / "in")
    expected = peer(ids).logits.detach()
    torch.testing.assert_close(plain_logits(model, ids).detach(), expected, atol=2e-5, rtol=1e-5)
    with torch.no_grad():
        model.lm_head.weight += 0.1                                                    # not the file it came from
    llm_rlvr.export_model(model, tmp_path / "out", "")
    again = type(peer).from_pretrained(tmp_path / "out")(ids).logits.detach()
    assert (again - expected).abs().max() > 0.01
    torch.testing.assert_close(again, plain_logits(model, ids).detach(), atol=2e-5, rtol=1e-5)


def test_small_gpt_of_this_file_is_a_qwen3(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    run = [*TINY, "--steps", "1", "--warm-steps", "2", "--out", str(tmp_path), "--export", str(tmp_path / "hf")]
    llm_rlvr.main(run)
    ours, ids = llm_rlvr.Trainer(llm_rlvr.parse(run)), torch.randint(0, 20, (2, 9))
    ours.model.load_state_dict(torch.load(tmp_path / "checkpoint.pt", weights_only=True)["model"])
    peer = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "hf")
    assert type(peer).__name__ == "Qwen3ForCausalLM"
    torch.testing.assert_close(peer(ids).logits.detach(), plain_logits(ours.model, ids).detach(), atol=2e-5, rtol=1e-5)


def broken(path, change):
    config = json.loads(path.read_text())
    change(config)
    path.write_text(json.dumps(config))


def resave(folder, **changes):
    from safetensors.torch import load_file, save_file
    tensors = load_file(folder / "model.safetensors")
    save_file({k: v for k, v in (tensors | changes).items() if v is not None}, folder / "model.safetensors")


NORM, EMBED = "model.norm.weight", "model.embed_tokens.weight"


@pytest.mark.parametrize("damage, words", [
    (lambda d: (d / "config.json").unlink(), "config.json cannot be read (No such file"),
    (lambda d: (d / "config.json").write_text('{"archi'), "config.json cannot be read (Unterminated string"),
    (lambda d: broken(d / "config.json", lambda c: c.update(architectures=["GPT2LMHeadModel"])), "has the architecture GPT2LMHeadModel; allowed are Llama"),
    (lambda d: broken(d / "config.json", lambda c: c.pop("hidden_size")), "lacks 'hidden_size'"),
    (lambda d: broken(d / "config.json", lambda c: c.update(rope_parameters={"rope_type": "yarn", "rope_theta": 1e4})), "rope_type 'yarn'; allowed is 'default'"),
    (lambda d: broken(d / "config.json", lambda c: c.update(rope_parameters=None, rope_scaling={"type": "linear"})), "rope_type 'linear'"),
    (lambda d: broken(d / "config.json", lambda c: c.update(rope_scaling={"type": "linear", "factor": 2})), "rope_type 'linear'"),
    (lambda d: broken(d / "config.json", lambda c: c.update(num_attention_heads=0)), "sizes that are none"),
    (lambda d: broken(d / "config.json", lambda c: c.update(hidden_size="32")), "sizes that are none"),
    (lambda d: (d / "config.json").write_text("[]"), "config.json is no JSON object"),
    (lambda d: (d / "model.safetensors.index.json").write_text("{}"), "is missing in the safetensors"),
    (lambda d: broken(d / "config.json", lambda c: c.update(attention_bias=True)), "attention_bias True; allowed is False"),
    (lambda d: broken(d / "config.json", lambda c: c.update(hidden_act="gelu")), "hidden_act 'gelu'"),
    (lambda d: broken(d / "config.json", lambda c: c.update(intermediate_size=44)), "mlp.down_proj.weight is (32, 40) in the safetensors; config.json wants (32, 44)"),
    (lambda d: (d / "model.safetensors").unlink(), "model.safetensors cannot be read"),
    (lambda d: (d / "model.safetensors").write_bytes((d / "model.safetensors").read_bytes()[:-100]), "model.safetensors cannot be read"),
    (lambda d: resave(d, **{NORM: None}), NORM + " is missing in the safetensors"),
    (lambda d: resave(d, extra=torch.zeros(2)), "config.json wants no such tensor"),
    (lambda d: resave(d, **{NORM: torch.full((32,), math.nan)}), NORM + " is torch.float32 or not finite"),
    (lambda d: resave(d, **{NORM: torch.ones(32, dtype=torch.int8)}), NORM + " is torch.int8 or not finite; allowed are finite fp32"),
])
def test_broken_checkpoint_is_one_line(damage, words, tmp_path, capsys):
    family("Llama").save_pretrained(tmp_path)
    damage(tmp_path)
    capsys.readouterr()                                                                      # a progress bar of transformers
    one_line(lambda: llm_rlvr.read_model(tmp_path), capsys, words)


def test_lora_starts_at_the_model_trains_its_branches_and_merges_back():
    model, tokens, y, of = tiny_model(), torch.tensor([[1, 2, 3]] * 2), torch.randint(0, 20, (6, 5)), torch.arange(6) // 3
    names, before = list(model.state_dict()), llm_rlvr.token_logp(model, tokens, tokens > 0, y, of).detach()
    llm_rlvr.add_lora(model, 4, torch.float32)
    trained = {name: p for name, p in model.named_parameters() if p.requires_grad}
    assert len(trained) == 2 * 2 * 7 and all(name.endswith((".A", ".B")) and 4 in p.shape for name, p in trained.items())
    torch.testing.assert_close(llm_rlvr.token_logp(model, tokens, tokens > 0, y, of), before)
    for p in trained.values():
        torch.nn.init.normal_(p, std=0.1)
    changed = llm_rlvr.token_logp(model, tokens, tokens > 0, y, of)
    changed.sum().backward()
    assert all((p.grad is not None) == (name in trained) for name, p in model.named_parameters())
    assert (changed - before).abs().max() > 0.01
    assert list(llm_rlvr.merge_lora(model).state_dict()) == names
    torch.testing.assert_close(llm_rlvr.token_logp(model, tokens, tokens > 0, y, of), changed, atol=1e-5, rtol=1e-5)


def test_lora_on_frozen_bf16_weights_computes_the_same_and_merges_in_fp32():
    model, prompt, y = tiny_model(), torch.tensor([[1, 2, 3]]), torch.randint(0, 20, (3, 5))
    for p in model.parameters():
        p.data = p.data.bfloat16().float()                                                # a checkpoint stored in bf16
    log_policy = lambda: llm_rlvr.token_logp(model, prompt, prompt > 0, y, torch.zeros(3, dtype=torch.long))
    with torch.autocast("cpu", torch.bfloat16):
        before = log_policy()
        llm_rlvr.add_lora(model, 4, torch.bfloat16)
        assert torch.equal(log_policy(), before)
        (-log_policy().sum()).backward()
    gate = model.model["layers"][0].mlp.gate_proj
    assert model.lm_head.weight.dtype == gate.base.weight.dtype == torch.bfloat16 and gate.B.dtype == torch.float32 and gate.B.grad.abs().max() > 0
    torch.nn.init.normal_(gate.B, std=1e-4)                                                # too small for bf16's 8 bits
    wanted = gate.base.weight.float() + 2 * gate.B @ gate.A
    llm_rlvr.merge_lora(model)
    merged = model.model["layers"][0].mlp.gate_proj.weight
    assert all(p.dtype == torch.float32 for p in model.parameters()) and torch.equal(merged, wanted) and not torch.equal(merged, wanted.bfloat16().float())


TEXTS = ["Natalia sold 48 clips in April, and 1,205 in May.", "x  =  12   +3\n\n\n  y\t7 8", "it's WE'LL they've 'tis",
         "naïve café – “quotes” ☃ 日本語 ½ ٣", " leading", "trailing   ", "a\r\nb \n c", "$3.50/2=1.75!!!", "<|end|>hi<|end|>"]
QWEN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")


def bpe_folder(kind, folder):
    """A byte-level BPE trained on TEXTS by the tokenizers library, and that library's own reading of it."""
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    pre, byte_level = tokenizers.pre_tokenizers, tokenizers.pre_tokenizers.ByteLevel
    t = tokenizers.Tokenizer(tokenizers.models.BPE())
    t.pre_tokenizer = {"gpt2": byte_level(add_prefix_space=False),
                       "smollm": pre.Sequence([pre.Digits(individual_digits=True), byte_level(add_prefix_space=False)]),
                       "qwen": pre.Sequence([pre.Split(tokenizers.Regex(QWEN), "isolated"),
                                             byte_level(add_prefix_space=False, use_regex=False)])}[kind]
    if kind == "qwen":
        t.normalizer = tokenizers.normalizers.NFC()
    trainer = tokenizers.trainers.BpeTrainer(vocab_size=400, special_tokens=["<|end|>"], initial_alphabet=byte_level.alphabet(),
                                             show_progress=False)
    t.train_from_iterator(TEXTS * 3, trainer)
    t.save(str(folder / "tokenizer.json"))
    (folder / "tokenizer_config.json").write_text('{"eos_token": "<|end|>"}')
    return t


@pytest.mark.parametrize("kind", ["gpt2", "smollm", "qwen"])
def test_token_ids_are_those_of_the_tokenizers_library(kind, tmp_path):
    peer = bpe_folder(kind, tmp_path)
    enc, end, encode = llm_rlvr.read_tokenizer(tmp_path)
    assert end == peer.token_to_id("<|end|>") and enc.n_vocab == peer.get_vocab_size()
    mixed = ["".join(random.Random(i).choices([*"ab 1 2\n\t'.", " the", "'s", "é", "e\u0301", "  "], k=12)) for i in range(300)]
    for text in TEXTS + mixed:
        assert encode(text) == peer.encode(text).ids, text
    assert enc.decode(encode(TEXTS[0])) == TEXTS[0]


def test_token_ids_of_a_real_checkpoint_on_gsm8k():
    """MODEL=DIR GSM8K=DIR pytest -k gsm8k: a checkpoint's folder, and one with train.jsonl."""
    if not {"MODEL", "GSM8K"} <= os.environ.keys():
        pytest.skip("set MODEL to the folder of a checkpoint and GSM8K to one with train.jsonl")
    tokenizers = pytest.importorskip("tokenizers", reason="pip install tokenizers")
    enc, *_ = llm_rlvr.read_tokenizer(Path(os.environ["MODEL"]))
    peer = tokenizers.Tokenizer.from_file(str(Path(os.environ["MODEL"]) / "tokenizer.json"))
    rows = records_of(Path(os.environ["GSM8K"]) / "train.jsonl")
    texts = [row[name] for row in rows for name in ("question", "answer")]
    assert len(texts) > 2000
    assert [enc.encode(t, allowed_special="all") for t in texts] == [e.ids for e in peer.encode_batch(texts, add_special_tokens=False)]


def test_chat_template_is_rendered_as_transformers_does(tmp_path):
    transformers = pytest.importorskip("transformers", reason="pip install transformers")
    bpe_folder("qwen", tmp_path)
    template = """{%- if messages[0].role != 'system' %}
    {{- '<sys>' + {'a': 'é'}|tojson + '</sys>\\n' }}
{%- endif %}
{% for m in messages %}
    {% if m.role == 'nobody' %}{% continue %}{% endif %}
{{ bos_token or '' }}[{{ m.role }}] {{ m.content | trim }}{{ eos_token }}
{% endfor %}
{% if add_generation_prompt %}[assistant]{% if enable_thinking is defined and not enable_thinking %} {% endif %}{% endif %}"""
    (tmp_path / "chat_template.jinja").write_text(template)
    _, _, encode = llm_rlvr.read_tokenizer(tmp_path)
    peer = transformers.PreTrainedTokenizerFast(tokenizer_file=str(tmp_path / "tokenizer.json"), eos_token="<|end|>")
    expected = peer.apply_chat_template([{"role": "user", "content": " What is 12 + 3? "}], chat_template=template,
                                        add_generation_prompt=True, return_dict=False, enable_thinking=False)
    assert encode(" What is 12 + 3? ") == expected and len(expected) > 20


@pytest.mark.parametrize("change, words", [
    (lambda j: j["model"].pop("merges"), "no byte-level BPE with merges"),
    (lambda j: j["model"].update(type="Unigram"), "no byte-level BPE with merges"),
    (lambda j: j["model"].pop("vocab"), "merges that are not in the order of their ids"),
    (lambda j: j["model"]["merges"].reverse(), "merges that are not in the order of their ids"),
    (lambda j: j.update(pre_tokenizer={"type": "Metaspace"}), 'the pre_tokenizer {"type": "Metaspace"}'),
    (lambda j: j.update(normalizer={"type": "Lowercase"}), "the normalizer Lowercase"),
    (lambda j: j.update(added_tokens=[]), "eos_token '<|end|>', which is not among the added_tokens"),
])
def test_foreign_tokenizer_is_one_line(change, words, tmp_path, capsys):
    bpe_folder("gpt2", tmp_path)
    broken(tmp_path / "tokenizer.json", change)
    one_line(lambda: llm_rlvr.read_tokenizer(tmp_path), capsys, words)


@pytest.mark.parametrize("extra", [[], ["--lora-rank", "2", "--recompute"]], ids=["full", "lora"])
def test_pretrained_run_from_command_line_to_export(extra, tmp_path, capsys):
    """--init-from, a jsonl task, checkpoint, resume, --export: the exported folder starts where the run ended."""
    (model := tmp_path / "model").mkdir()
    bpe_folder("gpt2", model)
    peer = family("Qwen3")
    peer.resize_token_embeddings(400, mean_resizing=False)
    torch.nn.init.normal_(peer.get_input_embeddings().weight)
    peer.save_pretrained(model)
    (tmp_path / "lines.jsonl").write_text("".join(json.dumps({"prompt": f"{i} or", "answer": str(i)}) + "\n" for i in range(90)))
    run = ["--init-from", str(model), "--task", "jsonl", "--data", str(tmp_path / "lines.jsonl"), "--prompts", "2", "--candidates",
           "4", "--max-new-tokens", "36", "--epochs", "2", "--eval-puzzles", "2", "--micro-tokens", "100", "--lr", "1e-3",
           "--algo", "tpo_no_anchor", "--device", "cpu", *extra]
    full = [*run, "--steps", "3", "--eval-every", "1", "--out", str(tmp_path / "full"), "--export", str(tmp_path / "export")]
    llm_rlvr.main(full)
    assert "took jsonl from" in capsys.readouterr().out
    trained = llm_rlvr.read_model(tmp_path / "export")
    assert llm_rlvr.read_tokenizer(tmp_path / "export")[1] == llm_rlvr.read_tokenizer(model)[1]
    start = llm_rlvr.read_model(model)
    moved = [name for name, p in trained.named_parameters() if not torch.equal(p, start.state_dict()[name])]
    assert moved and (not extra or all("_proj" in name for name in moved))
    llm_rlvr.main([*full, "--resume"])
    for a, b in zip(trained.parameters(), llm_rlvr.read_model(tmp_path / "export").parameters(), strict=True):
        assert torch.equal(a, b)
    saved = torch.load(tmp_path / "full" / "checkpoint.pt", weights_only=True)["model"]
    assert saved.keys() == {name for name, p in llm_rlvr.Trainer(llm_rlvr.parse(full)).model.named_parameters() if p.requires_grad}


def test_missing_safetensors_is_one_line(tmp_path, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "safetensors", None)
    one_line(lambda: llm_rlvr.read_model(tmp_path), capsys, "--init-from needs safetensors: pip install safetensors")


# ------------------------------------------------------------------------------------------------------------- bandit.py
CONFIDENT = torch.tensor([0.02, 0.001, 0.9, 0.005, 0.004, 0.03, 0.01, 0.02, 0.005, 0.005], dtype=torch.float64)


def some_pi(*shape, scale=2.0, seed=0):
    rng = torch.Generator().manual_seed(seed)
    return (scale * torch.randn(*shape, 10, generator=rng, dtype=torch.float64)).softmax(-1)


def ascent(loss, pi):
    """-dL/dlogits of loss(logp) at the logits log pi."""
    logits = pi.log().requires_grad_()
    loss(logits.log_softmax(-1)).backward()
    return -logits.grad


# Expected losses over the action at one context, reward 1{a = 0}: bandit.beta claims that each has g = beta (e_y - pi).
def expected(weight):
    """-sum_a pi_a W_a log pi_a with the weights W(logp) of all ten actions frozen."""
    return lambda logp: -(logp.exp().detach() * weight(logp.detach()) * logp).sum()


FIRST = F.one_hot(torch.tensor(0), 10).double()
EXACT = {"ce": lambda eta: lambda logp: -logp[0],
         "pg": lambda eta: expected(lambda logp: FIRST - logp.exp()[0]),
         "grpo": lambda eta: expected(lambda l: (FIRST - l[0].exp()) / (l[0].exp() * (1 - l[0].exp())).sqrt()),
         "dg": lambda eta: expected(lambda logp: FIRST * torch.sigmoid(-logp / eta)),
         "tpo": lambda eta: lambda logp: tpo_loss(logp, logp.detach(), FIRST, eta)}


@pytest.mark.parametrize("eta", [0.5, 1.0, 2.0])
@pytest.mark.parametrize("algo", EXACT)
def test_bandit_closed_form_betas_are_the_losses_gradients(algo, eta):
    for pi in (*some_pi(4), CONFIDENT, CONFIDENT.roll(-2)):
        g = ascent(EXACT[algo](eta), pi)
        assert torch.allclose(g, bandit.beta(algo, pi[0], eta) * (FIRST - pi), rtol=1e-9, atol=1e-12)


def test_bandit_betas_of_pg_and_grpo_from_the_library_losses():
    """20 candidates in exact proportion to pi turn the sample losses into population ones."""
    counts = torch.tensor([4, 3, 3, 2, 2, 2, 1, 1, 1, 1])
    pi, a = counts.double() / 20, torch.arange(10).repeat_interleave(counts)[None]                # (10,), (1, 20)
    r = (a == 0).double()
    g = ascent(lambda logp: pg_loss(logp[a], logp[a].detach(), r), pi)
    assert torch.allclose(g, bandit.beta("pg", pi[0], 1.0) * (FIRST - pi))
    g = ascent(lambda logp: grpo_loss(logp[a], logp[a].detach(), r) / 20, pi)
    assert torch.allclose(g, bandit.beta("grpo", pi[0], 1.0) * (FIRST - pi))


def test_bandit_beta_tpo_at_a_tenth_is_073():
    assert float(bandit.beta("tpo", torch.tensor(0.1), 1.0)) == pytest.approx(0.73, abs=0.005)


def test_bandit_single_gradients_are_the_losses_gradients():
    pi, a = some_pi(1)[0], torch.randint(10, (100,), generator=torch.Generator().manual_seed(1))
    r = (a == 0).double()
    scores = torch.stack([((r - 0.5) * (a == arm)).mean() for arm in range(10)])
    surprisal = -pi.log()[a]
    weights = {"pg": r - 0.5, "grpo": (r - r.mean()) / (r.var(correction=0) + 1e-8).sqrt(),
               "dg": (r - 0.5) * torch.sigmoid((r - 0.5) * surprisal / 2)}
    losses = {algo: lambda logp, A=A: -(A * logp[a]).mean() for algo, A in weights.items()}
    losses["tpo"] = lambda logp: tpo_loss(logp, logp.detach(), scores, 2.0)
    for algo, loss in losses.items():
        g = bandit.single_gradient(algo, pi[None], a[None], r[None], 2.0)[0]
        assert torch.allclose(g, ascent(loss, pi), rtol=1e-9, atol=1e-12), algo


@pytest.mark.parametrize("eta", [1.0, 0.7])
@pytest.mark.parametrize("algo", ["ce", "pg", "group_pg", "dg", "tpo"])
def test_bandit_expected_mnist_updates_are_sums_over_all_ten_actions(algo, eta):
    for pi in (*some_pi(5), CONFIDENT):
        for y in (0, 2):
            label = torch.tensor([[y]])
            loss = lambda logp, a: bandit.mnist_loss(algo, logp[None, None], torch.tensor([[a]]), label, eta)
            g = sum(pi[a] * ascent(lambda logp: loss(logp, a), pi) for a in range(10))
            assert torch.allclose(bandit.mnist_update(algo, pi[None], label[0], eta)[0], g, rtol=1e-5, atol=1e-7)


def test_bandit_expected_grpo_update_uses_the_reward_variance_of_the_batch():
    pi, y = some_pi(1, 6), torch.tensor([0, 1, 2, 3, 4, 5])
    p = pi[0, range(6), y]
    sigma = (p.mean() * (1 - p.mean())).sqrt()
    v = F.one_hot(y, 10) - pi[0]
    assert torch.allclose(bandit.mnist_update("grpo", pi, y, 1.0)[0], p[:, None] * v / sigma)


def test_bandit_grpo_mnist_loss_z_scores_the_batch_of_each_seed():
    logp, y = some_pi(2, 5).log(), torch.tensor([[0, 1, 2, 3, 4], [5, 6, 7, 8, 9]])
    a = torch.tensor([[0, 1, 9, 9, 9], [5, 9, 9, 9, 0]])                  # right: 1 1 0 0 0 and 1 0 0 0 0
    r = (a == y).double()
    A = (r - r.mean(1, keepdim=True)) / r.std(1, keepdim=True, correction=0)
    g = ascent(lambda logp: bandit.mnist_loss("grpo", logp, a, y, 1.0), logp.exp())
    assert torch.allclose(g, A[..., None] * (F.one_hot(a, 10) - logp.exp()) / 5, rtol=1e-5, atol=1e-7)


def spec_update(algo, p, y, eta):
    """The updates of the paper's Appendix C, written out for one example; p is a list of ten probabilities."""
    lam, b, sigmoid = math.exp(10 / 3 / eta), sum(x * x for x in p), lambda x: 1 / (1 + math.exp(-x))
    e = lambda k: [float(i == k) - p[i] for i in range(10)]              # e_k - pi
    if algo == "pg":
        weight = {y: p[y]}
    elif algo == "group_pg":
        weight = {y: 6 * p[y]}
    elif algo == "dg":
        weight = {j: -b * p[j] * sigmoid(-b * math.log(1 / p[j]) / eta) for j in range(10)}
        weight[y] = p[y] * (1 - b) * sigmoid((1 - b) * math.log(1 / p[y]) / eta)
    else:
        weight = {j: -p[j] * p[j] * (lam - 1) / (lam * (1 - p[j]) + p[j]) for j in range(10)}
        weight[y] = p[y] * p[y] * (lam - 1) / (1 - p[y] + lam * p[y])
    return [sum(w * e(k)[i] for k, w in weight.items()) for i in range(10)]


def spec_surrogate(algo, p, eta):
    lam, r, sigmoid = math.exp(10 / 3 / eta), (1 - p) / 9, lambda x: 1 / (1 + math.exp(-x))
    b = p * p + 9 * r * r
    return {"pg": p, "group_pg": 6 * p,
            "dg": p * (1 - b) * sigmoid((1 - b) * math.log(1 / p) / eta) + p * b * sigmoid(-b * math.log(1 / r) / eta),
            "tpo": p * p * (lam - 1) / (1 - p + lam * p) + p * r * (lam - 1) / (lam * (1 - r) + r)}[algo]


@pytest.mark.parametrize("eta", [1.0, 0.7])
@pytest.mark.parametrize("algo", ["pg", "group_pg", "dg", "tpo"])
def test_bandit_updates_and_surplus_are_appendix_c(algo, eta):
    pi, y = torch.cat((some_pi(150), some_pi(150, scale=0.4, seed=1), CONFIDENT[None])), torch.arange(301) % 10
    g = bandit.mnist_update(algo, pi[None], y, eta)[0]
    assert torch.allclose(g, torch.tensor([spec_update(algo, p.tolist(), int(k), eta) for p, k in zip(pi, y)]).double(),
                          rtol=1e-5, atol=1e-7)
    binned = [[], [], [], []]
    for p, k, row in zip(pi.tolist(), y.tolist(), g.tolist()):
        wrong = [x for j, x in enumerate(p) if j != k]
        if max(wrong) > p[k]:
            v = [float(j == k) - x for j, x in enumerate(p)]
            gain = p[k] * sum(x * u for x, u in zip(v, row))
            surrogate = p[k] * spec_surrogate(algo, p[k], eta) * sum(x * x for x in v)
            binned[min(3, int(max(wrong) / (1 - p[k]) * 4))].append(gain - surrogate)
    assert all(binned)
    means = torch.tensor([sum(b) / len(b) for b in binned], dtype=torch.float64)
    assert torch.allclose(bandit.surplus(algo, pi[None], y, eta)[0], means, rtol=1e-5, atol=1e-9)
    if algo == "tpo" and eta == 1:
        assert means[3] > 4 * means[0].abs()                             # the paper: about 0, ..., .073
    if algo == "dg" and eta == 1:
        assert (means < 0).all()


def test_bandit_surplus_skips_what_it_cannot_use():
    """A certain and right example (p_y = 1 exactly) must not turn a bin into NaN; an empty bin is NaN."""
    certain = (800 * FIRST).softmax(-1).clamp(min=1e-300)
    confused = torch.tensor([0.001, 0.998] + [0.000125] * 8, dtype=torch.float64)         # c = .999
    surplus = bandit.surplus("pg", torch.stack((certain, confused))[None], torch.tensor([0, 0]), 1.0)[0]
    assert surplus[:3].isnan().all() and surplus[3].abs() < 1e-12


def test_bandit_sample_draws_from_pi():
    pi = some_pi(1)
    u = torch.rand(1, 100_000, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    share = torch.bincount(bandit.sample(pi, u)[0], minlength=10) / 100_000
    assert (share - pi[0]).abs().max() < 5 * (0.25 / 100_000) ** 0.5     # five standard errors
    assert bandit.sample(torch.full((1, 3), 1 / 3), torch.ones(1, 1)) == 2


@pytest.mark.parametrize("name", ["rloo", "maxrl", "rebel", "dr_grpo", "dapo", "gspo", "cispo"])
def test_bandit_single_step_of_the_later_losses_is_grpo(name):
    """On policy and with steps of unit length: the reason why bandit.py leaves them out."""
    logits, (a, r) = torch.randn(3, 10, **F64, requires_grad=True), torch.rand(2, 3, 100, **F64)
    a, r = (a * 10).long(), (r < 0.3).double()
    for s in range(3):
        logp = logits.log_softmax(-1)[s].gather(-1, a[s])[None]                                     # (1, 100)
        g, = torch.autograd.grad(-getattr(baselines, name + "_loss")(logp, logp.detach(), r[s:s + 1]), logits)
        expected = bandit.single_gradient("grpo", logits.detach().softmax(-1), a, r, 1.0)[s]
        torch.testing.assert_close(bandit.normalize(g[s]), bandit.normalize(expected), rtol=1e-6, atol=1e-9)


def test_bandit_single_ranks_the_methods_as_the_paper_does():
    first = {}
    for algo in ("pg", "grpo", "dg", "tpo"):
        for step, m in bandit.single(algo, 5, 150, 1.0):
            if m["error"].mean() < 0.01:
                first.setdefault(algo, step)
    assert max(first["tpo"], first["dg"]) < first["grpo"] < first["pg"]


def test_bandit_multi_ranks_the_methods_as_the_paper_does():
    algos = ("ce", "tpo", "grpo", "dg", "pg")
    errors = [[m["error"].mean() for _, m in bandit.multi(algo, 5, 700, 1.0)][-1] for algo in algos]
    assert errors == sorted(errors) and errors[1] < 0.012 < errors[2]


def test_bandit_misalignment_is_zero_along_the_oracle_and_one_without_a_gradient():
    v = torch.tensor([[1.0, 2.0], [0.0, 0.0]])
    oracle = torch.tensor([[2.0, 4.0], [1.0, 0.0]])
    assert torch.allclose(bandit.misalignment(v, oracle), torch.tensor([0.0, 1.0]), atol=1e-6)


def fake_mnist():
    rng = torch.Generator().manual_seed(0)
    labels = torch.randint(10, (500,), generator=rng)
    images = torch.rand(500, 784, generator=rng) * 0.1 + F.one_hot(labels, 784)           # learnable: pixel y is bright
    return images, labels, images[:100], labels[:100]


@pytest.mark.parametrize("algo", bandit.REFERENCE["mnist"])
def test_bandit_seeds_of_a_batch_are_independent(algo):
    """Seed s gives the same run whatever runs beside it."""
    for task in ("single", "multi"):
        if algo in bandit.REFERENCE[task]:
            alone, beside = (list(getattr(bandit, task)(algo, seeds, 20, 1.0)) for seeds in (2, 4))
            for (_, a), (_, b) in zip(alone, beside):
                assert torch.allclose(a["error"], b["error"][:2], rtol=1e-9)
    data = fake_mnist()
    alone, beside = (list(bandit.mnist(algo, seeds, 60, 1.0, data, None)) for seeds in (1, 3))
    assert torch.allclose(alone[-1][1]["misalignment"], beside[-1][1]["misalignment"][:1], atol=1e-4)
    assert algo == "ce" or beside[-1][1]["misalignment"].unique().numel() == 3            # ce: 0 for each


def test_bandit_mnist_learns():
    *_, (step, m) = bandit.mnist("tpo", 2, 500, 1.0, fake_mnist(), 500)
    assert step == 500 and (m["error"] < 0.3).all() and m["surplus"].shape == (2, 4)


def idx(shape, kind=8):
    header = struct.pack(f">4B{len(shape)}I", 0, 0, kind, len(shape), *shape)
    return gzip.compress(header + bytes(range(math.prod(shape))))


def test_bandit_reads_idx(tmp_path):
    (tmp_path / "a.gz").write_bytes(idx((2, 3, 4)))
    assert torch.equal(bandit.read_idx(tmp_path, "a.gz", 2, 3, 4), torch.arange(24, dtype=torch.uint8).view(2, 3, 4))


@pytest.mark.parametrize("content", [
    b"", b"<html>not found</html>", idx((2, 3, 4))[:-9], gzip.compress(b"\0\0"), idx((24,)), idx((3, 2, 4)),
    idx((2, 3, 4), kind=9), gzip.compress(gzip.decompress(idx((2, 3, 4))) + b"x")])
def test_bandit_damaged_and_wrong_idx_files_are_one_line(tmp_path, capsys, content):
    (tmp_path / "a.gz").write_bytes(content)
    with pytest.raises(SystemExit) as exit:
        bandit.read_idx(tmp_path, "a.gz", 2, 3, 4)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and err.count("\n") == 1
    assert f"{tmp_path}/a.gz is damaged" in err and "curl" in err and bandit.MIRROR + "a.gz" in err


def offline(url, timeout):
    raise urllib.error.URLError("offline")


def test_bandit_missing_mnist_is_downloaded_or_one_line(tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(urllib.request, "urlopen", offline)
    with pytest.raises(SystemExit) as exit:
        bandit.main(["--task", "mnist", "--data", str(tmp_path / "new")])
    err = capsys.readouterr().err
    assert exit.value.code == 2 and err.count("\n") == 1
    assert "train-images-idx3-ubyte.gz is missing" in err and "offline" in err and "curl" in err
    monkeypatch.setattr(urllib.request, "urlopen", lambda url, timeout: io.BytesIO(idx((2, 3, 4))))
    assert bandit.read_idx(tmp_path / "new", "a.gz", 2, 3, 4).shape == (2, 3, 4)
    assert [p.name for p in (tmp_path / "new").iterdir()] == ["a.gz"]                     # no temporary file stays


@pytest.mark.parametrize("argv, words", [
    (["--task", "double"], ("--task double", "single, multi, mnist")),
    (["--algo", "tpo,ppo"], ("--algo tpo,ppo", "group_pg")),
    (["--task", "single", "--algo", "ce"], ("--algo ce", "pg, grpo, dg, tpo")),
    (["--seeds", "0"], ("--seeds 0", "from 1")),
    (["--seeds", "many"], ("--seeds", "many", "int")),
    (["--steps", "-1"], ("--steps -1", "from 1")),
    (["--eta", "0"], ("--eta 0", "above 0")),
    (["--eta", "nan"], ("--eta nan", "above 0")),
    (["--eta", "inf"], ("--eta inf", "finite")),
    (["--out", "no/such/folder/log.jsonl"], ("--out no/such/folder/log.jsonl", "folder")),
    (["--out", "/"], ("--out /", "folder")),
    (["--plot", "figure.pdf"], ("--plot figure.pdf", ".png")),
    (["--mechanism"], ("--mechanism", "mnist")),
    (["--tasks", "single"], ("--tasks", "--task", "--eta"))])
def test_bandit_wrong_flags_are_one_line_and_status_2(argv, words, capsys):
    with pytest.raises(SystemExit) as exit:
        bandit.main(argv)
    out, err = capsys.readouterr()
    assert exit.value.code == 2 and not out and err.count("\n") == 1 and all(word in err for word in words), err


def test_bandit_main_writes_config_evals_and_results(tmp_path, capsys):
    log = tmp_path / "log.jsonl"
    bandit.main(["--seeds", "3", "--steps", "6", "--eta", "0.5", "--out", str(log)])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert records[0]["kind"] == "config" and records[0]["eta"] == 0.5 and records[0]["seeds"]["multi"] == 3
    assert {r["kind"] for r in records[1:-9]} == {"eval"} and {r["kind"] for r in records[-9:]} == {"result"}
    assert list(records[-1]) == ["kind", "task", "algo", "seeds", "final_error", "final_error_se", "steps_to_1pct",
                                 "final_misalignment", "seconds"]
    errors = [m["error"] for _, m in bandit.multi("tpo", 3, 6, 0.5)]
    assert records[-1]["final_error"] == pytest.approx(float(errors[-1].mean()), rel=1e-5)
    assert records[-1]["final_error_se"] == pytest.approx(float(errors[-1].std() / 3 ** 0.5), rel=1e-5)
    assert records[-1]["steps_to_1pct"] is None and [p.name for p in tmp_path.iterdir()] == ["log.jsonl"]
    out = capsys.readouterr().out
    assert "0.034" in out
    assert out.endswith("multi: mean error below 1%: ce never, pg never, grpo never, dg never, tpo never\n")


def test_bandit_reports_the_first_step_below_each_bar(monkeypatch):
    curve = [(200, 0.06), (400, 0.049), (600, 0.051), (800, 0.0099), (1000, 0.02)]
    metrics = lambda e: {"error": torch.tensor([e, e + 2e-5]), "misalignment": torch.tensor([0.1, 0.3])}
    monkeypatch.setattr(bandit, "mnist", lambda *args: ((step, metrics(e)) for step, e in curve))
    *evals, result = bandit.run("mnist", "tpo", bandit.Config(), None)
    assert (result["steps_to_5pct"], result["steps_to_1pct"]) == (400, 800)
    assert len(evals) == 5 and result["final_misalignment"] == pytest.approx(0.2)


def test_bandit_mnist_run_from_files(tmp_path, capsys, monkeypatch):
    images, labels, *test = fake_mnist()
    monkeypatch.setattr(bandit, "load_mnist", lambda folder: (images, labels, *test))
    log = tmp_path / "log.jsonl"
    bandit.main("--task mnist --algo dg,tpo --seeds 2 --steps 10 --mechanism --out".split() + [str(log)])
    records = [json.loads(line) for line in log.read_text().splitlines()]
    assert [r["kind"] for r in records] == ["config", "eval", "mechanism", "eval", "mechanism", "result", "result"]
    assert records[-1]["steps_to_5pct"] is None and len(records[2]["surplus"]) == 4
    out = capsys.readouterr().out
    assert "seed-steps/s" in out and "s left" in out and "0.073" in out


def test_bandit_plot_draws_every_task_of_the_run(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    bandit.main(["--seeds", "1", "--steps", "20", "--plot", str(tmp_path / "figure.png")])
    assert (tmp_path / "figure.png").read_bytes()[:4] == b"\x89PNG"


# --------------------------------------------------------------------------------------------------------------- seqtask.py
RUN = seqtask.Run("reverse_copy", "terminal", "tpo", 4, 2, 4, 12, 4, 1.0, 1e-3, "prompts", 2, 6)


def seq_model(seeds, run=RUN, scale=1.0):
    """Parameters of the seeds; scale > 1 makes the policy less uniform, as after some training."""
    models = [seqtask.parameters(torch.Generator().manual_seed(s), run.vocab, run.length) for s in seeds]
    P = {name: torch.stack([m[name] for m in models]) for name in models[0]}
    P["head"], P["qkv_bias.0"] = P["head"] * scale, torch.randn_like(P["qkv_bias.0"])
    return {name: p.requires_grad_() for name, p in P.items()}


def plain_forward(P, s, tokens):
    """Log-probs (N, L, V) by one seed's model written the ordinary way: no seed axis, no sharing, no folding."""
    p = {name: x[s].squeeze(0) for name, x in P.items()}
    norm = lambda x, n: F.layer_norm(x, (64,), p["gain" + n], p["shift" + n], 1e-6)
    x = p["token"][tokens] + p["position"][:tokens.shape[1]]
    for l in "01":
        q, k, v = (norm(x, f"1.{l}") @ p[f"qkv.{l}"] + p[f"qkv_bias.{l}"].flatten()).chunk(3, -1)
        heads = []
        for h in (slice(0, 32), slice(32, 64)):
            logits = q[..., h] @ k[..., h].mT / 32**0.5
            future = torch.ones_like(logits, dtype=torch.bool).triu(1)
            heads.append(logits.masked_fill(future, -math.inf).softmax(-1) @ v[..., h])
        x = x + torch.cat(heads, -1) @ p[f"out.{l}"] + p[f"out_bias.{l}"]
        up = norm(x, f"2.{l}") @ p[f"up.{l}"] + p[f"up_bias.{l}"]
        x = x + F.gelu(up, approximate="tanh") @ p[f"down.{l}"] + p[f"down_bias.{l}"]
    return (norm(x, "") @ p["head"] + p["head_bias"]).log_softmax(-1)


def test_seqtask_rewards_and_goals_by_hand():
    right = torch.tensor([[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]).bool()
    for kind, expected in (("bag", [[1, 1, 0, 1], [1, 1, 1, 1], [0, 1, 1, 1]]),
                           ("sequential", [[1, 1, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]]),
                           ("terminal", [[0, 0, 0, 0], [1, 1, 1, 1], [0, 0, 0, 0]])):
        assert seqtask.rewards(kind, right).tolist() == expected
    for target, expected in (("copy", [0, 1, 3]), ("flip", [3, 2, 0]), ("reverse_copy", [3, 1, 0]), ("reverse_flip", [0, 2, 3])):
        assert seqtask.goal(target, torch.tensor([0, 1, 3]), 4).tolist() == expected


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("vocab", [2, 5])
def test_seqtask_rollout_and_shared_forward_are_the_plain_model(share, vocab):
    """Cached rollout log-probs, and the tree's, against a full forward of one ordinary model per seed."""
    run = RUN._replace(vocab=vocab)
    P, (S, B, K, H) = seq_model([3, 4, 5], run, 6.0), (3, 6, 4, 4)
    prompts, uniform = torch.randint(vocab, (S, B, H)), torch.rand(S, B * K, H)
    prompts[0] = prompts[0, 0]                                             # seeds with unequal numbers of distinct prefixes
    y, logps = seqtask.rollout(P, prompts, uniform, share)
    sequences = torch.cat((prompts.repeat_interleave(K, 1), y[..., :-1]), -1)
    nodes = seqtask.tree(sequences, H, vocab, K, share)
    table = seqtask.forward(P, nodes, H)
    full = torch.stack([plain_forward(P, s, sequences[s])[:, H - 1:] for s in range(S)])
    torch.testing.assert_close(logps, full.detach(), atol=2e-5, rtol=1e-4)
    torch.testing.assert_close(seqtask.take(table, nodes.node[..., H - 1:]).view(S, B * K, H, vocab), full, atol=2e-5, rtol=1e-4)
    assert (y == (uniform[..., None] > full.exp().cumsum(-1)).sum(-1).clamp(max=vocab - 1)).all()
    prefixes = {tuple(row[:n + 1]) for row in sequences[1].tolist() for n in range(2 * H - 1)}
    if share:                                                              # each distinct prefix is one node
        assert len({*nodes.node[1].flatten().tolist()}) == len(prefixes)
    else:
        assert nodes.token.shape[1] == B * H + B * K * (H - 1)


def gradients_by_hand(run, P, prompts, uniform):
    """The first two epochs' gradients by the losses themselves, on the plain model, for every row of every group."""
    S, B, H = prompts.shape
    y, logps = seqtask.rollout(P, prompts, uniform[:, :, :run.K].flatten(1, 2), False)
    losses = []
    for s in range(S):
        sequences = torch.cat((prompts[s].repeat_interleave(run.K, 0), y[s, :, :-1]), -1)
        logp = plain_forward(P, s, sequences)[:, H - 1:]                   # (N, H, V)
        goal = prompts[s].flip(-1).repeat_interleave(run.K, 0)
        r = seqtask.rewards(run.reward, y[s] == goal).view(B, run.K, H)
        if run.algo in seqtask.TOKEN:
            cdf = logps[s].exp().cumsum(-1)[..., 0]                        # V = 2
            choice = (uniform[s] > cdf[:, None]).long().mT                 # (B, H, K)
            before = torch.cat((torch.ones(B, 1), r[:, 0].cumprod(-1)[:, :-1]), -1) if run.reward == "sequential" else 1
            scores = (choice == goal[..., None]).float() * torch.as_tensor(before).expand(B, H)[..., None]
            args = logp.gather(-1, choice), logps[s].gather(-1, choice), scores
        else:
            l, l_old = (x.gather(-1, y[s][..., None])[..., 0].view(B, run.K, H) for x in (logp, logps[s]))
            args = ((l, l_old, r) if run.algo in seqtask.SINGLE else (l, l_old, r.mean(-1))
                    if run.algo in ("dr_grpo", "dapo", "gspo", "cispo") else (l.sum(-1), l_old.sum(-1), r.mean(-1)))
        name = run.algo.replace("_token", "").replace("_no_kl", "")
        loss = tpo_loss if name == "tpo" else getattr(baselines, name + "_loss")
        extra = ({"beta": 0.0} if run.algo == "grpo_no_kl" else {"eta": run.eta} if name in ("tpo", "dg", "tpo_no_anchor", "rebel") else
                 {"length": H} if name == "dr_grpo" else {})
        losses.append(loss(*args, **extra))
    return torch.autograd.grad(sum(losses), P.values(), allow_unused=True)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("algo, reward", [(a, "terminal") for a in seqtask.SINGLE + seqtask.GROUPED]
                         + [(a, r) for a in seqtask.TOKEN for r in ("bag", "sequential")] + [("tpo", "sequential"), ("dg", "bag")])
def test_seqtask_shared_and_skipped_rows_keep_the_gradient(algo, reward, share):
    """On the first epoch and, from a policy that has moved by then, on the second: against plain losses on every row."""
    torch.manual_seed(0)
    run = RUN._replace(algo=algo, reward=reward, length=3, epochs=2, eta=0.8)
    old, B, H = seq_model([1, 2], run, 2.0), 24, 3
    prompts, uniform = torch.randint(2, (2, B, H)), torch.rand(2, B, 4, H)
    seen, moved = [], {name: p.detach() + 0.05 * torch.randn_like(p) for name, p in old.items()}
    P = {name: p.detach().clone().requires_grad_() for name, p in old.items()}

    class Recorder:
        def step(self):
            seen.append([p.grad.clone() for p in P.values()])
            for name, p in P.items():
                p.data.copy_(moved[name])

    started = torch.zeros(2, dtype=torch.bool)
    seqtask.episode(run, P, [Recorder()], prompts, uniform, started, share)
    assert started.all() and len(seen) == 2
    expected = gradients_by_hand(run, old, prompts, uniform)
    scale = max(g.abs().max() for g in expected)
    for name, g, e in zip(P, seen[0], expected):
        torch.testing.assert_close(g, e, atol=2e-5 * scale, rtol=1e-3, msg=f"first epoch, {name}")
    samples = seqtask.rollout(old, prompts, uniform[:, :, :run.K].flatten(1, 2), False)
    with pytest.MonkeyPatch.context() as m:                                # the rollouts of old, the model of moved
        m.setattr(seqtask, "rollout", lambda *args: samples)
        expected = gradients_by_hand(run, P, prompts, uniform)
    scale = max(g.abs().max() for g in expected)
    for name, g, e in zip(P, seen[1], expected):
        torch.testing.assert_close(g, e, atol=2e-5 * scale, rtol=1e-3, msg=f"second epoch, {name}")


@pytest.mark.parametrize("algo", ["tpo", "grpo_masked", "dg"])
def test_seqtask_seeds_do_not_depend_on_their_neighbours(algo):
    """Two episodes: what three seeds do together, each does alone (longer, rounding may flip a sample)."""
    run = RUN._replace(algo=algo, reward="sequential", seeds=3, episodes=2)
    streams = [torch.Generator().manual_seed(s) for s in range(3)]
    draws = [(torch.stack([torch.randint(2, (12, 4), generator=g) for g in streams]),
              torch.stack([torch.rand(12, 4, 4, generator=g) for g in streams])) for _ in range(2)]

    def final(seeds):
        P = {name: p.detach()[seeds].requires_grad_() for name, p in seq_model([0, 1, 2], run).items()}
        optimizer, started = seqtask.optimizers(P, 1e-3), torch.zeros(len(seeds), dtype=torch.bool)
        for prompts, uniform in draws:
            seqtask.episode(run, P, optimizer, prompts[seeds], uniform[seeds], started, True)
        return P

    torch.manual_seed(5)
    together = final([0, 1, 2])
    torch.manual_seed(5)
    alone = final([1])
    for name in alone:
        if not name.startswith("qkv_bias"):                                # keys' bias: gradient 0 but for rounding, and
            torch.testing.assert_close(together[name][1:2], alone[name], atol=3e-5, rtol=1e-3)     # Muon ignores its size


def test_seqtask_training_repeats_and_first_seed_is_the_same_alone():
    errors = [seqtask.train(RUN._replace(seeds=s, episodes=3), "cpu", True)[0] for s in (1, 3)]
    assert torch.equal(errors[0][:, 0], errors[1][:, 0]) and not torch.equal(errors[1][:, 0], errors[1][:, 1])


def test_seqtask_interrupted_run_goes_on_to_the_same_bits(tmp_path, monkeypatch, capsys):
    """Stopped in the second of two algorithms. A checkpoint of other settings is not gone on from, a damaged one is told."""
    episode, log, flags = seqtask.episode, tmp_path / "log.jsonl", "--algo grpo,tpo --length 4 --batch 10 --seeds 2 --episodes 6 --diagnostics --out"
    checkpoint, curves = tmp_path / "log.jsonl.checkpoint", lambda path: [
        {k: v for k, v in json.loads(line).items() if k not in ("command", "out", "ms_per_episode_seed")} for line in path.read_text().splitlines()]
    seqtask.main([*flags.split(), str(tmp_path / "whole.jsonl")])
    count = iter(range(100))

    def dies(*args):
        if next(count) == 2 * 6 + 2 * 4:                                   # two seeds: before the fifth episode of tpo
            raise KeyboardInterrupt
        return episode(*args)

    monkeypatch.setattr(seqtask, "EVERY", 0)
    monkeypatch.setattr(seqtask, "episode", dies)
    one_line(lambda: seqtask.main([*flags.split(), str(log)]), capsys, "interrupted checkpoint")
    monkeypatch.setattr(seqtask, "episode", episode)
    saved, run = checkpoint.read_bytes(), seqtask.parse(flags.split()[:-1])[1][1]
    for other, diagnose in ((run._replace(eta=2.0), True), (run, False)):
        (tmp_path / "other").write_bytes(saved)
        seqtask.train(other, "cpu", True, diagnose, tmp_path / "other")
        assert "goes on" not in (out := capsys.readouterr().out) and "of another run" in out
    seqtask.main([*flags.split(), str(log)])
    assert "goes on after episode 4" in capsys.readouterr().out and not checkpoint.exists()
    assert curves(log) == curves(tmp_path / "whole.jsonl") and len({*curves(log)[3]["error"]}) > 2
    (tmp_path / "other").write_bytes(saved[:1000])
    one_line(lambda: seqtask.train(run, "cpu", True, True, tmp_path / "other"), capsys, "other damaged delete")


def test_seqtask_muon_is_torch_muon_up_to_bf16_and_its_scale():
    for n, m in ((64, 256), (256, 64), (2, 64)):
        ours, scale = torch.randn(2, n, m, requires_grad=True), max(1, m / n)**0.5
        theirs = [ours.detach()[s].T.contiguous().requires_grad_() for s in range(2)]        # torch's are (out, in)
        start = ours.detach().clone()
        muon = seqtask.Muon([ours], 0.01)
        peers = [torch.optim.Muon([p], lr=0.01, momentum=0.95, weight_decay=0) for p in theirs]
        for _ in range(3):
            ours.grad = torch.randn(2, n, m)
            for s, (p, peer) in enumerate(zip(theirs, peers)):
                p.grad = ours.grad[s].T.contiguous()
                peer.step()
            muon.step()
        for s in range(2):
            a, b = (ours.detach()[s] - start[s]).flatten(), (theirs[s].detach().T - start[s]).flatten()
            assert F.cosine_similarity(a, b, 0) > 0.995
            assert a.norm() / b.norm() == pytest.approx(1, abs=0.03) and a.norm() > 0.01 * scale


def test_seqtask_what_goes_to_muon():
    P = seq_model([0])
    muon, adam = seqtask.optimizers(P, 1e-3)
    on_muon = {id(p): scale for group in muon.groups.values() for p, _, scale in group}
    names = {name.rstrip(".01"): round(on_muon[id(p)], 3) for name, p in P.items() if id(p) in on_muon}
    assert names == {"token": 5.657, "position": 2.828, "qkv_bias": 4.0, "up": 2.0, "down": 1.0, "head": 1.0}
    assert len(on_muon) + sum(len(g["params"]) for g in adam.param_groups) == len(P)


def test_seqtask_initial_scales():
    P = seqtask.parameters(torch.Generator().manual_seed(0), 16, 10)
    for name, std in (("token", 64**-0.5), ("position", 0.02), ("qkv.0", 64**-0.5), ("out.1", 64**-0.5), ("up.0", 64**-0.5),
                      ("down.0", 256**-0.5), ("head", 64**-0.5)):
        assert P[name].std().item() == pytest.approx(std, rel=0.08), name


@pytest.mark.parametrize("neighbour", [False, True])
def test_seqtask_a_seed_that_never_had_a_gradient_stays_where_it_is(neighbour):
    """All answers wrong: the first epoch's gradient is exactly 0, and rounding must not become Muon's full-size steps, whether
    or not another seed is under way."""
    torch.manual_seed(0)
    run = RUN._replace(length=12, episodes=1)
    P = seq_model([0, 1], run)
    before = {name: p.detach().clone() for name, p in P.items()}
    started = torch.tensor([neighbour, False])
    error, _ = seqtask.episode(run, P, seqtask.optimizers(P, 1e-3), torch.randint(2, (2, 12, 12)),
                               torch.rand(2, 12, 4, 12), started, True)
    assert error.tolist() == [1, 1] and started.tolist() == [neighbour, False]
    assert all(torch.equal(p[1], before[name][1]) for name, p in P.items())


def test_seqtask_dense_run_reaches_one_percent(tmp_path, capsys):
    log = tmp_path / "a.jsonl"
    command = "--reward bag --algo tpo_token --length 4 --episodes 80 --seeds 2 --out".split() + [str(log)]
    seqtask.main(command)
    config, curve, result = records_of(log)
    assert result["steps_to_1pct"] < 70 and result["final_error"] < 0.02 and result["solved"] == 1
    assert curve["error"][0] > 0.3 and len(curve["error"]) == 80 and len(curve["error_per_seed"]) == 2
    assert {"target", "reward", "algo", "length", "vocab", "candidates", "batch", "epochs", "eta", "match", "seeds", "episodes",
            "final_error", "final_error_se", "solved", "steps_to_1pct", "ms_per_episode_seed"} <= set(result)
    out = capsys.readouterr().out
    assert "seed-episodes/s" in out and "s left" in out and "final error, 2 seeds: tpo_token" in out
    seqtask.main(command)                                                  # the same again: nothing is run twice
    assert "not run again" in capsys.readouterr().out and records_of(log) == [config, curve, result]


def records_of(path):
    return [json.loads(line) for line in path.read_text().splitlines()]


def test_seqtask_last_line_names_what_varies(capsys):
    seqtask.main("--algo tpo,dg --length 2,3 --episodes 10 --batch 4 --seeds 1".split())
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert {part.rpartition(" ")[0] for part in last.split(": ")[1].split(", ")} == {"tpo H 2", "tpo H 3", "dg H 2", "dg H 3"}
    seqtask.main("--algo tpo --length 2 --eta 0.5,2 --episodes 10 --batch 4 --seeds 1".split())
    last = capsys.readouterr().out.strip().splitlines()[-1]
    assert "tpo eta 0.5 " in last and "tpo eta 2 " in last


def test_seqtask_result_by_hand():
    errors = torch.linspace(1, 0, 40)[:, None].repeat(1, 4)
    errors[:, 3] = 1
    curve, result = seqtask.records(RUN._replace(seeds=4, episodes=40), errors, {}, 8.0)
    last = [1 - i / 39 for i in range(30, 40)]
    assert result["final_error"] == pytest.approx((3 * sum(last) / 10 + 1) / 4, rel=1e-3) and result["solved"] == 0
    assert result["steps_to_1pct"] is None and result["ms_per_episode_seed"] == 50
    errors[25:] = 0.04
    errors[30] = 0.005
    _, result = seqtask.records(RUN._replace(seeds=4, episodes=40), errors, {}, 8.0)
    assert result["steps_to_1pct"] == 30 and result["solved"] == 1 and result["final_error_se"] == 0


def test_seqtask_interactions_scale_batch_and_learning_rate(capsys, monkeypatch):
    seen, optimizers = [], seqtask.optimizers
    monkeypatch.setattr(seqtask, "optimizers", lambda P, lr: seen.append(lr) or optimizers(P, lr))
    monkeypatch.setattr(seqtask, "episode", lambda run, P, o, prompts, uniform, *rest: (
        seen.extend((tuple(prompts.shape), tuple(uniform.shape))) or torch.zeros(1), {}))
    seqtask.main("--algo dg,tpo --match interactions --seeds 1 --length 4 --candidates 16 --batch 10 --episodes 1".split())
    assert seen == [4e-3, (1, 160, 4), (1, 160, 1, 4), 1e-3, (1, 10, 4), (1, 10, 16, 4)]
    assert capsys.readouterr().out.count("10 * 16 prompts, learning rate 0.001 * sqrt(16)") == 1


def test_seqtask_diagnostics_by_hand():
    scores = torch.tensor([[[1.0, 0, 0, 0], [0, 0, 0, 0]]])
    d = seqtask.diagnostics(RUN, torch.tensor([2.0]), torch.zeros(1, 2, 4, 3), scores)
    e = math.exp(math.sqrt(3) + 1 / math.sqrt(3))                          # u = sqrt 3 and -1 / sqrt 3
    assert d["groups_with_success"] == 0.5 and d["zero_variance"] == 0.5 and d["gradient_norm"] == 2
    assert d["weight_success"].item() == pytest.approx(e / (e + 3)) and \
        d["weight_failure"].item() == pytest.approx((3 / (e + 3) + 1) / 7)
    d = seqtask.diagnostics(RUN._replace(algo="grpo"), torch.tensor([2.0]), torch.zeros(1, 2, 4, 3), scores)
    assert d["weight_success"].item() == pytest.approx(3**0.5) and d["weight_failure"].item() == pytest.approx(3**0.5 / 7)


def test_seqtask_plot_has_a_panel_per_setting(tmp_path, capsys):
    pytest.importorskip("matplotlib")
    log = tmp_path / "seq_a.jsonl"
    seqtask.main(f"--algo tpo,dg --length 2,3 --epochs 1,2 --batch 5 --episodes 3 --out {log}".split())
    plot = runpy.run_path(str(Path(seqtask.__file__).parent / "results" / "plot.py"))
    panels = []
    plot["seq"].__globals__["draw"] = lambda axis, curves, floor: panels.append(sorted(curves))
    plot["seq"](records_of(log), tmp_path / "a.png")
    assert sorted(panels) == [["dg", "tpo"]] * 2 + [["tpo"]] * 2 and (tmp_path / "a.png").read_bytes()[:4] == b"\x89PNG"


def test_seqtask_diagnostics_run(tmp_path):
    seqtask.main(["--preset", "section4", "--smoke", "--length", "3", "--episodes", "3", "--out", str(tmp_path / "a")])
    curve = records_of(tmp_path / "a")[1]
    assert all(len(curve[k]) == 3 for k in ("gradient_norm", "zero_variance", "weight_success")) and curve["gradient_norm"][0] > 0


@pytest.mark.parametrize("preset, count", [("table1", 16), ("table2", 32), ("table3", 40), ("fig8", 4), ("eta", 5), ("ksweep", 10),
                                           ("epochs", 10), ("masking", 3), ("dg-epochs", 2), ("section4", 2)])
def test_seqtask_presets(preset, count):
    cfg, runs = seqtask.parse(["--preset", preset])
    assert len(runs) == count and all(run.seeds >= 10 and run.episodes >= 1000 for run in runs)
    assert all(run.epochs == 1 for run in runs if run.algo == "dg") or preset == "dg-epochs"
    assert seqtask.parse(["--preset", preset, "--seeds", "3"])[1][0].seeds == 3
    assert all(run.episodes <= 300 and run.length <= 6 for run in seqtask.parse(["--preset", preset, "--smoke"])[1])


@pytest.mark.parametrize("command, words", [
    ("--algo tpo_token", "--algo tpo_token with --reward terminal"), ("--candidates 1 --algo dg,grpo", "--candidates 1"),
    ("--reward dense", "--reward dense: allowed are bag, sequential, terminal"), ("--length 1", "--length 1"),
    ("--vocab x", "--vocab x"), ("--eta 0", "--eta 0"), ("--lr nan", "--lr nan"), ("--preset table9", "table1, table2"),
    ("--epoch 3", "--epoch is not a flag"), ("--length 40 --vocab 4", "2 ** 62"), ("--device tpu", "--device tpu"),
    ("--diagnostics --algo dg", "--diagnostics"), ("--diagnostics --algo rloo", "--diagnostics"),
    ("--algo maxrl --reward bag", "--algo maxrl with --reward bag"), ("--out /nowhere/a.jsonl", "--out /nowhere/a.jsonl"), ("--seeds 1.5", "--seeds")])
def test_seqtask_bad_flags_are_one_line(command, words, capsys):
    with pytest.raises(SystemExit) as error:
        seqtask.main(command.split())
    err = capsys.readouterr().err
    assert error.value.code == 2 and err.count("\n") == 1 and words in err and err.startswith("seqtask.py: ")


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


# ---------------------------------------------------------------------------------------------------------------- recipes/
def recipe(name, *needs):
    """Import recipes/<name>.py, or skip the test where what it needs is not installed."""
    missing = [package for package in needs if importlib.util.find_spec(package) is None]
    if missing:
        pytest.skip(f"recipes/{name}.py needs: pip install {' '.join(missing)}")
    spec = importlib.util.spec_from_file_location(name, Path(__file__).parent / "recipes" / f"{name}.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_seqtask_refuses_the_log_of_another_script(tmp_path, capsys):
    for text in ('{"kind": "result", "task": "single"}\n', "[1]\n", '{"half'):
        (tmp_path / "log.jsonl").write_text(text)
        one_line(lambda: seqtask.main(["--out", str(tmp_path / "log.jsonl")]), capsys, "log.jsonl something else")


def test_seqtask_weights_that_are_not_finite_stop_the_run(monkeypatch, capsys):
    def poisoned(run, P, *rest):
        P["head"].data.fill_(math.nan)
        return torch.ones(1), {}

    monkeypatch.setattr(seqtask, "episode", poisoned)
    one_line(lambda: seqtask.train(RUN._replace(episodes=2), "cpu", True), capsys, "not finite episode 2 --lr")


def test_verl_loss_with_our_advantage_has_the_gradient_of_tpo_loss():
    verl_tpo = recipe("verl_tpo", "verl")
    from verl.trainer.ppo import core_algos
    logp, rewards, mask = torch.randn(6, 5).requires_grad_(), torch.zeros(6, 5), torch.arange(5) < torch.tensor([[5], [2], [3], [1], [4], [5]])
    rewards[:, 0] = torch.tensor([1.0, 0.2, 0, 0.5, 0, 0.5])
    uid = ["a", "b", "a", "b", "a", "b"]                                    # rows of a group need not be neighbours
    A, _ = core_algos.get_adv_estimator_fn("tpo")(token_level_rewards=rewards, response_mask=mask.float(), index=uid, config=None)
    l = logp.masked_fill(~mask, 0).sum(-1).view(3, 2).T                     # (2 prompts, 3)
    expected = grad(tpo_loss(l, l.detach(), rewards[:, 0].view(3, 2).T, anchor=0.0), logp)
    gpg, total = core_algos.get_policy_loss_fn("gpg"), 0
    for rows in ([0, 3], [5, 1, 2], [4]):                                   # any micro-batches; verl passes the global size
        config = types.SimpleNamespace(global_batch_info=dict(dp_size=1, global_batch_size=6))
        total += gpg(logp[rows].detach(), logp[rows], A[rows], mask[rows].float(), "seq-mean-token-sum", config)[0]
    torch.testing.assert_close(grad(total, logp), expected)
    assert expected.abs().max() > 0.01


def trl_run(tmp_path, trl_tpo, accumulate, epochs, **settings):
    """A trainer of a random Qwen3-shaped model on 8 prompts, K = 4, 2 groups a micro-batch."""
    import datasets, tokenizers, transformers, trl
    words = {word: i for i, word in enumerate(["<pad>", "<eos>", *"abcdefghijkl"])}
    tokenizer = tokenizers.Tokenizer(tokenizers.models.WordLevel(words, unk_token="<pad>"))
    tokenizer.pre_tokenizer = tokenizers.pre_tokenizers.Whitespace()
    tokenizer = transformers.PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", eos_token="<eos>", padding_side="left")
    torch.manual_seed(0)
    model = transformers.Qwen3ForCausalLM(transformers.Qwen3Config(
        vocab_size=14, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2,
        head_dim=8, tie_word_embeddings=False, pad_token_id=0, eos_token_id=1, bos_token_id=None))
    args = trl.GRPOConfig(**dict(dict(
        output_dir=str(tmp_path), use_cpu=True, bf16=False, gradient_checkpointing=False, report_to="none", num_generations=4,
        per_device_train_batch_size=8, gradient_accumulation_steps=accumulate, num_iterations=epochs, max_completion_length=6,
        max_steps=4, learning_rate=1e-2, max_grad_norm=0, beta=0.0, save_strategy="no", disable_tqdm=True), **settings))
    reward = lambda completions, **kw: [text.count("a") + 0.5 * text.count("b") for text in completions]
    data = datasets.Dataset.from_dict({"prompt": ["a b c", "d", "e f", "g h i j", "k", "l a", "b d", "c e"]})
    return trl_tpo.TPOTrainer(model, reward_funcs=reward, args=args, train_dataset=data, processing_class=tokenizer, anchor=0.25)


@pytest.mark.parametrize("accumulate, epochs", [(2, 3), (1, 1)])
def test_trl_step_has_the_gradient_of_tpo_loss(tmp_path, accumulate, epochs):
    """At each optimizer step, the gradient that TRL hands to the optimizer is tpo_loss's over whole groups, q frozen."""
    trl_tpo = recipe("trl_tpo", "trl")
    import transformers
    trainer = trl_run(tmp_path, trl_tpo, accumulate, epochs)
    rollouts, errors = [], []

    class Check(transformers.TrainerCallback):
        def on_pre_optimizer_step(self, args, state, control, model=None, **kw):
            got = torch.cat([p.grad.flatten() for p in model.parameters()])
            if state.global_step % epochs == 0:
                rows = {k: torch.cat([b[k] for b in trainer._buffered_inputs]) for k in ("prompt_ids", "prompt_mask", "completion_ids",
                                                                                      "completion_mask")}
                text = trainer.processing_class.batch_decode(rows["completion_ids"], skip_special_tokens=True)
                rollouts.append((rows, torch.tensor([x.count("a") + 0.5 * x.count("b") for x in text]).view(-1, 4)))
                assert (rows["prompt_ids"].view(-1, 4, rows["prompt_ids"].shape[1]).diff(dim=1) == 0).all()   # whole groups
            rows, scores = rollouts[-1]
            ids = torch.cat((rows["prompt_ids"], rows["completion_ids"]), 1)
            P = rows["prompt_ids"].shape[1]
            attention = torch.cat((rows["prompt_mask"], rows["completion_mask"]), 1)
            logits = model(ids, attention_mask=attention).logits[:, P - 1:-1]
            l = (logits.log_softmax(-1).gather(-1, ids[:, P:, None])[..., 0] * rows["completion_mask"]).sum(-1).view(-1, 4)
            if state.global_step % epochs == 0:
                rows["old"] = l.detach()
            loss = tpo_loss(l, rows["old"], scores, anchor=0.25)
            expected = torch.cat([g.flatten() for g in torch.autograd.grad(loss, list(model.parameters()))])
            errors.append(float((got - expected).norm() / expected.norm()))

    trainer.add_callback(Check())
    trainer.train()
    print(f"TRL, {accumulate} micro-batches, {epochs} epochs: relative gradient errors {errors}")
    assert len(errors) == 4 and len(rollouts) == (2 if epochs == 3 else 4) and max(errors) < 1e-3


def test_trl_settings_that_split_groups_or_change_the_loss_are_refused(tmp_path):
    trl_tpo = recipe("trl_tpo", "trl")
    for wrong, words in ((dict(per_device_train_batch_size=2, gradient_accumulation_steps=2), "splits groups"),
                         (dict(temperature=0.7), "temperature 0.7"), (dict(scale_rewards="batch"), "scale_rewards")):
        with pytest.raises(ValueError, match=words):
            trl_run(tmp_path, trl_tpo, wrong.pop("gradient_accumulation_steps", 1), 1, **wrong)


def test_trl_advantage_form_has_the_gradient_of_tpo_loss():
    """dr_grpo's loss on the first epoch, -A l_t summed over tokens / (rows * budget), in micro-batches that split groups."""
    trl_tpo = recipe("trl_tpo", "trl")
    logp, scores = torch.randn(8, 5, **F64).requires_grad_(), torch.rand(2, 4, **F64)
    l = logp.sum(-1).view(2, 4)
    A = trl_tpo.advantages(l.detach(), scores, 7, 0.5, 0.25)
    g = sum(grad(-(A[rows, None] * (logp[rows] - logp[rows].detach()).exp()).sum() / (2 * 7), logp) for rows in torch.randperm(8).split(2)) / 4
    torch.testing.assert_close(g, grad(tpo_loss(l, l.detach(), scores, 0.5, 0.25), logp))
