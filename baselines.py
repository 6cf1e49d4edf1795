"""The methods TPO is compared with, under tpo_loss's convention: loss(logp, logp_old, scores, ..., mask=None) -> scalar.

Group losses take (..., K): summed log-probs of K candidates on the last axis; mask (..., K) marks real candidates.
Sample losses (pg, ppo, dg) take (B, K) summed or (B, K, T) token log-probs, with scores (B, K), or (B, K, T) when each
token has its own reward; mask, of logp's shape, marks completion tokens. Sum over T, mean over the B * K samples.
B prompts, K candidates, T tokens. logp_old and scores carry no gradient. Shapes that do not fit: ValueError. fp32 inside
(fp64 stays fp64). Log-ratios are clamped to [-20, 20]. A = r - mean(r) over the batch; for r per token, at each position
over the samples that reach it: padding has no reward, so it is not in the mean, nor is a sample without any token.

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

from tpo import _prepare, standardize, tpo_loss


def tpo_no_anchor_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """TPO whose target forgets the old policy: q ~ exp(u / eta)."""
    return tpo_loss(logp, torch.zeros_like(logp_old), scores, eta, mask=mask)


def group_pg_loss(logp, logp_old, scores, mask=None):
    """TPO's u as scalar policy-gradient weights: sum over K, mean over prompts. logp_old is not used."""
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    return -(standardize(scores, mask) * logp).sum(-1).mean()


def grpo_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO on sequence ratios with the k3 KL penalty to the rollout policy: sum over K, mean over prompts."""
    return _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask).mean()


def grpo_masked_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO whose zero-variance groups get zero loss; mean over the other groups (0 if there are none)."""
    informative = (standardize(scores, mask) != 0).any(-1)
    loss = _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask)
    return torch.where(informative, loss, 0).sum() / informative.sum().clamp(min=1)


def _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask):
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    r = (logp - logp_old).clamp(-20, 20)                              # (..., K) log-ratios, 0 where masked
    u = standardize(scores, mask)                                     # the z-score without float noise in equal groups
    return (beta * (torch.exp(-r) + r - 1) - _clipped(r, u, clip, clip)).sum(-1)


def pg_loss(logp, logp_old, scores, mask=None):
    """REINFORCE with the batch mean as baseline. logp_old is not used."""
    logp, _, r, real, mask = _tokens(logp, logp_old, scores, mask)
    return -_sample_mean(_centre(r, real, (0, 1)) * logp, mask)


def ppo_loss(logp, logp_old, scores, clip=0.2, mask=None):
    """Clipped surrogate on the ratio of each element of logp: per token when logp is (B, K, T)."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask)
    return -_sample_mean(_clipped(logp - logp_old, _centre(r, real, (0, 1)), clip, clip), mask)


def dg_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """Delightful Policy Gradient: A gated by sigmoid(A * surprisal / eta). For one epoch. logp_old is not used."""
    logp, _, r, real, mask = _tokens(logp, logp_old, scores, mask)
    A = _centre(r, real, (0, 1))
    gate = torch.sigmoid(A * -logp.detach() / eta)
    return -_sample_mean(gate * A * logp, mask)


def _clipped(delta, A, low, high):
    """PPO's min(rho A, clip(rho) A) from the log-ratio delta; exp(20) still fits fp32."""
    rho = delta.clamp(-20, 20).exp()
    return torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)


def _inputs(logp, logp_old, scores, mask):
    """tpo.py's checks and dtypes; then 0 for whatever is masked, before exp can make inf of it and 0 * inf = NaN."""
    scores, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old)
    return *(x.masked_fill(~mask, 0) for x in (logp, logp_old.detach(), scores)), mask


def _tokens(logp, logp_old, scores, mask):
    """Token form: logp, logp_old, mask (B, K, T), T = 1 for sums; r, real (B, K, T), or (B, K, 1) for sample rewards."""
    if logp.ndim not in (2, 3) or scores.shape not in (logp.shape, logp.shape[:2]):
        raise ValueError(f"logp {tuple(logp.shape)} and scores {tuple(scores.shape)} do not fit: logp is (B, K) or "
                         "(B, K, T), scores have its shape or (B, K)")
    r = scores if scores.ndim == logp.ndim else scores[..., None]
    logp, logp_old, _, mask = _inputs(logp, logp_old, r.expand_as(logp), mask)
    logp, logp_old, r, mask = (x if x.ndim == 3 else x[..., None] for x in (logp, logp_old, r, mask))
    r, real = _prepare(r, mask if r.shape == mask.shape else mask.any(-1, keepdim=True))
    return logp, logp_old, r, real, mask


def _centre(r, real, dim):
    """r minus its mean over the real entries of dim; 0 elsewhere."""
    mean = r.masked_fill(~real, 0).sum(dim, keepdim=True) / real.sum(dim, keepdim=True).clamp(min=1)
    return (r - mean).masked_fill(~real, 0)


def _sample_mean(x, mask):
    """Sum over tokens, mean over the samples that have any."""
    return x.masked_fill(~mask, 0).sum() / mask.any(-1).sum().clamp(min=1)
