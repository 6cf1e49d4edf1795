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
