"""The methods TPO is compared with, called as tpo_loss is: loss(logp, logp_old, scores, mask=None).

Group losses take (..., K): summed log-probs of K candidates on the last axis; mask (..., K) marks
real candidates. Sample losses (pg and all below it) take (B, K) summed or (B, K, T) token
log-probs; mask, of the same shape, marks completion tokens; scores are (B, K), or in pg, ppo, dg
and kondo (B, K, T) when each token has its own reward. Sum over T, mean over the B * K samples;
dapo and cispo: mean over tokens. B prompts, K candidates, T tokens. logp_old and scores carry no
gradient. Shapes that do not fit: ValueError. fp32 inside (fp64 stays). |log rho| is cut to 20.

A = r - mean(r) over the batch; for r per token, at each position over the samples that reach it:
padding has no reward, so it is not in the mean, nor is a sample without any token.
C = r - mean(r) over the group, u = C / sigma (population). rho = pi / pi_old per token (grpo: per
sequence), clip(rho) in [1 - .2, 1 + .2] unless the line says otherwise. Losses without rho are for
one epoch, but for rebel and oapl, regressions that hold on any epoch.

name           loss of a prompt or sample               difference from TPO            source
tpo            -sum_i q_i log p_i, q ~ p_old exp(u/eta) -                              2604.06159
tpo_no_anchor  the same with q ~ exp(u / eta)           the target forgets p_old       2604.06159
group_pg       -sum_i u_i l_i                           u as a weight: no fixed point  2604.06159
grpo           -sum_i min(rho u, clip(rho) u) + beta KL stopped by a clip, no target   2402.03300
grpo_no_kl     grpo with beta = 0                       nothing pulls back to pi_old   2402.03300
grpo_masked    grpo, mean over groups with sigma > 0    equal groups do not pull back  2604.06159
rloo           -A_i l_i, A_i = r_i - mean of the others scalar weight, no sigma        2402.14740
maxrl          -(C_i / mean(r)) l_i, binary r           rare success weighs 1 / mean   2602.02710
rebel          ((D_a - D_b) / eta - (r_a - r_b))^2      squares over pairs a, b, raw r 2404.16767
oapl           (b2 D - (r - V))^2, D = l - l_old        squares, soft value V of r     2602.19362
pg             -A l                                     one sample, scalar weight      REINFORCE
ppo            -min(rho A, clip(rho) A), per token      one sample, clip per token     1707.06347
dg             -sigmoid(-A log pi / eta) A l, per token one sample, gated weight       2603.14608
kondo          -A l where -A l is largest               most samples need no backward  2603.20526
dr_grpo        -min(rho C, clip(rho) C) / constant      no sigma, no sequence length   2503.20783
dapo           -min(rho u, clip(rho) u), rho to 1.28    more room up than down         2503.14476
gspo           -min(s u, clip(s) u), geometric mean s   clip per sequence, 3e-4, 4e-4  2507.18071
cispo          -sg(min(rho, 5)) u l                     no token loses its gradient    2506.13585
"""
from functools import partial
from typing import Callable, NamedTuple

import torch

from tpo import _prepare, standardize, tpo_loss


def tpo_no_anchor_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """TPO whose target forgets the old policy: q ~ exp(u / eta)."""
    return tpo_loss(logp, torch.zeros_like(logp_old), scores, eta, mask=mask)


def group_pg_loss(logp, logp_old, scores, mask=None):
    """TPO's u as scalar policy-gradient weights: sum over K, mean over prompts. No logp_old."""
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    return -(standardize(scores, mask) * logp).sum(-1).mean()


def grpo_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO on sequence ratios, k3 KL to the rollout policy: sum over K, mean over prompts."""
    return _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask).mean()


def grpo_masked_loss(logp, logp_old, scores, beta=0.04, clip=0.2, mask=None):
    """GRPO whose equal-score groups get zero loss; mean over the others (0 if there are none)."""
    informative = (standardize(scores, mask) != 0).any(-1)
    loss = _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask)
    return torch.where(informative, loss, 0).sum() / informative.sum().clamp(min=1)


def _grpo_per_prompt(logp, logp_old, scores, beta, clip, mask):
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    r = (logp - logp_old).clamp(-20, 20)                    # (..., K) log-ratios, 0 where masked
    u = standardize(scores, mask)
    return (beta * (torch.exp(-r) + r - 1) - _clipped(r, u, clip, clip)).sum(-1)


def rloo_loss(logp, logp_old, scores, mask=None):
    """REINFORCE leave-one-out, mean over K and prompts. A lone candidate rests. No logp_old."""
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    n = mask.sum(-1, keepdim=True)
    A = _centre(scores, mask, -1) * n / (n - 1).clamp(min=1)          # r_i - mean of the others
    return -_group_mean(A * logp, mask)


def maxrl_loss(logp, logp_old, scores, mask=None):
    """MaxRL for scores in {0, 1}, mean over K and prompts. No success: rests. No logp_old."""
    logp, _, scores, mask = _inputs(logp, logp_old, scores, mask)
    mean = scores.sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    A = torch.where(mean == 0, 0, _centre(scores, mask, -1) / mean)
    return -_group_mean(A * logp, mask)


def rebel_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """REBEL: mean over the pairs a < b of a group, then over prompts; a lone candidate gives 0."""
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    d = _centre((logp - logp_old) / eta - scores, mask, -1)
    pairs = d.square().sum(-1) / (mask.sum(-1) - 1).clamp(min=1)      # sum over pairs: n sum of d^2
    return (2 * pairs).mean()


def oapl_loss(logp, logp_old, scores, b1=1.0, b2=1e-3, mask=None):
    """OAPL: regress b2 log(pi / pi_old) on r - V, V = b1 log mean_j exp(r_j / b1).

    Mean over K and prompts. Made for stale logp_old.
    """
    logp, logp_old, scores, mask = _inputs(logp, logp_old, scores, mask)
    n = mask.sum(-1, keepdim=True).clamp(min=1)
    total = (scores / b1).masked_fill(~mask, -torch.inf).logsumexp(-1, keepdim=True)
    V = b1 * (total - n.to(scores).log())
    return _group_mean((b2 * (logp - logp_old) - (scores - V)).square(), mask)


def pg_loss(logp, logp_old, scores, mask=None):
    """REINFORCE with the batch mean as baseline. logp_old is not used."""
    logp, _, r, real, mask = _tokens(logp, logp_old, scores, mask)
    return -_sample_mean(_centre(r, real, (0, 1)) * logp, mask)


def ppo_loss(logp, logp_old, scores, clip=0.2, mask=None):
    """Clipped surrogate on the ratio of each element of logp: per token when logp is (B, K, T)."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask)
    A = _centre(r, real, (0, 1))
    return -_sample_mean(_clipped(logp - logp_old, A, clip, clip), mask)


def dg_loss(logp, logp_old, scores, eta=1.0, mask=None):
    """Delightful Policy Gradient: A gated by sigmoid(A * surprisal / eta). No logp_old."""
    logp, _, r, real, mask = _tokens(logp, logp_old, scores, mask)
    A = _centre(r, real, (0, 1))
    gate = torch.sigmoid(A * -logp.detach() / eta)
    return -_sample_mean(gate * A * logp, mask)


def kondo_loss(logp, logp_old, scores, keep=0.03, mask=None):
    """The Kondo gate: the share `keep` of samples (one at least) with the largest delight counts.

    Delight is A * surprisal summed over T. The others need no backward. No logp_old.
    """
    logp, _, r, real, mask = _tokens(logp, logp_old, scores, mask)
    A = _centre(r, real, (0, 1))
    delight = (A * -logp.detach()).sum(-1).masked_fill(~mask.any(-1), -torch.inf).flatten()
    best = delight.topk(max(1, int(keep * delight.numel()))).indices
    gate = torch.zeros_like(delight).index_fill(0, best, 1).view(logp.shape[:2])
    return -_sample_mean(gate[..., None] * A * logp, mask)


def dr_grpo_loss(logp, logp_old, scores, clip=0.2, length=1, mask=None):
    """Dr. GRPO: no sigma; `length` is the authors' constant, the generation budget in tokens."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask, per_token=False)
    C = _centre(r, real, 1)
    return -_sample_mean(_clipped(logp - logp_old, C, clip, clip), mask) / length


def dapo_loss(logp, logp_old, scores, low=0.2, high=0.28, mask=None):
    """DAPO: clip-higher, mean over the batch's tokens, without its redrawing of equal groups."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask, per_token=False)
    return -_token_mean(_clipped(logp - logp_old, _group_u(r, real), low, high), mask)


def gspo_loss(logp, logp_old, scores, low=3e-4, high=4e-4, mask=None):
    """GSPO: one ratio per sequence, the geometric mean of its tokens' ratios; needs (B, K, T)."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask, per_token=False)
    delta = (logp - logp_old).sum(-1, keepdim=True) / mask.sum(-1, keepdim=True).clamp(min=1)
    surrogate = _clipped(delta, _group_u(r, real), low, high)                         # (B, K, 1)
    return -_sample_mean(surrogate, mask.any(-1, keepdim=True))


def cispo_loss(logp, logp_old, scores, cap=5.0, mask=None):
    """CISPO: clip the weight, not the update. `cap` bounds rho, as in TRL; 5: 2510.13786."""
    logp, logp_old, r, real, mask = _tokens(logp, logp_old, scores, mask, per_token=False)
    rho = (logp.detach() - logp_old).clamp(-20, 20).exp().clamp(max=cap)
    return -_token_mean(rho * _group_u(r, real) * logp, mask)


def _clipped(delta, A, low, high):
    """PPO's min(rho A, clip(rho) A) from the log-ratio delta; exp(20) still fits fp32."""
    rho = delta.clamp(-20, 20).exp()
    return torch.minimum(rho * A, rho.clamp(1 - low, 1 + high) * A)


def _inputs(logp, logp_old, scores, mask):
    """tpo.py's checks and dtypes; then 0 where masked, before exp makes inf and 0 * inf NaN."""
    scores, mask, logp, logp_old = _prepare(scores, mask, logp, logp_old)
    return *(x.masked_fill(~mask, 0) for x in (logp, logp_old.detach(), scores)), mask


def _tokens(logp, logp_old, scores, mask, per_token=True):
    """All in token form (B, K, T), T = 1 for sums; r, real are (B, K, 1) for sample rewards."""
    if logp.ndim not in (2, 3) or scores.shape not in (logp.shape[:2], logp.shape)[:1 + per_token]:
        raise ValueError(f"logp {tuple(logp.shape)} and scores {tuple(scores.shape)} do not fit: "
                         "logp is (B, K) or (B, K, T), "
                         f"scores are (B, K){' or (B, K, T)' * per_token}")
    r = scores if scores.ndim == logp.ndim else scores[..., None]
    logp, logp_old, _, mask = _inputs(logp, logp_old, r.expand_as(logp), mask)
    logp, logp_old, r, mask = (x if x.ndim == 3 else x[..., None]
                               for x in (logp, logp_old, r, mask))
    r, real = _prepare(r, mask if r.shape == mask.shape else mask.any(-1, keepdim=True))
    return logp, logp_old, r, real, mask


def _centre(r, real, dim):
    """r minus its mean over the real entries of dim; 0 elsewhere."""
    count = real.sum(dim, keepdim=True).clamp(min=1)
    mean = r.masked_fill(~real, 0).sum(dim, keepdim=True) / count
    return (r - mean).masked_fill(~real, 0)


def _sample_mean(x, mask):
    """Sum over tokens, mean over the samples that have any."""
    return x.masked_fill(~mask, 0).sum() / mask.any(-1).sum().clamp(min=1)


def _group_u(r, real):
    """TPO's u of each sample within its prompt's group: (B, K, 1)."""
    return standardize(r[..., 0], real[..., 0])[..., None]


def _group_mean(x, mask):
    """Mean over the real candidates of each group, then over the groups."""
    return (x.masked_fill(~mask, 0).sum(-1) / mask.sum(-1).clamp(min=1)).mean()


def _token_mean(x, mask):
    return x.masked_fill(~mask, 0).sum() / mask.sum().clamp(min=1)


class Method(NamedTuple):
    """What the scripts know of a method; METHODS is the only place that says it."""
    loss: Callable
    # log-probs that it takes. group: (B, K) of K completions; token: (B, K, T) of their tokens;
    # sample: (B, K, T), and one completion per prompt suffices
    per: str
    # A group of equal scores has exactly zero gradient on the first epoch. Not so where A is taken
    # from the mean of the batch (pg, ppo, dg, kondo), or where q forgets p_old
    rests: bool
    pulls: bool = False   # ... and on later epochs such a group pulls back to pi_old
    epochs: int = 4       # gradient steps on each batch of rollouts that it is made for
    takes: tuple = ()     # settings of a script that its loss takes: eta, anchor, length

    def bind(self, **settings):
        """The loss with those of the settings that it takes."""
        return partial(self.loss, **{name: settings[name] for name in self.takes})


METHODS = {
    "tpo": Method(tpo_loss, "group", rests=True, pulls=True, takes=("eta", "anchor")),
    "tpo_no_anchor": Method(tpo_no_anchor_loss, "group", rests=False, pulls=True, takes=("eta",)),
    "group_pg": Method(group_pg_loss, "group", rests=True, epochs=1),
    "grpo": Method(grpo_loss, "group", rests=True, pulls=True),
    "grpo_no_kl": Method(partial(grpo_loss, beta=0.0), "group", rests=True),
    "grpo_masked": Method(grpo_masked_loss, "group", rests=True),
    "rloo": Method(rloo_loss, "group", rests=True, epochs=1),
    "maxrl": Method(maxrl_loss, "group", rests=True, epochs=1),
    "rebel": Method(rebel_loss, "group", rests=True, pulls=True, takes=("eta",)),
    "oapl": Method(oapl_loss, "group", rests=True, pulls=True),
    "pg": Method(pg_loss, "sample", rests=False, epochs=1),
    "ppo": Method(ppo_loss, "sample", rests=False),
    "dg": Method(dg_loss, "sample", rests=False, epochs=1, takes=("eta",)),
    "kondo": Method(kondo_loss, "sample", rests=False, epochs=1),
    "dr_grpo": Method(dr_grpo_loss, "token", rests=True, takes=("length",)),
    "dapo": Method(dapo_loss, "token", rests=True),
    "gspo": Method(gspo_loss, "token", rests=True),
    "cispo": Method(cispo_loss, "token", rests=True)}
