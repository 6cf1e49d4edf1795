"""The methods TPO is compared with, called as tpo_loss is: loss(logp, logp_old, scores, mask=None).

Group losses take summed log-probs (..., K) of K candidates; mask marks real ones. Sum over K, mean
over prompts; rloo, vcpo, maxrl and oapl: mean over K; rebel: over pairs. Sample losses (pg and all
below it) take token log-probs (B, K, T) of B prompts, or sums (B, K); mask, alike, marks completion
tokens; scores are (B, K), where A is used also (B, K, T), a reward per token. Sum over T, mean over
samples; grpo_token_ratio: mean over T; dapo and cispo: over all tokens. Groups and samples without
a real entry are in no mean. logp_old and scores get no gradient. Errors and dtypes: as in tpo.py.

A = r - mean(r) over the batch (dg's paper: the group); for r per token, at each position over the
samples that reach it. C = r - mean(r) over the group, u = C / sigma (population), D = l - l_old.
rho = pi / pi_old per token (grpo, vcpo: per sequence), log rho cut to +-20; clip(rho) in [.8, 1.2]
unless the line says otherwise. What does not use pi_old is for one epoch, tpo_no_anchor excepted.

name             loss of a prompt or sample                difference from TPO            source
tpo              -sum_i q_i log p_i, q ~ p_old exp(u/eta)  -                              2604.06159
tpo_no_anchor    the same with q ~ exp(u / eta)            the target forgets p_old       2604.06159
lpo              tpo at anchor 0, where p = softmax(D)     uniform anchor on the samples  2605.06139
lpo_rev          KL(P || w), P = softmax(D), w ~ e^(u/eta) the KL that seeks one mode     2605.06139
group_pg         -sum_i u_i l_i                            u as a weight: no fixed point  2604.06159
grpo             -sum_i min(rho u, clip(rho) u) + beta KL  per sequence, KL to pi_old     2604.06159
grpo_no_kl       grpo with beta = 0                        nothing pulls back to pi_old   2604.06159
grpo_masked      grpo, mean over groups with sigma > 0     equal groups do not pull back  2604.06159
rloo             -A_i l_i, A_i = r_i - mean of the others  scalar weight, no sigma        2402.14740
vcpo             -sg(min(rho, 8)) A_i l_i, A_i as in rloo  for stale data; no ESS in it   2602.17616
maxrl            -(C_i / mean(r)) l_i, binary r            rare success weighs 1 / mean   2602.02710
rebel            ((D_a - D_b) / eta - (r_a - r_b))^2       squares over pairs a, b, raw r 2404.16767
oapl             (b2 D - (r - V))^2                        squares, soft value V of r     2602.19362
pg               -A l                                      one sample, scalar weight      REINFORCE
ppo              -min(rho A, clip(rho) A)                  one sample, and no critic      1707.06347
dg               -sigmoid(-A log pi / eta) A l, per token  one sample, gated weight       2603.14608
ddpg             dg itself, on samples of an older policy  no ratio; the learner's log pi 2603.20521
kondo            -A l where -A l is largest                most samples need no backward  2603.20526
grpo_token_ratio grpo per token, mean over the completion  as DeepSeekMath and TRL do it  2402.03300
dr_grpo          -min(rho C, clip(rho) C) / constant       no sigma, no sequence length   2503.20783
dapo             -min(rho u, clip(rho) u), rho to 1.28     no redraws, no length penalty  2503.14476
gspo             -min(s u, clip(s) u), geometric mean s    clip per sequence, 3e-4, 4e-4  2507.18071
cispo            -sg(min(rho, 5)) u l                      no token loses its gradient    2506.13585

Relatives. REPS, MPO and V-MPO (on the better half) fit a target ~ pi_old exp(A / eta) too, with eta
from a bound on the KL; PMPO does so for accepted and rejected samples. AWR's weights exp(A / eta)
are TPO's first at anchor 0 without their baseline. MDPO takes gradient steps on what q solves, E[A]
- eta KL(pi || pi_old). At anchor 0 eta to 0 gives MaxRL on binary scores, eta to infinity group_pg.
"""
from functools import partial
from typing import Callable, NamedTuple

import torch

from tpo import _log_softmax, _prepare, standardize, tpo_loss


def tpo_no_anchor_loss(logp, logp_old, scores, eta=1.0, mask=None):
    return tpo_loss(logp, torch.zeros_like(logp_old), scores, eta, mask=mask)


def lpo_rev_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """Reverse LPO. Under P the gradient of log P has mean 0: only the factor P needs one."""
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    log_P = _log_softmax(logp - logp_old, mask)
    log_w = _log_softmax(standardize(scores, mask) / eta, mask)
    return _mean(log_P.exp() * (log_P - log_w).detach(), mask)


def group_pg_loss(logp, logp_old, scores, mask=None):
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    return -_mean(standardize(scores, mask) * logp, mask)


def grpo_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    u = standardize(scores, mask)
    return -_mean(_clipped(logp - logp_old, u, clip, clip, beta), mask)


def grpo_masked_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    u = standardize(scores, mask)
    mixed = (u != 0).any(-1, keepdim=True).expand_as(u)
    return grpo_loss(logp, logp_old, scores, beta, clip, mixed if mask is None else mixed & mask)


def rloo_loss(logp, logp_old, scores, mask=None):
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    others = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
    return -_mean(_centre(scores, mask) / others * logp, mask)       # C_i / others = A_i / K


def vcpo_loss(logp, logp_old, scores, limit=8.0, mask=None):
    """RLOO weighed by truncated ratios. The factor sqrt(min(1, ESS / N)) of lr is the caller's."""
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    rho = (logp - logp_old).detach().clamp(-20, 20).exp().clamp(max=limit)
    return rloo_loss(rho * logp, logp_old, scores, mask)


def maxrl_loss(logp, logp_old, scores, mask=None):
    """MaxRL for scores in {0, 1}. A group without success rests."""
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    total = scores.sum(-1, keepdim=True)
    weight = torch.where(total == 0, 0, _centre(scores, mask) / total)           # C_i / mean / K
    return -_mean(weight * logp, mask)


def rebel_loss(logp, logp_old, scores, eta=1.0, mask=None):
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    others = (mask.sum(-1, keepdim=True) - 1).clamp(min=1)
    d = _centre((logp - logp_old) / eta - _centre(scores, mask), mask)
    return _mean(2 * d.square() / others, mask)               # sum over pairs: K sum_i d_i^2


def oapl_loss(logp, logp_old, scores, b1=1.0, b2=1e-3, mask=None):
    """OAPL: V = b1 log mean_j exp(r_j / b1). Made for stale logp_old."""
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    r = _centre(scores, mask)                           # r - V is the same, and exact
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    total = (r / b1).masked_fill(~mask, -torch.inf).logsumexp(-1, keepdim=True)
    V = b1 * (total - n.to(r).log())
    return _mean((b2 * (logp - logp_old) - (r - V)).square() / n, mask)


def pg_loss(logp, logp_old, scores, mask=None):
    logp, _, A, mask = _tokens(logp, logp_old, scores, mask)
    return -_mean(A * logp, mask)


def ppo_loss(logp, logp_old, scores, clip=0.2, mask=None):
    logp, logp_old, A, mask = _tokens(logp, logp_old, scores, mask)
    return -_mean(_clipped(logp - logp_old, A, clip, clip), mask)


def dg_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """Delightful Policy Gradient: A gated by sigmoid(A * surprisal / eta)."""
    logp, _, A, mask = _tokens(logp, logp_old, scores, mask)
    gate = torch.sigmoid(A * -logp.detach() / eta)
    return -_mean(gate * A * logp, mask)


def kondo_loss(logp, logp_old, scores, keep=0.03, mask=None):
    """The Kondo gate: the share `keep` of samples (one at least) with the largest sum of -A l."""
    logp, _, A, mask = _tokens(logp, logp_old, scores, mask)
    real = mask.any(-1).flatten()
    delight = (A * -logp.detach()).sum(-1).flatten().masked_fill(~real, -torch.inf)
    best = delight.topk(max(1, int(keep * real.sum().item()))).indices
    gate = torch.zeros_like(delight).index_fill(0, best, 1).view(logp.shape[:2])
    return -_mean(gate[..., None] * A * logp, mask)


def grpo_token_ratio_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    logp, logp_old, u, mask = _tokens(logp, logp_old, scores, mask, standardize)
    T = mask.sum(-1, keepdim=True).clamp(min=1)
    return -_mean(_clipped(logp - logp_old, u, clip, clip, beta) / T, mask)


def dr_grpo_loss(logp, logp_old, scores, clip=0.2, length=1, mask=None):
    """Dr. GRPO: `length` is the authors' constant, the generation budget in tokens."""
    logp, logp_old, C, mask = _tokens(logp, logp_old, scores, mask, _centre)
    return -_mean(_clipped(logp - logp_old, C, clip, clip), mask) / length


def dapo_loss(logp, logp_old, scores, low=0.2, high=0.28, mask=None):
    logp, logp_old, u, mask = _tokens(logp, logp_old, scores, mask, standardize)
    return -_mean(_clipped(logp - logp_old, u, low, high)[..., None], mask[..., None])


def gspo_loss(logp, logp_old, scores, low=3e-4, high=4e-4, mask=None):
    """GSPO: one ratio per sequence, the geometric mean of its tokens' ratios; needs (B, K, T)."""
    logp, logp_old, u, mask = _tokens(logp, logp_old, scores, mask, standardize)
    delta = (logp - logp_old).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    return -_mean(_clipped(delta, u, low, high), mask.any(-1, keepdim=True))         # (B, K, 1)


def cispo_loss(logp, logp_old, scores, cap=5.0, mask=None):
    """CISPO: clip the weight, not the update. `cap` bounds rho, as in TRL; 5: 2510.13786."""
    logp, logp_old, u, mask = _tokens(logp, logp_old, scores, mask, standardize)
    rho = (logp - logp_old).detach().clamp(-20, 20).exp().clamp(max=cap)
    return -_mean((rho * u * logp)[..., None], mask[..., None])


def _clipped(delta, A, low, high, beta=0.0):
    """min(rho A, clip(rho) A) - beta KL from log-ratios, KL by k3. exp(20) still fits fp32."""
    delta = delta.clamp(-20, 20)
    rho = delta.exp()
    surrogate = torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)
    return surrogate - beta * (torch.exp(-delta) + delta - 1)


def _inputs(logp, logp_old, scores, mask):
    """tpo.py's checks and dtypes; then 0 where masked, before exp makes inf and 0 * inf NaN."""
    scores, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old)
    return *(x.masked_fill(~mask, 0) for x in (logp, logp_old.detach(), scores)), mask


def _tokens(logp, logp_old, scores, mask, standard=None):
    """Log-probs and mask as (B, K, T), T = 1 for sums; between them the advantages of the rewards:
    u or C by standard(r, real), else A. Those of rewards per sample are (B, K, 1)."""
    fitting = (logp.shape[:2],) if standard else (logp.shape[:2], logp.shape)
    if logp.ndim not in (2, 3) or scores.shape not in fitting:
        raise ValueError(f"logp {tuple(logp.shape)} and scores {tuple(scores.shape)} do not fit: "
                         f"(B, K) or (B, K, T), and (B, K){'' if standard else ' or the same'}")
    r = (scores if scores.ndim == logp.ndim else scores[..., None]).detach()
    logp, logp_old, _, mask = _inputs(logp, logp_old, r.expand_as(logp), mask)
    logp, logp_old, r, mask = (x.reshape(*x.shape[:2], -1) for x in (logp, logp_old, r, mask))
    real = mask if r.shape == mask.shape else mask.any(-1, keepdim=True)
    r = r.to(logp).mT                                                         # (B, 1 or T, K)
    A = standard(r, real.mT) if standard else _centre(r, real.mT, (0, -1))
    return logp, logp_old, A.mT, mask


def _centre(r, real, dim=-1):
    """r minus its mean over the real entries of dim; 0 elsewhere."""
    top = r.masked_fill(~real, -torch.inf).amax(dim, keepdim=True)
    r = (r - top).masked_fill(~real, 0)                  # first: 1e5 + {0, 1} has an inexact mean
    mean = r.sum(dim, keepdim=True) / real.sum(dim, keepdim=True).clamp(min=1)
    return (r - mean).masked_fill(~real, 0)


def _mean(x, mask):
    """Sum over the last axis, mean over the others where it has a real entry."""
    return x.masked_fill(~mask, 0).sum() / mask.any(-1).sum().clamp(min=1)


class Method(NamedTuple):
    """What the scripts know of a method; METHODS is the only place that says it."""
    loss: Callable
    per: str              # group: log-probs (B, K) of K completions; token: (B, K, T) of their
                          # tokens; sample: the same, and one completion per prompt suffices
    rests: bool = True    # a group of equal scores has exactly zero gradient on the first epoch,
                          # tpo by tpo_weights; not where A is over the batch or q forgets p_old
    pulls: bool = False   # on later epochs it pulls back to pi_old: seqtask.py may not skip it
    epochs: int = 4       # gradient steps on each batch of rollouts that it is made for
    takes: tuple = ()     # settings of a script that its loss takes

    def bind(self, **settings):
        """The loss with those of the settings that it takes: eta, anchor, length, clip, beta."""
        return partial(self.loss, **{key: settings[key] for key in self.takes if key in settings})


METHODS = {
    "tpo": Method(tpo_loss, "group", pulls=True, takes=("eta", "anchor")),
    "tpo_no_anchor": Method(tpo_no_anchor_loss, "group", rests=False, pulls=True, takes=("eta",)),
    "lpo": Method(partial(tpo_loss, anchor=0.0), "group", pulls=True, takes=("eta",)),
    "lpo_rev": Method(lpo_rev_loss, "group", pulls=True, takes=("eta",)),
    "group_pg": Method(group_pg_loss, "group", epochs=1),
    "grpo": Method(grpo_loss, "group", pulls=True, takes=("clip", "beta")),
    "grpo_no_kl": Method(partial(grpo_loss, beta=0.0), "group", takes=("clip",)),
    "grpo_masked": Method(grpo_masked_loss, "group", takes=("clip", "beta")),
    "rloo": Method(rloo_loss, "group", epochs=1),
    "vcpo": Method(vcpo_loss, "group"),
    "maxrl": Method(maxrl_loss, "group", epochs=1),
    "rebel": Method(rebel_loss, "group", pulls=True, takes=("eta",)),
    "oapl": Method(oapl_loss, "group", pulls=True),
    "pg": Method(pg_loss, "sample", rests=False, epochs=1),
    "ppo": Method(ppo_loss, "sample", rests=False, takes=("clip",)),
    "dg": Method(dg_loss, "sample", rests=False, epochs=1, takes=("eta",)),
    "ddpg": Method(dg_loss, "sample", rests=False, epochs=1, takes=("eta",)),
    "kondo": Method(kondo_loss, "sample", rests=False, epochs=1),
    "grpo_token_ratio": Method(grpo_token_ratio_loss, "token", pulls=True, takes=("clip", "beta")),
    "dr_grpo": Method(dr_grpo_loss, "token", takes=("length", "clip")),
    "dapo": Method(dapo_loss, "token"),
    "gspo": Method(gspo_loss, "token"),
    "cispo": Method(cispo_loss, "token")}
