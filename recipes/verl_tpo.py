"""TPO in verl 0.9.1: an advantage estimator, and the flags that make verl's loss the right one.

    VERL_USE_EXTERNAL_MODULES=verl_tpo PYTHONPATH=recipes \\
        python -m verl.trainer.main_ppo <your data, model, reward> \\
        algorithm.adv_estimator=tpo algorithm.use_kl_in_reward=False \\
        actor_rollout_ref.actor.policy_loss.loss_mode=gpg \\
        actor_rollout_ref.actor.loss_agg_mode=seq-mean-token-sum \\
        actor_rollout_ref.actor.use_kl_loss=False actor_rollout_ref.actor.entropy_coeff=0 \\
        actor_rollout_ref.actor.ppo_epochs=1 actor_rollout_ref.rollout.n=16 \\
        data.train_batch_size=16 actor_rollout_ref.actor.ppo_mini_batch_size=16

`+algorithm.tpo_eta=0.5` sets eta (default 1). The anchor (default 0) needs the old log-probs, and
verl 0.9.1 hands them to one estimator only, the one named gdpo. So this file takes that name too
(verl's own GDPO is then gone), for `algorithm.adv_estimator=gdpo +algorithm.tpo_anchor=0.25`.

dL/dl = p - q, and (w * l).sum() with w = tpo_weights has tpo_loss's gradient, here at l = l_old:
one epoch (ppo_epochs 1) and one mini-batch (ppo_mini_batch_size = train_batch_size), as a second
would need another w. gpg is -A log pi without ratio or clip; seq-mean-token-sum adds tokens, then
divides by the number of sequences, padding too, so an advantage of -w * sequences / prompts gives
the mean over prompts, in any micro-batches. Sample at temperature 1 without top-k/top-p. A group
with equal scores has exactly zero advantage.

SkyRL's own trainer (skyrl 0.3.0) takes the same function, at anchor 0 and with eta 1:

    from skyrl.backends.skyrl_train.utils.ppo_utils import AdvantageEstimatorRegistry
    from verl_tpo import tpo_advantage                       # verl need not be installed
    AdvantageEstimatorRegistry.register("tpo", lambda token_level_rewards, response_mask, index,
        **_: tpo_advantage(token_level_rewards, response_mask, index))
    # trainer.algorithm.advantage_estimator=tpo trainer.algorithm.policy_loss_type=regular
    # trainer.algorithm.loss_reduction=seq_mean_token_sum_norm trainer.algorithm.max_seq_len=1
    # trainer.algorithm.use_kl_loss=false trainer.algorithm.use_kl_in_reward=false
    # trainer.update_epochs_per_batch=1 trainer.policy_mini_batch_size=<trainer.train_batch_size>

That reduction divides a sum over tokens by sequences * max_seq_len: 1 makes it the mean. Have
train_batch_size * n_samples_per_prompt a multiple of the number of data-parallel processes: the
rows that SkyRL would pad with are copies of a real one, each with a prompt number of its own.
verl shows an estimator only algorithm.*: the actor's settings above are not checked.
"""
import importlib.util
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import tpo_weights


@torch.no_grad()
def tpo_advantage(token_level_rewards, response_mask, index, config=None, batch=None, **kwargs):
    """rewards, mask (rows, T), index: uid of each row's prompt -> advantages, returns (rows, T).

    Groups may have any size, their rows any order. batch["old_log_probs"] (rows, T) where the
    trainer hands it over; ValueError if the anchor needs it and it is not there.
    """
    given = config or {}
    eta, anchor = given.get("tpo_eta", 1.0), given.get("tpo_anchor", 0.0)
    correction = given.get("rollout_correction") or {}
    if given.get("use_kl_in_reward"):
        raise ValueError("algorithm.use_kl_in_reward changes the scores: TPO needs False")
    if any(correction.get(name) for name in ("rollout_is", "rollout_rs", "bypass_mode")):
        raise ValueError("algorithm.rollout_correction changes the weights: TPO needs it off")
    if not (eta > 0 and 0 <= anchor <= 1):
        raise ValueError(f"tpo_eta {eta}, tpo_anchor {anchor}: allowed are eta above 0, anchor 0 "
                         "to 1")
    mask = response_mask.bool()
    scores = token_level_rewards.sum(-1)                                             # (rows,)
    logp_old = torch.zeros_like(scores)
    if batch is not None:
        logp_old = batch["old_log_probs"].float().masked_fill(~mask, 0).sum(-1)
    elif anchor != 0:
        raise ValueError(f"tpo_anchor {anchor} needs the old log-probs, which verl hands only to "
                         "the estimator named gdpo: set algorithm.adv_estimator=gdpo")
    groups = {}
    for row in mask.any(-1).nonzero().flatten().tolist():        # a row without a token is padding
        groups.setdefault(index[row], []).append(row)
    advantages = torch.zeros_like(scores)
    for rows in groups.values():
        l = logp_old[rows]                                                           # (K,)
        advantages[rows] = -tpo_weights(l, l, scores[rows], eta, anchor)
    advantages *= len(index) / max(1, len(groups))          # a mean over rows -> over prompts
    advantages = advantages[:, None] * response_mask
    return advantages, advantages


if importlib.util.find_spec("verl"):
    from verl.trainer.ppo import core_algos
    core_algos.ADV_ESTIMATOR_REGISTRY |= {"tpo": tpo_advantage, "gdpo": tpo_advantage}
