"""Target Policy Optimization (Kaddour, arXiv 2604.06159) in PyTorch. Needs only torch: copy this.

A group is K candidates y_i ~ pi_old(.|x) with scores s_i. Arguments are (..., K), or ValueError;
mask is bool, True for a real candidate; losses are means over groups, in fp32 (fp64 stays fp64).
    u = (s - mean(s)) / sigma(s)                 population sigma; u = 0 where all scores are equal
    p_i = softmax_i(l),  l_i = log pi(y_i|x)                                               (Eq. 1)
    q_i ~ p_i^old exp(u_i / eta)                 the target, without gradient              (Eq. 2)
    L = -sum_i q_i log p_i,  dL/dl_i = p_i - q_i      0 once the policy matches the target (Eq. 3)
A non-finite score makes its whole group NaN; an error would make a GPU wait for the check.

Sequences: l_i sums the completion's token log-probs in fp32, with the end token, without prompt and
padding. Over hundreds of tokens they differ by tens of nats, but |u| <= sqrt(K - 1): p_old is
one-hot, q = p_old, nothing is learnt. `anchor` = alpha < 1 (ours) takes z = l - (1 - alpha) l_old
for l, so q ~ exp(alpha l_old + u / eta): another road to the same fixed point l = l_old + u / eta.
alpha = 1 is the paper, alpha = 0 anchors on the uniform distribution over the K samples.
"""
import torch


def standardize(scores, mask=None):
    """u (..., K), z-scores within each group; 0 if all are within 1e-6 max|s| of their mean."""
    s, mask = _prepare(scores, mask)
    count = mask.sum(-1, keepdim=True).clamp(min=1)
    s = s.masked_fill(~mask, 0)
    s = s / s.abs().amax(-1, keepdim=True).clamp(min=torch.finfo(s.dtype).tiny)  # 1e30 squared: inf
    c = (s - s.sum(-1, keepdim=True) / count).masked_fill(~mask, 0)
    sigma = (c.square().sum(-1, keepdim=True) / count).sqrt()
    return torch.where(c.abs().amax(-1, keepdim=True) <= 1e-6, 0, c / sigma)


def tpo_target(logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """Target q (..., K), Eq. 2: fixed over all gradient epochs on one batch of rollouts."""
    _, mask, logp_old = _prepare(scores, mask, logp_old)
    z = anchor * logp_old.detach() + standardize(scores, mask) / eta
    return _log_softmax(z, mask).exp().masked_fill(~mask, 0)


def tpo_loss(logp, logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """Cross-entropy to the target, Eq. 3. Its floor is q's entropy: watch KL(q || p) instead."""
    q = tpo_target(logp_old, scores, eta, anchor, mask)
    _, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old)
    return -(q * _log_softmax(logp - (1 - anchor) * logp_old.detach(), mask)).sum(-1).mean()


@torch.no_grad()
def tpo_weights(logp, logp_old, scores, eta=1.0, anchor=1.0, mask=None):
    """w (..., K) = (p - q) / groups, detached: (w * logp).sum() has the gradient of tpo_loss.

    So micro-batches may split a group, -w is an advantage, and rows with w = 0 need no backward.
    """
    q = tpo_target(logp_old, scores, eta, anchor, mask)
    _, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old)
    p = _log_softmax(logp - (1 - anchor) * logp_old, mask).exp().masked_fill(~mask, 0)
    return (p - q) / p[..., 0].numel()


def _log_softmax(z, mask):
    """Over the real candidates. The fill is finite: 0 * -inf would make the loss NaN."""
    return z.masked_fill(~mask, torch.finfo(z.dtype).min).log_softmax(-1)


def _prepare(scores, mask, *logps):
    """Equal shapes, at least fp32, log-probs >= -1e9: (1 - alpha) * -inf is NaN at alpha = 1."""
    mask = torch.ones_like(scores, dtype=torch.bool) if mask is None else mask
    shapes = [tuple(x.shape) for x in (scores, mask, *logps)]
    if len(set(shapes)) > 1:
        raise ValueError(f"shapes {', '.join(map(str, shapes))} differ: all are (..., K)")
    double = torch.float64
    scores, *logps = (x if x.dtype == double else x.float() for x in (scores.detach(), *logps))
    return scores, mask, *(x.clamp(min=-1e9) for x in logps)
