"""TPO in verl 0.9.1: an advantage estimator, and the flags that make verl's loss the right one.

    VERL_USE_EXTERNAL_MODULES=verl_tpo PYTHONPATH=recipes \\
        python -m verl.trainer.main_ppo <your data, model, reward> \\
        algorithm.adv_estimator=tpo algorithm.use_kl_in_reward=False \\
        actor_rollout_ref.actor.policy_loss.loss_mode=gpg \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \\
        actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.entropy_coeff=0 \\
        actor_rollout_ref.actor.ppo_epochs=1 actor_rollout_ref.rollout.n=16 \\
        data.train_batch_size=16 actor_rollout_ref.actor.ppo_mini_batch_size=16

dL/dl = p - q, and (w * l).sum() with w = tpo_weights has tpo_loss's gradient. verl hands an
estimator the rewards and the prompt (uid) of every row, but no old log-probs, so only anchor = 0
can be computed: on the first epoch p = 1/K whatever they are. Hence one epoch (ppo_epochs 1) and
one mini-batch (ppo_mini_batch_size = train_batch_size); a second would find p != p_old and need
another w. gpg is -A log pi without ratio or clip; seq-mean-token-sum adds tokens, then divides by
the number of sequences, so an advantage of -w * rows gives the mean over prompts, in any
micro-batches. Sample at temperature 1 without top-k/top-p. eta is fixed at 1: verl passes an
estimator no setting of ours.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import tpo_weights

try:
    from verl.trainer.ppo.core_algos import register_adv_est
except ImportError as error:
    sys.exit(f"recipes/verl_tpo.py needs verl: pip install verl==0.9.1 ({error})")


@register_adv_est("tpo")
@torch.no_grad()
def tpo_advantage(token_level_rewards, response_mask, index, config=None, **kwargs):
    """rewards, mask (rows, T), index: uid of each row's prompt -> advantages, returns (rows, T).

    Groups may have any size.
    """
    scores, advantages = token_level_rewards.sum(-1), torch.empty(len(index))     # (rows,)
    groups = {}
    for row, uid in enumerate(index):
        groups.setdefault(uid, []).append(row)
    for rows in groups.values():
        r = scores[rows]                                                           # (K,)
        start = torch.zeros_like(r)
        advantages[rows] = -tpo_weights(start, start, r, anchor=0.0).float().cpu()
    advantages *= len(index) / len(groups)                     # a mean over rows -> over prompts
    advantages = advantages.to(scores.device)[:, None] * response_mask
    return advantages, advantages
