"""TPO in TRL 1.16: TPOTrainer is used as GRPOTrainer is, with the same GRPOConfig.

    pip install trl==1.16

    from trl_tpo import TPOTrainer
    args = GRPOConfig(num_generations=16, per_device_train_batch_size=16, num_iterations=2,
                      max_completion_length=64)
    TPOTrainer(model, reward_funcs=reward, train_dataset=dataset, args=args,
               eta=1.0, anchor=0.25).train()

TRL shuffles the rows of a rollout before it slices them into micro-batches, which tears groups
apart; this trainer puts them back in order, so that each micro-batch holds whole groups, for any
number of epochs (num_iterations) and steps per rollout. What would split a group or change the
loss is refused in one line: see refuse(). q depends on the rollout alone (old log-probs, scores),
so it is the same on every epoch. Scores are TRL's advantages, the group's z-scores: standardizing
them again gives u. eta and anchor as in tpo.py; anchor = 1, the paper, suits short completions.

Where groups must be split (micro-batches smaller than K), use the advantage form: advantages(...)
in place of TRL's, with GRPOConfig(loss_type="dr_grpo", beta=0): the same gradient under any
micro-batching, on the first epoch only.
"""
import sys
from pathlib import Path

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import tpo_loss, tpo_weights

try:
    from trl import GRPOTrainer
    from trl.trainer.utils import split_tensor_dict
except ImportError as error:
    sys.exit(f"recipes/trl_tpo.py needs trl: pip install trl==1.16 ({error})")


def advantages(logp_old, scores, max_completion_length, eta=1.0, anchor=1.0):
    """(B, K) -> (B * K,) for loss_type "dr_grpo".

    That loss divides by rows * max_completion_length, TPO by B; this undoes it.
    """
    w = tpo_weights(logp_old, logp_old, scores, eta, anchor)
    return -w.flatten() * w.numel() * max_completion_length


NEEDED = dict(beta=0.0, use_vllm=False, scale_rewards="group", top_entropy_quantile=1.0,
              temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
              mask_truncated_completions=False, use_liger_kernel=False)


def refuse(args):
    """One line for each setting under which the loss would not be TPO's."""
    rows, K = args.per_device_train_batch_size, args.num_generations
    if rows % K:
        raise ValueError(f"per_device_train_batch_size {rows} splits groups: it must be a "
                         f"multiple of num_generations {K}; or use the advantage form")
    for name, needed in NEEDED.items():
        value = getattr(args, name)
        if value != needed:
            raise ValueError(f"{name} {value!r} changes the loss or the sampling: "
                             f"TPO needs {needed!r}")


class TPOTrainer(GRPOTrainer):
    """tpo_loss: mean over the prompts of a micro-batch, then over the accumulation steps."""

    def __init__(self, *args, eta=1.0, anchor=1.0, **kwargs):
        super().__init__(*args, **kwargs)
        refuse(self.args)
        self.eta, self.anchor = eta, anchor

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rows = len(batch["advantages"])
        batch["row"] = torch.arange(rows, device=batch["advantages"].device)
        if self.model.training and "old_per_token_logps" not in batch:
            # the policy that sampled, before any step, for every epoch
            with torch.no_grad():
                at_once = self.args.per_device_train_batch_size
                batch["old_per_token_logps"] = self.token_logp(self.model, batch, at_once)
        return batch

    def token_logp(self, model, batch, at_once=None):
        """Log-probs (rows, T) of the completions, after their prompts (rows, P)."""
        ids, mask = (torch.cat((batch["prompt_" + x], batch["completion_" + x]), 1)
                     for x in ("ids", "mask"))                             # (rows, P + T)
        T = batch["completion_ids"].size(1)
        return self._get_per_token_logps_and_entropies(model, ids, mask, T, at_once)[0]

    def _prepare_inputs(self, generation_batch):
        every = self.args.steps_per_generation * self.num_iterations
        fresh = self._step % every == 0 or self._buffered_inputs is None
        inputs = super()._prepare_inputs(generation_batch)
        if self.model.training and fresh:                      # undo the shuffle, slice again
            slices = self._buffered_inputs
            together = {k: v if v.ndim == 0 else torch.cat([part[k] for part in slices])
                        for k, v in inputs.items() if v is not None}
            order = together["row"].argsort()
            together = {k: v if v.ndim == 0 else v[order] for k, v in together.items()}
            slices = split_tensor_dict(together, self.args.steps_per_generation)
            self._buffered_inputs = slices
            inputs = slices[self._step % self.args.steps_per_generation]
        return inputs

    def _compute_loss(self, model, inputs):
        real = inputs["completion_mask"].bool()         # (rows, T): end token in, padding out
        logp = self.token_logp(model, inputs)
        old = inputs.get("old_per_token_logps", logp.detach())    # evaluation: loss at p = p_old
        training = self.model.training
        K = self.num_generations if training else self.num_generations_eval
        logp, old = (x.float().masked_fill(~real, 0).sum(-1).view(-1, K) for x in (logp, old))
        scores = inputs["advantages"].view(-1, K)
        # float noise over TRL's sigma + 1e-4 is less than 1e-2
        scores = scores * (scores.abs().amax(-1, keepdim=True) > 1e-2)
        loss = tpo_loss(logp, old, scores, self.eta, self.anchor)
        return loss / (self.current_gradient_accumulation_steps if training else 1)
