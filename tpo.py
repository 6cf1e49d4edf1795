"""Target Policy Optimization (Kaddour, arXiv 2604.06159) in PyTorch. Needs only torch: copy this.

A group is K candidates y_i ~ pi_old(.|x) with scores s_i. Arguments are (..., K), not empty, or
ValueError; mask is bool, True for a real candidate; losses are means over groups that have one, in
fp32 (fp64 if an argument is). A non-finite score makes its group NaN: a check would stall a GPU.
    u = (s - mean(s)) / sigma(s)                 population sigma; u = 0 where all scores are equal
    p_i = softmax_i(l),  l_i = log pi(y_i|x)                                               (Eq. 1)
    q_i ~ p_i^old exp(u_i / eta)                 the target, without gradient              (Eq. 2)
    L = -sum_i q_i log p_i,  dL/dl_i = p_i - q_i      0 once the policy matches the target (Eq. 3)

Sequences: l_i sums the completion's token log-probs in fp32, with the end token, without prompt and
padding. Over hundreds of tokens they differ by tens of nats, but |u| <= sqrt(K - 1): p_old is
one-hot, q = p_old, nothing is learnt. `anchor` = alpha takes z = l - (1 - alpha) l_old for l, so
q ~ exp(alpha l_old + u / eta). The fixed point stays l = l_old + u / eta, if the model can be that.
1 is the paper; 0, a uniform anchor, is LPO (arXiv 2605.06139) and for language models. alpha > 0
(ours below 1) counts likely samples twice: even noise drifts to unlikely ones, often the longer.
"""
import torch


def standardize(scores, mask=None):
    """z-scores u (..., K), 0 where all are within 1e-6 max|s| of their mean. Noise beyond that is
    signal: sums that cancel (round them), 16-bit scores a bit apart (fp16 5e-4 s, bf16 4e-3 s)."""
    s, mask = _prepare(scores, mask)
    count = mask.sum(-1, keepdim=True)                    # (..., 1)
    top = s.masked_fill(~mask, -torch.inf).amax(-1, keepdim=True)
    c = (s - top).masked_fill(~mask, 0)                 # first: 1e5 + {0, 1} has an inexact mean
    c = (c - c.sum(-1, keepdim=True) / count).masked_fill(~mask, 0)
    size, largest = (x.masked_fill(~mask, 0).abs().amax(-1, keepdim=True) for x in (c, s))
    sigma = ((c / size).square().sum(-1, keepdim=True) / count).sqrt()     # 1e30 squared is inf
    return torch.where(size <= 1e-6 * largest, 0, c / size / sigma)


def tpo_target(logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """Target q (..., K), Eq. 2: fixed over all gradient epochs on one batch of rollouts."""
    scores, mask, logp_old = _prepare(scores, mask, logp_old.detach())
    z = logp_old - (1 - anchor) * logp_old + standardize(scores, mask) / eta  # rounds as tpo_loss
    return _log_softmax(z, mask).exp().masked_fill(~mask, 0)


def tpo_loss(logp, logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """Cross-entropy to the target, Eq. 3. Its floor is q's entropy: watch KL(q || p) instead."""
    scores, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old.detach())
    q = tpo_target(logp_old, scores, eta, anchor, mask)
    z = logp - (1 - anchor) * logp_old
    return -(q * _log_softmax(z, mask)).sum() / mask.any(-1).sum().clamp(min=1)


def tpo_weights(logp, logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """w (..., K) = (p - q) / groups, detached: (w * logp).sum() has the gradient of tpo_loss, also
    in micro-batches that split a group. -w is an advantage; rows with w = 0 need no backward."""
    scores, mask, logp, logp_old = _prepare(scores, mask, logp.detach(), logp_old.detach())
    q = tpo_target(logp_old, scores, eta, anchor, mask)
    p = _log_softmax(logp - (1 - anchor) * logp_old, mask).exp().masked_fill(~mask, 0)
    return (p - q) / mask.any(-1).sum().clamp(min=1)


def _log_softmax(z, mask):
    """Over the real candidates. The fill is finite: 0 * -inf would make the loss NaN."""
    return z.masked_fill(~mask, torch.finfo(z.dtype).min).log_softmax(-1)


def _prepare(scores, mask, *logps):
    """Equal shapes, one dtype, log-probs >= -1e9: (1 - alpha) * -inf is NaN at alpha = 1."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    shapes = [tuple(x.shape) for x in (scores, mask, *logps)]
    if len(set(shapes)) > 1 or not scores.numel():
        raise ValueError(f"shapes {', '.join(map(str, shapes))}: all are one (..., K), not empty")
    dtype = torch.float64 if torch.float64 in {x.dtype for x in (scores, *logps)} else torch.float32
    return scores.detach().to(dtype), mask, *(x.to(dtype).clamp(min=-1e9) for x in logps)
