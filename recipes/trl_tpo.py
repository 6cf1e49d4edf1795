"""TPO in TRL 1.16: TargetPOTrainer is used as GRPOTrainer is, with the same GRPOConfig.

    pip install trl==1.16.0

    from trl_tpo import TargetPOTrainer                      # beside it, or PYTHONPATH=recipes
    args = GRPOConfig(num_generations=16, per_device_train_batch_size=16, num_iterations=2,
                      max_completion_length=256)
    TargetPOTrainer(model, reward_funcs=reward, train_dataset=dataset, args=args,
                    eta=1.0, anchor=0.0).train()                        # or under torchrun

TRL's own "tpo" is another method, Triple Preference Optimization. eta and anchor as in tpo.py. The
logged loss is KL(q || p), 0 once the policy matches the target; its gradient is tpo_loss's, for any
number of epochs (num_iterations), steps per rollout, micro-batches of whole groups, and processes.
- Scores are the rewards themselves (reward_weights applied), not TRL's advantages, whose
  sigma + 1e-4 makes a signal of rounding. A candidate that every reward function returns None for
  is left out of its group.
- TRL shuffles a rollout's rows before it slices them, which tears groups apart: not here.
- Only tokens that the model wrote count: its end token, not padding nor what a tool answered.
- A group with equal scores has exactly zero weight until the policy moves. A step whose gradient is
  exactly zero is not taken: AdamW's moments and weight decay would move weights without a signal.
- Whatever else would change GRPO's loss, the sampling or the rows is refused in one line, and so is
  a library that replaces compute_loss, as Unsloth does. use_vllm is allowed (it was not run) with
  vllm_importance_sampling_correction=False.
- Dropout is turned off, LoRA's too, and an attention_dropout refused: two masks are nats apart in
  the log-prob of a completion.
Run with TRL 1.16.0 and 1.14.2, in two processes with DDP too (checked.txt); 1.15.0 wants Triton
where there is no GPU, older ones are refused. FSDP, images and DeepSpeed, which takes its own
steps, were not run.
"""
import inspect
import sys
from dataclasses import fields
from pathlib import Path
from unittest.mock import patch

import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
from tpo import standardize, tpo_loss, tpo_weights

try:
    from transformers import TrainerCallback, TrainingArguments
    from trl import GRPOConfig, GRPOTrainer
    from trl.trainer import grpo_trainer
except ImportError as error:
    sys.exit(f"recipes/trl_tpo.py needs trl: pip install trl==1.16.0 ({error})")

# GRPOConfig's own fields are all in one of two lists; the last three come from TrainingArguments
NEEDED = dict(
    temperature=1.0, top_p=1.0, top_k=0, min_p=None, repetition_penalty=1.0,
    generation_kwargs=None, vllm_structured_outputs_regex=None,
    loss_type="dapo", beta=0.0, epsilon=0.2, epsilon_high=None, delta=None, sync_ref_model=False,
    importance_sampling_level="token", off_policy_mask_threshold=None, top_entropy_quantile=1.0,
    entropy_coef=0.0, use_adaptive_entropy=False, mask_truncated_completions=False,
    scale_rewards="group", multi_objective_aggregation="sum_then_normalize",
    vllm_importance_sampling_correction=False,                             # with use_vllm only
    use_liger_kernel=False, neftune_noise_alpha=None, label_smoothing_factor=0.0)
HARMLESS = set("""
    model_init_kwargs trust_remote_code disable_dropout cast_lm_head_to_fp32 num_generations
    num_generations_eval max_completion_length ds3_gather_for_generation shuffle_dataset
    pad_to_multiple_of generation_batch_size steps_per_generation chat_template_kwargs
    cache_implementation num_iterations reward_weights max_tool_calling_iterations
    use_vllm vllm_mode vllm_model_impl vllm_enable_sleep_mode vllm_server_base_url vllm_server_host
    vllm_server_port vllm_server_timeout vllm_group_port vllm_gpu_memory_utilization
    vllm_max_model_length vllm_tensor_parallel_size use_transformers_continuous_batching
    transformers_continuous_batching_config use_transformers_paged
    log_completions log_multimodal num_completions_to_print log_unique_prompts
    log_completions_hub_repo
    router_aux_loss_coef""".split())                     # see refuse_model
HARMLESS |= set("""
    sapo_temperature_neg sapo_temperature_pos vespo_k_pos vespo_lambda_pos vespo_k_neg
    vespo_lambda_neg ref_model_mixup_alpha ref_model_sync_steps use_bias_correction_kl
    entropy_coef_min entropy_coef_max entropy_coef_delta entropy_target
    vllm_importance_sampling_mode vllm_importance_sampling_clip_max
    vllm_importance_sampling_clip_min vllm_importance_sampling_cap
    """.split())                                                # read only with what is refused
UNKNOWN = ({f.name for f in fields(GRPOConfig)} - {f.name for f in fields(TrainingArguments)}
           - HARMLESS - set(NEEDED))                            # a newer TRL's: as it comes, or not


def refuse(args):
    """ValueError for a setting under which the loss, the sampling or the rows were not TPO's."""
    for rows, K in (("per_device_train_batch_size", args.num_generations),
                    ("per_device_eval_batch_size", args.num_generations_eval
                     or args.num_generations)):
        evaluates = args.eval_strategy != "no" or "train" in rows
        if evaluates and getattr(args, rows) % K:
            raise ValueError(f"{rows} {getattr(args, rows)} splits groups: it must be a multiple "
                             f"of num_generations {K}")
    if args.fp16 and not args.max_grad_norm:
        raise ValueError("fp16 without max_grad_norm: GradScaler fails on a step without gradient")
    for name, needed in (NEEDED | {n: getattr(GRPOConfig, n, None) for n in UNKNOWN}).items():
        value = getattr(args, name)
        if value != needed and (args.use_vllm or not name.startswith("vllm")):
            raise ValueError(f"{name} {value!r} changes GRPO's loss, its sampling or its rows in "
                             f"a way that TPO does not have: leave it at {needed!r}")


def refuse_model(trainer):
    """ValueError for what the model itself brings along."""
    if getattr(trainer, "rollout_func", None):
        raise ValueError("rollout_func samples as it likes: TPO needs temperature 1 without top-k "
                         "or top-p, so leave it out")
    if getattr(trainer.model.config, "attention_dropout", 0):
        raise ValueError("attention_dropout changes log-probs by nats: set it to 0.0 in the config")
    if getattr(trainer, "aux_loss_enabled", False):
        raise ValueError("router_aux_loss_coef adds a loss that TPO does not have: set it to 0.0")
    if not hasattr(trainer, "eos_token_ids"):
        raise ValueError("before 1.14.2 TRL ends a row only at the tokenizer's eos_token_id, where "
                         "generation may stop at several: pip install trl==1.16.0")
    if trainer.use_vllm:
        return
    model = trainer.accelerator.unwrap_model(trainer.model)
    config, _ = model._prepare_generation_config(trainer.generation_config)
    for changed in model._get_logits_processor(config, input_ids_seq_length=1):
        raise ValueError(f"the model's generation_config changes the sampling "
                         f"({type(changed).__name__}): unset that field of it")


class SkipStepsWithoutGradient(TrainerCallback):
    """An optimizer leaves alone, moments and weight decay included, what has no gradient at all."""

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        if not any(p.grad.any() for p in model.parameters() if p.grad is not None):
            model.zero_grad(set_to_none=True)


class TargetPOTrainer(GRPOTrainer):
    """tpo_loss: mean over the prompts of a micro-batch, then over micro-batches and processes."""

    def __init__(self, *args, eta=1.0, anchor=0.0, **kwargs):
        if not (eta > 0 and 0 <= anchor <= 1):
            raise ValueError(f"eta {eta}, anchor {anchor}: allowed are eta above 0, anchor 0 to 1")
        super().__init__(*args, **kwargs)
        refuse(self.args)
        refuse_model(self)
        grpo_trainer.disable_dropout_in_model(self.model)
        self.eta, self.anchor = eta, anchor
        self.add_callback(SkipStepsWithoutGradient())

    def _calculate_rewards(self, *args):
        rewards = super()._calculate_rewards(*args)          # (rows of all processes, functions)
        total = (rewards * self.reward_weights.to(rewards.device)).nansum(1)
        if total.isinf().any():
            raise ValueError("a reward is infinite: allowed are finite numbers and None")
        self.scores = total.masked_fill(rewards.isnan().all(1), torch.nan)
        return rewards

    def _generate_and_score_completions(self, inputs):
        batch = super()._generate_and_score_completions(inputs)
        rows = len(batch["advantages"])
        batch["scores"] = self.scores.split(rows)[self.accelerator.process_index]
        return batch

    def _prepare_inputs(self, generation_batch):
        with patch.object(grpo_trainer, "shuffle_sequence_dict", lambda rows: rows):
            return super()._prepare_inputs(generation_batch)

    def training_step(self, *args):
        self.ours = False
        loss = super().training_step(*args)
        if not self.ours:
            raise RuntimeError("something replaced GRPOTrainer.compute_loss or _compute_loss, as "
                               "Unsloth does: the loss is not TPO's, and no step was taken with it")
        return loss

    def _compute_loss(self, model, inputs):
        self.ours = True
        training, steps = self.model.training, self.current_gradient_accumulation_steps
        K = self.num_generations if training else self.num_generations_eval
        logp = self.token_logp(model, inputs)                                      # (rows, T)
        if self.args.gradient_accumulation_steps % self.args.steps_per_generation == 0:
            # no step within a rollout's first pass: that pass is p_old, to the last bit in bf16 too
            old = inputs.setdefault("first_logp", logp.detach())
        else:
            old = inputs["old_per_token_logps"]                 # TRL's, before any step
        written = inputs["completion_mask"] * inputs.get("tool_mask", 1) > 0       # (rows, T)
        l, l_old = (x.float().masked_fill(~written, 0).sum(-1).view(-1, K) for x in (logp, old))
        scores = inputs["scores"].view(-1, K)                                      # (B, K)
        group = l_old, scores, self.eta, self.anchor, ~scores.isnan()
        loss = (tpo_weights(l, *group) * l).sum()
        with torch.no_grad():                                   # the value: tpo_loss over its floor
            matched = l_old + standardize(scores, group[-1]) / self.eta
            kl = tpo_loss(l, *group) - tpo_loss(matched, *group)
        return (loss - loss.detach() + kl) / (steps if training else 1)

    def token_logp(self, model, inputs):
        """Log-probs (rows, T) of the completions, after their prompts (rows, P)."""
        ids, mask = (torch.cat((inputs["prompt_" + x], inputs["completion_" + x]), 1)
                     for x in ("ids", "mask"))                                     # (rows, P + T)
        logps = self._get_per_token_logps_and_entropies
        images = {k: v for k, v in inputs.items() if k in inspect.signature(logps).parameters}
        return logps(model, ids, mask, inputs["completion_ids"].size(1), **images)[0]
