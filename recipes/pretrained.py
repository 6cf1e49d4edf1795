"""llm_rlvr.py's Trainer on a pretrained Llama, Qwen2 or Qwen3 in a Hugging Face folder.

    pip install "transformers>=4.56,<6"
    python recipes/pretrained.py DIR --task gsm8k --data FOLDER     train.jsonl and test.jsonl
    python recipes/pretrained.py DIR --task jsonl --data FILE.jsonl      your own lines
    python recipes/pretrained.py DIR --task rg:chain_sum                 pip install reasoning-gym

hf_folder.py reads and writes the folder by transformers, text_tasks.py has the tasks, and
final_number (answers.py) is GSM8K's reward for any trainer. The weights go into llm_rlvr.GPT under
the same names, so that its sampler and its shared-prompt forward are used. A prompt is one user
message in the model's chat template, or the bare text if it has none; what reads like a control
token in it is text, and one that the model's context does not hold is left out. A completion ends
at any of the model's end tokens. One device: for more, see trl_tpo.py, verl_tpo.py, tinker_tpo.py.
"""
import os
import sys
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import nn

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]
import llm_rlvr
from hf_folder import Vocabulary, as_gpt, export, read_folder
from llm_rlvr import fail, flag
from text_tasks import final_number, leave_out_long, make_task


# --------------------------------------------------------------------------------------- settings
def again(name, default):
    """A flag of llm_rlvr.py with another default."""
    return flag(default, **llm_rlvr.Config.__dataclass_fields__[name].metadata)


@dataclass(frozen=True)
class Config(llm_rlvr.Config):
    init_from: str = flag("", "the model's folder: what stands before all flags")
    task: str = flag("gsm8k", "gsm8k, jsonl (your own lines), rg:NAME (a dataset of Reasoning "
                              "Gym), or one of llm_rlvr.py's")
    data: str = flag("", "folder of train.jsonl and test.jsonl (gsm8k), or the .jsonl file (jsonl)")
    shots: int = flag(0, "solved gsm8k examples before each, for models without a chat template")
    lora_rank: int = flag(0, "train low-rank branches of this rank instead of the weights, which "
                             "on CUDA are kept in bf16; 0 trains the weights")
    export: str = flag("", "folder for the trained model and its tokenizer")
    steps: int = again("steps", 100)
    prompts: int = again("prompts", 16)             # and lr: the paper's, without its KL penalty
    epochs: int = again("epochs", 1)
    lr: float = flag(1e-5, "AdamW learning rate: rises over 30 updates, then falls to 0; LoRA's "
                           "weights want about 10 times as much", 1e-12, 1)
    anchor: float = again("anchor", 0.0)                # results/long/README.md says why
    eval_every: int = again("eval_every", 10)
    eval_puzzles: int = again("eval_puzzles", 64)
    max_new_tokens: int = again("max_new_tokens", 256)
    micro_tokens: int = again("micro_tokens", 2048)
    warm_steps: int = 0                                 # from here on no flags
    layers: int = 2
    width: int = 128
    heads: int = 4
    kv_heads: int = 2


# ------------------------------------------------------------------------------------------- LoRA
def add_lora(model, rank, dtype):
    """y = W x + 2 B A x (Hu et al., arXiv 2106.09685, alpha = 2 rank) in the matrices of blocks.

    Only A and B, which is 0 at first, are trained. W is kept in dtype: on CUDA autocast would
    round it again for every token.
    """
    model.requires_grad_(False)
    for name, module in model.named_modules():
        if isinstance(module, (nn.Linear, nn.Embedding)):
            module.to(dtype)
        if name.endswith("_proj"):
            width_out, width_in = module.weight.shape
            module.A = nn.Parameter(torch.randn(rank, width_in) * width_in ** -0.5)
            module.B = nn.Parameter(torch.zeros(width_out, rank))
            module.register_forward_hook(add_branch)


def add_branch(module, inputs, y):
    return y + 2 * F.linear(F.linear(inputs[0], module.A), module.B)


@torch.no_grad()
def merged(model):
    """The weights by their names in transformers, fp32, with their branches added."""
    weights = {name: x.cpu().float() for name, x in model.state_dict().items()}
    for name in [name for name in weights if name.endswith(".A")]:
        A, B = weights.pop(name), weights.pop(name[:-1] + "B")
        weights[name[:-1] + "weight"] = weights[name[:-1] + "weight"] + 2 * B @ A
    return weights


# ---------------------------------------------------------------------------------------- trainer
class Pretrained(llm_rlvr.Trainer):
    """RL with verifiable rewards on a pretrained model: recipes/pretrained.py DIR, then flags."""
    Config, tuned = Config, {}

    @staticmethod
    def find_task(c):
        if c.lora_rank < 0:
            fail(f"--lora-rank {c.lora_rank}: allowed are 0 or more")
        if c.export and "," in c.algo:
            fail(f"--export {c.export}: allowed with one algorithm, not with a list")
        if c.export:                            # made at the end, refused now
            path = Path(c.export)
            place = next(p for p in (path, *path.parents) if os.path.lexists(p))
            if not (place.is_dir() and os.access(place, os.W_OK)):
                fail(f"--export {c.export}: {place} is no folder that can be written to")
        return make_task(c.task, c.data, c.shots)

    def build(self):
        library, tokenizer = read_folder(self.c.init_from)
        model = as_gpt(library)
        if self.c.lora_rank:
            cuda = self.device.type == "cuda"
            add_lora(model, self.c.lora_rank, torch.bfloat16 if cuda else torch.float32)
        vocabulary = Vocabulary(library, tokenizer)
        room = library.config.max_position_embeddings - self.c.max_new_tokens
        leave_out_long(self.task, vocabulary.encode, room)
        return vocabulary, model

    def make_optimizers(self):
        return [(torch.optim.AdamW(self.trained, **llm_rlvr.ADAMW), 1.0)]

    def evaluate(self):
        result, scorer = super().evaluate(), getattr(self.task, "scorer", None)
        if scorer and (line := scorer.told()):
            print(line)
        return result

    def run(self):
        result = super().run()
        if self.c.export:
            library, tokenizer = read_folder(self.c.init_from)
            library.load_state_dict(merged(self.model))
            export(library, tokenizer, Path(self.c.export))
        return result


def main(argv=None, trainer=Pretrained):
    argv = sys.argv[1:] if argv is None else argv
    if argv and not argv[0].startswith("-"):
        argv = ["--init-from", *argv]
    llm_rlvr.main(argv, trainer)


if __name__ == "__main__":
    main()
