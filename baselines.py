"""The methods TPO is compared with, under tpo_loss's convention: loss(logp, logp_old, scores, ..., mask=None) -> scalar.

Group losses take (..., K): summed log-probs of K candidates on the last axis; mask (..., K) marks real candidates.
Sample losses (pg, ppo, dg) take (B, K) summed or (B, K, T) token log-probs, with scores (B, K), or (B, K, T) when each
token has its own reward; mask, of logp's shape, marks completion tokens. Sum over T, mean over the B * K samples.
B prompts, K candidates, T tokens. logp_old and scores carry no gradient. A = r - mean(r) over the batch, per position.

name           update (loss, before the mean over prompts or samples)    difference from TPO            source
tpo            -sum_i q_i log p_i, q ~ p_old exp(u / eta)                -                              2604.06159
tpo_no_anchor  the same with q ~ exp(u / eta)                            the target forgets p_old       2604.06159
group_pg       -sum_i u_i l_i                                            u as a weight: no fixed point  2604.06159
grpo           -sum_i min(rho u, clip(rho) u) + beta KL, rho = p / p_old stopped by a clip, no target   2402.03300
grpo, beta=0   the same without the KL penalty                           nothing pulls back to pi_old   2402.03300
grpo_masked    grpo, averaged over the groups with sigma > 0             equal groups do not pull back  2604.06159
pg             -A l                                                      one sample, scalar weight      REINFORCE, 1992
ppo            -min(rho A, clip(rho) A), per token                       one sample, clip per token     1707.06347
dg             -sigmoid(A surprisal / eta) A l, per token                one sample, gated weight       2603.14608
"""
import torch

from tpo import standardize, tpo_loss


def tpo_no_anchor_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """TPO whose target forgets the old policy: q ~ exp(u / eta)."""
    return tpo_loss(logp, torch.zeros_like(logp_old), scores, eta, mask=mask)


def group_pg_loss(logp, logp_old, scores, mask=None):
    """TPO's u as scalar policy-gradient weights: sum over K, mean over prompts. logp_old is not used."""
    u = standardize(scores, mask)
    return -torch.where(u == 0, 0, u * logp).sum(-1).mean()


def grpo_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO on sequence ratios with the k3 KL penalty to the rollout policy: sum over K, mean over prompts."""
    return _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask).mean()


def grpo_masked_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO whose zero-variance groups get zero loss; mean over the other groups (0 if there are none)."""
    informative = (standardize(scores, mask) != 0).any(-1)
    loss = _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask)
    return torch.where(informative, loss, 0).sum() / informative.sum().clamp(min=1)


def _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask):
    u = standardize(scores, mask)                                    # the z-score without float noise in equal groups
    r = (logp.to(u.dtype) - logp_old.detach()).clamp(-20, 20)        # (..., K) log-ratios; exp(20) still fits fp32
    surrogate = torch.minimum(r.exp() * u, r.exp().clamp(1 - clip, 1 + clip) * u)
    loss = beta * (torch.exp(-r) + r - 1) - surrogate
    return (loss if mask is None else loss.masked_fill(~mask, 0)).sum(-1)


def pg_loss(logp, logp_old, scores, mask=None):
    """REINFORCE with the batch mean as baseline. logp_old is not used."""
    return -_sample_mean(_advantage(logp, scores) * logp, mask)


def ppo_loss(logp, logp_old, scores, clip=0.2, mask=None):
    """Clipped surrogate on the ratio of each element of logp: per token when logp is (B, K, T)."""
    A, ratio = _advantage(logp, scores), (logp - logp_old.detach()).exp()
    return -_sample_mean(torch.minimum(ratio * A, ratio.clamp(1 - clip, 1 + clip) * A), mask)


def dg_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """Delightful Policy Gradient: A gated by sigmoid(A * surprisal / eta). For one epoch. logp_old is not used."""
    A = _advantage(logp, scores)
    gate = torch.sigmoid(A * -logp.detach() / eta)
    return -_sample_mean(gate * A * logp, mask)


def _advantage(logp, scores):
    """r - mean(r) over the B * K samples, at each position when scores are (B, K, T); broadcast over logp's tokens."""
    A = scores.detach().float()
    A = A - A.mean((0, 1))
    return A if A.ndim == logp.ndim else A[..., None]


def _sample_mean(x, mask):
    """Sum over tokens if there are any, mean over the samples."""
    x = x if mask is None else x.masked_fill(~mask, 0)
    return x.sum(-1).mean() if x.ndim == 3 else x.mean()
